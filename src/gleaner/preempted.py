"""The last preemptions of the tiers: when, for whom, whether streams ended whole, and how soon a tier was back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gleaner import report, slurm
from gleaner.events import Event, Kind
from gleaner.report import Stay

# Further back is the ledger's: `gleaner report`.
DAYS = 7.0
SHOWN = 5


@dataclass(frozen=True)
class Preemption:
    """A run of a tier's job that was preempted. `at` is unix time in seconds."""

    at: float
    tier: str
    job: int
    nodes: tuple[str, ...]
    job_after: int | None
    """The first job that started on its nodes then, and whose it was; None when that is not known."""
    user_after: str | None
    whole: bool | None
    """Its streams in flight ended in time; None when it served nobody, or has not told."""
    away_seconds: float | None
    """From the signal until the tier was ready again; None while it is not."""

    def as_json(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "nodes": list(self.nodes)}


def last(told: Iterable[Event], tiers: Sequence[str], now: float, shown: int = SHOWN) -> list[Preemption]:
    """The last ones of these tiers, the newest first. A run that was signalled again and again is one."""
    events = list(told)
    found: list[Preemption] = []
    for tier in tiers:
        mine = [event for event in events if event.tier == tier]
        stays = report.stays(mine, (), now)
        ready = [span.begin for stay in stays for span in stay.ready]
        for stay in stays:
            if stay.preempted is not None:
                back = next((at for at in ready if at > stay.preempted), None)
                away = None if back is None else round(back - stay.preempted, 1)
                found.append(
                    Preemption(stay.preempted, tier, stay.job, stay.nodes, None, None, _whole(mine, stay), away)
                )
    return sorted(found, key=lambda one: -one.at)[:shown]


def _whole(mine: Iterable[Event], stay: Stay) -> bool | None:
    drained = [
        event
        for event in mine
        if event.kind is Kind.DRAINED
        and event.run == (stay.job, stay.restart)
        and stay.started <= event.at <= stay.until
    ]
    return bool(drained[-1].more.get("whole")) if drained else None


def with_jobs(preemptions: Sequence[Preemption], runs: Iterable[slurm.Run], service_user: str) -> list[Preemption]:
    """The same, with the first job of somebody else that accounting has on those nodes afterwards."""
    others = report.Others(run for run in runs if run.user != service_user)
    found = []
    for one in preemptions:
        until = one.at + one.away_seconds if one.away_seconds is not None else float("inf")
        span = report.Span(one.at - report.CLOCKS_SECONDS, until)
        after = [run for node in one.nodes for run in others.started(node, span)]
        first = min(after, key=lambda run: (run.started, run.job), default=None)
        found.append(dataclasses.replace(one, job_after=first.job, user_after=first.user) if first else one)
    return found
