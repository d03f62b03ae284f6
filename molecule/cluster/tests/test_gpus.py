"""A GPU that is not as declared, or that cannot be trusted, is refused before a job is spent on it.

The lab's nodes have a stand-in for `nvidia-smi`, which answers from a file as the driver of a V100S does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab import cluster
from tests.lab.ansible import Run, playbook
from tests.lab.cluster import CONTROLLER, SERVICE_USER, TIER_NODE, run

STATE = "/etc/lab-gpus.json"
BUS_ID = "0000:3b:00.0"
NUMA_NODE = f"/run/lab-gpus/sys/bus/pci/devices/{BUS_ID}/numa_node"
DECLARED = {"model": "v100s", "memory_mib": 32768, "numa_node": 0}
STRANGER = {"gpu_bus_id": f"0000{BUS_ID.upper()}", "pid": 1, "process_name": "init"}


@contextmanager
def gpu(
    process: dict[str, Any] | None = None, missing: bool = False, numa_node: int = 0, **changes: Any
) -> Iterator[None]:
    """The one GPU of the fast tier's node with other answers."""
    before, beside = run(TIER_NODE, f"cat {STATE}"), run(TIER_NODE, f"cat {NUMA_NODE}")
    state = json.loads(before)
    state["gpus"][0].update(changes)
    state["gpus"] = [] if missing else state["gpus"]
    state["processes"] = [process] if process else []
    try:
        cluster.put(TIER_NODE, STATE, json.dumps(state))
        cluster.put(TIER_NODE, NUMA_NODE, str(numa_node))
        yield
    finally:
        cluster.put(TIER_NODE, STATE, before)
        cluster.put(TIER_NODE, NUMA_NODE, beside)


def provision(*arguments: str) -> Run:
    return playbook("playbooks/tiers.yml", "--limit", TIER_NODE, "--tags", "tier_node", *arguments)


def spent() -> tuple[list[str], set[tuple[int, int]]]:
    """The jobs of the service user: each start that accounting knows, and what is in the queue with its restarts."""
    options = "--allocations --duplicates --starttime=2020-01-01 --noheader --parsable2 --format=JobID"
    booked = run(CONTROLLER, f"sacct --user={SERVICE_USER} {options}").splitlines()
    queued = [job for job in cluster.jobs() if job.user == SERVICE_USER and job.state != "COMPLETING"]
    return sorted(booked), {(job.id, job.restarts) for job in queued}


@pytest.mark.parametrize(
    ("changes", "declared", "said"),
    [
        (
            {"memory.total": 16384},
            1,
            "hostvars[vasp-02].gpus: got gpus[0] (0000:3b:00.0): memory_mib 32768, vasp-02 has 16384: "
            "write gpus: [{model: v100s, memory_mib: 16384, numa_node: 0}]",
        ),
        (
            {"numa_node": 1},
            1,
            "hostvars[vasp-02].gpus: got gpus[0] (0000:3b:00.0): numa_node 0, on vasp-02 it sits beside 1: "
            "write gpus: [{model: v100s, memory_mib: 32768, numa_node: 1}]",
        ),
        ({"missing": True}, 1, "hostvars[vasp-02].gpus: got 1 GPU(s), the driver on vasp-02 has none"),
        (
            {},
            2,
            "hostvars[vasp-02].gpus: got 2 GPU(s), vasp-02 has 1: "
            "write gpus: [{model: v100s, memory_mib: 32768, numa_node: 0}]",
        ),
        (
            {"ecc.errors.uncorrected.volatile.total": 2},
            1,
            "GPU 0 (0000:3b:00.0) of vasp-02: 2 uncorrected ECC error(s) since the driver was loaded: drain the node",
        ),
        ({"process": STRANGER}, 1, "is held by pid 1 (init), which is no job of Slurm"),
    ],
    ids=["memory", "NUMA", "missing", "fewer", "ECC", "process"],
)
def test_a_gpu_that_a_plan_must_not_count_on_is_refused(changes: dict[str, Any], declared: int, said: str) -> None:
    before = spent()
    with gpu(**changes):
        done = provision("-e", json.dumps({"gpus": [DECLARED] * declared}))
    assert done.code != 0
    assert said in done.text
    assert done.changed == {TIER_NODE: 0}
    assert spent() == before


def test_a_process_of_a_job_is_no_stranger() -> None:
    server = cluster.router_pid()
    with gpu({**STRANGER, "pid": server, "process_name": "llama-server"}):
        done = provision()
    assert done.code == 0, done.output
    assert done.changed == {TIER_NODE: 0}
