"""`make up` ends with a completion, too, after everything was killed: in the middle of it, and while it served.

Has a lab of its own, id 8 unless GLEANER_LAB_ID names one, which it takes down before and after.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import processes

ROOT = Path(__file__).resolve().parents[2]
LAB = os.environ.get("GLEANER_LAB_ID") or "8"
# A make that runs these tests is not to pass its own settings on.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))} | {
    "GLEANER_LAB_ID": LAB
}
COLD_SECONDS = 20 * 60
KILLED_SECONDS = 10


def make(target: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(
            ["make", target], cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )


def completion(log: Path) -> str:
    """Run `make up` to its end; gives the model's answer."""
    code = make("up", log).wait(COLD_SECONDS)
    said = log.read_text()
    assert code == 0, said
    answer = said.partition(" was asked: ")[2].partition("\n")[2].partition("\n\n")[0]
    assert answer.strip(), said
    return answer


def kill_everything(*more: int) -> None:
    """Kill the lab's processes by their recorded ids, and other processes, each with all that it started."""
    doomed = processes.with_descendants(processes.recorded(LAB) | set(more))
    assert doomed
    processes.kill(doomed)
    deadline = time.monotonic() + KILLED_SECONDS
    while alive := processes.with_descendants(doomed):
        assert time.monotonic() < deadline, f"processes {alive} do not end"
        time.sleep(0.1)


def installing_hosts() -> set[int]:
    """Processes of the lab's hosts that unpack or configure packages."""
    return {
        pid
        for pid in processes.with_descendants(processes.recorded(LAB))
        if {"--unpack", "--configure"} & set(processes.command(pid))
    }


def down() -> None:
    done = subprocess.run(
        ["make", "down"], cwd=ROOT, env=ENVIRONMENT, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def _lab() -> Iterator[None]:
    """No lab of an earlier run, and none left."""
    down()
    yield
    down()


def test_a_lab_that_was_killed_while_packages_are_installed(tmp_path: Path) -> None:
    up = make("up", tmp_path / "killed.log")
    deadline = time.monotonic() + COLD_SECONDS
    while not installing_hosts():
        assert up.poll() is None, (tmp_path / "killed.log").read_text()
        assert time.monotonic() < deadline, "no host installs packages"
        time.sleep(0.2)
    # In the thick of it: three nodes and a controller have about a hundred packages to unpack.
    time.sleep(2)
    kill_everything(up.pid)
    up.wait(KILLED_SECONDS)
    said = (tmp_path / "killed.log").read_text()
    assert "PLAY [Hosts share a file system and a clock]" in said
    assert "PLAY RECAP" not in said.partition("PLAY [Hosts share")[2]

    assert completion(tmp_path / "again.log")


def test_a_lab_that_was_killed_while_it_serves(tmp_path: Path) -> None:
    kill_everything()
    assert completion(tmp_path / "again.log")
