"""What each tier is doing, in words (`gleaner status`)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gleaner import keeper, record, slurm, upstream
from gleaner.record import Record
from gleaner.states import Tier


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


def look(config: upstream.Config, kept: dict[str, keeper.TierState]) -> list[dict[str, Any]]:
    """One JSON-ready line per tier."""
    jobs: list[slurm.Job] | None
    try:
        jobs = slurm.jobs(config.service_user, [tier.job_name for tier in config.tiers])
    except slurm.SlurmError as error:
        print(f"warning: {error}", file=sys.stderr)
        jobs = None
    lines = []
    for tier in config.tiers:
        mine = None if jobs is None else [job for job in jobs if job.name == tier.job_name]
        reading = record.read(config.registry, tier.tier)
        routed = upstream.flag_of(config, tier.tier).exists()
        remembered = kept.get(tier.tier, keeper.TierState())
        state = state_of(mine, reading, routed, remembered)
        job = max(mine or [], key=lambda one: one.state == "RUNNING", default=None)
        lines.append(
            {
                "tier": tier.tier,
                "state": state.value,
                "meaning": state.meaning,
                "job": job.id if job else None,
                "node": job.nodes if job and job.state == "RUNNING" else None,
                "reason": job.reason if job and job.state == "PENDING" else None,
                "held": remembered.held,
                "ending": remembered.ending,
                "why": remembered.why or (remembered.failure if state is Tier.PAUSED else "") or None,
                "failure": remembered.failure or None,
                "models": list(reading.models) if isinstance(reading, Record) else [],
            }
        )
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("/etc/gleaner/gateway.json"))
    parser.add_argument("--keeper", type=Path, default=Path("/etc/gleaner/keeper.json"))
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    try:
        config = upstream.Config.load(args.config)
        kept = keeper.load_state(keeper.Config.load(args.keeper).state)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = look(config, kept)
    if args.json:
        print(json.dumps(lines, indent=1))
        return 0
    for line in lines:
        where = " ".join(
            str(part)
            for part in (
                f"job {line['job']}" if line["job"] else "",
                f"on {line['node']}" if line["node"] else "",
                f"({line['reason'] or line['why']})" if line["reason"] or line["why"] else "",
            )
            if part
        )
        print(f"{line['tier']:<12} {line['state']:<9} {where}\n{'':<12} {line['meaning']}")
    return 0
