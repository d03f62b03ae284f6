"""Playbooks as an administrator runs them, for tests on the lab."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAB_ID = os.environ.get("GLEANER_LAB_ID") or "0"
CACHE = Path(os.environ.get("GLEANER_CACHE") or "/var/cache/gleaner")
SUMMARY = re.compile(r"^(\S+) +: ok=\d+ +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """A finished playbook: exit code and all that it said."""

    code: int
    output: str

    @property
    def changed(self) -> dict[str, int]:
        """Changed tasks of each host."""
        return {host: int(changed) for host, changed, _, _ in SUMMARY.findall(self.output)}

    @property
    def failed(self) -> set[str]:
        """Hosts that failed, or could not be reached."""
        return {host for host, _, *bad in SUMMARY.findall(self.output) if bad != ["0", "0"]}

    @property
    def text(self) -> str:
        """The output with its folded lines made one, for finding sentences in it."""
        return re.sub(r"\s+", " ", self.output)


def surroundings(cwd: Path = ROOT) -> dict[str, str]:
    """The environment of a playbook: the checkout's own configuration, and none of whatever runs the tests."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "MOLECULE_"))},
        "ANSIBLE_CONFIG": str(cwd / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "LC_ALL": "C.UTF-8",
    }


def command(name: str, *arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "inventories/lab", name, *arguments]


@contextmanager
def started(name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A playbook that runs meanwhile; killed with the block, if it still does."""
    with subprocess.Popen(
        command(name, *arguments),
        cwd=ROOT,
        env={**surroundings(), "GLEANER_LAB_ID": LAB_ID},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as play:
        try:
            yield play
        finally:
            play.kill()


def playbook(
    name: str, *arguments: str, lab: str = LAB_ID, cwd: Path = ROOT, timeout: int = 600, **environment: str
) -> Run:
    """Run a playbook of the project; the exit code is the caller's to judge."""
    done = subprocess.run(
        command(name, *arguments),
        cwd=cwd,
        env={**surroundings(cwd), "GLEANER_LAB_ID": lab, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Run(done.returncode, done.stdout)


def succeed(name: str, *arguments: str, **options: str | Path) -> Run:
    """Run a playbook that has to succeed."""
    run = playbook(name, *arguments, **options)  # type: ignore[arg-type]
    assert run.code == 0, run.output
    return run
