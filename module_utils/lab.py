"""What the lab's modules share: processes that outlive Ansible, recorded by id and start time.

A process id alone may name a stranger after a restart of the machine, so the start time is kept beside it.
Nothing here is ever found or ended by its name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_SYSTEMD_RUNS = Path("/run/systemd/system")


class LabError(Exception):
    """Something of the lab could not be made or ended; the text is for the person who runs the playbook."""


def run(*argv: str, check: bool = True) -> str:
    """Run a short command and give its output; a failure names the command and its last words."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    if check and done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip() or done.returncode}")
    return done.stdout


def started_at(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc(5), field 22 of stat); None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


class Lab:
    """A lab on this machine, known by its folder: whether it lives, whose it is and what its hosts were made of."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._record = directory / "owner.json"

    def owner(self) -> dict[str, str]:
        """What the lab was claimed with; empty when nothing says so."""
        try:
            owner = json.loads(self._record.read_text())
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def hosts(self) -> list[str]:
        """Names of its hosts, whatever inventory they are of."""
        return sorted(folder.name for folder in self.directory.glob("hosts/*"))

    def alive(self) -> bool:
        """Whether a process of the lab runs."""
        records = [*self.directory.glob("hosts/*/process.json"), *self.directory.glob("packages-*.json")]
        return any(Process(record, "").pid() is not None for record in records)

    def claim(self, owner: dict[str, str]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self._record.with_suffix(".tmp")
        temporary.write_text(json.dumps(owner))
        temporary.rename(self._record)


class Process:
    """One long-lived process of the lab, known by a file that holds its id and start time."""

    def __init__(self, record: Path, unit: str) -> None:
        self.record = record
        self.unit = unit

    def pid(self) -> int | None:
        """The id of the running process, None when it does not run."""
        try:
            known = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return None
        alive = started_at(known["pid"]) == known["started_at"]
        return int(known["pid"]) if alive else None

    def start(self, argv: list[str], log: Path) -> None:
        """Start argv detached from Ansible, below systemd where that is PID 1, else as a session of its own."""
        if _SYSTEMD_RUNS.is_dir():
            run("systemctl", "reset-failed", self.unit, check=False)
            run(
                "systemd-run",
                "--collect",
                f"--unit={self.unit}",
                # The machine inside manages the cgroups below this unit.
                "--property=Delegate=yes",
                "--property=KillMode=mixed",
                "--property=TasksMax=infinity",
                f"--property=StandardOutput=append:{log}",
                f"--property=StandardError=append:{log}",
                *argv,
            )
            pid = int(run("systemctl", "show", "--property=MainPID", "--value", self.unit))
        else:
            with log.open("ab") as sink:
                pid = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True, cwd="/"
                ).pid
        started = started_at(pid)
        if started is None:
            raise LabError(f"{self.unit} ended at once; its last words are in {log}")
        temporary = self.record.with_suffix(".tmp")
        temporary.write_text(json.dumps({"pid": pid, "started_at": started}))
        temporary.rename(self.record)

    def stop(self, patience_seconds: float) -> None:
        """End the process: TERM, then KILL when the patience is used up."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            if not wait_until(lambda: self.pid() is None, patience_seconds):
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: self.pid() is None, 5)
        self.record.unlink(missing_ok=True)


def wait_until(condition: Callable[[], bool], patience_seconds: float) -> bool:
    """Poll a condition until it holds or the patience is used up."""
    deadline = time.monotonic() + patience_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
