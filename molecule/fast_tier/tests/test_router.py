"""The model service in its Slurm job: how it sits on its node, who reaches it, which models it holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.lab import cluster
from tests.lab.ansible import ROOT
from tests.lab.cluster import CONTROLLER, GEMMA3, PORT, SERVICE_USER, SMOLLM2, TIER_NODE, TINY, run


def test_the_record_names_the_running_job_and_its_place() -> None:
    job = cluster.running_job()
    cluster.wait_served()
    record = json.loads(run(CONTROLLER, f"cat {cluster.REGISTRY}/fast.json"))
    assert (record["v"], record["tier"], record["host"], record["port"]) == (1, "fast", TIER_NODE, PORT)
    assert (record["job"], record["restart"]) == (job.id, job.restarts)
    assert set(record["models"]) >= {SMOLLM2, GEMMA3, TINY}
    cluster.wait_until(
        "the record beats",
        lambda: json.loads(run(CONTROLLER, f"cat {cluster.REGISTRY}/fast.json"))["seq"] > record["seq"],
        5,
    )


def test_two_models_stay_loaded_and_the_oldest_goes() -> None:
    for model in (SMOLLM2, GEMMA3, TINY):
        assert cluster.complete(model).status == 200, model
    states = cluster.model_states()
    assert {model for model, state in states.items() if state == "loaded"} == {GEMMA3, TINY}
    assert cluster.complete(SMOLLM2).status == 200
    states = cluster.model_states()
    assert {model for model, state in states.items() if state == "loaded"} == {TINY, SMOLLM2}


def memlock(pid: str | int) -> tuple[str, str]:
    """What a process may lock, soft and hard, in bytes or `unlimited`."""
    line = run(TIER_NODE, f"grep '^Max locked memory' /proc/{pid}/limits")
    soft, hard = line.split()[3:5]
    return soft, hard


@pytest.fixture
def low_limit() -> Iterator[str]:
    """The tier in a job of a slurmd whose own limit is low, but may be raised; gives how far."""
    slurmd = run(TIER_NODE, "systemctl show --property=MainPID --value slurmd")
    soft, hard = memlock(slurmd)

    def another_job() -> None:
        before = cluster.running_job().id
        run(CONTROLLER, f"runuser -u {SERVICE_USER} -- scancel {before}")
        cluster.wait_until("another job runs", lambda: cluster.running_job().id != before)
        cluster.wait_served()

    run(TIER_NODE, f"prlimit --pid={slurmd} --memlock=65536:{hard}")
    try:
        another_job()
        yield hard
    finally:
        run(TIER_NODE, f"prlimit --pid={slurmd} --memlock={soft}:{hard}")
    another_job()


def test_weights_are_locked_in_memory_as_far_as_slurmd_may_lock(low_limit: str) -> None:
    locked = {}
    for model in (TINY, SMOLLM2, GEMMA3):
        weights = json.loads((ROOT / f"inventories/lab/models/{model}.json").read_text())["tensor_bytes"]["total"]
        # Where the machine may not raise limits, a process may lock 8 MiB: room for the small model.
        if low_limit != "unlimited" and int(low_limit) < weights * 1.1:
            continue
        assert cluster.complete(model).status == 200
        pid = cluster.model_pid(model)
        assert memlock(pid) == memlock(cluster.router_pid()) == (low_limit, low_limit)
        found = re.search(r"VmLck:\s+(\d+) kB", run(TIER_NODE, f"cat /proc/{pid}/status"))
        assert found
        locked[model] = int(found[1]) << 10
        assert weights <= locked[model] <= weights * 1.1
    assert TINY in locked


def test_memory_is_bound_to_the_numa_node_of_the_gpu() -> None:
    assert cluster.complete(TINY).status == 200
    for pid in (cluster.router_pid(), cluster.model_pid(TINY)):
        policies = set(run(TIER_NODE, f"cut --delimiter=' ' --fields=2 /proc/{pid}/numa_maps").split())
        assert policies == {"bind:0"}


def test_it_runs_as_the_service_user_below_the_job() -> None:
    job = cluster.running_job().id
    for pid in (cluster.router_pid(), *cluster.pids(TIER_NODE, "llama-server .*--alias")):
        environment = run(TIER_NODE, f"tr '\\0' '\\n' < /proc/{pid}/environ")
        assert f"SLURM_JOB_ID={job}" in environment.splitlines()


def test_it_listens_on_the_cluster_address_only() -> None:
    lines = run(TIER_NODE, "ss --no-header --listening --tcp --numeric --processes").splitlines()
    listening = {line.split()[3] for line in lines if "llama-server" in line}
    outside = {where for where in listening if not where.startswith("127.0.0.1:")}
    assert outside == {f"{cluster.address(TIER_NODE)}:{PORT}"}


def test_an_unknown_model_is_refused_in_json_and_evicts_nothing() -> None:
    before = cluster.model_states()
    answer = cluster.complete("no-such-model")
    assert 400 <= answer.status < 500
    assert "no-such-model" in answer.json["error"]["message"]
    assert cluster.model_states() == before
