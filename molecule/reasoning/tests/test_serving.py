"""The layer-split tier in its Slurm job: both tiers at once, thoughts apart from answers, workers out of sight."""

from __future__ import annotations

import json
import re

import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.lab import cluster, split
from tests.lab.cluster import CONTROLLER, HEAD, RPC_PORT, SMOLLM2, SPLIT_JOB, SPLIT_PORT, THINKING, WORKERS, run

(WORKER,) = WORKERS
ALIAS = "OR1-Behemoth"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "What is a GPU?"},
]


@pytest.fixture(autouse=True)
def _served() -> None:
    split.wait_served()


def test_both_tiers_serve_at_once_on_nodes_of_their_own() -> None:
    job = cluster.running_job(SPLIT_JOB)
    assert (job.user, job.qos) == (cluster.SERVICE_USER, "ai_opportunistic")
    assert run(CONTROLLER, f"scontrol show hostnames {job.node}").split() == [HEAD, WORKER]
    assert cluster.running_job().node == cluster.TIER_NODE
    assert cluster.complete(SMOLLM2).status == 200
    assert cluster.complete(THINKING, port=SPLIT_PORT).status == 200


def test_the_seeds_name_of_the_model_is_answered_and_listed() -> None:
    answer = split.client().chat.completions.create(model=ALIAS, messages=MESSAGES, max_tokens=40, temperature=0)
    assert answer.choices[0].message.content
    (entry,) = cluster.ask("/v1/models", port=SPLIT_PORT).json["data"]
    assert set(entry["aliases"]) == {ALIAS, THINKING}
    # The engine keeps a set: what comes first in ASCII is the name that its other answers have.
    assert (entry["id"], answer.model) == (ALIAS, ALIAS)


def test_thoughts_arrive_apart_from_the_answer() -> None:
    answer = split.client().chat.completions.create(model=THINKING, messages=MESSAGES, max_tokens=40, temperature=0)
    message = answer.choices[0].message
    assert message.content
    thought = getattr(message, "reasoning_content", "")
    assert thought
    assert "<think>" not in message.content

    stream = split.client().chat.completions.create(
        model=THINKING, messages=MESSAGES, max_tokens=40, temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    thoughts = [text for delta in deltas if (text := getattr(delta, "reasoning_content", None))]
    contents = [delta.content for delta in deltas if delta.content]
    assert ("".join(thoughts), "".join(contents)) == (thought, message.content)
    assert len(thoughts) > 3


def test_head_and_worker_are_started_as_planned() -> None:
    plan = json.loads(run(CONTROLLER, "cat /cluster/shared/ai/plans/reasoning.json"))
    head = run(HEAD, f"tr '\\0' '\\n' < /proc/{split.head_pid()}/cmdline").split("\n")
    place = ["--host", cluster.address(HEAD), "--port", str(SPLIT_PORT)]
    assert head[1:] == [*plan["server"]["args"], *place]
    flags = dict(zip(head[1:], head[2:]))
    assert {name: flags[name] for name in ("--split-mode", "--parallel", "--timeout", "--fit", "--cache-ram")} == {
        "--split-mode": "layer",
        "--parallel": "1",
        "--timeout": "600",
        "--fit": "off",
        "--cache-ram": "0",
    }
    assert (flags["--flash-attn"], flags["--load-mode"], flags["--reasoning-format"]) == ("off", "mlock", "deepseek")
    assert flags["--rpc"] == f"{cluster.rpc_address(WORKER)}:{RPC_PORT}"
    worker = run(WORKER, f"tr '\\0' '\\n' < /proc/{split.worker_pid()}/cmdline").split("\n")
    assert worker[1:5] == ["--host", cluster.rpc_address(WORKER), "--port", str(RPC_PORT)]
    assert "--cache" in worker
    for node, pid in ((HEAD, split.head_pid()), (WORKER, split.worker_pid())):
        policies = set(run(node, f"cut --delimiter=' ' --fields=2 /proc/{pid}/numa_maps").split())
        assert policies == {"bind:0"}
        environment = run(node, f"tr '\\0' '\\n' < /proc/{pid}/environ").splitlines()
        assert f"SLURM_JOB_ID={cluster.running_job(SPLIT_JOB).id}" in environment


def test_the_layers_are_where_the_plan_has_them() -> None:
    """The worker holds the weights: the head's process has little more than its own tables."""
    resident = {
        node: int(re.findall(r"VmRSS:\s+(\d+) kB", run(node, f"cat /proc/{pid}/status"))[0]) >> 10
        for node, pid in ((HEAD, split.head_pid()), (WORKER, split.worker_pid()))
    }
    plan = json.loads(run(CONTROLLER, "cat /cluster/shared/ai/plans/reasoning.json"))
    (row,) = (row for row in plan["memory"] if row["layers"])
    assert row["device"] == f"{WORKER} cpu"
    assert row["weights"] + row["kv"] <= resident[WORKER] <= plan["slurm"]["mem_mib"]


def test_a_worker_listens_on_the_rpc_network_alone_and_can_do_little() -> None:
    lines = run(WORKER, "ss --no-header --listening --tcp --numeric --processes").splitlines()
    assert {line.split()[3] for line in lines if "ggml-rpc" in line} == {f"{cluster.rpc_address(WORKER)}:{RPC_PORT}"}
    status = run(WORKER, f"cat /proc/{split.worker_pid()}/status")
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    log = run(CONTROLLER, f"cat /cluster/shared/ai/logs/{cluster.running_job(SPLIT_JOB).id}/supervisor.log")
    assert "does not keep it from" not in log


TRY = "timeout 3 bash -c 'exec 3<>/dev/tcp/{}/{}'"


@pytest.mark.parametrize("network", ["cluster", "rpc"])
def test_strangers_reach_no_rpc_port(network: str) -> None:
    """From the controller, which is no node, by its addresses on both networks."""
    place = cluster.rpc_address(WORKER)
    source = cluster.rpc_address(CONTROLLER) if network == "rpc" else cluster.address(CONTROLLER)
    asked = cluster.host(CONTROLLER).run(
        f"timeout 5 python3 -c \"import socket; socket.create_connection(('{place}', {RPC_PORT}), 3, ('{source}', 0))\""
    )
    assert asked.rc != 0
    # At once: a server with a client of its own would let it wait. And it is the port's, not the node's, refusal.
    assert "ConnectionRefusedError" in asked.stderr, asked.stderr
    ssh = cluster.host(CONTROLLER).run(TRY.format(place, 22))
    assert ssh.rc == 0
    assert cluster.complete(THINKING, port=SPLIT_PORT).status == 200


def test_the_kernel_gives_the_rpc_port_to_nobody_else() -> None:
    for node in cluster.NODES:
        assert run(node, "cat /proc/sys/net/ipv4/ip_local_reserved_ports") == str(RPC_PORT)


def test_other_users_of_a_node_reach_no_rpc_port() -> None:
    for node in (HEAD, WORKER, cluster.TIER_NODE):
        command = TRY.format(cluster.rpc_address(WORKER), RPC_PORT)
        asked = cluster.host(node).run(f"runuser -u alice -- {command}")
        assert asked.rc == 1, (node, asked)
        assert "refused" in asked.stderr.lower(), asked.stderr
    assert cluster.complete(THINKING, port=SPLIT_PORT).status == 200


def test_a_tensor_that_was_not_written_to_its_end_is_not_believed() -> None:
    said = split.says()
    torn = run(WORKER, "find /scratch/ai/rpc-cache/rpc -type f").splitlines()[0]
    run(WORKER, f"truncate --size=1000 {torn}")
    server = split.head_pid()
    run(HEAD, f"kill -KILL {server}")
    cluster.wait_until("another head", lambda: split.parts()[HEAD] not in ([], [server]), 30)
    split.wait_served()
    assert split.says() == said
    assert run(WORKER, f"stat --format=%s {torn}") != "1000"


def test_large_tensors_are_sent_once_and_then_kept_by_the_worker() -> None:
    kept = int(run(WORKER, "du --summarize --bytes /scratch/ai/rpc-cache").split()[0])
    plan = json.loads(run(CONTROLLER, "cat /cluster/shared/ai/plans/reasoning.json"))
    weights = next(row["weights"] for row in plan["memory"] if row["layers"]) << 20
    # Of this small model only the output is larger than the 10 MiB from which on the engine keeps a tensor.
    assert 25 << 20 < kept <= plan["worker"]["cache"]["limit_mib"] << 20
    assert run(WORKER, "stat --format='%U %a' /scratch/ai/rpc-cache") == f"{cluster.SERVICE_USER} 700"
    (before, _), server = split.traffic(WORKER), split.head_pid()
    run(HEAD, f"kill -KILL {server}")
    cluster.wait_until("another head", lambda: split.parts()[HEAD] not in ([], [server]), 30)
    split.wait_served()
    assert split.traffic(WORKER)[0] - before < weights - 0.8 * kept
