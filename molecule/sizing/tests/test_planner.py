"""The short version of `benchmarks.sizing`: the planner against llama.cpp's programs, over a small matrix."""

from __future__ import annotations

import pytest

from benchmarks import lab, sizing
from tests.lab.ansible import LAB_ID


@pytest.fixture(scope="module")
def result() -> sizing.Result:
    return sizing.run(lab.Lab(LAB_ID), quick=True)


def test_nothing_differs_from_what_llama_cpp_says_and_takes(result: sizing.Result) -> None:
    assert result.differences == []


def test_enough_was_compared(result: sizing.Result) -> None:
    assert result.splits >= 40
    assert result.kv >= 80
    assert min(len(result.compute), len(result.weights), len(result.totals)) >= 50
    assert result.loads == 2
