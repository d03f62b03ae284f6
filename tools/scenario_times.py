#!/usr/bin/env python3
"""Run molecule, and print at the end how long each scenario took, beside its budget in molecule/README.md.

A machine is sometimes slow, so a scenario that took too long is said loudly and fails nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

BUDGETS = Path(__file__).resolve().parents[1] / "molecule" / "README.md"
ROW = re.compile(r"^\| `([\w-]+)` \|.*\| (\d+) \|$", re.MULTILINE)
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
# [gateway > verify] Executing … [gateway > verify] Executed: Successful
STEP = re.compile(rb"\[(\w+) > \w+\] (Executing|Executed: \w+)$")


def budgets(text: str) -> dict[str, int]:
    """Seconds that each part of `make test` may take, by the tables of molecule/README.md."""
    return {name: int(seconds) for name, seconds in ROW.findall(text)}


class Stopwatch:
    """Adds up the time of each scenario from molecule's own lines."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: tuple[str, float] | None = None

    def read(self, line: bytes, now: float) -> None:
        step = STEP.search(COLOUR.sub(b"", line).rstrip())
        if step is None:
            return
        self.stop(now)
        if step[2] == b"Executing":
            self._running = (step[1].decode(), now)

    def stop(self, now: float) -> None:
        if self._running:
            scenario, begin = self._running
            self.seconds[scenario] = self.seconds.get(scenario, 0.0) + now - begin
        self._running = None


def report(seconds: Mapping[str, float], allowed: Mapping[str, int]) -> str:
    """The table, and below it a line for each scenario that is over its budget or has none."""
    lines, complaints = ["", f"{'scenario':<20} seconds  budget"], []
    for scenario, spent in seconds.items():
        budget = allowed.get(scenario)
        lines.append(f"{scenario:<20} {spent:7.0f} {'none' if budget is None else budget:>7}")
        if budget is None:
            complaints.append(f"NO BUDGET: {scenario}: write one into {BUDGETS.name} of {BUDGETS.parent.name}/")
        elif spent > budget:
            lines[-1] += "  OVER"
            complaints.append(
                f"OVER BUDGET: {scenario} took {spent:.0f} s, its budget is {budget} s. Make it quicker, or review "
                f"the budgets in {BUDGETS.parent.name}/{BUDGETS.name}, whose sum is bounded."
            )
    lines.append(f"{'all':<20} {sum(seconds.values()):7.0f} {sum(allowed.get(name, 0) for name in seconds):7}")
    return "\n".join([*lines, "", *complaints, *([""] if complaints else [])])


def main() -> int:
    watch = Stopwatch()
    with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        rest = b""
        while chunk := os.read(process.stdout.fileno(), 65536):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                watch.read(line, time.monotonic())
    watch.stop(time.monotonic())
    print(report(watch.seconds, budgets(BUDGETS.read_text())), flush=True)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
