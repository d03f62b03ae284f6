"""Incidents of the first cluster that only a running tier can show; tests/unit/test_lessons.py has the others."""

from __future__ import annotations

import time

from tests.lab import cluster, split
from tests.lab.cluster import CONTROLLER, HEAD, RPC_PORT, SPLIT_JOB, SPLIT_PORT, THINKING, WORKERS, run

(WORKER,) = WORKERS


def test_lesson_3_rpc_is_fragile_and_ends_the_head_with_a_worker() -> None:
    """ "Hard abort on any socket failure": the engine does so still, and the tier is served again without a human."""
    split.wait_served()
    job = cluster.running_job(SPLIT_JOB).id
    split.lose_process(WORKER, "KILL", busy=True)
    heads = run(CONTROLLER, f"cat /cluster/shared/ai/logs/{job}/head.log")
    assert "Remote RPC server crashed or returned malformed response" in heads


def test_lesson_4_a_probe_that_a_connected_worker_cannot_answer_kills_no_tier() -> None:
    """ "Worker DEAD" after six minutes: its port takes no more connections, and it works."""
    split.wait_served()
    job, parts = cluster.running_job(SPLIT_JOB), split.parts()
    place = (cluster.rpc_address(WORKER), RPC_PORT)
    code = (
        "import socket, time; held = [socket.socket() for _ in range(3)]; "
        f"[(one.setblocking(False), one.connect_ex({place!r})) for one in held]; time.sleep(12)"
    )
    run(HEAD, f'nohup runuser -u {cluster.SERVICE_USER} -- python3 -c "{code}" > /dev/null 2>&1 &')
    end = time.monotonic() + 10
    while time.monotonic() < end:
        assert cluster.complete(THINKING, 4, SPLIT_PORT).status == 200
    assert (cluster.running_job(SPLIT_JOB), split.parts()) == (job, parts)
