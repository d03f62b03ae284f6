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
from tests.lab.cluster import TIER_NODE, run

STATE = "/etc/lab-gpus.json"


@contextmanager
def gpu(process: dict[str, Any] | None = None, **changes: Any) -> Iterator[None]:
    """The one GPU of the fast tier's node with other answers."""
    before = run(TIER_NODE, f"cat {STATE}")
    state = json.loads(before)
    state["gpus"][0].update(changes)
    state["processes"] = [process] if process else []
    cluster.put(TIER_NODE, STATE, json.dumps(state))
    try:
        yield
    finally:
        cluster.put(TIER_NODE, STATE, before)


def provision() -> Run:
    return playbook("playbooks/tiers.yml", "--limit", TIER_NODE, "--tags", "tier_node")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"memory.total": 16384},
            "hostvars[vasp-02].gpus: got gpus[0] (0000:3b:00.0): memory_mib 32768, vasp-02 has 16384: "
            "write gpus: [{model: v100s, memory_mib: 16384, numa_node: 0}]",
        ),
        (
            {"process": {"gpu_bus_id": "00000000:3B:00.0", "pid": 1, "process_name": "init"}},
            "is held by pid 1 (init), which is no job of Slurm",
        ),
    ],
    ids=["memory", "process"],
)
def test_a_gpu_that_a_plan_must_not_count_on_is_refused(changes: dict[str, Any], said: str) -> None:
    with gpu(**changes):
        done = provision()
    assert done.code != 0
    assert said in done.text
    assert done.changed == {TIER_NODE: 0}


def test_a_process_of_a_job_is_no_stranger() -> None:
    server = cluster.router_pid()
    with gpu({"gpu_bus_id": "00000000:3B:00.0", "pid": server, "process_name": "llama-server"}):
        done = provision()
    assert done.code == 0, done.output
    assert done.changed == {TIER_NODE: 0}
