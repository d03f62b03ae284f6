"""Who holds the nodes of the tiers: Slurm's state of each node in words, and the jobs that are there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gleaner import slurm
from gleaner.claims import Need

COMMAND_SECONDS = 10.0

# squeue cuts a field at its size. A list of nodes that was cut could be read, and be others.
NODES_LIMIT = 4096
_COLUMNS = (
    "JobID:16",
    "UserName:64",
    "TimeLeft:24",
    f"NodeList:{NODES_LIMIT}",
    "tres-alloc:256",
    "tres-per-node:128",
    "tres-per-job:128",
    "tres-per-socket:128",
    "tres-per-task:128",
)

# Brackets in pairs, never within each other.
_NODES = re.compile(r"(?:[^\[\]]|\[[^\[\]]+\])*")

# By the first that a node has: a mark says more than the state beside it.
_MARKS = {
    "NOT_RESPONDING": "does not answer",
    "INVALID_REG": "has less than Slurm was told",
    "FAIL": "failed",
    "POWERED_DOWN": "switched off",
    "POWERING_DOWN": "being switched off",
    "POWERING_UP": "being switched on",
    "REBOOT_REQUESTED": "to be rebooted",
    "REBOOT_ISSUED": "being rebooted",
    "MAINTENANCE": "in maintenance",
    "MAINT": "in maintenance",
    "RESERVED": "reserved",
}
_BUSY = {"ALLOCATED", "MIXED", "COMPLETING"}


@dataclass(frozen=True)
class Stay:
    """A job of anybody that has nodes now."""

    job: int
    user: str
    nodes: tuple[str, ...]
    left_seconds: int | None
    """Until its time limit; None without one."""
    has_gpus: bool
    """As far as Slurm tells: accounting may not track GPUs, and a request may not name them."""


def parse_stays(text: str) -> list[Stay]:
    """Lines of squeue; SlurmError for one that cannot be read."""
    found = []
    for line in filter(str.strip, text.splitlines()):
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < len(_COLUMNS) or not cells[0].isdigit():
            raise slurm.SlurmError(f"squeue: cannot read the line {line.strip()[:80]!r}")
        if len(cells[3]) >= NODES_LIMIT or not _NODES.fullmatch(cells[3]):
            raise slurm.SlurmError(
                f"squeue: job {cells[0]}: cannot read its list of nodes, which ends with {cells[3][-40:]!r}"
            )
        has_gpus = any(re.search(r"\bgpu\b", cell) for cell in cells[4:])
        found.append(Stay(int(cells[0]), cells[1], tuple(slurm.hosts(cells[3])), slurm.seconds(cells[2]), has_gpus))
    return found


def stays(names: Sequence[str]) -> list[Stay]:
    """Everybody's jobs that have one of these nodes; SlurmError when Slurm does not know one of them."""
    form = ",".join(column + "|" for column in _COLUMNS)
    states = "--states=RUNNING,COMPLETING,SUSPENDED,CONFIGURING"
    argv = ["squeue", "--noheader", "--all", states, f"--nodelist={','.join(names)}", f"--Format={form}"]
    return parse_stays(slurm.run(argv, COMMAND_SECONDS))


def known_nodes(names: Sequence[str], problems: list[str]) -> dict[str, slurm.Node]:
    """What Slurm says of these nodes. One that it does not know is named in `problems`; SlurmError when it is away."""
    try:
        return slurm.nodes(names, COMMAND_SECONDS) if names else {}
    except slurm.SlurmError as error:
        if "not found" not in str(error):
            raise
    found: dict[str, slurm.Node] = {}
    for name in names:
        try:
            found.update(slurm.nodes([name], COMMAND_SECONDS))
        except slurm.SlurmError as error:
            if "not found" not in str(error):
                raise
            problems.append(f"{name}: Slurm does not know this node: run site.yml, or take it out of the inventory")
    return found


def state_in_words(state: str) -> str:
    """Slurm's `IDLE+DRAIN`, `DOWN*` and their like, as a person would say it."""
    base, *flags = state.upper().split("+")
    marks = {*flags, *(["NOT_RESPONDING"] if base.endswith("*") else [])}
    base = base.rstrip("*~#!%$@^-")
    words = [_MARKS[mark] for mark in _MARKS if mark in marks]
    if base == "DOWN":
        words.insert(0, "down")
    if "DRAIN" in marks:
        words.insert(0, "draining" if base in _BUSY or "COMPLETING" in marks else "drained")
    return ", ".join(dict.fromkeys(words)) or base.lower().replace("_", " ")


def on(node: str, there: Iterable[Stay]) -> list[Stay]:
    """The jobs on a node that matter to whoever wants its GPUs: those with GPUs or, where none is known, all."""
    here = [stay for stay in there if node in stay.nodes]
    return [stay for stay in here if stay.has_gpus] or here


def has_room(need: Need, node: slurm.Node) -> bool:
    """A tier's job could start there now."""
    return (
        node.up
        and node.gpus - node.gpus_held >= need.gpus
        and node.cpus - node.cpus_held >= node.whole_cores(need.cpus)
        and node.mem_mib - node.mem_held_mib >= need.mem_mib
    )


@dataclass(frozen=True)
class Obstacles:
    """What keeps a tier's job from starting."""

    jobs: tuple[Stay, ...]
    nodes: tuple[str, ...]
    """Nodes that start no job at all, or that Slurm does not know."""


def obstacles(need: Need, nodes: Mapping[str, slurm.Node], there: Sequence[Stay]) -> Obstacles:
    """What is in the way on the nodes of a tier; nothing where enough of them have room.

    What others hold matters also while another node is dead: both have to end before a tier over both can start.
    """
    if sum(name in nodes and has_room(need, nodes[name]) for name in need.nodes) >= need.node_count:
        return Obstacles((), ())
    jobs: dict[int, Stay] = {}
    shut = []
    for name in need.nodes:
        node = nodes.get(name)
        if node is None or not node.up:
            shut.append(name)
        if node is None or not has_room(need, node):
            jobs.update({stay.job: stay for stay in on(name, there)})
    return Obstacles(tuple(jobs.values()), tuple(shut))
