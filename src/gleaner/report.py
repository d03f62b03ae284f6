"""The ledger (`gleaner report`): what the tiers gleaned, and what that cost the jobs that pay.

Two sources that know nothing of each other: the supervisors' events say when a tier was signalled and when it served,
to the millisecond; Slurm's accounting says who had which node when, to the second. Where they differ, it is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gleaner import events, slurm, upstream
from gleaner.events import Event, Kind
from gleaner.states import Cause

# The two clocks are of different hosts, and accounting rounds down.
CLOCKS_SECONDS = 1.0
# A run that ends sooner may have had no time to tell anything.
SHORT_SECONDS = 3.0
DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class Span:
    """From one unix time to another."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return max(0.0, self.end - self.begin)

    def within(self, other: Span) -> Span:
        return Span(max(self.begin, other.begin), min(self.end, other.end))


@dataclass(frozen=True)
class Stay:
    """One run of a tier's job as its supervisor told it."""

    job: int
    restart: int
    nodes: tuple[str, ...]
    gpus: int
    started: float
    serving: tuple[Span, ...]
    preempted: float | None
    """When it was signalled for a preemption."""
    left: float | None


@dataclass(frozen=True)
class Wait:
    """A job that pays, and the time from our signal to its start."""

    job: int
    user: str
    nodes: tuple[str, ...]
    signalled: float
    seconds: float


@dataclass(frozen=True)
class Return:
    """From the end of the last paying job on a tier's nodes to the tier's own next run, and until it served."""

    job: int
    running: float
    serving: float | None


def stays(found: Iterable[Event], accounted: Sequence[slurm.Run], end: float) -> list[Stay]:
    """The runs of one tier, from its events in the order of time; `end` is until when they are known.

    A supervisor that was killed, or whose node lost its power, has not told its end: accounting has it.
    """
    by_run: dict[tuple[int, int], list[Event]] = {}
    for event in found:
        by_run.setdefault(event.run, []).append(event)
    whole = sorted((run for run in by_run.values() if run[0].kind is Kind.STARTED), key=lambda run: run[0].at)
    nexts = [run[0].at for run in whole[1:]] + [end]
    found_stays = []
    for run, after in zip(whole, nexts):
        known = run_of(run[0].job, run[0].at, accounted)
        ended = after if known is None or known.ended is None else known.ended
        found_stays.append(_stay(run, min(ended, after)))
    return found_stays


def run_of(job: int, started: float, accounted: Sequence[slurm.Run]) -> slurm.Run | None:
    """The run of a job whose supervisor started then: the last that had begun."""
    begun = [run for run in accounted if run.job == job and run.started <= started + CLOCKS_SECONDS]
    return max(begun, key=lambda run: run.started, default=None)


def _stay(run: Sequence[Event], end: float) -> Stay:
    first = run[0]
    serving: list[Span] = []
    since: float | None = None
    preempted = left = None
    for event in run:
        if event.kind is Kind.SERVING:
            since = event.at
        elif event.kind in (Kind.WITHDRAWN, Kind.LEFT) and since is not None:
            serving.append(Span(since, event.at))
            since = None
        if event.kind is Kind.SIGNALLED and event.more.get("cause") == Cause.PREEMPTED.value and preempted is None:
            preempted = event.at
        if event.kind is Kind.LEFT:
            left = event.at
    if since is not None:
        serving.append(Span(since, end))
    return Stay(
        job=first.job,
        restart=first.restart,
        nodes=tuple(str(name) for name in first.more.get("nodes", [])),
        gpus=int(first.more.get("gpus", 0)),
        started=first.at,
        serving=tuple(serving),
        preempted=preempted,
        left=left,
    )


def waits(vacated: Sequence[Stay], others: Sequence[slurm.Run]) -> list[Wait]:
    """Who waited for us: of the first to start on each node that a preempted run vacated, who was queued by then.

    A job that needed several of our tiers to leave has waited since the first of their signals.
    """
    found: dict[int, Wait] = {}
    for stay in vacated:
        if stay.preempted is None:
            continue
        gone = stay.left if stay.left is not None else math.inf
        for node in stay.nodes:
            after = (
                run
                for run in others
                if node in run.nodes and run.started >= math.floor(stay.preempted) and run.submitted <= gone
            )
            run = next(after, None)
            if run is None:
                continue
            wait = Wait(run.job, run.user, run.nodes, stay.preempted, max(0.0, run.started - stay.preempted))
            if run.job not in found or found[run.job].signalled > wait.signalled:
                found[run.job] = wait
    return sorted(found.values(), key=lambda wait: wait.signalled)


def returns(all_stays: Sequence[Stay], others: Sequence[slurm.Run]) -> list[Return]:
    """How soon each preempted run was followed by the next one, since its nodes were free."""
    found = []
    for before, after in zip(all_stays, all_stays[1:]):
        if before.preempted is None:
            continue
        ends = [
            run.ended
            for run in others
            if run.ended is not None
            and set(run.nodes) & set(after.nodes)
            and before.preempted <= run.ended <= after.started + CLOCKS_SECONDS
        ]
        if ends:
            free = max(ends)
            served = after.serving[0].begin - free if after.serving else None
            found.append(Return(after.job, max(0.0, after.started - free), served))
    return found


def differences(told: Sequence[Stay], accounted: Sequence[slurm.Run], period: Span) -> list[str]:
    """Runs that one source knows and the other does not."""
    known = {stay: run_of(stay.job, stay.started, accounted) for stay in told if stay.started >= period.begin}
    untold = [
        run
        for run in accounted
        if run.started >= period.begin
        and run not in known.values()
        and (period.end if run.ended is None else run.ended) - run.started > SHORT_SECONDS
    ]
    return [
        *(
            f"job {run.job}, started {_when(run.started)}: accounting knows it, no supervisor told of it"
            for run in untold
        ),
        *(
            f"job {stay.job} restart {stay.restart}, started {_when(stay.started)}: accounting does not know it"
            for stay, run in known.items()
            if run is None
        ),
    ]


@dataclass(frozen=True)
class Ledger:
    """One tier in one period."""

    tier: str
    period: Span
    runs: int
    gpu_hours: float
    preemptions: int
    waits: tuple[Wait, ...]
    returns: tuple[Return, ...]
    served_seconds: float
    lent_seconds: float
    """From the signal of a preemption to the next run: the time in which the GPUs were lent to others."""
    differences: tuple[str, ...]


def ledger(
    tier: str, told: Sequence[Event], accounted: Sequence[slurm.Run], others: Sequence[slurm.Run], period: Span
) -> Ledger:
    """What one tier did: `told` are its events, `accounted` its job's runs, `others` everybody else's on its nodes."""
    all_stays = stays(told, accounted, period.end)
    nexts = [stay.started for stay in all_stays[1:]] + [period.end]
    lent = [
        Span(stay.preempted, after).within(period)
        for stay, after in zip(all_stays, nexts)
        if stay.preempted is not None
    ]
    # What a run of before the period did is known, but counts no more.
    preempted = [stay for stay in all_stays if stay.preempted is not None and stay.preempted >= period.begin]
    return Ledger(
        tier=tier,
        period=period,
        runs=len(accounted),
        gpu_hours=sum(
            run.gpus * Span(run.started, period.end if run.ended is None else run.ended).within(period).seconds
            for run in accounted
        )
        / 3600,
        preemptions=len(preempted),
        waits=tuple(waits(preempted, others)),
        returns=tuple(
            returns([stay for stay in all_stays if stay.started >= period.begin or stay in preempted], others)
        ),
        served_seconds=sum(span.within(period).seconds for stay in all_stays for span in stay.serving),
        lent_seconds=sum(span.seconds for span in lent),
        differences=tuple(differences(all_stays, accounted, period)),
    )


# Words


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at))


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"count": len(values), "median": round(statistics.median(values), 1), "worst": round(max(values), 1)}


def as_json(one: Ledger) -> dict[str, Any]:
    """For programs; times are unix seconds, durations seconds."""
    whole = one.period.seconds or 1.0
    return {
        "tier": one.tier,
        "from": one.period.begin,
        "to": one.period.end,
        "runs": one.runs,
        "gpu_hours": round(one.gpu_hours, 4),
        "preemptions": one.preemptions,
        "waits": [dataclasses.asdict(wait) for wait in one.waits],
        "waited": _summary([wait.seconds for wait in one.waits]),
        "returned_running": _summary([one.running for one in one.returns]),
        "returned_serving": _summary([one.serving for one in one.returns if one.serving is not None]),
        "served_share": round(one.served_seconds / whole, 4),
        "lent_share": round(one.lent_seconds / whole, 4),
        "differences": list(one.differences),
    }


def in_words(one: Ledger) -> str:
    """For people."""
    value = as_json(one)

    def told(name: str, none: str) -> str:
        got = value[name]
        return none if got is None else f"median {got['median']:g} s, worst {got['worst']:g} s, of {got['count']}"

    lines = [
        f"{one.tier}",
        f"  gleaned                {one.gpu_hours:.2f} GPU-hours in {one.runs} runs",
        f"  served                 {value['served_share']:.1%} of the time, {value['lent_share']:.1%} lent to others",
        f"  preempted              {one.preemptions} times",
        f"  others waited for us   {told('waited', 'nobody')}",
        f"  back after others      {told('returned_running', 'not yet')}; "
        f"serving {told('returned_serving', 'not yet')}",
    ]
    worst = sorted(one.waits, key=lambda wait: -wait.seconds)[:5]
    lines += [
        f"    job {wait.job} of {wait.user} on {','.join(wait.nodes)}: {wait.seconds:.1f} s, {_when(wait.signalled)}"
        for wait in worst
    ]
    lines += [f"  differs: {text}" for text in one.differences]
    return "\n".join(lines)


# The command


def moment(text: str) -> float:
    """Unix seconds: of `2026-11-25` or `2026-11-25T08:00:00`, both local, `7d` or `12h` before now, or `@seconds`."""
    ago = re.fullmatch(r"(\d{1,5})([dh])", text)
    if ago:
        return time.time() - int(ago.group(1)) * (DAY_SECONDS if ago.group(2) == "d" else 3600.0)
    if re.fullmatch(r"@\d{1,12}", text):
        return float(text[1:])
    for form in ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d"):
        try:
            return time.mktime(time.strptime(text, form))
        except (ValueError, OverflowError):
            continue
    raise argparse.ArgumentTypeError(f"got {text!r}, want a date, a date and time as 2026-11-25T08:00, or 7d or 12h")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", type=moment, default="7d", help="a local date or time, or 7d, 12h (default: 7d)")
    parser.add_argument("--until", type=moment, help="the same (default: now)")
    parser.add_argument("--config", type=Path, default=Path("/etc/gleaner/gateway.json"))
    parser.add_argument("--json", action="store_true", help="for programs")


def collect(config: upstream.Config, period: Span, problems: list[str]) -> list[Ledger]:
    """The ledgers of all tiers. SlurmError or OSError when one of the sources is not there at all."""
    nodes = sorted({node for tier in config.tiers for node in tier.supervisors})
    accounted = slurm.runs(nodes, period.begin, period.end) if nodes else []
    told = events.read(events.folder_of(config.registry), period.begin, problems)
    found = []
    for tier in config.tiers:
        ours = [run for run in accounted if run.name == tier.job_name and run.user == config.service_user]
        others = [run for run in accounted if run.user != config.service_user]
        mine = [event for event in told if event.tier == tier.tier and event.at <= period.end]
        found.append(ledger(tier.tier, mine, ours, others, period))
    return found


def run(args: argparse.Namespace) -> int:
    now = time.time()
    period = Span(args.since, min(args.until if args.until is not None else now, now))
    problems: list[str] = []
    try:
        if period.end <= period.begin:
            raise ValueError(f"--since: got {_when(period.begin)}, want a time before {_when(period.end)}")
        config = upstream.Config.load(args.config)
        found = collect(config, period, problems)
    except (ValueError, slurm.SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}: run playbooks/tiers.yml", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if args.json:
        print(json.dumps([as_json(one) for one in found], indent=1))
        return 0
    print(f"from {_when(period.begin)} to {_when(period.end)}, local time")
    for one in found:
        print(in_words(one))
    return 0
