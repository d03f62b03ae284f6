"""Something is broken at the very moment of a preemption: the paying job gets its node, clients are told, all is back.

What is slow is not hastened here: how long each takes is what benchmarks/preemption.py measures.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks import preemption
from benchmarks.preemption import FAST, LONG_TOKENS, REASONING
from gleaner import slurm
from gleaner.events import Kind
from tests.lab import cluster, preempt, split
from tests.lab.cluster import CONTROLLER, REGISTRY, SERVICE_USER, TIER_NODE, run


@pytest.fixture(autouse=True)
def _served() -> None:
    preempt.wait_served()


def draining(job: cluster.Job) -> None:
    cluster.wait_until("it drains", lambda: "told to stop (signal): preempted" in preempt.log(job), 10, 0.05)


def assert_told() -> None:
    """Clients are told at once that the tier is away, and go on being told so."""
    for _ in range(10):
        cluster.assert_away(cluster.ask("/health", timeout=cluster.ANSWER_SECONDS))
        time.sleep(0.1)


def stream() -> preemption.Stream:
    return preemption.begin_stream(preempt.controller().address, LONG_TOKENS)


def test_while_a_model_loads() -> None:
    job = preempt.tier_job(REASONING)
    with preempt.paying(REASONING) as first:
        preempt.wait_runs(first)
    with preempt.frozen_when_it_starts(REASONING) as has_frozen:
        cluster.wait_until("it loads", has_frozen, 60, 0.05)
        with preempt.paying(REASONING) as second:
            preempt.wait_runs(second)
            last = [one for one in preempt.told(REASONING, job.id) if one.restart == job.restarts + 1]
            assert [one.kind for one in last] == [Kind.STARTED, Kind.SIGNALLED, Kind.LEFT]


def test_a_second_signal_cuts_no_stream() -> None:
    job = preempt.tier_job(FAST)
    flowing = stream()
    with preempt.paying(FAST) as paying:
        draining(job)
        pieces = flowing.pieces
        run(CONTROLLER, f"runuser -u {SERVICE_USER} -- scancel --batch --signal=TERM {job.id}")
        cluster.wait_until("it was told again", lambda: "told to stop again" in preempt.log(job), 5, 0.05)
        assert not flowing.ended
        cluster.wait_until("the stream goes on", lambda: flowing.pieces > pieces + 3, 3, 0.05)
        preempt.wait_runs(paying)
    assert not flowing.done


def test_a_server_that_does_not_hear_the_signal() -> None:
    job = preempt.tier_job(FAST)
    flowing = stream()
    with preempt.paying(FAST) as paying:
        draining(job)
        run(TIER_NODE, f"pkill -STOP --uid {SERVICE_USER} llama-server")
        preempt.wait_runs(paying)
        assert preempt.left_on(TIER_NODE) == []
    assert not flowing.done


def test_without_the_keeper() -> None:
    job = preempt.tier_job(FAST)
    run(CONTROLLER, "systemctl stop gleaner-keeper")
    try:
        with preempt.paying(FAST) as paying:
            preempt.wait_runs(paying)
            waiting = cluster.wait_until("the tier's job is queued", cluster.tier_job)
            assert (waiting.id, waiting.state) == (job.id, "PENDING")
    finally:
        run(CONTROLLER, "systemctl start gleaner-keeper")


@contextlib.contextmanager
def read_only() -> Iterator[None]:
    try:
        run(TIER_NODE, f"mount --bind {REGISTRY} {REGISTRY} && mount -o remount,bind,ro {REGISTRY}")
        yield
    finally:
        cluster.host(TIER_NODE).run(f"umount --lazy {REGISTRY}")


@contextlib.contextmanager
def full() -> Iterator[None]:
    """The node's registry is another one, which is full: the controller's keeps a record that nobody takes away."""
    copy = "/run/registry"
    try:
        run(TIER_NODE, f"mkdir -p {copy} && cp -a {REGISTRY}/*.json {REGISTRY}/*.alive {copy}/")
        run(TIER_NODE, f"mount -t tmpfs -o size=64k none {REGISTRY} && cp -a {copy}/. {REGISTRY}/")
        run(
            TIER_NODE,
            # Until nothing fits any more: that it fails is what is wanted.
            f"chown {SERVICE_USER}: {REGISTRY} && ! dd if=/dev/zero of={REGISTRY}/filler bs=4k 2>/dev/null",
        )
        yield
    finally:
        cluster.host(TIER_NODE).run(f"umount --lazy {REGISTRY}; rm -rf {copy}")


@contextlib.contextmanager
def gone() -> Iterator[None]:
    run(CONTROLLER, f"mv {REGISTRY} {REGISTRY}.away")
    try:
        yield
    finally:
        run(CONTROLLER, f"mv -T {REGISTRY}.away {REGISTRY}")


@pytest.mark.parametrize("broken", [read_only, full, gone])
def test_the_registry_cannot_be_written(broken: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    job = preempt.tier_job(FAST)
    with broken(), preempt.paying(FAST) as paying:
        preempt.wait_runs(paying)
        assert_told()
        assert preempt.left_on(TIER_NODE) == []
    cluster.wait_served()
    after = preempt.tier_job(FAST)
    assert (after.id, after.restarts) == (job.id, job.restarts + 1)


def test_the_event_log_cannot_be_written() -> None:
    job = preempt.tier_job(FAST)
    run(CONTROLLER, f"mv {preemption.EVENTS} {preemption.EVENTS}.away")
    try:
        with preempt.paying(FAST) as paying:
            preempt.wait_runs(paying)
            assert "event not written: " in preempt.log(job)
    finally:
        run(CONTROLLER, f"mv -T {preemption.EVENTS}.away {preemption.EVENTS}")
    cluster.wait_served()


def test_slurmctld_is_away_while_the_tier_yields() -> None:
    job = preempt.tier_job(FAST)
    flowing = stream()
    with preempt.paying(FAST) as paying:
        draining(job)
        # Not killed: it would forget the paying job, which is younger than its books.
        run(CONTROLLER, "systemctl stop slurmctld")
        try:
            cluster.wait_until("its processes are gone", lambda: not preempt.left_on(TIER_NODE), 30)
            assert "cannot requeue" in preempt.log(job)
            assert flowing.ended
            assert not flowing.done
            assert_told()
        finally:
            run(CONTROLLER, "systemctl start slurmctld")
        # Slurm itself hears of the end when the node tells again, or when the keeper misses its job.
        cluster.wait_until("the paying job runs", lambda: preempt.runs(paying), 180, 1)
    cluster.wait_served()
    assert "FAILED" not in preempt.states(job.id)


def test_slurm_does_not_answer_when_the_tier_asks_why() -> None:
    job = preempt.tier_job(FAST)
    preempt.wait_in_books(job.id)
    run(CONTROLLER, "systemctl stop slurmctld")
    try:
        (supervisor,) = cluster.pids(TIER_NODE, "pyz supervise")
        run(TIER_NODE, f"kill -TERM {supervisor}")
        cluster.wait_until("it has yielded", lambda: not preempt.left_on(TIER_NODE), 30)
        assert "told to stop (signal): unanswered" in preempt.log(job)
        assert_told()
    finally:
        run(CONTROLLER, "systemctl start slurmctld")
    cluster.wait_served()
    assert "FAILED" not in preempt.states(job.id)


def test_a_job_at_its_time_limit_is_followed_by_another() -> None:
    job = preempt.tier_job(FAST)
    ran = slurm.seconds(run(CONTROLLER, f"squeue --noheader --jobs={job.id} --Format=TimeUsed")) or 0
    run(CONTROLLER, f"scontrol update JobId={job.id} TimeLimit={ran // 60 + 2}")
    cluster.wait_until("it stops", lambda: "told to stop (signal): time limit" in preempt.log(job), 200, 1)
    cluster.wait_until("another one runs", lambda: preempt.tier_job(FAST).id != job.id)
    cluster.wait_served()
    assert cluster.status(FAST)["state"] == "serving"
    assert "FAILED" not in preempt.states(job.id)


def test_slurmdbd_is_down_while_the_tier_yields() -> None:
    job = preempt.tier_job(FAST)
    run(CONTROLLER, "systemctl stop slurmdbd")
    try:
        with preempt.paying(FAST) as paying:
            preempt.wait_runs(paying)
            assert_told()
        cluster.wait_served()
        after = preempt.tier_job(FAST)
        assert (after.id, after.restarts) == (job.id, job.restarts + 1)
    finally:
        run(CONTROLLER, "systemctl start slurmdbd")


def test_the_node_dies_while_the_tier_yields() -> None:
    job = preempt.tier_job(FAST)
    flowing = stream()
    with preempt.paying(FAST) as paying:
        draining(job)
        cluster.cut_power(TIER_NODE)
        cluster.wait_until("the stream has ended", lambda: flowing.ended, split.GONE_SECONDS, 0.05)
        assert not flowing.done
        assert_told()
        cluster.wait_until("the node is there again", lambda: split.reaches(TIER_NODE), 60, 1)
        cluster.wait_until("the paying job runs", lambda: preempt.runs(paying), 180, 1)
    cluster.wait_served(180)


def test_the_controller_is_rebooted_while_a_tier_runs() -> None:
    job, server = preempt.tier_job(FAST), cluster.router_pid()
    preempt.wait_in_books(job.id)
    cluster.cut_power(CONTROLLER)
    cluster.wait_until("the controller is there again", lambda: split.reaches(CONTROLLER), 60, 1)
    cluster.wait_until("slurmctld answers", lambda: cluster.host(CONTROLLER).run("squeue").rc == 0, 60, 1)
    cluster.wait_until("it is routed again", lambda: cluster.ask("/health").status == 200, 60)
    assert (preempt.tier_job(FAST), cluster.router_pid()) == (job, server)
    # And it can still be preempted.
    with preempt.paying(FAST) as paying:
        preempt.wait_runs(paying)
        assert_told()
