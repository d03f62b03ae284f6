"""The file system with a job's logs hangs, or its server says more than anybody wants to keep: the tier serves on.

On the tier's node the job's folder is covered by tests/lab/lagging_fs.py on FUSE, whose program is then stopped by a
signal: whoever touches a file there waits.
"""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Iterator

import pytest

from benchmarks.preemption import FAST
from tests.lab import cluster, preempt
from tests.lab.ansible import ROOT
from tests.lab.cluster import CONTROLLER, SMOLLM2, TIER_NODE, run

UNIT, PROGRAM, EMPTY, SHOWN = "hanging-logs", "/run/lagging_fs.py", "/run/nothing", "/run/hanging"
LIMIT_MIB, GENERATIONS = 16, 3


@pytest.fixture(scope="module", autouse=True)
def _tools() -> Iterator[None]:
    preempt.wait_served()
    try:
        run(TIER_NODE, "apt-get -y -q install python3-fusepy >/dev/null")
        program = base64.b64encode((ROOT / "tests/lab/lagging_fs.py").read_bytes()).decode()
        run(TIER_NODE, f"echo {program} | base64 --decode > {PROGRAM}")
        run(TIER_NODE, f"[ -e /dev/fuse ] || mknod /dev/fuse c 10 229; mkdir -p {EMPTY} {SHOWN}")
        yield
    finally:
        # What is not there need not go.
        cluster.host(TIER_NODE).run(
            f"rm -f {PROGRAM}; rmdir {EMPTY} {SHOWN}; apt-get -y -q autoremove --purge python3-fusepy >/dev/null"
        )
        cluster.wait_served()


def folder(job: cluster.Job) -> str:
    return f"/cluster/shared/ai/logs/{job.id}"


@contextlib.contextmanager
def hanging(place: str) -> Iterator[None]:
    """A folder of the tier's node in which nothing answers, as long as the block lasts."""
    try:
        run(TIER_NODE, f"systemd-run --quiet --collect --unit={UNIT} python3 {PROGRAM} {EMPTY} {SHOWN} 0")
        cluster.wait_until("it is there", lambda: cluster.host(TIER_NODE).run(f"mountpoint -q {SHOWN}").rc == 0, 10)
        run(TIER_NODE, f"mount --bind {SHOWN} {place} && systemctl kill --signal=STOP {UNIT}")
        yield
    finally:
        # Killed, it answers whoever waits with an error.
        cluster.host(TIER_NODE).run(f"umount --lazy {place} {SHOWN}; systemctl kill --signal=KILL {UNIT}")


def shout(megabytes: int, pause: float = 0.0) -> None:
    """Say so much for the server, into the pipe that it writes to; this ends only when all of it was taken."""
    pid = cluster.router_pid()
    line = "noise " * 20
    run(
        TIER_NODE,
        f"for n in $(seq {megabytes}); do yes '{line}' | head --bytes=1M > /proc/{pid}/fd/1; sleep {pause}; done",
    )


def said(job: cluster.Job) -> str:
    return run(CONTROLLER, f"cat {folder(job)}/router.log")


def test_a_server_whose_log_hangs_answers_and_what_was_lost_is_told() -> None:
    job, pid = preempt.tier_job(FAST), cluster.router_pid()
    with hanging(folder(job)):
        asked = cluster.host(TIER_NODE).run(f"timeout 3 ls {folder(job)}")
        assert asked.rc == 124, "the folder answers: nothing is shown by this test"
        # More than the pipe holds, and more than is kept.
        shout(8)
        for _ in range(20):
            assert cluster.complete(SMOLLM2).status == 200
        assert "were lost" not in said(job)
    cluster.wait_until("the loss is told", lambda: re.search(r" \d+ lines were lost: ", said(job)), 30)
    assert (preempt.tier_job(FAST), cluster.router_pid()) == (job, pid)
    told = run(CONTROLLER, f"gleaner log fast --job {job.id}")
    assert re.search(rf"router +{TIER_NODE} +{job.id}\.\d+  \d+ lines were lost: ", told)


def test_what_a_chatty_server_says_stays_small() -> None:
    job = preempt.tier_job(FAST)
    shout(90, 0.25)
    cluster.wait_until(
        "it is all written", lambda: cluster.host(CONTROLLER).run(f"test -e {folder(job)}/router.log.3").rc == 0, 60
    )
    sizes = {
        name: int(size)
        for name, size in (
            line.split()
            for line in run(CONTROLLER, f"cd {folder(job)} && stat --format='%n %s' router.log*").splitlines()
        )
    }
    assert set(sizes) == {"router.log", *(f"router.log.{number}" for number in range(1, GENERATIONS + 1))}
    # A batch more than the limit.
    assert max(sizes.values()) < (LIMIT_MIB + 4) << 20
    assert cluster.complete(SMOLLM2).status == 200
    told = run(CONTROLLER, f"gleaner log fast --job {job.id} --lines 5").splitlines()
    assert len(told) == 5


def test_a_paying_job_does_not_wait_for_logs_that_hang() -> None:
    job = preempt.tier_job(FAST)
    with contextlib.ExitStack() as paid:
        with hanging(folder(job)):
            paying = paid.enter_context(preempt.paying(FAST))
            preempt.wait_runs(paying)
            assert preempt.left_on(TIER_NODE) == []
        causes = [event.more["cause"] for event in preempt.told(FAST, job.id) if "cause" in event.more]
        assert causes[-1] == "preempted"
    cluster.wait_served()
