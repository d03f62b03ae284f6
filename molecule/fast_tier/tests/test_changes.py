"""The inventory changes under a running site: tiers come and go, and a changed plan is followed in order."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, PORT, SERVICE_USER, SMOLLM2, SPLIT_PORT, TINY, run
from tests.lab.inventory import apply, tiers

SECOND_NODE = "vasp-03"
SECOND: dict[str, Any] = {
    "name": "second",
    "kind": "router",
    "job_name": "llama-second",
    "gateway_port": 8082,
    "nodes": [SECOND_NODE],
    "priority": 5,
    "models": [TINY],
    "models_max": 1,
    "context_tokens": 512,
    "threads": 2,
}
SHARED = "/cluster/shared"
SCRIPT = f"{SHARED}/scripts/llama-cpp/run-second.slurm"
PLAN = f"{SHARED}/ai/plans/second.json"


def fast(**differences: object) -> dict[str, Any]:
    """The router tier of the lab's inventory."""
    return {**tiers()["fast"], **differences}


@pytest.fixture(scope="module", autouse=True)
def _only_the_inventory_s_tier_stays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    cluster.wait_served()
    yield
    if '"second"' not in run(CONTROLLER, "cat /etc/gleaner/keeper.json"):
        # The last test has seen to it.
        return
    apply(tmp_path_factory.mktemp("tiers"), *tiers().values())
    cluster.wait_until("the second job is gone", lambda: not jobs_of("llama-second"))
    cluster.wait_served()


def jobs_of(name: str) -> list[cluster.Job]:
    return [job for job in cluster.jobs() if job.name == name]


def kept(tier: str) -> dict[str, Any]:
    """What the keeper remembers of a tier."""
    found: dict[str, Any] = json.loads(run(CONTROLLER, "cat /var/lib/gleaner/keeper.json"))["tiers"][tier]
    return found


def wanted_digest(tier: str) -> str:
    keeping = json.loads(run(CONTROLLER, "cat /etc/gleaner/keeper.json"))["tiers"]
    return next(str(entry["digest"]) for entry in keeping if entry["tier"] == tier)


def second_answers(port: int = 8082) -> bool:
    return cluster.complete(TINY, port=port).status == 200


def start_by_hand(script: str) -> int:
    return int(run(CONTROLLER, f"runuser -u {SERVICE_USER} -- sbatch --parsable {script}"))


def test_a_second_tier_comes_beside_the_first_which_does_not_notice(tmp_path: Path) -> None:
    before, server = cluster.running_job(), cluster.router_pid()
    apply(tmp_path, fast(), SECOND)
    cluster.wait_until("the second tier answers", second_answers)
    assert cluster.running_job("llama-second").node == SECOND_NODE
    assert (cluster.running_job(), cluster.router_pid()) == (before, server)
    assert cluster.complete(SMOLLM2).status == 200
    for tier, job in (("fast", before), ("second", cluster.running_job("llama-second"))):
        assert cluster.comment(job.id) == f"gleaner:{wanted_digest(tier)}"
    # The other node had its model already.
    staged = run(SECOND_NODE, "cat /var/log/gleaner/gleaner-models-stage.log")
    assert f"{TINY} comes from {cluster.address(cluster.TIER_NODE)}:8098" in staged


def test_a_running_tier_whose_plan_changes_lets_its_streams_end_and_serves_the_new_one(tmp_path: Path) -> None:
    before, other = cluster.running_job(), cluster.running_job("llama-second")
    done = threading.Event()

    def keep_asking() -> list[cluster.Answer]:
        answers: list[cluster.Answer] = []
        while not done.wait(0 if not answers or answers[-1].status == 200 else 0.5):
            # Short, so that two in a row fit into the drain on a busy machine, too.
            answers.append(cluster.stream(TINY, 50))
        return answers

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking) for _ in range(2)]
        try:
            apply(tmp_path, fast(context_tokens=1024), SECOND)
            after = cluster.wait_until(
                "another job runs", lambda: job if (job := cluster.running_job()).id != before.id else None
            )
            cluster.wait_served()
        finally:
            done.set()
        answers = [answer for one in asking for answer in one.result()]

    assert [answer for answer in answers if answer.status == 200 and not cluster.is_whole(answer)] == []
    for answer in answers:
        if answer.status != 200:
            cluster.assert_away(answer)
    log = run(CONTROLLER, f"cat {SHARED}/ai/logs/{before.id}/supervisor.log")
    assert "told to stop (signal): replaced" in log
    assert "drain: nothing in flight" in log
    # A job that was preempted once Slurm requeues whenever it ends: the keeper cancels it while it waits.
    ended = run(CONTROLLER, f"sacct -X -n -P -j {before.id} -o State,ExitCode")
    uid = run(CONTROLLER, f"id -u {SERVICE_USER}")
    assert ended in ("COMPLETED|0:0", f"CANCELLED by {uid}|0:0")
    assert (kept("fast")["failures"], kept("fast")["held"]) == (0, False)
    assert "--ctx-size 1024" in run(cluster.TIER_NODE, f"tr '\\0' ' ' < /proc/{cluster.router_pid()}/cmdline")
    assert cluster.comment(after.id) == f"gleaner:{wanted_digest('fast')}"
    assert cluster.running_job("llama-second") == other


def test_a_waiting_job_of_another_plan_is_replaced_and_the_gateway_follows(tmp_path: Path) -> None:
    """The second tier moves to another port while a paying job has its node; the first goes back to its own plan."""
    paying = cluster.submit(f"--partition=gpu_vasp --nodelist={SECOND_NODE} --gres=gpu:1 --wrap='sleep 600'")
    try:
        waiting = cluster.wait_until(
            "the second tier waits",
            lambda: job if (job := cluster.tier_job("llama-second")) and job.state == "PENDING" else None,
        )
        apply(tmp_path, fast(), {**SECOND, "gateway_port": 8083})
        again = cluster.wait_until(
            "another job waits",
            lambda: job if (job := cluster.tier_job("llama-second")) and job.id != waiting.id else None,
        )
        assert (again.state, kept("second")["held"], kept("second")["failures"]) == ("PENDING", False, 0)
        assert cluster.comment(again.id) == f"gleaner:{wanted_digest('second')}"
    finally:
        cluster.cancel(paying)
    cluster.wait_until("the second tier answers on its new port", lambda: second_answers(8083))
    assert cluster.ask("/health", port=8082).status == 0, "the old port is still open"
    cluster.wait_served()


def test_a_job_that_a_person_submits_from_the_current_script_is_the_tiers() -> None:
    cluster.cancel(cluster.running_job("llama-second").id)
    cluster.wait_until("it is held", lambda: cluster.status("second")["state"] == "held")
    assert cluster.status("second")["why"].endswith("was cancelled by uid 0")
    job = start_by_hand(SCRIPT)
    cluster.wait_until("the second tier answers", lambda: second_answers(8083))
    cluster.wait_until("the keeper has taken it", lambda: kept("second")["job"] == job)
    assert not kept("second")["ending"]
    assert cluster.running_job("llama-second").id == job


def test_a_cancel_of_which_accounting_never_tells_holds_the_tier_and_says_so() -> None:
    run(CONTROLLER, 'sed -i \'s/"accounting_seconds": [0-9]*/"accounting_seconds": 20/\' /etc/gleaner/keeper.json')
    run(CONTROLLER, "systemctl restart gleaner-keeper")
    job = cluster.running_job("llama-second").id
    run(CONTROLLER, "systemctl stop slurmdbd")
    try:
        cluster.cancel(job)
        cluster.wait_until("it is paused", lambda: cluster.status("second")["state"] == "paused", 30)
        assert f"job {job} was cancelled; asking accounting by whom" in cluster.status("second")["why"]
        cluster.wait_until("it is held", lambda: cluster.status("second")["state"] == "held", 60)
        why = cluster.status("second")["why"]
        assert why.startswith(f"job {job} was cancelled, and accounting did not say by whom within 20 s (sacct: ")
    finally:
        run(CONTROLLER, "systemctl start slurmdbd")
    job = start_by_hand(SCRIPT)
    cluster.wait_until("the second tier answers", lambda: second_answers(8083))
    cluster.wait_until("the keeper has seen it", lambda: not kept("second")["held"], 10)


def test_a_tier_that_leaves_the_inventory_is_gone_without_a_trace(tmp_path: Path) -> None:
    before = cluster.running_job()
    run(CONTROLLER, f"echo '#SBATCH --comment=mine' > {SHARED}/scripts/llama-cpp/run-mine.slurm")
    try:
        applied = apply(tmp_path, *tiers().values())
        assert PLAN in applied.output
        assert SCRIPT in applied.output
        cluster.wait_until("its job is gone", lambda: not jobs_of("llama-second"), 60)
        cluster.wait_until("the keeper has forgotten it", lambda: "second" not in kept_tiers(), 20)
        left = run(CONTROLLER, f"ls {SHARED}/ai/plans {SHARED}/ai/endpoints {SHARED}/scripts/llama-cpp").split()
        assert {name for name in left if "second" in name} == set()
        assert "run-mine.slurm" in left, "a site's own script"
        assert run(SECOND_NODE, "ls -A /scratch/ai/models").split() == [".staging"]
        assert cluster.ask("/health", port=8083).status == 0
        assert cluster.running_job() == before
        assert cluster.ask("/health", port=PORT).status == 200
        # The layer-split tier, which had made room, is back on the node.
        cluster.wait_until("the other tier is served", lambda: cluster.ask("/health", port=SPLIT_PORT).status == 200)
    finally:
        run(CONTROLLER, f"rm {SHARED}/scripts/llama-cpp/run-mine.slurm")


def kept_tiers() -> set[str]:
    return set(json.loads(run(CONTROLLER, "cat /var/lib/gleaner/keeper.json"))["tiers"])
