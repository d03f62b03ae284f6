"""What each tier is doing, in a word and the facts behind it: one line per tier, which `gleaner status` begins with."""

from __future__ import annotations

import sys
from typing import Any

from gleaner import bounded, keeper, record, slurm, upstream
from gleaner.record import Record
from gleaner.states import Tier

SHARED_SECONDS = 5.0


def state_of(jobs: list[slurm.Job] | None, reading: record.Reading, routed: bool, kept: keeper.TierState) -> Tier:
    """One word for what is known of a tier."""
    if jobs is None:
        return Tier.UNKNOWN
    job = max(jobs, key=lambda one: one.state == "RUNNING", default=None)
    if job is None:
        if kept.held:
            return Tier.HELD
        return Tier.PAUSED if kept.failures or kept.why else Tier.ABSENT
    ending = kept.ending and kept.job == job.id and job.state != "PENDING"
    if job.preempted or job.state == "COMPLETING" or ending:
        return Tier.YIELDING
    if job.state == "PENDING":
        return Tier.HELD if job.reason.startswith("JobHeld") else Tier.QUEUED
    if routed:
        return Tier.SERVING
    if isinstance(reading, Record) and reading.run == (job.id, job.restarts):
        return Tier.UNROUTED
    return Tier.LOADING


def readings(config: upstream.Config) -> dict[str, record.Reading]:
    """The records of all tiers, in bounded time."""

    def read() -> dict[str, record.Reading]:
        return {tier.tier: record.read(config.registry, tier.tier) for tier in config.tiers}

    try:
        return bounded.ask(str(config.registry), read, SHARED_SECONDS)
    except TimeoutError as error:
        return {tier.tier: record.Unreadable(str(error)) for tier in config.tiers}


def look(
    config: upstream.Config, kept: dict[str, keeper.TierState], problems: list[str] | None = None
) -> list[dict[str, Any]]:
    """One JSON-ready line per tier. What could not be asked is said in `problems` or, without them, on stderr."""
    told: list[str] = []
    jobs: list[slurm.Job] | None
    try:
        jobs = slurm.jobs(config.service_user, [tier.job_name for tier in config.tiers])
    except slurm.SlurmError as error:
        told.append(f"Slurm does not answer: {error}")
        jobs = None
    read = readings(config)
    told += sorted({reading.why for reading in read.values() if isinstance(reading, record.Unreadable)})
    lines = [
        _line(
            tier,
            None if jobs is None else [job for job in jobs if job.name == tier.job_name],
            read[tier.tier],
            upstream.flag_of(config, tier.tier).exists(),
            kept.get(tier.tier, keeper.TierState()),
        )
        for tier in config.tiers
    ]
    if problems is None:
        for problem in told:
            print(f"warning: {problem}", file=sys.stderr)
    else:
        problems += told
    return lines


def _line(
    tier: upstream.TierConfig,
    jobs: list[slurm.Job] | None,
    reading: record.Reading,
    routed: bool,
    kept: keeper.TierState,
) -> dict[str, Any]:
    state = state_of(jobs, reading, routed, kept)
    job = max(jobs or [], key=lambda one: one.state == "RUNNING", default=None)
    return {
        "tier": tier.tier,
        "state": state.value,
        "meaning": state.meaning,
        "job": job.id if job else None,
        "node": job.nodes if job and job.state == "RUNNING" else None,
        "run_seconds": job.run_seconds if job and job.state == "RUNNING" else None,
        "preempted": bool(job and job.preempted),
        "digest": keeper.digest_of(job, kept) if job else None,
        "reason": job.reason if job and job.state == "PENDING" else None,
        "held": kept.held,
        "ending": kept.ending,
        "why": kept.why or (kept.failure if state is Tier.PAUSED else "") or None,
        "failure": kept.failure or None,
        "failures": kept.failures,
        "models": list(reading.models) if isinstance(reading, Record) else [],
    }
