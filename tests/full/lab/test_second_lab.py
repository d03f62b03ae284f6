"""A second lab of one host: beside the first, refused to strangers, and gone without a trace even after a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import cluster
from tests.lab.ansible import CACHE, LAB_ID, ROOT, Run, playbook, succeed

SECOND = str((int(LAB_ID) + 1) % 10)
HOST = "vasp-01"
FOLDER = Path("/var/lib/gleaner-lab") / SECOND
PROXY = f"10.213.{SECOND}.1:3143"


def up(cwd: Path = ROOT, cache: Path = CACHE, **more_hosts: int) -> Run:
    """Boot the second lab for a checkout, with HOST and with hosts that the inventory does not have: name, octet."""
    machines = [
        {"name": name, "octet": octet, "fake_gpus": [], "binds": []} for name, octet in {HOST: 11, **more_hosts}.items()
    ]
    hosts = json.dumps({"lab_host_machines": machines})
    return playbook(
        "playbooks/lab_up.yml",
        *("--limit", f"localhost,{HOST}", "-e", hosts),
        lab=SECOND,
        cwd=cwd,
        GLEANER_CACHE=str(cache),
    )


def down() -> None:
    succeed("playbooks/lab_down.yml", lab=SECOND)


def ask(command: str, cwd: Path = ROOT) -> str:
    """What a command prints on HOST, for the one who has the checkout's key; nothing when it cannot be asked."""
    ssh = ["ssh", "-F", str(cwd / f".lab/ssh_config-{SECOND}"), "-o", "ConnectTimeout=5", HOST, command]
    return subprocess.run(ssh, capture_output=True, text=True, check=False).stdout.strip()


def answers(cwd: Path = ROOT) -> bool:
    return ask("hostname", cwd) == HOST


def proxies() -> set[str]:
    """Addresses of this machine at which a package proxy of a lab listens."""
    sockets = subprocess.run(["ss", "-Hltn", "sport = :3143"], capture_output=True, text=True, check=True).stdout
    return {line.split()[3] for line in sockets.splitlines()}


def kill_all() -> None:
    killed = lab_pids()
    assert killed
    for pid in killed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    cluster.wait_until("all are dead", lambda: not set(killed) & set(lab_pids()), 10)
    assert not answers()


def lab_pids() -> list[int]:
    """Processes whose cgroup or command line belongs to the second lab."""
    marks = (f"gleaner-lab-gl{SECOND}-", f"gleaner-lab-packages-{SECOND}", f"{FOLDER}/", f"gl{SECOND}-{HOST}")
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "cmdline").read_text() + (entry / "cgroup").read_text()
        except OSError:
            continue
        if any(mark in text for mark in marks):
            found.append(int(entry.name))
    return found


def remains() -> list[str]:
    """Whatever of the second lab this machine still has, in words."""
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    found = [f"interface {line.split()[0]}" for line in links.splitlines() if line.startswith(f"gl{SECOND}")]
    found += [f"network namespace {path.name}" for path in Path("/run/netns").glob(f"gl{SECOND}-*")]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found += [f"mount {line}" for line in mounts if f"{FOLDER}/" in line or f"gl{SECOND}-" in line]
    found += [f"process {pid}" for pid in lab_pids()]
    found += [f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(f"**/gleaner-lab-gl{SECOND}-*")]
    found += [f"nspawn {path}" for path in Path("/run/systemd/nspawn").glob(f"*/gl{SECOND}-*")]
    found += [str(path) for path in (FOLDER, *(ROOT / ".lab").glob(f"*-{SECOND}")) if path.exists()]
    return found


@pytest.fixture(scope="module", autouse=True)
def _second_lab(stranger: Path) -> Iterator[None]:
    assert remains() == [], f"lab {SECOND} is in use: the tests need it for themselves"
    yield
    # A test that failed may have left it to the other checkout.
    playbook("playbooks/lab_down.yml", lab=SECOND, cwd=stranger)
    down()


def distclean(checkout: Path, lab: str, cache: Path) -> Run:
    done = subprocess.run(
        ["make", "distclean", f"GLEANER_LAB_ID={lab}", f"GLEANER_CACHE={cache}"],
        cwd=checkout,
        env={
            name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "MAKE", "MOLECULE_"))
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return Run(done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that may go: it has the base image of the first lab's, but not as its own."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "base").symlink_to(CACHE / "base")
    (folder / "sources").mkdir()
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another checkout, with a login key and secrets of its own."""
    checkout = tmp_path_factory.mktemp("stranger") / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "__pycache__", "vault.yml"))
    (checkout / ".venv").symlink_to(sys.prefix)
    return checkout


def test_two_labs_run_side_by_side() -> None:
    run = up()
    assert run.code == 0, run.output
    assert answers()
    assert cluster.ask("/health").status == 200
    # Each lab is a network of its own.
    code = f"import socket; socket.create_connection(('10.213.{SECOND}.11', 22), 3)"
    assert cluster.host(HOST).run(f'python3 -c "{code}"').rc != 0


def test_the_package_proxy_listens_on_the_labs_bridge_only() -> None:
    assert PROXY in proxies()
    assert not [address for address in proxies() if not re.fullmatch(r"10\.213\.\d\.1:3143", address)]
    assert ask("apt-get update >/dev/null && apt-cache policy hello | grep -c Candidate") == "1"


def test_a_lab_of_another_checkout_is_refused_with_the_cure(stranger: Path) -> None:
    before = lab_pids()
    refused = up(cwd=stranger)
    assert refused.failed == {"localhost"}, refused.output
    assert f"Lab {SECOND} runs for the checkout {ROOT}, not for {stranger}" in refused.text
    assert f"make -C {ROOT} down GLEANER_LAB_ID={SECOND}" in refused.text
    assert set(before) <= set(lab_pids())
    assert answers()


def test_a_lab_that_was_killed_comes_up_again() -> None:
    assert ask("echo kept >/root/kept; sync /root/kept; cat /root/kept") == "kept"
    kill_all()
    run = up()
    assert run.code == 0, run.output
    assert ask("cat /root/kept") == "kept"
    assert cluster.ask("/health").status == 200


def test_a_dead_lab_of_another_checkout_is_removed_before_it_is_taken_over(stranger: Path) -> None:
    kill_all()
    run = up(cwd=stranger, elsewhere=20)
    assert run.code == 0, run.output
    assert f"Lab {SECOND} is made anew, its hosts' disks included: it belonged to the checkout {ROOT}." in run.text
    assert ask("cat /root/kept; echo asked", cwd=stranger) == "asked"

    # And back again, where the inventory has fewer hosts.
    kill_all()
    run = up()
    assert run.code == 0, run.output
    assert f"it belonged to the checkout {stranger}." in run.text
    assert answers()
    assert not (FOLDER / "hosts/elsewhere").exists()
    down()
    assert remains() == []


def test_a_lab_whose_login_key_was_cleaned_away_is_made_anew(stranger: Path, cache: Path) -> None:
    assert up(cwd=stranger, cache=cache).code == 0
    # What git ignores, `git clean -fdx` removes.
    shutil.rmtree(stranger / ".lab")
    run = up(cwd=stranger, cache=cache)
    assert run.code == 0, run.output
    assert "the login key that its hosts admit is gone or was made anew." in run.text
    assert answers(stranger)
    again = up(cwd=stranger, cache=cache)
    assert again.changed == {"localhost": 0, HOST: 0}, again.output


def test_caches_are_not_taken_from_under_another_lab(stranger: Path, cache: Path) -> None:
    refused = distclean(stranger, LAB_ID, cache)
    assert refused.code != 0
    assert f"GLEANER_CACHE={cache} and the keys in {stranger} are in use by lab {SECOND} of {stranger}" in refused.text
    assert f"(make -C {stranger} down GLEANER_LAB_ID={SECOND})" in refused.text
    assert answers(stranger)

    # Its own lab goes with the cache; the first lab, which lives on another one, is in nobody's way.
    cleaned = distclean(stranger, SECOND, cache)
    assert cleaned.code == 0, cleaned.output
    assert not cache.exists()
    assert not [name for name in (".venv", ".lab") if (stranger / name).exists()]
    assert cluster.ask("/health").status == 200


def test_a_lab_that_is_taken_down_leaves_nothing() -> None:
    assert up().code == 0
    down()
    assert remains() == []
    assert PROXY not in proxies()
    assert cluster.ask("/health").status == 200
