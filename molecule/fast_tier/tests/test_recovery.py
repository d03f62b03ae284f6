"""Something dies: without a human it serves again, and meanwhile clients get proper answers, never a hang."""

from __future__ import annotations

import pytest

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, JOB_NAME, SERVICE_USER, SMOLLM2, TIER_NODE, run

SERVICES = ("munge", "mariadb", "slurmdbd", "slurmctld", "nginx", "gleaner-keeper", "gleaner-upstream")


@pytest.fixture(autouse=True)
def _served() -> None:
    cluster.wait_served()


def test_a_killed_server_is_started_again_in_the_same_job() -> None:
    job, server = cluster.running_job(), cluster.router_pid()
    run(TIER_NODE, f"kill -KILL {server}")
    cluster.away_and_back(30)
    assert cluster.running_job() == job
    assert cluster.router_pid() != server
    assert cluster.complete(SMOLLM2).status == 200


def test_a_killed_model_process_is_started_again_by_the_next_request() -> None:
    assert cluster.complete(SMOLLM2).status == 200
    server = cluster.router_pid()
    run(TIER_NODE, f"kill -KILL {cluster.model_pid(SMOLLM2)}")

    def answered() -> bool:
        answer = cluster.complete(SMOLLM2)
        # The router may notice the death by this very request, and says so itself.
        assert answer.status in (200, 500), answer
        assert b"<html" not in answer.body, answer
        assert answer.seconds < 10, answer
        return answer.status == 200

    cluster.wait_until("the model answers again", answered, 30)
    assert cluster.router_pid() == server


def test_a_frozen_server_is_replaced() -> None:
    server = cluster.router_pid()
    run(TIER_NODE, f"kill -STOP {server}")
    cluster.away_and_back(30)
    assert cluster.router_pid() != server


def test_a_killed_supervisor_takes_all_along_and_the_tier_starts_anew() -> None:
    job, server = cluster.running_job(), cluster.router_pid()
    (supervisor,) = cluster.pids(TIER_NODE, "pyz supervise")
    run(TIER_NODE, f"kill -KILL {supervisor}")
    cluster.wait_until("its server is gone", lambda: server not in cluster.pids(TIER_NODE, "llama-server"), 15)
    cluster.away_and_back()
    # Slurm requeues a batch step that was killed; were it not so, the keeper would submit another job.
    after = cluster.running_job()
    assert (after.id, after.restarts) != (job.id, job.restarts)


def test_a_job_that_the_service_user_cancels_is_replaced() -> None:
    job = cluster.running_job()
    run(CONTROLLER, f"runuser -u {SERVICE_USER} -- scancel --name={JOB_NAME}")
    cluster.away_and_back()
    assert cluster.running_job().id != job.id


@pytest.mark.parametrize(
    "order",
    [SERVICES, SERVICES[::-1], SERVICES[3:] + SERVICES[:3]],
    ids=lambda order: f"{order[0]}-first",
)
def test_controller_services_restarted_in_any_order_serve_again(order: tuple[str, ...]) -> None:
    job, server = cluster.running_job(), cluster.router_pid()
    for service in order:
        run(CONTROLLER, f"systemctl restart {service}")
        # A start that goes wrong later than at once is seen, too.
        answers = cluster.watch_for(3, refused=service == "nginx")
        assert answers[-1].status == 200, f"after {service}: {answers[-1]}"
    assert cluster.complete(SMOLLM2).status == 200
    # Nothing of it touched what was running.
    assert (cluster.running_job(), cluster.router_pid()) == (job, server)
