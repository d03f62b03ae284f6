"""The ledger (`gleaner report`): what the tiers gleaned, and what that cost the jobs that pay.

Two sources that know nothing of each other: the supervisors' events say when a tier was signalled and when it was
ready, to the millisecond; Slurm's accounting says who had which node when, to the second. It is said where they differ.
A wait is reckoned to the end of the second in which the job started: it was that long at most.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import json
import math
import os
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
from gleaner.slurm import local_time
from gleaner.states import Cause

# The two clocks are of different hosts, and accounting rounds down.
CLOCKS_SECONDS = 1.0
# A run that ends sooner may have had no time to tell anything.
SHORT_SECONDS = 3.0
LAG_SECONDS = 60.0
DAY_SECONDS = 86400.0
WORST = 5
# One that Slurm did not explain in time was most likely one, too.
PREEMPTIONS = {Cause.PREEMPTED.value, Cause.UNANSWERED.value}


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
    """One run of a tier's job, as its supervisor told it and accounting completes it."""

    job: int
    restart: int
    nodes: tuple[str, ...]
    gpus: int
    started: float
    gone: float
    """When its nodes were free; the end of what is known, while it runs."""
    until: float
    """The start of the tier's next run, or the end of what is known."""
    ready: tuple[Span, ...]
    preempted: float | None
    """When it was signalled for a preemption."""
    run: slurm.Run | None
    """What accounting has of it."""


@dataclass(frozen=True)
class Wait:
    """A job that pays, and how long it waited for us at most: from our signal to its start."""

    job: int
    user: str
    nodes: tuple[str, ...]
    since: float
    seconds: float


@dataclass(frozen=True)
class Return:
    """From the end of the last paying job on a tier's nodes to the tier's own next run, and until it was ready."""

    job: int
    running: float
    ready: float | None


class Others:
    """Other users' runs, by node and in the order of their starts. Only those with GPUs, where accounting tells."""

    def __init__(self, runs: Iterable[slurm.Run]) -> None:
        known = list(runs)
        if any(run.gpus for run in known):
            known = [run for run in known if run.gpus]
        self._runs: dict[str, list[slurm.Run]] = {}
        for run in sorted(known, key=lambda one: one.started):
            for node in run.nodes:
                self._runs.setdefault(node, []).append(run)
        self._starts = {node: [run.started for run in runs] for node, runs in self._runs.items()}

    def started(self, node: str, span: Span) -> list[slurm.Run]:
        """Those that started on a node in a span of time."""
        starts = self._starts.get(node, [])
        first, last = bisect.bisect_left(starts, span.begin), bisect.bisect_right(starts, span.end)
        return self._runs[node][first:last] if first < last else []


# Reckoning


def stays(told: Iterable[Event], accounted: Sequence[slurm.Run], end: float) -> list[Stay]:
    """The runs of one tier, from its events in the order of time; `end` is until when they are known.

    A supervisor that was killed, or whose node lost its power, has not told its end: accounting has it.
    """
    groups: list[list[Event]] = []
    current: dict[tuple[int, int], list[Event]] = {}
    for event in told:
        if event.kind is Kind.STARTED:
            current[event.run] = [event]
            groups.append(current[event.run])
        elif event.run in current:
            current[event.run].append(event)
    groups.sort(key=lambda group: group[0].at)
    nexts = [group[0].at for group in groups[1:]] + [end]
    by_job: dict[int, list[slurm.Run]] = {}
    for run in accounted:
        by_job.setdefault(run.job, []).append(run)
    return [_stay(group, _run_of(group[0], by_job), after) for group, after in zip(groups, nexts)]


def _run_of(start: Event, by_job: dict[int, list[slurm.Run]]) -> slurm.Run | None:
    """The run of a job whose supervisor started then: the last that had begun, and was not over."""
    begun = [
        run
        for run in by_job.get(start.job, [])
        if run.started <= start.at + CLOCKS_SECONDS
        and (run.ended is None or run.ended + 1.0 + CLOCKS_SECONDS >= start.at)
    ]
    return max(begun, key=lambda run: run.started, default=None)


def _stay(group: Sequence[Event], run: slurm.Run | None, after: float) -> Stay:
    first = group[0]
    left = next((event.at for event in group if event.kind is Kind.LEFT), None)
    ended = None if run is None else run.ended
    gone = min(after, ended if ended is not None else left if left is not None else after)
    ready: list[Span] = []
    since: float | None = None
    for event in group:
        if event.kind is Kind.SERVING:
            since = event.at
        elif event.kind in (Kind.WITHDRAWN, Kind.LEFT) and since is not None:
            ready.append(Span(since, event.at))
            since = None
    if since is not None:
        ready.append(Span(since, gone))
    signals = [event for event in group if event.kind is Kind.SIGNALLED]
    preempted = any(event.more.get("cause") in PREEMPTIONS for event in signals) or (
        run is not None and run.state == "PREEMPTED"
    )
    return Stay(
        job=first.job,
        restart=first.restart,
        nodes=tuple(first.more.get("nodes", ())),
        gpus=first.more.get("gpus", 0),
        started=first.at,
        gone=gone,
        until=after,
        ready=tuple(ready),
        preempted=signals[0].at if signals and preempted else None,
        run=run,
    )


def preempted_in(all_stays: Iterable[Stay], period: Span) -> list[Stay]:
    """Those that were preempted in a period: what a run did before it is known, but counts no more."""
    return [stay for stay in all_stays if stay.preempted is not None and stay.preempted >= period.begin]


def waits(vacated: Iterable[Stay], others: Others) -> list[Wait]:
    """Who waited for us: who was queued when a preempted run left, and started on its nodes before anybody else's end.

    A job that needed several runs to leave has waited since the first of their signals.
    """
    found: dict[tuple[int, int], Wait] = {}
    for stay in vacated:
        if stay.preempted is None:
            continue
        for node in stay.nodes:
            span = Span(math.floor(stay.preempted) - CLOCKS_SECONDS, stay.until)
            over = math.inf
            for run in others.started(node, span):
                if run.started > over:
                    # What starts where another one has ended has waited for that one.
                    break
                if run.started >= math.floor(stay.preempted):
                    over = min(over, math.inf if run.ended is None else run.ended)
                if run.submitted > stay.gone:
                    continue
                since = max(stay.preempted, float(run.submitted))
                wait = Wait(run.job, run.user, run.nodes, since, max(0.0, run.started + 1.0 - since))
                key = (run.job, run.started)
                if key not in found or found[key].since > since:
                    found[key] = wait
    return sorted(found.values(), key=lambda wait: wait.since)


def lent(stay: Stay, others: Others) -> Span:
    """From the signal of a preemption to the end of the last job on those nodes, before the tier's next run."""
    assert stay.preempted is not None
    free = stay.gone
    for node in stay.nodes:
        for run in others.started(node, Span(math.floor(stay.preempted) - CLOCKS_SECONDS, stay.until)):
            free = max(free, stay.until if run.ended is None else min(run.ended, stay.until))
    return Span(stay.preempted, free)


def returns(all_stays: Sequence[Stay], others: Others) -> list[Return]:
    """How soon each preempted run was followed by the next one, since its nodes were free."""
    found = []
    for before, after in zip(all_stays, all_stays[1:]):
        if before.preempted is None:
            continue
        free = lent(before, others).end
        ready = after.ready[0].begin - free if after.ready else None
        found.append(Return(after.job, max(0.0, after.started - free), ready))
    return found


def differences(told: Sequence[Stay], accounted: Sequence[slurm.Run], period: Span) -> list[str]:
    """What one source knows and the other does not."""
    mine = [stay for stay in told if stay.started >= period.begin]
    known = {(stay.run.job, stay.run.started) for stay in told if stay.run is not None}
    lines = [
        f"{_run(run)}: accounting knows it, no supervisor told of it"
        for run in accounted
        if run.started >= period.begin
        and (run.job, run.started) not in known
        and (period.end if run.ended is None else run.ended) - run.started > SHORT_SECONDS
    ]
    lines += [
        f"job {stay.job} restart {stay.restart}, started {local_time(stay.started)}: accounting does not know it"
        for stay in mine
        # Accounting lags.
        if stay.run is None and period.end - stay.started > LAG_SECONDS
    ]
    lines += [
        f"{_run(stay.run)}: accounting says that it was preempted, its supervisor was not told"
        for stay in mine
        if stay.run is not None and stay.run.state == "PREEMPTED" and stay.preempted is None
    ]
    return lines


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
    ready_seconds: float
    lent_seconds: float
    """From the signal of a preemption until the jobs that followed had ended."""
    differences: tuple[str, ...]


def ledger(
    tier: str, all_stays: Sequence[Stay], accounted: Sequence[slurm.Run], others: Others, period: Span
) -> Ledger:
    """What one tier did: its stays, its job's runs by accounting, and everybody else's."""
    preempted = preempted_in(all_stays, period)
    recent = [stay for stay in all_stays if stay.started >= period.begin or stay in preempted]
    told = {(stay.run.job, stay.run.started): stay for stay in all_stays if stay.run is not None}
    starts = sorted(run.started for run in accounted)
    hours = 0.0
    for run in accounted:
        stay = told.get((run.job, run.started))
        # A run without an end, after which there was another one, is one that accounting has lost sight of.
        later = bisect.bisect_right(starts, run.started)
        end = run.ended if run.ended is not None else starts[later] if later < len(starts) else period.end
        gpus = run.gpus or (stay.gpus if stay is not None else 0)
        hours += gpus * Span(run.started, end).within(period).seconds / 3600
    return Ledger(
        tier=tier,
        period=period,
        runs=sum(run.ended is None or run.ended >= period.begin for run in accounted),
        gpu_hours=hours,
        preemptions=len(preempted),
        waits=tuple(waits(preempted, others)),
        returns=tuple(returns(recent, others)),
        ready_seconds=sum(span.within(period).seconds for stay in all_stays for span in stay.ready),
        lent_seconds=sum(lent(stay, others).within(period).seconds for stay in all_stays if stay.preempted is not None),
        differences=tuple(differences(all_stays, accounted, period)),
    )


@dataclass(frozen=True)
class Report:
    """All tiers in one period; a job that waited for several of them is one of `waits`."""

    period: Span
    tiers: tuple[Ledger, ...]
    waits: tuple[Wait, ...]


def collect(config: upstream.Config, period: Span, problems: list[str]) -> Report:
    """SlurmError or OSError when one of the sources is not there at all."""
    nodes = {node for tier in config.tiers for node in tier.supervisors}
    names = slurm.names_of(config.service_user, period.begin, period.end)
    runs = slurm.runs(period.begin, period.end, problems)
    others = Others(run for run in runs if run.user != config.service_user and not nodes.isdisjoint(run.nodes))
    told = events.read(events.folder_of(config.registry), problems)
    ledgers, vacated = [], []
    for tier in config.tiers:
        mine = [run for run in runs if run.user == config.service_user and names.get(run.job) == tier.job_name]
        all_stays = stays(
            (event for event in told if event.tier == tier.tier and event.at <= period.end), mine, period.end
        )
        ledgers.append(ledger(tier.tier, all_stays, mine, others, period))
        vacated += preempted_in(all_stays, period)
    return Report(period, tuple(ledgers), tuple(waits(sorted(vacated, key=lambda stay: stay.started), others)))


# Words


def _run(run: slurm.Run) -> str:
    return f"job {run.job}, started {local_time(run.started)}"


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"count": len(values), "median": round(statistics.median(values), 1), "worst": round(max(values), 1)}


def _ledger_json(one: Ledger) -> dict[str, Any]:
    whole = one.period.seconds or 1.0
    return {
        "tier": one.tier,
        "runs": one.runs,
        "gpu_hours": round(one.gpu_hours, 4),
        "preemptions": one.preemptions,
        "waits": [dataclasses.asdict(wait) for wait in one.waits],
        "waited": _summary([wait.seconds for wait in one.waits]),
        "returned_running": _summary([one.running for one in one.returns]),
        "returned_ready": _summary([one.ready for one in one.returns if one.ready is not None]),
        "available_share": round(one.ready_seconds / whole, 4),
        "lent_share": round(one.lent_seconds / whole, 4),
        "differences": list(one.differences),
    }


def as_json(report: Report) -> dict[str, Any]:
    """For programs; times are unix seconds, durations seconds."""
    return {
        "v": 1,
        "from": report.period.begin,
        "to": report.period.end,
        "gpu_hours": round(sum(one.gpu_hours for one in report.tiers), 4),
        "waits": [dataclasses.asdict(wait) for wait in report.waits],
        "waited": _summary([wait.seconds for wait in report.waits]),
        "tiers": [_ledger_json(one) for one in report.tiers],
    }


def _told(got: dict[str, float] | None, none: str) -> str:
    return none if got is None else f"median {got['median']:g} s, worst {got['worst']:g} s, of {got['count']}"


def in_words(report: Report) -> str:
    """For people."""
    whole = as_json(report)
    lines = [
        f"from {local_time(report.period.begin)} to {local_time(report.period.end)}, local time",
        f"gleaned {whole['gpu_hours']:.2f} GPU-hours",
        f"others waited for us, at most: {_told(whole['waited'], 'nobody')}",
    ]
    lines += [
        f"  job {wait.job} of {wait.user} on {','.join(wait.nodes)}: "
        f"{wait.seconds:.1f} s, from {local_time(wait.since)}"
        for wait in sorted(report.waits, key=lambda wait: -wait.seconds)[:WORST]
    ]
    for value in whole["tiers"]:
        lines += [
            value["tier"],
            f"  gleaned           {value['gpu_hours']:.2f} GPU-hours in {value['runs']} runs",
            f"  available         {value['available_share']:.1%} of the time, {value['lent_share']:.1%} lent to others",
            f"  preempted         {value['preemptions']} times; others waited: {_told(value['waited'], 'nobody')}",
            f"  back after others {_told(value['returned_running'], 'not yet')}; "
            f"ready: {_told(value['returned_ready'], 'not yet')}",
            *(f"  differs: {text}" for text in value["differences"]),
        ]
    return "\n".join(lines)


# The command


def moment(text: str) -> float:
    """Unix seconds: of `2026-11-25` or `2026-11-25T08:00:00`, both local, `7d`, `12h` or `30m` ago, or `@seconds`."""
    ago = re.fullmatch(r"(\d{1,5})([dhm])", text)
    if ago:
        return time.time() - int(ago.group(1)) * {"d": DAY_SECONDS, "h": 3600.0, "m": 60.0}[ago.group(2)]
    if re.fullmatch(r"@\d{1,12}", text):
        return float(text[1:])
    for form in ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d"):
        try:
            return time.mktime(time.strptime(text, form))
        except (ValueError, OverflowError):
            continue
    raise argparse.ArgumentTypeError(
        f"got {text!r}, want a date, a date and time as 2026-11-25T08:00, 7d, 12h, 30m or @seconds"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--since",
        type=moment,
        default="7d",
        help="a local date or time, 7d, 12h, 30m, or @ and unix seconds (default: 7d)",
    )
    parser.add_argument("--until", type=moment, help="the same (default: now)")
    parser.add_argument("--config", type=Path, default=Path("/etc/gleaner/gateway.json"))
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    now = time.time()
    period = Span(args.since, min(args.until if args.until is not None else now, now))
    problems: list[str] = []
    try:
        if os.geteuid() != 0:
            raise ValueError("uid: got another than 0: accounting may show others' jobs to root only; cure: sudo")
        if period.end <= period.begin:
            raise ValueError(f"--since: got {local_time(period.begin)}, want a time before {local_time(period.end)}")
        found = collect(upstream.Config.load(args.config), period, problems)
    except (ValueError, slurm.SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}: run playbooks/tiers.yml", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    print(json.dumps(as_json(found), indent=1) if args.json else in_words(found))
    return 0
