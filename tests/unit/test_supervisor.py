"""The router tier's life, with real processes, sockets and signals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gleaner import bounded, events, joblog, life, line, record, supervisor
from gleaner.engine import Manifest, sums
from gleaner.events import Kind
from gleaner.states import Cause, Exit
from gleaner.supervisor import Plan, PlanError
from tests.unit.fakes import SERVER_KEY, Home, alive, home, job_text, wait_for

TIER = "fast"
SOURCE = Path(supervisor.__file__).parent.parent


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


@pytest.fixture
def log() -> Iterator[joblog.File]:
    """What a supervisor in this very process says."""
    made = joblog.File(None, "fast 41.1 vasp-02")
    yield made
    made.close(5)


def plan(place: Home, **more: Any) -> Path:
    value = {
        "v": 1,
        "cluster": "test",
        "tier": TIER,
        "kind": "router",
        "job_name": "llama-14b",
        "slurm": {"cpus_per_node": 2, "gpus_per_node": 1, "signal_seconds": 25},
        "engine": {
            "prefix": str(place.engine.parent),
            "flash_attention": False,
            "memory": str(place.root / "engine.json"),
        },
        "nodes": {"vasp-02": {"address": "127.0.0.1", "rpc_address": "127.0.0.1", "numa_node": None}},
        "server": {"node_port": place.port, "args": ["--models-max", "2"], "environment": {"EXTRA": "yes"}},
        "models": ["one", "two"],
        "drain_seconds": 3,
        "load_timeout_seconds": 20,
        **more,
    }
    path = place.plans / f"{TIER}.json"
    place.set(path, json.dumps(value))
    return path


def supervise(place: Home, **more: Any) -> subprocess.Popen[str]:
    return place.start(
        "supervise",
        "--plan",
        str(plan(place, **more)),
        SLURM_JOB_ID="41",
        SLURM_JOB_NODELIST="vasp-02",
        SLURM_RESTART_COUNT="1",
        SLURMD_NODENAME="vasp-02",
    )


def served(place: Home) -> record.Record | None:
    reading = record.read(place.registry, TIER)
    return reading if isinstance(reading, record.Record) else None


def healthy(place: Home) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{place.port}/health", timeout=2) as answer:
        return bool(answer.status == 200)


def nothing_left(place: Home) -> bool:
    child = int((place.server / "child").read_text())
    return not alive(child) and not any(alive(start["pid"]) for start in place.started)


def test_serves_and_beats(place: Home) -> None:
    child = supervise(place)
    first = wait_for(lambda: served(place))
    assert (first.job, first.restart, first.host, first.port) == (41, 1, "vasp-02", place.port)
    assert first.models == ("one", "two")
    assert healthy(place)
    wait_for(lambda: (served(place) or first).seq > first.seq + 1)
    start = place.started[0]
    assert start["argv"][1:] == ["--models-max", "2", "--host", "127.0.0.1", "--port", str(place.port)]
    assert start["environment"]["EXTRA"] == "yes"
    assert start["environment"]["GGML_NO_BACKTRACE"] == "1"
    assert not [name for name in start["environment"] if name.startswith("GLEANER_")]
    log = place.root / "ai" / "logs" / "41" / "router.log"
    wait_for(lambda: "/health" in log.read_text())
    assert child.poll() is None


def test_every_line_says_when_and_whose_it_is(place: Home) -> None:
    place.set(place.server / "dies")
    child = supervise(place)
    wait_for(lambda: len(place.started) == 2)
    (place.server / "dies").unlink()
    wait_for(lambda: served(place))
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED
    said = place.log("supervise")
    # The supervisor's own, and its agent's.
    assert "serving on vasp-02" in said
    assert "started pid" in said
    server = (place.root / "ai" / "logs" / "41" / "router.log").read_text()
    assert "GET /health" in server
    begin = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z fast 41\.1 vasp-02: \S.*")
    assert [line for line in (said + server).splitlines() if not begin.fullmatch(line)] == []


def test_slurms_own_log_of_the_job_is_put_aside_when_it_is_large(place: Home) -> None:
    slurms = place.root / "ai" / "logs" / "llama-14b.log"
    supervise(place)
    wait_for(lambda: served(place))
    for child in place.children:
        os.kill(child.pid, signal.SIGTERM)
        child.wait(10)
    place.set(slurms, "x" * (joblog.SLURM_LIMIT + 1))
    place.start(
        "supervise",
        *("--plan", str(plan(place))),
        SLURM_JOB_ID="41",
        SLURM_JOB_NAME="llama-14b",
        SLURM_JOB_NODELIST="vasp-02",
        SLURMD_NODENAME="vasp-02",
    )
    wait_for(lambda: slurms.with_name("llama-14b.log.1").exists() and not slurms.exists())


def test_server_that_dies_is_started_again_from_the_same_build(place: Home) -> None:
    old, new = place.root / "old", place.root / "new"
    place.engine.parent.rename(old)
    shutil.copytree(old, new)
    link = place.engine.parent
    link.symlink_to("old")
    supervise(place)
    wait_for(lambda: served(place))
    assert (place.root / "ai" / "logs" / "41" / "engine").readlink() == old
    link.unlink()
    link.symlink_to("new")
    os.kill(place.started[0]["pid"], signal.SIGKILL)
    wait_for(lambda: len(place.started) == 2)
    assert [start["argv"][0] for start in place.started] == [str(old / "bin" / "llama-server")] * 2


def test_no_record_while_loading(place: Home) -> None:
    place.set(place.server / "loading")
    supervise(place)
    wait_for(lambda: place.started)
    time.sleep(1.0)
    assert served(place) is None
    (place.server / "loading").unlink()
    wait_for(lambda: served(place))


def test_sign_of_life_from_the_first_moment_to_the_last(place: Home) -> None:
    place.set(place.server / "loading")
    child = supervise(place)
    first = wait_for(lambda: life.read(place.registry, TIER))
    assert first.run == (41, 1)
    wait_for(lambda: (life.read(place.registry, TIER) or first).seq > first.seq)
    assert served(place) is None, "the sign of life was to move while the model loads"
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED
    assert life.read(place.registry, TIER) is None


def test_load_timeout_fails_the_job(place: Home) -> None:
    place.set(place.server / "loading")
    child = supervise(place, load_timeout_seconds=1)
    assert child.wait(15) == Exit.LOAD_TIMEOUT
    assert "load_timeout_seconds=1" in place.log("supervise")
    assert nothing_left(place)


def test_server_killed_is_withdrawn_and_restarted(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    place.set(place.server / "loading")
    os.kill(place.started[0]["pid"], signal.SIGKILL)
    wait_for(lambda: served(place) is None)
    old_child = int((place.server / "child").read_text())
    wait_for(lambda: len(place.started) == 2)
    assert not alive(old_child), "a router's child outlived its router"
    (place.server / "loading").unlink()
    wait_for(lambda: served(place))
    assert child.poll() is None


def test_frozen_server_is_killed_and_restarted(place: Home) -> None:
    supervise(place)
    wait_for(lambda: served(place))
    os.kill(place.started[0]["pid"], signal.SIGSTOP)
    wait_for(lambda: len(place.started) == 2)
    wait_for(lambda: served(place))
    assert not alive(place.started[0]["pid"])


def test_server_that_keeps_dying_fails_the_job(
    place: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], log: joblog.File
) -> None:
    place.set(place.server / "dies")
    for name, value in place.environment(PYTHONPATH=str(SOURCE), SLURMD_NODENAME="vasp-02").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(supervisor, "RESTART_PAUSES", (0.1, 0.2, 0.3))
    where = supervisor.JobEnvironment(job=41, restart=1, node="vasp-02", nodes=("vasp-02",))
    one = supervisor.Supervisor(
        supervisor.Plan.load(plan(place)), where, place.registry, place.root, log, bounded.Patience(1)
    )
    with contextlib.closing(one.signals):
        assert one.run() == Exit.SERVER_FAILED
    assert len(place.started) == 4
    told = capfd.readouterr().err
    assert "starting it again in 0.2 s" in told
    assert "server on vasp-02 ended with 7; 4 times" in told


def test_preempted_idle_yields_at_once(place: Home) -> None:
    child = supervise(place, drain_seconds=60)
    wait_for(lambda: served(place))
    place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:10:00"))
    os.kill(child.pid, signal.SIGTERM)
    wait_for(lambda: served(place) is None)
    assert child.wait(10) == Exit.STOPPED, "waited for its budget"
    assert place.calls_of("scontrol requeue") == ["scontrol requeue 41"]
    assert nothing_left(place)


def told(place: Home) -> list[events.Event]:
    problems: list[str] = []
    found = events.read(place.events, problems)
    assert not problems
    return found


def test_the_event_log_has_the_whole_of_a_run(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:10:00"))
    signalled = time.time()
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED
    found = told(place)
    # Withdrawn and signalled are of one moment.
    assert sorted((event.kind for event in found), key=list(Kind).index) == list(Kind)
    assert [found[0].kind, found[-1].kind] == [Kind.STARTED, Kind.LEFT]
    assert {event.run for event in found} == {(41, 1)}
    assert found[0].more == {"nodes": ["vasp-02"], "gpus": 1}
    by_kind = {event.kind: event for event in found}
    assert by_kind[Kind.SIGNALLED].more == {"cause": "preempted"}
    assert -0.001 <= by_kind[Kind.SIGNALLED].at - signalled < 1
    assert by_kind[Kind.DRAINED].more == {"whole": True}
    assert by_kind[Kind.LEFT].more == {"exit": 0}


def test_a_server_that_dies_is_in_the_event_log(place: Home) -> None:
    supervise(place)
    wait_for(lambda: served(place))
    os.kill(place.started[0]["pid"], signal.SIGKILL)
    wait_for(lambda: [event.kind for event in told(place)].count(Kind.SERVING) == 2)
    (withdrawn,) = (event for event in told(place) if event.kind is Kind.WITHDRAWN)
    assert withdrawn.more["why"].startswith("server on vasp-02 ended with")


def test_events_that_cannot_be_written_are_in_the_supervisors_log(place: Home) -> None:
    shutil.rmtree(place.events)
    child = supervise(place)
    wait_for(lambda: served(place))
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED
    log = place.log("supervise")
    lost = [text.partition("event not written: ")[2] for text in log.splitlines() if "event not written" in text]
    assert [events.parse(text.encode()).kind for text in lost] == list(Kind)
    assert "events: cannot be written to" in log


def test_a_signal_that_came_before_it_could_be_heard(place: Home) -> None:
    place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:10:00"))
    assert supervise(place).wait(10) == Exit.STOPPED
    assert "told to stop (seen at the start): preempted" in place.log("supervise")
    assert place.calls_of("srun") == []
    assert place.calls_of("scontrol requeue") == ["scontrol requeue 41"]


def test_preempted_busy_drains_first(place: Home) -> None:
    child = supervise(place, drain_seconds=60)
    wait_for(lambda: served(place))
    place.set(place.server / "busy")
    place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:10:00"))
    os.kill(child.pid, signal.SIGTERM)
    wait_for(lambda: served(place) is None)
    time.sleep(1.0)
    assert healthy(place), "the stream in flight was cut"
    (place.server / "busy").unlink()
    assert child.wait(10) == Exit.STOPPED, "waited for its budget"
    assert len(place.calls_of("scontrol requeue")) == 1


def test_a_request_that_the_gateway_hands_over_after_the_withdrawal_is_drained_too(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    server = place.started[0]["pid"]
    place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:10:00"))
    child.send_signal(signal.SIGTERM)
    wait_for(lambda: served(place) is None)
    place.set(place.server / "busy")
    time.sleep(1.2)
    assert alive(server)
    (place.server / "busy").unlink()
    assert child.wait(10) == Exit.STOPPED
    assert "drain: nothing in flight" in place.log("supervise")


@contextlib.contextmanager
def gateway(place: Home, key: str = SERVER_KEY) -> Iterator[line.Line]:
    """The gateway's end of the line to the supervisor of what is served."""
    found = wait_for(lambda: served(place))
    assert found.supervisor == "vasp-02"
    with selectors.DefaultSelector() as selector:
        end = line.Line(selector, found.run, "127.0.0.1", found.line, key)
        with contextlib.closing(end):
            yield end


def hear(end: line.Line) -> line.Line:
    end.advance()
    return end


def test_a_gateway_with_a_line_hears_of_the_withdrawal_and_is_waited_for(place: Home) -> None:
    child = supervise(place)
    with gateway(place) as end:
        wait_for(lambda: hear(end) and "the gateway has a line to us" in place.log("supervise"))
        seq = served(place)
        place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:10:00"))
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: hear(end).withdrawn is not None)
        assert seq is not None
        assert end.withdrawn is not None
        assert end.withdrawn >= seq.seq
        # What came until the gateway knew is drained.
        place.set(place.server / "busy")
        end.answer()
        wait_for(lambda: "drain: the gateway takes no request any more" in place.log("supervise"))
        time.sleep(1.5)
        assert alive(place.started[0]["pid"])
        (place.server / "busy").unlink()
        assert child.wait(10) == Exit.STOPPED
    assert "drain: nothing in flight" in place.log("supervise")
    assert nothing_left(place)


def test_an_idle_tier_leaves_when_the_gateway_has_answered(place: Home) -> None:
    child = supervise(place)
    with gateway(place) as end:
        wait_for(lambda: hear(end) and "the gateway has a line to us" in place.log("supervise"))
        place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:10:00"))
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: hear(end).withdrawn is not None)
        end.answer()
        assert child.wait(10) == Exit.STOPPED
        wait_for(lambda: hear(end).done)
    drained = {event.kind: event.at for event in told(place)}
    assert drained[Kind.DRAINED] - drained[Kind.SIGNALLED] < supervisor.ROUTED_SECONDS


def test_a_line_is_for_the_gateway_alone(place: Home) -> None:
    supervise(place)
    with gateway(place, key="f" * 64) as end:
        wait_for(lambda: hear(end).done)
    wait_for(lambda: "connection refused: wrong token of a gateway" in place.log("supervise"))


def test_without_a_key_there_is_no_line(place: Home) -> None:
    (place.root / "server.key").unlink()
    supervise(place)
    wait_for(lambda: "the gateway will hear of a withdrawal later" in place.log("supervise"))


def test_drain_ends_with_its_budget(place: Home) -> None:
    child = supervise(place, drain_seconds=1)
    wait_for(lambda: served(place))
    for name in ("busy", "ignores-term"):
        place.set(place.server / name)
    place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:10:00"))
    began = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED
    assert 1.0 < time.monotonic() - began < 2.0, "more than a second beyond the budget"
    assert nothing_left(place)


def test_cancelled_never_requeues_nor_drains(place: Home) -> None:
    child = supervise(place, drain_seconds=60)
    wait_for(lambda: served(place))
    place.set(place.server / "busy")
    place.set(place.slurm / "job", job_text(state="COMPLETING"))
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED, "drained"
    assert not place.calls_of("scontrol requeue")
    assert "cancelled" in place.log("supervise")


def test_cancelled_while_draining_wins(place: Home) -> None:
    child = supervise(place, drain_seconds=20)
    wait_for(lambda: served(place))
    place.set(place.server / "busy")
    place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:10:00"))
    os.kill(child.pid, signal.SIGTERM)
    wait_for(lambda: "preempted" in place.log("supervise"))
    place.set(place.slurm / "job", job_text(state="COMPLETING"))
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(5) == Exit.STOPPED
    assert not place.calls_of("scontrol requeue")


def test_time_limit_stops_without_requeue(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    place.set(place.slurm / "job", job_text(ran="23:59:10", limit="1-00:00:00"))
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED
    assert not place.calls_of("scontrol requeue")
    assert "time limit" in place.log("supervise")


@pytest.mark.parametrize("cause", ["replaced", "outranked"])
def test_told_to_yield_by_the_keeper_drains_and_leaves_without_requeue(place: Home, cause: str) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    place.set(place.server / "busy")
    place.set(place.slurm / "job", job_text(comment=f"gleaner:0123456789abcdef {cause}"))
    os.kill(child.pid, signal.SIGTERM)
    wait_for(lambda: served(place) is None)
    time.sleep(1.0)
    assert healthy(place), "the stream in flight was cut"
    (place.server / "busy").unlink()
    assert child.wait(10) == Exit.STOPPED
    assert not place.calls_of("scontrol requeue")
    assert f"told to stop (signal): {cause}" in place.log("supervise")
    assert nothing_left(place)


def test_preempted_while_it_is_being_replaced_does_not_requeue(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    place.set(place.server / "busy")
    place.set(place.slurm / "job", job_text(comment="gleaner:0123456789abcdef replaced"))
    os.kill(child.pid, signal.SIGTERM)
    wait_for(lambda: "replaced" in place.log("supervise"))
    place.set(
        place.slurm / "job",
        job_text(comment="gleaner:0123456789abcdef replaced", preempted="2026-11-24T01:10:00"),
    )
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED
    assert not place.calls_of("scontrol requeue")


def test_silent_slurm_yields_as_if_preempted(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    place.set(place.slurm / "scontrol.fails", "Unable to contact slurm controller")
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED
    assert len(place.calls_of("scontrol requeue")) == 1
    assert "unanswered" in place.log("supervise")


def test_agents_hear_a_beat_before_each_question_to_slurm(
    place: Home, monkeypatch: pytest.MonkeyPatch, log: joblog.File
) -> None:
    where = supervisor.JobEnvironment(41, 0, "vasp-02", ("vasp-02",))
    child = supervisor.Supervisor(
        supervisor.Plan.load(plan(place)), where, place.registry, place.root, log, bounded.Patience(1)
    )
    heard: list[Any] = []
    asked: list[list[Any]] = []

    class Agent:
        def send(self, message: Any) -> None:
            heard.append(message)

    def ask() -> Cause:
        asked.append(heard[:])
        heard.clear()
        return Cause.PREEMPTED

    try:
        child.agents["vasp-02"] = Agent()  # type: ignore[assignment]
        monkeypatch.setattr(child, "_ask_why", ask)
        child.phase = supervisor.Phase.SERVING
        child._told_to_stop("signal")
        child._told_to_stop("signal to the agent")
    finally:
        child.signals.close()
        for listener in child.listeners:
            listener.close()
        child.selector.close()
    assert len(asked) == 2
    assert all(messages[-1] == {"beat": 1} for messages in asked), "agents take 5 s of silence for our death"


def test_signal_to_the_agent_alone_is_asked_about_too(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    agent = wait_for(lambda: agents_of(place))[0]
    place.set(place.slurm / "job", job_text(preempted="2026-11-24T01:10:00"))
    os.kill(agent, signal.SIGTERM)
    assert child.wait(10) == Exit.STOPPED
    assert len(place.calls_of("scontrol requeue")) == 1


def test_supervisor_killed_leaves_nothing(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    os.kill(child.pid, signal.SIGKILL)
    wait_for(lambda: nothing_left(place), 3.0)
    wait_for(lambda: not agents_of(place), 3.0)


def test_agent_killed_takes_the_tier_down(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    os.kill(agents_of(place)[0], signal.SIGKILL)
    assert child.wait(10) == Exit.AGENT_LOST
    assert served(place) is None
    # Killed by the kernel at its parent's death, which nobody waits for here.
    wait_for(lambda: not alive(place.started[0]["pid"]))


def test_frozen_agent_takes_the_tier_down(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    agent = agents_of(place)[0]
    os.kill(agent, signal.SIGSTOP)
    began = time.monotonic()
    assert child.wait(20) == Exit.AGENT_LOST
    assert 4.0 < time.monotonic() - began < 10.0
    assert served(place) is None


def test_missing_program_is_refused_by_name(place: Home) -> None:
    (place.engine / "llama-server").unlink()
    child = supervise(place)
    assert child.wait(15) == Exit.START_FAILED
    assert "llama-server" in place.log("supervise")


def test_a_program_that_is_not_the_published_one_is_not_started(place: Home) -> None:
    with (place.engine / "llama-server").open("a") as program:
        program.write("# changed\n")
    child = supervise(place)
    assert child.wait(15) == Exit.START_FAILED
    assert "llama-server: sha256: got" in place.log("supervise")
    assert place.started == []


def test_a_build_without_a_manifest_is_refused(place: Home) -> None:
    (place.engine.parent / "manifest.json").unlink()
    child = supervise(place)
    assert child.wait(15) == Exit.REFUSED
    assert "manifest.json: cannot be read" in place.log("supervise")


SMI = """#!/bin/sh
case $1 in
*query-gpu=*) echo "0, Tesla V100S-PCIE-32GB, 32768, 00000000:3B:00.0, 550.163.01, 7.0, {errors}, No";;
esac
"""


@pytest.mark.parametrize("errors", [0, 2])
def test_a_tier_starts_only_on_a_sound_gpu(place: Home, errors: int) -> None:
    place.program(place.bin / "nvidia-smi", SMI.format(errors=errors))
    node: dict[str, Any] = {"address": "127.0.0.1", "rpc_address": "127.0.0.1", "numa_node": None}
    node["gpus"] = {"count": 1, "shared": False}
    child = supervise(place, nodes={"vasp-02": node})
    if errors:
        assert child.wait(15) == Exit.START_FAILED
        assert "GPU 0 (0000:3b:00.0) of vasp-02: 2 uncorrected ECC error(s)" in place.log("supervise")
        assert place.started == []
    else:
        wait_for(lambda: served(place))


@pytest.mark.parametrize("again", [1, 2])
def test_a_file_system_that_hangs_is_waited_for_once(
    place: Home, monkeypatch: pytest.MonkeyPatch, log: joblog.File, again: int
) -> None:
    where = supervisor.JobEnvironment(41, 0, "vasp-02", ("vasp-02",))
    patience = bounded.Patience(supervisor.WITHDRAW_SECONDS + supervisor.LAST_WORDS_SECONDS)
    child = supervisor.Supervisor(Plan.load(plan(place)), where, place.registry, place.root, log, patience)
    waited: list[float] = []

    def hangs(seconds: float) -> bool:
        waited.append(seconds)
        time.sleep(seconds)
        return False

    monkeypatch.setattr(child.publisher, "withdraw", hangs)
    monkeypatch.setattr(child.events, "close", hangs)
    monkeypatch.setattr(child.pulse, "stop", hangs)
    with contextlib.closing(child.signals):
        for _ in range(again):
            child._withdraw("signal")
        child._leave()
    assert waited[0] == pytest.approx(supervisor.WITHDRAW_SECONDS)
    assert sum(waited) == pytest.approx(supervisor.WITHDRAW_SECONDS + supervisor.LAST_WORDS_SECONDS, abs=0.1)


def test_stranger_on_the_heartbeat_port_changes_nothing(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    port = heartbeat_port(child.pid)
    for text in (b'{"hello":1,"token":"guess","node":"vasp-02"}\n', b"\xff" * 5000, b"[]\n"):
        with socket.create_connection(("127.0.0.1", port), 2) as stranger:
            stranger.sendall(text)
            stranger.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
    assert served(place)
    assert child.poll() is None


def test_registry_gone_does_not_stop_the_server(place: Home) -> None:
    child = supervise(place)
    wait_for(lambda: served(place))
    place.registry.rename(place.registry.with_name("away"))
    wait_for(lambda: "record: cannot be written" in place.log("supervise"))
    assert healthy(place)
    assert child.poll() is None
    place.registry.with_name("away").rename(place.registry)
    wait_for(lambda: "record: written again" in place.log("supervise"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "odd"}, "kind: got 'odd'"),
        ({"kind": "layer_split"}, "not a plan of this version (KeyError('worker'))"),
        ({"v": 2}, "v: got 2, want 1"),
        ({"server": {}}, "not a plan of this version"),
        (
            {"nodes": {"vasp-09": {"address": "127.0.0.1", "rpc_address": "127.0.0.1", "numa_node": None}}},
            "SLURM_JOB_NODELIST: got vasp-02",
        ),
    ],
)
def test_wrong_plan_is_refused(place: Home, change: dict[str, Any], told: str) -> None:
    assert supervise(place, **change).wait(10) == Exit.REFUSED
    assert told in place.log("supervise")


def test_a_plan_with_flash_attention_refuses_a_build_without(place: Home) -> None:
    """Its kernels are stubs that trap: the first answer would abort."""
    prefix = place.engine.parent
    engine = {"prefix": str(prefix), "flash_attention": True, "memory": str(place.root / "engine.json")}
    path = plan(place, engine=engine)
    place.publish()
    assert Plan.load(path).engine == prefix
    built = Manifest("key", "1", "cuda", {}, "c++", "x86-64-v3", ("-DGGML_CUDA_FA=OFF",), sums(prefix))
    built.write(prefix)
    with pytest.raises(PlanError, match=r"built without flash attention, .*llama_cpp_flash_attention: false"):
        Plan.load(path)
    dataclasses.replace(built, cmake_options=("-DGGML_CUDA_FA=ON",)).write(prefix)
    assert Plan.load(path).engine == prefix


def test_outside_a_job_is_refused(place: Home) -> None:
    assert place.start("supervise", "--plan", str(plan(place))).wait(10) == Exit.REFUSED
    assert "SLURM_JOB_ID" in place.log("supervise")


def agents_of(place: Home) -> list[int]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(place.pyz).encode() in words and b"agent" in words:
                found.append(int(entry.name))
    return found


def heartbeat_port(pid: int) -> int:
    """The port on which this process listens, from /proc."""
    inodes = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
    for entry in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        cells = entry.split()
        if cells[3] == "0A" and f"socket:[{cells[9]}]" in inodes:
            return int(cells[1].partition(":")[2], 16)
    raise AssertionError("no listening port")
