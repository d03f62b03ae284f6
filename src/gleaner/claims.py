"""Tiers that compete: which jobs of lower tiers have to yield, so that the job of a higher one can start."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gleaner import slurm


@dataclass(frozen=True)
class Need:
    """What a tier's job takes: `node_count` of `nodes`, and so much on each of them."""

    priority: int
    nodes: tuple[str, ...]
    node_count: int
    gpus: int
    cpus: int
    mem_mib: int

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Need:
        """From a plan's `slurm`, with the plan's `priority`."""
        return cls(
            priority=int(value["priority"]),
            nodes=tuple(str(name) for name in value["nodes"]),
            node_count=int(value["node_count"]),
            gpus=int(value["gpus_per_node"]),
            cpus=int(value["cpus_per_node"]),
            mem_mib=int(value["mem_mib"]),
        )

    def outranks(self, other: Need) -> bool:
        """The other one is lower and may stand in the way. The same priority is no lower one."""
        return other.priority < self.priority and not set(self.nodes).isdisjoint(other.nodes)


@dataclass(frozen=True)
class Holder:
    """A job of a lower tier, and where it runs."""

    job: int
    need: Need
    nodes: frozenset[str]


@dataclass(frozen=True)
class Way:
    """Nodes on which the higher tier's job can start once these jobs have yielded."""

    nodes: tuple[str, ...]
    yields: tuple[Holder, ...]


def best_way(need: Need, nodes: Mapping[str, slurm.Node], holders: Sequence[Holder]) -> Way | None:
    """The way with the fewest yields, and among equals the one that ends the lowest tiers; None when there is none."""
    return min(_ways(need, nodes, holders), key=_cost, default=None)


def _cost(way: Way) -> tuple[int, list[int]]:
    return len(way.yields), sorted((holder.need.priority for holder in way.yields), reverse=True)


def _ways(need: Need, nodes: Mapping[str, slurm.Node], holders: Sequence[Holder]) -> Iterator[Way]:
    # A plan's job takes one of its nodes or all of them, so these are few.
    for chosen in itertools.combinations(need.nodes, need.node_count):
        there = [holder for holder in holders if not holder.nodes.isdisjoint(chosen)]
        for going in _subsets(there):
            if all(name in nodes and _has_room(need, nodes[name], going) for name in chosen):
                yield Way(chosen, going)


def _subsets(holders: Sequence[Holder]) -> Iterable[tuple[Holder, ...]]:
    sizes = range(len(holders) + 1)
    return itertools.chain.from_iterable(itertools.combinations(holders, size) for size in sizes)


def _has_room(need: Need, node: slurm.Node, going: Iterable[Holder]) -> bool:
    """The node can take the job when these have gone."""
    # Queue and nodes are not of one moment: a job that just ended is still a holder, and holds nothing any more.
    freed = [holder.need for holder in going if node.name in holder.nodes]
    gpus = node.gpus - max(0, node.gpus_held - sum(one.gpus for one in freed))
    cpus = node.cpus - max(0, node.cpus_held - sum(node.whole_cores(one.cpus) for one in freed))
    mem_mib = node.mem_mib - max(0, node.mem_held_mib - sum(one.mem_mib for one in freed))
    return node.up and gpus >= need.gpus and cpus >= node.whole_cores(need.cpus) and mem_mib >= need.mem_mib
