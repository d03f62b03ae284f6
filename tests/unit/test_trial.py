"""A node that comes back is tried with the programs of its tiers, and nothing of them is left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gleaner import keeper, smoke, status, trial
from gleaner.supervisor import Plan
from gleaner.trial import EXIT_FAILED, EXIT_UNSEEN
from tests.unit.fakes import Home, alive, home, wait_for

WORKER = {
    "port": 50052,
    "args": ["--threads", "2", "--cache"],
    "environment": {},
    "cache": {"directory": "/nonexistent", "limit_mib": 1},
    "confined": False,
}


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        (made.root / "models").mkdir()
        (made.root / "models" / "one.gguf").write_text("larger than the other")
        (made.root / "models" / "two.gguf").write_text("small")
        yield made


def plan(place: Home, tier: str = "fast", **more: Any) -> Path:
    node = {"address": "127.0.0.1", "rpc_address": "127.0.0.1", "numa_node": None}
    arguments = ["--models-dir", str(place.root / "models"), "--models-max", "2", "--ctx-size", "16384"]
    value = {
        "v": 1,
        "tier": tier,
        "kind": "router",
        "slurm": {"cpus_per_node": 2, "gpus_per_node": 1, "signal_seconds": 25},
        "engine": {"prefix": str(place.engine.parent), "memory": str(place.root / "engine.json")},
        "nodes": {"vasp-02": {**node, "role": "router"}},
        "server": {
            "node_port": place.port,
            "args": [*arguments, "--flash-attn", "off", "--threads", "2", "--gpu-layers", "999"],
            "environment": {},
        },
        "models": ["one", "two", "three"],
        "drain_seconds": 3,
        "load_timeout_seconds": 20,
        **more,
    }
    path = place.plans / f"{tier}.json"
    place.set(path, json.dumps(value))
    return path


def split(place: Home) -> Path:
    node = {"address": "127.0.0.1", "rpc_address": "127.0.0.1", "numa_node": None}
    server = {
        "node_port": place.port,
        "args": ["--model", "/scratch/ai/models/or1.gguf", "--rpc", "10.0.0.1:50052", "--gpu-layers", "999"],
        "environment": {},
    }
    nodes = {"vasp-01": {**node, "role": "head"}, "vasp-03": {**node, "role": "worker"}}
    return plan(place, "reasoning", kind="layer_split", nodes=nodes, server=server, worker=WORKER, models=["or1"])


def ended(place: Home, node: str = "vasp-02") -> int:
    return place.start("trial", "node", f"--plans={place.plans}", f"--node={node}").wait(60)


def nothing_left(place: Home) -> bool:
    return not any(alive(start["pid"]) for start in [*place.started, *place.workers])


def test_the_smallest_model_answers_on_the_loopback_address_and_is_gone(place: Home) -> None:
    plan(place)
    assert ended(place) == 0, place.log("trial")
    assert "fast: router: a completion of 8 tokens by two" in place.log("trial")
    (start,) = place.started
    words = " ".join(start["argv"][1:])
    assert words.startswith(f"--model {place.root}/models/two.gguf --ctx-size 256 --parallel 1 --flash-attn off")
    assert "--gpu-layers 999 --host 127.0.0.1 --port " in words
    assert len(start["environment"]["LLAMA_API_KEY"]) == 64
    wait_for(lambda: nothing_left(place))


def test_a_server_that_dies_is_told_with_its_last_words(place: Home) -> None:
    plan(place)
    place.set(place.server / "dies")
    assert ended(place) == EXIT_FAILED
    assert "error: fast: llama-server ended with 7" in place.log("trial")


def test_an_answer_without_tokens_fails(place: Home) -> None:
    plan(place)
    place.set(place.server / "mute")
    assert ended(place) == EXIT_FAILED
    assert "error: fast: the answer has no tokens" in place.log("trial")
    wait_for(lambda: nothing_left(place))


def test_a_server_that_is_never_ready_is_ended(place: Home) -> None:
    plan(place, load_timeout_seconds=2)
    place.set(place.server / "loading")
    assert ended(place) == EXIT_FAILED
    assert "llama-server was not ready within 2 s" in place.log("trial")
    wait_for(lambda: nothing_left(place))


def test_a_trial_that_is_told_to_end_leaves_nothing(place: Home) -> None:
    plan(place)
    place.set(place.server / "loading")
    child = place.start("trial", "node", f"--plans={place.plans}", "--node=vasp-02")
    wait_for(lambda: place.started)
    child.terminate()
    assert child.wait(20) == 143
    wait_for(lambda: nothing_left(place))


def test_a_changed_engine_is_not_started(place: Home) -> None:
    plan(place)
    place.set(place.engine / "llama-server", "other bytes")
    assert ended(place) == EXIT_FAILED
    assert "the file was changed" in place.log("trial")
    assert place.started == []


def test_a_worker_offers_its_devices_to_the_engine(place: Home) -> None:
    split(place)
    place.set(place.server / "devices", "Available devices:\n  RPC0: 127.0.0.1:50052 (32768 MiB)\n")
    assert ended(place, "vasp-03") == 0, place.log("trial")
    assert "reasoning: worker: the RPC server offers RPC0: 127.0.0.1:50052 (32768 MiB)" in place.log("trial")
    assert "--cache" not in place.workers[0]["argv"]
    wait_for(lambda: nothing_left(place))


def test_a_worker_without_a_device_fails(place: Home) -> None:
    split(place)
    place.set(place.server / "devices", "Available devices:\n")
    assert ended(place, "vasp-03") == EXIT_FAILED
    assert "the RPC server offers no device" in place.log("trial")


def test_a_head_computes_one_layer_without_its_workers(place: Home) -> None:
    loaded = Plan.load(split(place))
    assert trial.server_arguments(loaded, trial.role_of(loaded, "vasp-01")) == [
        "--model", "/scratch/ai/models/or1.gguf", "--ctx-size", "256", "--parallel", "1", "--gpu-layers", "1",
    ]  # fmt: skip


def test_a_node_of_no_tier_has_nothing_to_try(place: Home) -> None:
    plan(place)
    assert ended(place, "vasp-09") == 0
    assert "no tier names vasp-09" in place.log("trial")
    assert place.started == []


def test_a_node_without_models_is_told(place: Home) -> None:
    plan(place, models=["three"])
    assert ended(place) == EXIT_FAILED
    assert "no model of three is here: run playbooks/tiers.yml" in place.log("trial")


def line(**more: Any) -> dict[str, Any]:
    found = {"tier": "fast", "state": "queued", "job": 41, "node": None, "reason": "Resources", "why": None}
    return {**found, "failure": None, "models": ["one"], **more}


SERVING = {"state": "serving", "reason": None, "node": "vasp-[02-03]"}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Follow one tier that is seen so, one look after the other."""
    monkeypatch.setattr(trial, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(keeper, "load_state", lambda _: {})

    def watch(*looks: dict[str, Any], seconds: float = 5.0, node: str = "vasp-02") -> int:
        left = list(looks)
        monkeypatch.setattr(status, "look", lambda *_: [left.pop(0) if len(left) > 1 else left[0]])
        config: Any = SimpleNamespace(tiers=(SimpleNamespace(tier="fast", gateway_port=1),))
        return trial.watch_tiers(config, Path("/nonexistent"), node, "127.0.0.1", ["fast"], seconds)

    return watch


def test_a_tier_that_answers_over_the_node_ends_the_wait(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "completion", lambda *_: None)
    assert watched(line(), line(state="loading", node="vasp-02"), line(**SERVING)) == 0


def test_a_tier_that_serves_elsewhere_says_nothing_of_the_node(watched: Any, capfd: Any) -> None:
    assert watched(line(state="serving", reason=None, node="vasp-01"), seconds=0.1) == EXIT_UNSEEN
    assert "no answer of fast over vasp-02: serving on vasp-01" in capfd.readouterr().err


def test_a_tier_that_waits_for_its_gpus_does_not_blame_the_node(watched: Any, capfd: Any) -> None:
    assert watched(line(), seconds=0.1) == EXIT_UNSEEN
    assert "no answer of fast over vasp-02: queued (Resources)" in capfd.readouterr().err


def test_a_tier_that_fails_twice_on_the_node_does(watched: Any, capfd: Any) -> None:
    here = line(state="loading", reason=None, node="vasp-02")
    paused = line(state="paused", job=None, reason=None, failure="job 41 failed")
    again = line(state="paused", job=None, reason=None, failure="job 42 failed")
    assert watched(here, paused, here, again) == EXIT_FAILED
    assert "fast failed with the node: job 41 failed; job 42 failed" in capfd.readouterr().err


def test_a_tier_that_fails_elsewhere_does_not(watched: Any) -> None:
    there = line(state="loading", reason=None, node="vasp-01")
    paused = line(state="paused", job=None, reason=None, failure="job 41 failed")
    again = line(state="paused", job=None, reason=None, failure="job 42 failed")
    assert watched(there, paused, there, again, seconds=0.2) == EXIT_UNSEEN


def test_a_tier_that_is_held_is_not_waited_for(watched: Any, capfd: Any) -> None:
    held = line(state="held", job=None, reason=None, why="held by root")
    assert watched(held, seconds=3600) == EXIT_UNSEEN
    assert "held (held by root)" in capfd.readouterr().err
