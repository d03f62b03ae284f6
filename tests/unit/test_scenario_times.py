"""Times of scenarios: taken from molecule's own lines, and told beside their budgets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tools.scenario_times import Stopwatch, report

PROGRAM = Path(__file__).parents[2] / "tools" / "scenario_times.py"


def test_time_is_taken_from_molecules_lines() -> None:
    watch = Stopwatch()
    for now, line in enumerate(
        [
            b"\x1b[36mINFO    \x1b[0m [default > create] Executing",
            b"TASK [Ssh answers] ***",
            b"INFO     [default > create] Executed: Successful",
            b"INFO     [gateway > verify] Executing",
            b"INFO     [gateway > verify] Executing Testinfra tests found in molecule/gateway/tests/...",
            b"INFO     [gateway > verify] Executed: Failed\r",
            b"INFO     [default > destroy] Executing",
        ]
    ):
        watch.read(line, float(now))
    watch.stop(10.0)
    assert watch.seconds == {"default": 2.0 + 4.0, "gateway": 2.0}


def test_a_scenario_over_its_budget_is_said_loudly() -> None:
    said = report({"default": 60.4, "gateway": 171.0, "new": 1.0}, {"default": 60, "gateway": 170})
    table, _, complaints = said.partition("all ")
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["default", "60", "60", "OVER"],
        ["gateway", "171", "170", "OVER"],
        ["new", "1", "none"],
    ]
    assert "OVER BUDGET: gateway took 171 s, its budget is 170 s." in complaints
    assert "NO BUDGET: new" in complaints


def test_a_scenario_within_its_budget_is_no_matter() -> None:
    assert "OVER" not in report({"default": 59.9}, {"default": 60})


def test_all_that_the_command_says_is_passed_on_with_its_exit_code() -> None:
    script = (
        "echo '[default > create] Executing'; echo warning >&2; sleep 1.1; echo '[gateway > verify] Executing'; exit 3"
    )
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stdout.startswith("[default > create] Executing\nwarning\n[gateway > verify] Executing\n")
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[4:] if line}
    assert rows["default"][0] == "1"
    assert rows["gateway"][0] == "0"
