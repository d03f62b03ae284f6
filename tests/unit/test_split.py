"""The life of a layer-split tier: one head and its workers, whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gleaner import bounded, heartbeat, joblog, record, supervisor, tensor_cache
from gleaner.states import Exit
from tests.unit.fakes import Home, alive, home, job_text, wait_for

TIER = "reasoning"
NODES = {"vasp-01": "127.0.0.1", "vasp-02": "127.0.0.2", "vasp-03": "127.0.0.3"}
RPC = {name: address.replace("127.0.0.", "127.0.1.") for name, address in NODES.items()}
WORKERS = ("vasp-02", "vasp-03")


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


@pytest.fixture
def log() -> Iterator[joblog.File]:
    """What a supervisor in this very process says."""
    made = joblog.File(None, "large 41.0 vasp-01")
    yield made
    made.close(5)


def plan(place: Home, **more: Any) -> Path:
    value = {
        "v": 1,
        "cluster": "test",
        "tier": TIER,
        "kind": "layer_split",
        "job_name": "llama-72b",
        "slurm": {"cpus_per_node": 2, "gpus_per_node": 1, "signal_seconds": 25},
        "engine": {
            "prefix": str(place.engine.parent),
            "flash_attention": False,
            "memory": str(place.root / "engine.json"),
        },
        "nodes": {
            name: {
                "address": address,
                "rpc_address": RPC[name],
                "numa_node": None,
                "role": "worker" if name in WORKERS else "head",
            }
            for name, address in NODES.items()
        },
        "server": {"node_port": place.port, "args": ["--rpc", "somewhere"], "environment": {}},
        "worker": {
            "port": place.port + 1 if place.port < 65535 else place.port - 1,
            "args": ["--threads", "2", "--cache"],
            "environment": {"EXTRA": "yes"},
            "cache": {"directory": str(place.root / "cache"), "limit_mib": 1},
            # These are scripts, whose interpreter a confined process could not start.
            "confined": False,
        },
        "models": ["large"],
        "drain_seconds": 3,
        "load_timeout_seconds": 20,
        **more,
    }
    cache = place.root / "cache"
    cache.mkdir(exist_ok=True)
    os.chown(cache, place.root.stat().st_uid, -1)
    path = place.plans / f"{TIER}.json"
    place.set(path, json.dumps(value))
    return path


def supervise(place: Home, nodes: str = "vasp-01,vasp-02,vasp-03", **more: Any) -> subprocess.Popen[str]:
    return place.start(
        "supervise",
        "--plan",
        str(plan(place, **more)),
        SLURM_JOB_ID="41",
        SLURM_JOB_NODELIST=nodes,
        SLURM_RESTART_COUNT="0",
        SLURMD_NODENAME="vasp-01",
        FAKE_NODES=nodes.replace(",", " "),
    )


def served(place: Home) -> record.Record | None:
    reading = record.read(place.registry, TIER)
    return reading if isinstance(reading, record.Record) else None


def nothing_left(place: Home) -> bool:
    return not any(alive(start["pid"]) for start in [*place.started, *place.workers])


def agents(place: Home, child: subprocess.Popen[str]) -> dict[str, int]:
    """The agent of each node, known by its program and its environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            # Other tests run at the same time, whose jobs have the same number and nodes: the program is this one's.
            if not entry.name.isdigit() or str(place.pyz).encode() not in words or b"agent" not in words:
                continue
            environment = dict(
                word.split("=", 1) for word in (entry / "environ").read_text().split("\0") if "=" in word
            )
            if environment.get("SLURM_JOB_ID") == "41" and "GLEANER_TOKEN" in environment:
                found[environment["SLURMD_NODENAME"]] = int(entry.name)
    assert child.poll() is None
    return found


def test_workers_come_first_and_are_probed_once(place: Home) -> None:
    child = supervise(place)
    first = wait_for(lambda: served(place))
    assert (first.host, first.port, first.models) == ("vasp-01", place.port, ("large",))
    assert sorted(worker["argv"][2] for worker in place.workers) == ["127.0.1.2", "127.0.1.3"]
    for worker in place.workers:
        assert worker["argv"][-3:] == ["--threads", "2", "--cache"]
        assert worker["environment"]["EXTRA"] == "yes"
        assert worker["environment"]["LLAMA_CACHE"] == str(place.root / "cache")
    (server,) = place.started
    assert server["argv"][1:3] == ["--rpc", "somewhere"]
    assert server["argv"][3:5] == ["--host", "127.0.0.1"]
    time.sleep(2)
    # A worker's port is looked at once, before the head comes, and never again.
    assert sorted((place.server / "probes").read_text().split()) == ["127.0.1.2", "127.0.1.3"]
    logs = place.root / "ai" / "logs" / "41"
    assert {path.name for path in logs.glob("*.log")} == {"head.log", "rpc-vasp-02.log", "rpc-vasp-03.log"}
    assert child.poll() is None


def test_the_head_waits_for_the_last_worker(place: Home) -> None:
    place.set(place.server / "deaf-127.0.1.3")
    child = supervise(place, load_timeout_seconds=3)
    assert child.wait(15) == Exit.LOAD_TIMEOUT
    assert "no worker could be reached within load_timeout_seconds=3" in place.log("supervise")
    assert place.started == []
    assert nothing_left(place)


@pytest.mark.parametrize("who", ["worker", "head"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_what_dies_or_freezes_takes_all_down_and_all_come_back(place: Home, who: str, how: signal.Signals) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    before = [*place.workers, *place.started]
    victim = (place.workers if who == "worker" else place.started)[0]["pid"]
    place.set(place.server / "loading")
    os.kill(victim, how)
    wait_for(lambda: served(place) is None, 5.0)
    wait_for(lambda: not any(alive(start["pid"]) for start in before), 5.0)
    (place.server / "loading").unlink()
    wait_for(lambda: served(place))
    assert (len(place.workers), len(place.started)) == (4, 2)
    assert child.poll() is None


def test_an_agent_that_is_gone_ends_the_job_and_everything_in_it(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    os.kill(agents(place, child)["vasp-03"], signal.SIGKILL)
    assert child.wait(10) == Exit.AGENT_LOST
    assert served(place) is None
    wait_for(lambda: nothing_left(place), 5.0)


@pytest.mark.parametrize(("network", "name"), [(0, "RPC"), (1, "cluster")])
def test_a_node_that_is_silent_on_one_network_is_lost(
    place: Home, capfd: pytest.CaptureFixture[str], log: joblog.File, network: int, name: str
) -> None:
    where = supervisor.JobEnvironment(41, 0, "vasp-01", tuple(NODES))
    child = supervisor.Supervisor(
        supervisor.Plan.load(plan(place)), where, place.registry, place.root, log, bounded.Patience(1)
    )
    child.phase = supervisor.Phase.SERVING
    with contextlib.ExitStack() as stack:
        stack.callback(child.signals.close)
        stack.callback(child.selector.close)
        lines = {}
        for number, listener in enumerate(child.listeners):
            stack.callback(listener.close)
            for node in NODES:
                stack.enter_context(socket.create_connection(listener.getsockname()))
                lines[node, number] = listener.accept()[0]
        child.agents = {node: heartbeat.Channel(lines[node, 0]) for node in NODES}
        child.pulses = {(node, 1): heartbeat.Channel(lines[node, 1]) for node in NODES}
        silent = child.agents["vasp-03"] if network == 0 else child.pulses["vasp-03", 1]
        silent.heard -= heartbeat.SILENCE_SECONDS + 1
        child._hear_agents()
        for channel in [*child.agents.values(), *child.pulses.values()]:
            channel.close()
    assert (child.phase, child.exit) == (supervisor.Phase.STOPPING, Exit.AGENT_LOST)
    assert f"agent on vasp-03: silent for 5 s on the {name} network" in capfd.readouterr().err


def test_a_supervisor_that_is_gone_leaves_nothing_behind(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    os.kill(child.pid, signal.SIGKILL)
    wait_for(lambda: nothing_left(place), 10.0)


def test_preemption_drains_stops_all_and_requeues(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:09:00"))
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED
    assert place.calls_of("scontrol requeue")
    assert nothing_left(place)


def test_fewer_nodes_than_the_plan_needs_are_refused(place: Home) -> None:
    child = supervise(place, nodes="vasp-01,vasp-02")
    assert child.wait(10) == Exit.REFUSED
    assert "and needs all" in place.log("supervise")


def test_the_cache_of_tensors_is_pruned(place: Home) -> None:
    cache = place.root / "cache" / "rpc"
    cache.mkdir(parents=True)
    (place.root / "cache" / tensor_cache.MARK).touch()
    for number in range(4):
        (cache / f"{number}").write_bytes(b"x" * 400_000)
        os.utime(cache / f"{number}", (number, number))
    for path in [place.root / "cache", cache, *cache.iterdir()]:
        os.chown(path, place.root.stat().st_uid, -1)
    supervise(place)
    wait_for(lambda: served(place))
    # Both workers of this test prune one folder, perhaps at the same time.
    assert {path.name for path in cache.iterdir()} == {"2", "3"}


def test_a_tier_that_is_ready_marks_what_its_workers_were_sent(place: Home) -> None:
    mark = place.root / "cache" / tensor_cache.MARK
    place.set(place.server / "loading")
    supervise(place)
    wait_for(lambda: place.started)
    torn = place.root / "cache" / "tensor"
    place.set(torn)
    assert not mark.exists()
    os.kill(place.workers[0]["pid"], signal.SIGKILL)
    wait_for(lambda: not torn.exists())
    place.set(torn)
    (place.server / "loading").unlink()
    wait_for(lambda: served(place))
    wait_for(mark.exists)
