"""A tier of a 72B's shape over two RPC workers: 131072 tokens of context, and a long prompt read through both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.lab import cluster, split
from tests.lab.ansible import ROOT, succeed
from tests.lab.cluster import run
from tools import fetch_lab_sources

READY_SECONDS = 240
# A machine with two slow processors takes six minutes.
ANSWER_SECONDS = 20 * 60

MODEL = fetch_lab_sources.TINY_72B.removesuffix(".gguf")
PORT = 8081
HEAD, WORKERS = "vasp-01", ("vasp-02", "vasp-03")
CONTEXT_TOKENS = 131072
PROMPT_TOKENS = 16384
ANSWER_TOKENS = 4
# The first cluster's tier. One thread each: two wait for each other at thousands of small operations for each
# micro-batch, which costs more than it gains as soon as anything else runs on the machine.
TIER: dict[str, Any] = {
    "name": "reasoning",
    "kind": "layer_split",
    "job_name": "llama-72b",
    "gateway_port": PORT,
    "head": HEAD,
    "workers": list(WORKERS),
    "priority": 20,
    "model": MODEL,
    "context_tokens": CONTEXT_TOKENS,
    "kv_cache": {"k": "q4_0", "v": "f16"},
    "batch_tokens": 512,
    "ubatch_tokens": 64,
    "threads": 1,
}
PLAN = "/cluster/shared/ai/plans/reasoning.json"


def header() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((ROOT / f"inventories/lab/models/{MODEL}.json").read_text())
    return value


def model() -> dict[str, Any]:
    """The miniature as an inventory has it."""
    (source,) = (one for one in fetch_lab_sources.SOURCES if one.name == f"{MODEL}.gguf")
    return {
        "name": MODEL,
        "source": f"file:///srv/sources/{source.name}",
        "sha256": source.sha256,
        "size_bytes": header()["size_bytes"],
        "header": f"models/{MODEL}.json",
    }


def is_served() -> bool:
    """Whether the gateway has this model; the lab's own tier of that name has another."""
    answer = cluster.ask("/v1/models", port=PORT)
    return answer.status == 200 and answer.json["data"][0]["id"] == MODEL


@pytest.fixture(scope="module", autouse=True)
def _tier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The lab with this tier alone, while this module lasts."""
    inventory = tmp_path_factory.mktemp("inventory") / "shape.json"
    inventory.write_text(json.dumps({"models": [model()], "tiers": [TIER]}))
    succeed("playbooks/tiers.yml", "playbooks/gateway.yml", "-e", f"@{inventory}")
    cluster.wait_until("the gateway has the model", is_served, READY_SECONDS)
    yield
    succeed("playbooks/tiers.yml", "playbooks/gateway.yml")
    cluster.wait_served()
    split.wait_served()


@dataclass(frozen=True)
class Worker:
    """What a worker's RPC server has taken so far, by the kernel of its node."""

    processor_seconds: float
    resident_mib: float
    largest_mib: float
    received: int
    sent: int


def worker(name: str) -> Worker:
    (pid,) = cluster.pids(name, "ggml-rpc-server")
    ticks = run(name, f"cut -d ' ' -f 14,15 /proc/{pid}/stat").split()
    status = dict(line.split(":", 1) for line in run(name, f"cat /proc/{pid}/status").splitlines())
    kib = [int(status[key].split()[0]) for key in ("VmRSS", "VmHWM")]
    per_second = int(run(name, "getconf CLK_TCK"))
    return Worker(sum(map(int, ticks)) / per_second, kib[0] / 1024, kib[1] / 1024, *split.traffic(name))


def planned(name: str) -> dict[str, Any]:
    """The row of a worker's device in the plan, in MiB."""
    rows = json.loads(run(cluster.CONTROLLER, f"cat {PLAN}"))["memory"]
    row: dict[str, Any] = next(row for row in rows if row["device"] == f"{name} cpu")
    return row


def events(body: bytes) -> list[dict[str, Any]]:
    """What a stream carried before its `[DONE]`."""
    lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", lines[-3:]
    return [json.loads(line) for line in lines[:-1]]


def test_the_whole_context_is_allocated_on_both_workers() -> None:
    (entry,) = cluster.ask("/v1/models", port=PORT).json["data"]
    assert (entry["id"], entry["meta"]["n_ctx"]) == (MODEL, CONTEXT_TOKENS)
    for name in WORKERS:
        # llama.cpp clears the cache when it makes it, so all of it is resident.
        assert worker(name).resident_mib >= planned(name)["kv"] >= 400
    answer = cluster.ask("/v1/completions", {"model": MODEL, "prompt": [100] * (CONTEXT_TOKENS + 1)}, port=PORT)
    assert (answer.status, answer.json["error"]["n_ctx"]) == (400, CONTEXT_TOKENS)


def test_a_long_prompt_is_read_through_both_workers() -> None:
    before = {name: worker(name) for name in WORKERS}
    wish = {
        "model": MODEL,
        "prompt": [100 + number * 7919 % 20000 for number in range(PROMPT_TOKENS)],
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "stream": True,
        # Without it nothing is sent for minutes, and who waits cannot tell a slow prompt from a lost one.
        "return_progress": True,
        "stream_options": {"include_usage": True},
    }
    answer = cluster.ask("/v1/completions", wish, timeout=ANSWER_SECONDS, port=PORT)
    assert answer.status == 200, answer
    told = events(answer.body)
    assert told[-1]["timings"]["prompt_n"] == PROMPT_TOKENS
    assert told[-1]["usage"]["completion_tokens"] == ANSWER_TOKENS
    progress = [event["prompt_progress"]["processed"] for event in told if "prompt_progress" in event]
    assert progress == sorted(progress)
    assert progress[-1] == PROMPT_TOKENS

    after = {name: worker(name) for name in WORKERS}
    spent = {name: after[name].processor_seconds - before[name].processor_seconds for name in WORKERS}
    # Half of the layers each: neither was asked for form's sake.
    assert min(spent.values()) > 0.3 * sum(spent.values()) > 3, spent
    # To the first worker at least the embedding of each token, and as much from it to the next one, by the head.
    hidden = 4 * header()["n_embd"] * PROMPT_TOKENS
    assert after[WORKERS[0]].received - before[WORKERS[0]].received > hidden
    assert after[WORKERS[0]].sent - before[WORKERS[0]].sent > hidden
    assert after[WORKERS[1]].received - before[WORKERS[1]].received > hidden
    for name in WORKERS:
        assert after[name].largest_mib <= planned(name)["total"]
