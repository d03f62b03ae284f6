"""Incidents of the first cluster, each with a test that would have caught it.

The two that only a running tier can show are in molecule/reasoning/tests/test_lessons.py.
"""

from __future__ import annotations

from gleaner import plan
from tests.unit.test_beefcake2 import HEADERS, REASONING, problems, site


def test_lesson_1_a_memory_limit_that_is_too_low_is_said_before_the_job_starts() -> None:
    """`--mem=64G`: workers were killed at 25,000 to 40,000 tokens."""
    planned = plan.plan_tier(site(), "reasoning", HEADERS)["slurm"]["mem_mib"]
    assert 64 * 1024 < planned <= 200 * 1024
    low = plan.plan_tier(site(memory_mib=64 * 1024), "reasoning", HEADERS)
    assert f"memory_mib 65536 is less than the {planned} MiB that this tier was planned to need" in low["warnings"]


def test_lesson_2_compute_buffers_that_do_not_fit_are_refused_with_what_does() -> None:
    """A batch of 1024 beside 40,000 tokens: the scores of a micro-batch did not fit the GPU, and the server crashed."""
    value = site(context_tokens=40960, batch_tokens=1024, ubatch_tokens=1024)
    found = [problem for problem in problems(value) if problem.variable == f"tiers[{REASONING}].context_tokens"]
    assert len(found) == 1
    assert "gpu0 needs" in found[0].got
    assert "ubatch_tokens: 512" in found[0].cure
