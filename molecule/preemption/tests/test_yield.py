"""A paying job gets its nodes at once, whatever the tier is doing; clients are told, and the tier is back by itself."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks import preemption
from benchmarks.preemption import CASES, LONG, SHORT, STREAMS, NotPlayedError, tiers_of
from gleaner.events import Kind
from tests.lab import cluster, preempt
from tests.lab.cluster import CONTROLLER, run

ATTEMPTS = 3


@pytest.fixture(autouse=True)
def _served() -> None:
    preempt.wait_served()


@pytest.fixture(scope="module", autouse=True)
def began() -> float:
    """When this module began: what was before is others'."""
    return time.time()


@pytest.fixture(scope="module", autouse=True)
def _folder() -> Iterator[None]:
    preemption.prepare(preempt.controller())
    yield
    run(CONTROLLER, f"rm -r {preemption.FOLDER}")


@pytest.fixture(scope="module")
def preempted() -> Counter[str]:
    """How often each tier was, in this module."""
    return Counter()


def play(case: str, preempted: Counter[str]) -> tuple[dict[str, cluster.Job], preemption.Round]:
    """The tiers' jobs before, and what was seen; once more where a short stream was over before the signal came."""
    for attempt in range(ATTEMPTS):
        preempt.wait_served()
        before = {tier: preempt.tier_job(tier) for tier in tiers_of(case)}
        preempted.update(tiers_of(case))
        try:
            return before, preemption.play(preempt.controller(), case, 0.0, preempt.DRAIN_SECONDS)
        except NotPlayedError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


@pytest.mark.parametrize("case", CASES)
def test_clients_are_served_or_told_and_the_tier_is_back(case: str, preempted: Counter[str]) -> None:
    before, played = play(case, preempted)
    assert played.wrong == ()
    if case in STREAMS:
        assert played.stream is not None
        assert played.stream.done is (case == SHORT), played.stream
        assert bool(played.stream.error) is (case == LONG), "a connection that is closed, not a stream that looks whole"
    for tier, job in before.items():
        after = preempt.tier_job(tier)
        assert (after.id, after.restarts) == (job.id, job.restarts + 1)
        assert "FAILED" not in preempt.states(job.id)
        drained = [
            one for one in preempt.told(tier, job.id) if one.restart == job.restarts and one.kind is Kind.DRAINED
        ]
        assert [one.more["whole"] for one in drained] == [case != LONG]


def test_the_ledger_has_it_all(began: float, preempted: Counter[str]) -> None:
    for tier, times in preempted.items():
        told = preempt.ledger(tier, f"@{int(began)}")
        assert told["preemptions"] == times
        assert told["waited"]["count"] == times
        assert told["gpu_hours"] > 0
        assert 0 < told["available_share"] < 1
        assert told["differences"] == []
    text = run(CONTROLLER, "gleaner report --since 1h")
    assert "others waited for us" in text
    refused = cluster.run_as("alice", CONTROLLER, "gleaner", "report")
    assert refused.returncode == 2
    assert "cure: sudo" in refused.stderr
