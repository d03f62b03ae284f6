"""Paying jobs come and go: what the tests of preemption share."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from benchmarks import lab, preemption
from benchmarks.preemption import FAST, JOBS, NODES, PORTS, REASONING
from gleaner import slurm
from gleaner.events import Event
from tests.lab import cluster
from tests.lab.ansible import LAB_ID
from tests.lab.cluster import CONTROLLER, run

BOTH = (FAST, REASONING)
# Of the lab's tiers.
DRAIN_SECONDS = 5.0
RUNS_SECONDS = 45.0
BOOKS_SECONDS = 12


@cache
def controller() -> preemption.Controller:
    return preemption.Controller(lab.Lab(LAB_ID))


def wait_served(tiers: tuple[str, ...] = BOTH) -> None:
    for tier in tiers:
        cluster.wait_served(port=PORTS[tier])


def runs(job: int) -> bool:
    return any(one.id == job and one.state == "RUNNING" for one in cluster.jobs())


def wait_runs(job: int) -> None:
    cluster.wait_until("the paying job runs", lambda: runs(job), RUNS_SECONDS)


@contextlib.contextmanager
def paying(*tiers: str) -> Iterator[int]:
    """An ordinary user's job on these tiers' nodes; gone with the block."""
    job = cluster.submit(f"-p gpu_vasp {preemption.options(tiers)} --time=10 --wrap 'sleep 600'")
    try:
        yield job
    finally:
        # It may be over, or Slurm away; what failed then is not this.
        cluster.host(CONTROLLER).run(f"scancel --quiet {job}")


@contextlib.contextmanager
def frozen_when_it_starts(tier: str) -> Iterator[Callable[[], bool]]:
    """Its llama-server, when there is one on its first node, is stopped by a signal at once.

    It loads as long as the supervisor bears that, which are three seconds.
    """
    node = NODES[tier][0]
    unit = "freeze-what-starts"
    loop = f"until pkill -STOP --uid {cluster.SERVICE_USER} --full '^[^ ]*/llama-server '; do sleep 0.02; done"
    run(node, f'systemd-run --quiet --collect --unit={unit} sh -c "{loop}"')
    try:
        yield functools.partial(_has_frozen, node, unit)
    finally:
        cluster.host(node).run(f"systemctl stop {unit}")


def _has_frozen(node: str, unit: str) -> bool:
    return bool(cluster.host(node).run(f"systemctl is-active {unit}").rc != 0)


def wait_in_books(job: int) -> None:
    """slurmctld writes its state down every few seconds: what is younger it forgets when it is killed."""
    age = f"squeue --noheader --jobs={job} --Format=TimeUsed"
    cluster.wait_until("it is in slurmctld's books", lambda: (slurm.seconds(run(CONTROLLER, age)) or 0) > BOOKS_SECONDS)


def told(tier: str, job: int) -> list[Event]:
    """A job's events, in their order."""
    return [one for one in controller().events(tier) if one.job == job]


def ledger(tier: str, since: str = "1d") -> dict[str, Any]:
    """What `gleaner report` says of a tier."""
    found: list[dict[str, Any]] = json.loads(run(CONTROLLER, f"gleaner report --json --since {since}"))["tiers"]
    return next(one for one in found if one["tier"] == tier)


def left_on(node: str) -> list[int]:
    """Processes of ours on a node."""
    return cluster.pids(node, ".")


def log(job: cluster.Job) -> str:
    """What the supervisor of this very run has said: a job that was requeued goes on in the same file."""
    text = run(CONTROLLER, f"cat /cluster/shared/ai/logs/{job.id}/supervisor.log")
    return text.rpartition(f": job {job.id} restart {job.restarts} on ")[2]


def states(job: int) -> set[str]:
    """What accounting calls all runs of a job."""
    text = run(CONTROLLER, f"sacct -X -n -P --duplicates -S now-1days -j {job} -o State")
    return {line.split()[0] for line in text.splitlines()}


def tier_job(tier: str) -> cluster.Job:
    return cluster.running_job(JOBS[tier])
