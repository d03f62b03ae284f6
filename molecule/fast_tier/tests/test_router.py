"""The model service in its Slurm job: how it sits on its node, who reaches it, which models it holds."""

from __future__ import annotations

import json
import re

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, GEMMA3, PORT, SMOLLM2, TIER_NODE, TINY, run

WEIGHTS_BYTES = 6686976  # of TINY, as its header says


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


def test_weights_are_locked_in_memory() -> None:
    # The small one: where the machine may not raise limits, a process may lock 8 MiB.
    assert cluster.complete(TINY).status == 200
    status = run(TIER_NODE, f"cat /proc/{cluster.model_pid(TINY)}/status")
    locked = int(re.search(r"VmLck:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]
    assert WEIGHTS_BYTES <= locked <= WEIGHTS_BYTES * 1.1


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
