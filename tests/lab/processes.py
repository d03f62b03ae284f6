"""The processes of a lab on this machine, found by their recorded ids, and their violent end."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Collection
from pathlib import Path

LABS = Path("/var/lib/gleaner-lab")


def recorded(lab: str) -> set[int]:
    """Ids that the lab wrote down: what boots each host, and the package proxy."""
    records = [*(LABS / lab).glob("hosts/*/process.json"), *(LABS / lab).glob("packages-*.json")]
    return {int(json.loads(record.read_text())["pid"]) for record in records}


def with_descendants(pids: Collection[int]) -> set[int]:
    """These processes that are alive, with all that they started."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            parents[int(entry.name)] = int(fields[1])
    found = set(pids) & parents.keys()
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def command(pid: int) -> list[str]:
    """A process's command line; empty when it is gone."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().split("\0")
    except OSError:
        return []


def kill(pids: Collection[int]) -> None:
    """End processes as a power cut would; those that are gone already do not matter."""
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    subprocess.run([*sudo, "kill", "-KILL", *map(str, pids)], check=False, stderr=subprocess.DEVNULL)
