"""The benchmark of preemption: what is reckoned of a round, and that each bar can be missed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks import preemption, report
from benchmarks.preemption import CASES, FAST, IDLE, LONG, SHORT, STREAMS, WIDE, Asked, Round, Stream, Yield

BUDGET = 5.0


def yielded(**more: float) -> Yield:
    """A tier that was signalled at 100 and was gone within half a second, back at 111."""
    times = {"signalled": 100.0, "drained": 100.3, "left": 100.4, "last_sent": 100.1, "in_flight": 100.1}
    return Yield(tier=FAST, **{**times, "running": 111.0, "served": 114.0, **more})


def played(case: str, **more: Any) -> Round:
    whole: dict[str, Any] = {
        "case": case,
        "job": 77,
        "wait": 1.6,
        "baseline": 0.8,
        "started": 100.9,
        "ended": 109.0,
        "yields": (yielded(),),
        "wrong": (),
    }
    if case == SHORT:
        whole |= {"stream": Stream(102.0, done=True), "yields": (yielded(drained=102.3, left=102.4),), "wait": 3.6}
    elif case == LONG:
        whole |= {"stream": Stream(105.1, error="cut"), "yields": (yielded(drained=105.0, left=105.2),), "wait": 6.5}
    return Round(**{**whole, **more})


def missed(*rounds: Round) -> list[str]:
    """The bars that are missed when these rounds take the place of good ones of their case."""
    kept = [played(case) for case in CASES if case not in {one.case for one in rounds}]
    return [one.name for one in preemption.claims([*kept, *rounds], BUDGET) if one.met is False]


def test_good_rounds_meet_every_bar() -> None:
    assert missed() == []


def test_nothing_in_flight_is_no_drain() -> None:
    assert played(IDLE).drain == 0.0
    assert played(IDLE).extra == pytest.approx(0.8)


def test_the_drain_is_what_clients_needed_not_what_we_did() -> None:
    assert played(SHORT).drain == pytest.approx(2.0), "the tier knew of it 0.3 s later"
    assert played(LONG).drain == pytest.approx(5.0), "the client noticed the end 0.1 s after the tier had cut it"


@pytest.mark.parametrize(
    ("case", "more", "bar"),
    [
        (IDLE, {"wait": 1.9}, f"{IDLE}: wait beyond idle nodes and drain"),
        (WIDE, {"wait": 4.0}, f"{WIDE}: wait beyond idle nodes"),
        (IDLE, {"yields": (yielded(last_sent=101.1),)}, "from the signal to the last request handed over"),
        (IDLE, {"yields": (yielded(running=112.1),)}, "from the last paying job's end to running again"),
        (LONG, {"stream": Stream(106.2, error="cut")}, "a long stream's end beyond the budget"),
        (LONG, {"stream": Stream(103.0, error="cut")}, "a long stream's end beyond the budget"),
        (LONG, {"stream": Stream(0.0, error="")}, "a long stream's end beyond the budget"),
        (LONG, {"stream": Stream(105.1, done=True)}, "long streams that ended as if they were whole"),
        (LONG, {"stream": Stream(105.1)}, "long streams that ended as if they were whole"),
        (SHORT, {"stream": Stream(102.0, error="cut")}, "short streams that were cut"),
        (IDLE, {"wrong": ("status 502",)}, "answers that were neither 200 nor a proper 503"),
    ],
)
def test_each_bar_can_be_missed(case: str, more: dict[str, Any], bar: str) -> None:
    assert bar in missed(played(case, **more))


def test_a_run_without_a_case_meets_no_bar_of_it() -> None:
    found = {one.name: one.met for one in preemption.claims([played(case) for case in STREAMS], BUDGET)}
    assert found[f"{IDLE}: wait beyond idle nodes"] is False


def test_what_was_handed_over_is_told_from_what_the_gateway_refused() -> None:
    asking = preemption.Asking("nowhere", FAST, health=False)
    asking.answers = [Asked(100.0, 200, 0.1), Asked(100.5, 503, 4.5), Asked(101.0, 503, 0.01), Asked(101.5, 503, 0.4)]
    asking.answers.append(Asked(120.0, 200, 0.1))
    assert [one.at for one in asking.handed_over(105.2, 104.9)] == [100.0, 100.5]
    assert asking.first_served(105.0) == pytest.approx(120.1)


@pytest.mark.parametrize("version", ["24.11", "22.05"])
def test_the_document_has_a_place_for_each_version(version: str) -> None:
    assert report.replace(preemption.DOCUMENT.read_text(), f"slurm-{version}", "figures")


def test_the_worst_figure_is_the_largest_in_either_direction() -> None:
    claim = preemption.Claim("x", [0.1, -1.9, 0.3], "-1 to 1", False)
    assert claim.row() == ("x", "3", "0.10", "-1.90", "-1 to 1", "missed")
    assert dataclasses.replace(claim, met=None).row()[-1] == ""
