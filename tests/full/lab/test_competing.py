"""Two tiers that want the same GPU: the higher priority runs when it can, the other one whenever it cannot.

With workers on both other nodes, as the first cluster had them, the layer-split tier leaves none for the router tier.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import cluster, split
from tests.lab.cluster import CONTROLLER, PORT, SMOLLM2, SPLIT_JOB, SPLIT_PORT, THINKING, run
from tests.lab.inventory import apply, tiers

FAST, REASONING = "fast", "reasoning"
# Three times the wait of the lab's keeper: a ping-pong would show.
QUIET_SECONDS = 30.0


@pytest.fixture(scope="module", autouse=True)
def _whole_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The layer-split tier over all nodes, while this module lasts."""
    folder = tmp_path_factory.mktemp("tiers")
    known = tiers()
    apply(folder, known[FAST], {**known[REASONING], "workers": ["vasp-02", "vasp-03"]})
    yield
    apply(folder, *known.values())
    cluster.wait_served()
    split.wait_served()


def test_of_two_that_wait_the_higher_one_starts() -> None:
    cluster.wait_until("the higher tier runs on all nodes", lambda: len(nodes()) == 3, 120)
    split.wait_served()
    assert cluster.complete(THINKING, port=SPLIT_PORT).status == 200
    lower = cluster.status(FAST)
    assert lower["state"] == "queued", lower
    cluster.assert_away(cluster.ask("/health", port=PORT))


def nodes() -> list[str]:
    job = cluster.tier_job(SPLIT_JOB)
    if job is None or job.state != "RUNNING":
        return []
    return run(CONTROLLER, f"scontrol show hostnames {job.node}").split()


def test_the_lower_one_runs_while_the_higher_one_cannot_and_yields_when_it_can() -> None:
    paying = cluster.submit("--partition=gpu_vasp --nodelist=vasp-03 --gres=gpu:1 --wrap='sleep 600'")
    try:
        cluster.wait_served()
        assert cluster.complete(SMOLLM2).status == 200
        before = cluster.running_job()
        # Nothing that the lower tier could give would help the higher one.
        answers = cluster.watch_for(QUIET_SECONDS)
        assert {answer.status for answer in answers} == {200}
        assert cluster.running_job() == before
        assert cluster.status(REASONING)["state"] == "queued"
    finally:
        cluster.cancel(paying)
    cluster.wait_until("the higher tier is back", lambda: len(nodes()) == 3, 180)
    split.wait_served()
    said = run(CONTROLLER, f"cat /cluster/shared/ai/logs/{before.id}/supervisor.log")
    assert "told to stop (signal): outranked" in said
    job = cluster.running_job(SPLIT_JOB)
    answers = cluster.watch(lambda seen: seen[-1].status != 200 or len(seen) > 200, QUIET_SECONDS + 30, port=SPLIT_PORT)
    assert {answer.status for answer in answers} == {200}
    assert cluster.running_job(SPLIT_JOB) == job
