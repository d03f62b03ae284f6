"""What a tier over several nodes leaves in its logs, and how it is read as one story."""

from __future__ import annotations

import re

from tests.lab import cluster, split
from tests.lab.cluster import CONTROLLER, HEAD, SPLIT_JOB, WORKERS, run

(WORKER,) = WORKERS
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def test_every_line_of_every_log_says_when_and_whose_it_is() -> None:
    split.wait_served()
    job = cluster.running_job(SPLIT_JOB)
    folder = f"/cluster/shared/ai/logs/{job.id}"
    logs = set(run(CONTROLLER, f"ls {folder}").split())
    assert {"supervisor.log", "head.log", f"rpc-{WORKER}.log"} <= logs
    begin = re.compile(rf"{STAMP} reasoning {job.id}\.\d+ ({HEAD}|{WORKER}): .*\S")
    for name in logs - {"engine"}:
        lines = run(CONTROLLER, f"cat {folder}/{name}").splitlines()
        assert lines, name
        assert [line for line in lines if not begin.fullmatch(line)] == [], name


def test_one_command_tells_its_story_over_all_hosts_in_order_of_time() -> None:
    split.wait_served()
    job = cluster.running_job(SPLIT_JOB)
    told = run(CONTROLLER, f"gleaner log reasoning --job {job.id}").splitlines()
    lines = [line.split(maxsplit=4) for line in told]
    assert {tuple(line[1:3]) for line in lines} >= {
        ("head", HEAD),
        ("rpc", WORKER),
        ("supervisor", HEAD),
        ("event", HEAD),
        ("keeper", CONTROLLER),
        ("updater", CONTROLLER),
    }
    assert {line[3].partition(".")[0] for line in lines} == {str(job.id)}
    # All hosts of the lab have one clock.
    stamps = [line[0] for line in lines]
    assert stamps == sorted(stamps)
    texts = [line[4] for line in lines]
    steps = (rf"reasoning: job {job.id} submitted", r"started on ", r"starting .*ggml-rpc-server", r"listening on http")
    places = [next(at for at, text in enumerate(texts) if re.match(rf".*{step}", text)) for step in steps]
    assert places == sorted(places)


def test_an_unknown_tier_is_answered_with_those_that_there_are() -> None:
    asked = cluster.host(CONTROLLER).run("gleaner log slow")
    assert (asked.rc, asked.stderr.strip()) == (2, "error: tier: got 'slow', want one of fast, reasoning")
