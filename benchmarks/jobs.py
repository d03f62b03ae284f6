"""A benchmark's own Slurm jobs, as accounting tells of them; asked and ended on the controller."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks import lab

LIVING = ("UNKNOWN", "PENDING", "RUNNING", "COMPLETING")
END_SECONDS = 60


def state(controller: Sequence[str], job: int) -> str:
    """Slurm's word for the job, or UNKNOWN while accounting has not heard of it."""
    command = ("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State")
    words = lab.output([*controller], *command).split()
    return words[0] if words else "UNKNOWN"


def wait_for_end(controller: Sequence[str], job: int, seconds: float = END_SECONDS) -> str:
    """Slurm's word for a job that has ended, or after a while the one that it has now."""
    deadline = time.monotonic() + seconds
    while (word := state(controller, job)) in LIVING and time.monotonic() < deadline:
        time.sleep(1)
    return word


def end(controller: Sequence[str], job: int) -> None:
    """Cancel a job, if it is not over already, and wait until it is."""
    if state(controller, job) not in LIVING:
        return
    lab.output([*controller], "scancel", str(job))
    wait_for_end(controller, job)
