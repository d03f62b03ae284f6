"""Patience: all who wait for a file system share what there is of it."""

from __future__ import annotations

import time

import pytest

from gleaner import bounded


def hangs(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_what_one_has_waited_the_next_one_does_not() -> None:
    patience = bounded.Patience(0.2)
    assert patience.spend(hangs, 0.15) == 0.15
    assert patience.spend(hangs) < 0.06
    assert patience.spend(hangs) == 0.0
    assert patience.spend(hangs, -1.0) == 0.0


def test_an_answer_costs_what_it_took_and_renews_it_all() -> None:
    patience = bounded.Patience(10.0)
    assert patience.spend(lambda seconds: f"{seconds:g}") == "10"
    assert 9.0 < patience.left <= 10.0
    patience.renew()
    assert patience.left == 10.0


def test_what_fails_has_waited_too() -> None:
    patience = bounded.Patience(0.2)

    def fails(seconds: float) -> None:
        time.sleep(seconds)
        raise OSError("away")

    with pytest.raises(OSError, match="away"):
        patience.spend(fails)
    assert patience.left == 0.0
