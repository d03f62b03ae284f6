"""Memory, planned and measured: what a tier's plan says of each node, beside what Slurm and the nodes say now."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gleaner import files, slurm

MIB = 2**20
COMMAND_SECONDS = 10.0
_ROW = re.compile(r"(\S+) (host|gpu\d+)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Row:
    """One device of one tier; all in MiB, None for what is not known."""

    tier: str
    node: str
    device: str
    """``host``, or ``gpu0`` for the first that the job has there."""
    planned_mib: int
    limit_mib: int
    """Beyond it Slurm ends the job, or the GPU is full."""
    peak_mib: int | None = None
    """The most that the job's processes have had, by Slurm's accounting."""
    now_mib: int | None = None
    """What they have now, as the node says."""

    @property
    def over(self) -> bool:
        return max(self.peak_mib or 0, self.now_mib or 0) > self.planned_mib

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "over": self.over}


def plan_path(registry: Path, tier: str) -> Path:
    return registry.parent / "plans" / f"{tier}.json"


def planned(registry: Path, tier: str) -> list[Row]:
    """The rows of a tier's plan that can be measured; ValueError for a plan that cannot be read or understood."""
    path = plan_path(registry, tier)
    try:
        plan = files.load_config(path)
    except ValueError as error:
        raise ValueError(f"{error}: run playbooks/tiers.yml") from None
    try:
        rows = []
        for row in plan["memory"]:
            place = _ROW.fullmatch(row["device"])
            # A worker's `cpu` is part of its host's memory.
            if place:
                limit = plan["slurm"]["mem_mib"] if place[2] == "host" else row["limit"]
                rows.append(Row(tier, place[1], place[2], int(row["total"]), int(limit)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a plan ({error!r}): run playbooks/tiers.yml") from None
    return rows


def of_nodes(rows: Sequence[Row], nodes: Sequence[str]) -> list[Row]:
    """Those of the nodes that the job has; all, while it has none: a router tier may be on any."""
    return [row for row in rows if row.node in nodes] or list(rows)


def parse_peaks(text: str) -> dict[str, int]:
    """MiB by node, of sstat's lines: of each step its greediest task, and where that is.

    Of a step over several nodes nothing is known of the others. The batch step counts where the other one is.
    """
    found: dict[str, int] = {}
    main: set[str] = set()
    for line in filter(None, text.splitlines()):
        cells = line.split("|")
        size = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", cells[1]) if len(cells) >= 3 else None
        if size and cells[2]:
            mib = round(float(size[1]) * _UNITS[size[2]] / MIB)
            found[cells[2]] = found.get(cells[2], 0) + mib
            if not cells[0].endswith((".batch", ".extern")):
                main.add(cells[2])
    return {node: mib for node, mib in found.items() if node in main}


def peaks(job: int) -> dict[str, int]:
    """The most that a running job's processes have had on a node, in MiB; SlurmError when Slurm does not tell."""
    argv = ["sstat", "--allsteps", "--noheader", "--parsable2", f"--jobs={job}", "--format=JobID,MaxRSS,MaxRSSNode"]
    return parse_peaks(slurm.run(argv, COMMAND_SECONDS))


def with_measures(
    rows: Sequence[Row], job: int, peak: Mapping[str, int], facts: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """The rows of a running job, with what Slurm said of it, and what nodes said of themselves (`gleaner.node`)."""
    found = []
    for row in rows:
        here = next((one for one in facts.get(row.node, {}).get("jobs", ()) if one["job"] == job), None)
        if row.device == "host":
            now = here["host_mib"] if here else None
            found.append(dataclasses.replace(row, peak_mib=peak.get(row.node), now_mib=now))
        else:
            gpus = (here["gpus_mib"] if here else None) or []
            index = int(row.device[len("gpu") :])
            found.append(dataclasses.replace(row, now_mib=gpus[index] if index < len(gpus) else None))
    return found
