"""A second lab of one host: beside the first, refused to strangers, and gone without a trace even after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import cluster
from tests.lab.ansible import LAB_ID, ROOT, Run, playbook, succeed

SECOND = str((int(LAB_ID) + 1) % 10)
HOST = "vasp-01"
FOLDER = Path("/var/lib/gleaner-lab") / SECOND
ONE_HOST = json.dumps({"lab_host_machines": [{"name": HOST, "octet": 11, "fake_gpus": [], "binds": []}]})


def up(cwd: Path = ROOT) -> Run:
    return playbook("playbooks/lab_up.yml", "--limit", f"localhost,{HOST}", "-e", ONE_HOST, lab=SECOND, cwd=cwd)


def down() -> None:
    succeed("playbooks/lab_down.yml", lab=SECOND)


def answers() -> bool:
    ssh = ["ssh", "-F", str(ROOT / f".lab/ssh_config-{SECOND}"), "-o", "ConnectTimeout=5", HOST, "hostname"]
    return subprocess.run(ssh, capture_output=True, text=True, check=False).stdout.strip() == HOST


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
def _second_lab() -> Iterator[None]:
    assert remains() == [], f"lab {SECOND} is in use: the tests need it for themselves"
    yield
    down()


def test_two_labs_run_side_by_side() -> None:
    run = up()
    assert run.code == 0, run.output
    assert answers()
    assert cluster.ask("/health").status == 200
    # Each lab is a network of its own.
    code = f"import socket; socket.create_connection(('10.213.{SECOND}.11', 22), 3)"
    assert cluster.host(HOST).run(f'python3 -c "{code}"').rc != 0


def test_a_lab_of_another_checkout_is_refused_with_the_cure(tmp_path: Path) -> None:
    stranger = tmp_path / "checkout"
    stranger.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".lab", "ansible.cfg"):
            (stranger / entry.name).symlink_to(entry)
    shutil.copy(ROOT / "ansible.cfg", stranger)
    before = lab_pids()

    refused = up(cwd=stranger)
    assert refused.failed == {"localhost"}, refused.output
    assert f"Lab {SECOND} runs for the checkout {ROOT}, not for {stranger}" in refused.text
    assert f"make -C {ROOT} down" in refused.text
    assert set(before) <= set(lab_pids())
    assert answers()


def test_a_lab_that_was_killed_comes_up_again() -> None:
    killed = lab_pids()
    assert killed
    for pid in killed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    cluster.wait_until("all are dead", lambda: not set(killed) & set(lab_pids()), 10)
    assert not answers()

    run = up()
    assert run.code == 0, run.output
    assert answers()
    assert cluster.ask("/health").status == 200


def test_a_lab_that_is_taken_down_leaves_nothing() -> None:
    down()
    assert remains() == []
    assert cluster.ask("/health").status == 200
