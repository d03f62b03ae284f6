"""The oldest and the newest supported release of ansible-core make the same site.

The newest wants a newer Python than the machine that holds the lab may have: it runs on a host of the lab.
Wants a lab of bare hosts.
"""

from __future__ import annotations

import importlib.metadata
import io
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.lab import cluster
from tests.lab.ansible import LAB_ID, ROOT, Run, succeed
from tests.lab.cluster import CONTROLLER, SMOLLM2, SPLIT_PORT, THINKING, run

HERE = Path(__file__).parent
NEWEST = re.findall(r"^ansible-core==(\S+)$", (HERE / "requirements.txt").read_text(), re.MULTILINE)[0]
OLDEST = re.findall(r"^ansible-core==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[0]
CHECKOUT, PACKAGES = "/root/gleaner", "/root/ansible-core"
# Files of the checkout that are not in git: the lab's secrets, and the way to its hosts.
SECRETS = ["inventories/lab/group_vars/all/vault.yml", ".lab/id_ed25519", f".lab/known_hosts-{LAB_ID}"]
RUN_SECONDS = 1500


def bring(archive: bytes, folder: str) -> None:
    """Unpack a tar archive on the controller."""
    command = f"mkdir -p {folder} && tar --extract --directory {folder}"
    subprocess.run(["ssh", "-F", cluster.SSH_CONFIG, CONTROLLER, command], input=archive, check=True)


def checkout() -> bytes:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in [*listed.split("\0")[:-1], *SECRETS]:
            archive.add(ROOT / name, name)
    return stream.getvalue()


def packages(folder: Path, python: str) -> bytes:
    """ansible-core and what it needs, for that Python, as folders to import from: a wheel is a zip archive of them."""
    platforms = [f"--platform=manylinux{name}_x86_64" for name in ("2014", "_2_17", "_2_28", "_2_34")]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", f"--dest={folder}", "--only-binary=:all:",
         f"--python-version={python}", *platforms, "--requirement", str(HERE / "requirements.txt")],
        check=True,
    )  # fmt: skip
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(path) as wheel:
                for entry in wheel.infolist():
                    member = tarfile.TarInfo(entry.filename)
                    member.size, member.mode = entry.file_size, 0o644
                    archive.addfile(member, io.BytesIO(wheel.read(entry)))
    return stream.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _control_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    python = run(CONTROLLER, "python3 -c 'import sys; print(\"%d.%d\" % sys.version_info[:2])'")
    bring(packages(tmp_path_factory.mktemp("wheels"), python), PACKAGES)
    bring(checkout(), CHECKOUT)


def ansible(*arguments: str) -> Run:
    """A command of the newest ansible-core, on the controller."""
    command = shlex.join(["python3", "-m", "ansible", *arguments])
    environment = f"PYTHONPATH={PACKAGES} GLEANER_LAB_ID={LAB_ID} ANSIBLE_NOCOLOR=1 LC_ALL=C.UTF-8"
    done = subprocess.run(
        ["ssh", "-F", cluster.SSH_CONFIG, CONTROLLER, f"cd {CHECKOUT} && {environment} {command}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
        timeout=RUN_SECONDS, check=False,
    )  # fmt: skip
    return Run(done.returncode, done.stdout)


def newest(*arguments: str) -> Run:
    done = ansible("playbook", *arguments)
    assert done.code == 0, done.output
    return done


def assert_served() -> None:
    for model, port in ((SMOLLM2, cluster.PORT), (THINKING, SPLIT_PORT)):
        cluster.wait_until(
            f"{port} answers", lambda m=model, p=port: cluster.complete(m, port=p).status == 200  # type: ignore[misc]
        )  # fmt: skip


def test_the_newest_makes_a_site_of_bare_hosts() -> None:
    assert f"[core {NEWEST}]" in ansible("playbook", "--version").output
    done = newest("site.yml")
    assert "[DEPRECATION WARNING]" not in done.output, done.output
    assert_served()
    again = newest("site.yml")
    assert set(again.changed.values()) == {0}, again.output


def test_the_oldest_finds_nothing_to_do_there() -> None:
    assert importlib.metadata.version("ansible-core") == OLDEST
    done = succeed("site.yml")
    assert set(done.changed.values()) == {0}, done.output


def test_what_the_oldest_changes_the_newest_finds_done() -> None:
    changes = ("-e", '{"slurm_controller_default_memory_per_cpu_mib": 1024, "gateway_max_body_mib": 32}')
    changed = succeed("site.yml", *changes)
    assert set(changed.changed.values()) != {0}
    again = newest("site.yml", *changes)
    assert set(again.changed.values()) == {0}, again.output
    newest("site.yml")
    dry = succeed("site.yml", "--check", "--diff")
    assert set(dry.changed.values()) == {0}, dry.output
    assert_served()
