"""What a job is made from: what counts, and where it is read."""

from __future__ import annotations

from typing import Any

import pytest

from gleaner import digest

PLAN: dict[str, Any] = {
    "v": 1,
    "tier": "fast",
    "priority": 10,
    "slurm": {"exclude": ["vasp-01"]},
    "engine": {"prefix": "/cluster/shared/ai/llama.cpp/0.5.0-cpu"},
    "nodes": {"vasp-02": {"address": "10.0.0.12"}},
    "server": {"node_port": 8080, "args": ["--models-max", "2"]},
    "models": ["one"],
    "drain_seconds": 5,
    "memory": [{"device": "vasp-02 host"}],
    "warnings": [],
}
SCRIPT = "#!/bin/sh\n#SBATCH --mem=100M\n"


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {"prefix": "/cluster/shared/ai/llama.cpp/0.6.0-cpu"}},
        {"nodes": {"vasp-03": {"address": "10.0.0.13"}}},
        {"server": {"node_port": 8081, "args": ["--models-max", "2"]}},
        {"server": {"node_port": 8080, "args": ["--models-max", "3"]}},
        {"drain_seconds": 6},
        {"a part that a later version adds": 1},
    ],
)
def test_what_a_running_job_would_do_otherwise_counts(change: dict[str, Any]) -> None:
    assert digest.of({**PLAN, **change}, SCRIPT) != digest.of(PLAN, SCRIPT)


def test_the_script_counts() -> None:
    assert digest.of(PLAN, SCRIPT.replace("100M", "200M")) != digest.of(PLAN, SCRIPT)


@pytest.mark.parametrize(
    "change",
    [
        {"models": ["one", "two"]},
        {"memory": []},
        {"warnings": ["competes"]},
        {"priority": 20},
        {"slurm": {"exclude": ["vasp-01", "vasp-04"]}},
    ],
)
def test_what_changes_nothing_for_a_running_job_does_not(change: dict[str, Any]) -> None:
    assert digest.of({**PLAN, **change}, SCRIPT) == digest.of(PLAN, SCRIPT)


def test_it_does_not_depend_on_the_order_of_keys() -> None:
    assert digest.of(dict(reversed(PLAN.items())), SCRIPT) == digest.of(PLAN, SCRIPT)


def test_it_is_read_from_scripts_and_comments() -> None:
    made = digest.of(PLAN, SCRIPT)
    assert digest.read(f"#!/bin/sh\n#SBATCH --comment=gleaner:{made}\n") == made
    assert digest.read(digest.replaced(made)) == digest.read(digest.outranked(made)) == made
    assert [digest.read(text) for text in ("", "(null)", "gleaner:", f"gleaner:{made}0")] == [""] * 4


def test_a_job_that_has_to_end_is_marked_even_if_it_had_no_digest() -> None:
    assert all(digest.is_replaced(digest.replaced(made)) for made in ("", digest.of(PLAN, SCRIPT)))
    assert not any(digest.is_replaced(text) for text in ("", "replaced", f"gleaner:{digest.of(PLAN, SCRIPT)}"))


def test_an_outranked_job_is_no_replaced_one() -> None:
    for made in ("", digest.of(PLAN, SCRIPT)):
        assert digest.is_outranked(digest.outranked(made))
        assert not digest.is_replaced(digest.outranked(made))
        assert not digest.is_outranked(digest.replaced(made))
