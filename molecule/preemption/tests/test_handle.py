"""The administrator's handle on a tier: held, started, restarted, each by one command that says what it does."""

from __future__ import annotations

import pytest

from benchmarks.preemption import FAST
from tests.lab import cluster, preempt
from tests.lab.ansible import Run, playbook, succeed
from tests.lab.cluster import CONTROLLER, TIER_NODE, run

PLAYBOOK = "playbooks/tier.yml"
KEEPER = "gleaner-keeper"


def tier(state: str, *more: str) -> Run:
    return succeed(PLAYBOOK, "-e", f"tier={FAST}", "-e", f"state={state}", *more)


@pytest.fixture(autouse=True)
def _served() -> None:
    preempt.wait_served((FAST,))


def test_held_and_started() -> None:
    job = preempt.tier_job(FAST)
    dry = tier("held", "--check", "--diff")
    assert dry.changed == {CONTROLLER: 1}
    assert "-fast: serving" in dry.output
    assert "+fast: held" in dry.output
    assert preempt.tier_job(FAST) == job
    try:
        assert tier("held").changed == {CONTROLLER: 1}
        assert cluster.tier_job() is None
        assert cluster.pids(TIER_NODE, "llama-server") == []
        held = cluster.status(FAST)
        assert held["state"] == "held"
        assert held["why"].startswith("held by ")
        assert held["words"] == f"held by {held['held_by']}; `gleaner tier {FAST} started` ends it"
        assert tier("held").changed == {CONTROLLER: 0}
        # Over the restart of whatever might bring it back, too.
        before = cluster.journal_cursor(KEEPER)
        run(CONTROLLER, "systemctl restart slurmctld gleaner-keeper gleaner-upstream")
        cluster.wait_until("the keeper has looked", lambda: "left alone" in cluster.said_since(KEEPER, before), 30)
        assert cluster.tier_job() is None
    finally:
        started = tier("started")
    assert started.changed == {CONTROLLER: 1}
    cluster.wait_served()
    assert tier("started").changed == {CONTROLLER: 0}
    assert "drain: " in preempt.log(job)


def test_restarted() -> None:
    job = preempt.tier_job(FAST)
    assert tier("restarted").changed == {CONTROLLER: 1}
    cluster.wait_served()
    assert preempt.tier_job(FAST).id != job.id
    assert "FAILED" not in preempt.states(job.id)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-e", "tier=slow", "-e", "state=held"), "tier = slow; wanted one of fast, reasoning"),
        (("-e", "tier=fast", "-e", "state=stopped"), "state = stopped; wanted one of held, started, restarted"),
        (("-e", "state=held"), "tier = undefined; wanted one of fast, reasoning"),
    ],
)
def test_what_cannot_be_wished_is_refused_with_the_cure(arguments: tuple[str, ...], words: str) -> None:
    refused = playbook(PLAYBOOK, *arguments)
    assert refused.code != 0
    assert words in refused.text
    assert "-e tier=fast -e state=held" in refused.text
