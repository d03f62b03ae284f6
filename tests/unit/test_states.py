"""One vocabulary for programs and documents."""

from __future__ import annotations

import re
from pathlib import Path

from gleaner import states

ROOT = Path(__file__).resolve().parents[2]


def test_document_is_what_the_enums_say() -> None:
    assert (ROOT / "docs" / "states.md").read_text() == states.tables(), (
        "docs/states.md has drifted: run PYTHONPATH=src python3 -m gleaner states > docs/states.md"
    )


def test_every_word_has_a_meaning() -> None:
    members = [*states.Tier, *states.Exit, *states.Cause]
    assert all(member.meaning for member in members)


def test_only_a_tier_that_slurm_wants_back_requeues_itself() -> None:
    assert {cause for cause in states.Cause if cause.requeues} == {
        states.Cause.PREEMPTED,
        states.Cause.UNANSWERED,
    }


def test_exit_codes_do_not_collide_with_signals_and_shells() -> None:
    assert all(code == 0 or 10 <= code < 64 for code in states.Exit)
    assert len({code.value for code in states.Exit}) == len(states.Exit)


def test_table_cells_hold_no_bars() -> None:
    rows = [line for line in states.tables().splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"\|", row)) for row in rows} == {3, 4, 6}
