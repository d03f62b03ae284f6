"""Every part of `make test` has a budget, and all of them together stay below what a person is asked to wait."""

from __future__ import annotations

import re

from tests.docs.readme import ROOT
from tools.scenario_times import BUDGETS, budgets

PATIENCE_SECONDS = 35 * 60
OTHERS = {"set-up", "lint", "unit"}


def test_every_scenario_has_a_budget_and_a_line_about_it() -> None:
    scenarios = {path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml")}
    apart = set(re.findall(r"--exclude (\w+)", (ROOT / "tools/lab_tests").read_text()))
    assert apart == {"replace_node", "tailnet"}
    assert set(budgets(BUDGETS.read_text())) - OTHERS == scenarios - apart


def test_the_other_parts_are_those_of_make_test() -> None:
    assert set(budgets(BUDGETS.read_text())) >= OTHERS
    assert re.search(r"^test: lint unit lab-tests$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_all_together_stay_below_the_bound() -> None:
    assert sum(budgets(BUDGETS.read_text()).values()) <= PATIENCE_SECONDS
