"""How long what an administrator does on a running cluster takes, into docs/operations.md.

Beside a lab that serves and is taken away afterwards, since machines of it are destroyed:
`GLEANER_LAB_ID=5 PYTHONPATH=src tools/with_lab .venv/bin/python -m benchmarks.day_two`. Exits with 1 when a bar is
missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import lab, report
from tests.lab import cluster, inventory, machines, models
from tests.lab.ansible import CACHE, playbook, succeed
from tests.lab.cluster import CONTROLLER, OTHER_KEY, PORT, SPLIT_PORT, TIER_NODE

DOCUMENT = lab.ROOT / "docs" / "operations.md"
REPLACE_BAR_SECONDS = 180.0
SERVED_SECONDS = 180.0
# A node that only a tier needs which the inventory can do without; and one that the inventory lacks.
LEAVES, COMES = "vasp-03", "vasp-04"
WITH_COMES = ("-i", "tests/full/day_two/inventory")
TIERS = {"fast": PORT, "reasoning": SPLIT_PORT}
# In the lab's engine.yml, beside the one in use.
OTHER_ENGINE = "0.1.0-dev"
# Nothing is claimed of the time of a build, or of a machine that Slurm gives up: a run that hangs is to end.
RUN_SECONDS = 1800

LOOK, HOLD, START = "look: `gleaner status`", "hold a tier", "start a tier, until it serves"
MODEL, KEY = "add a model", "change the server key, until both tiers serve"
ENGINE, ROLLBACK = "change the engine, once it is built", "go back to the engine before"
REPLACE, REMOVE, BACK = "replace a node, bare machine to serving", "remove a node", "bring it back by `site.yml`"
GROW, TAKE, RETURN = "grow by a node", "take away", "bring everything back by `site.yml`"
ACTIONS = (LOOK, HOLD, START, MODEL, ENGINE, ROLLBACK, GROW, REMOVE, BACK, REPLACE, KEY, TAKE, RETURN)
BARS = {REPLACE: REPLACE_BAR_SECONDS}


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def served(*names: str) -> None:
    for name in names or TIERS:
        cluster.wait_served(SERVED_SECONDS, TIERS[name])


def tier(state: str, name: str = "fast") -> None:
    succeed("playbooks/tier.yml", "-e", f"tier={name}", "-e", f"state={state}")


def start_until_served() -> None:
    tier("started")
    served("fast")


def add_model() -> float:
    """From the command to an answer of the model, which a running router has not had before."""
    name = "another"
    with tempfile.TemporaryDirectory() as folder, models.restored():

        def until_it_answers() -> None:
            done = models.offer(Path(folder), models.offered(name))
            assert done.code == 0, done.output
            answer = cluster.complete(name)
            assert answer.status == 200, answer

        return timed(until_it_answers)


def change_key(*arguments: str) -> None:
    """As docs/operations.md has it: held, site.yml, started."""
    for name in TIERS:
        tier("held", name)
    succeed("site.yml", *arguments)
    for name in TIERS:
        tier("started", name)
    served()


def upgrade() -> None:
    # Tried again, since the round before has left it.
    arguments = (
        "-e",
        f"llama_cpp_version={OTHER_ENGINE}",
        "-e",
        "planner_truth_quick=true",
        "-e",
        "llama_cpp_retry=true",
    )
    done = playbook("playbooks/upgrade_engine.yml", *arguments, timeout=RUN_SECONDS)
    assert done.code == 0, done.output


def roll_back() -> None:
    succeed("playbooks/rollback_engine.yml")


def replace() -> float:
    """From the command on a bare machine to an answer of the tier that was on it."""
    machines.replace(TIER_NODE)

    def until_served() -> None:
        succeed("playbooks/replace_node.yml", "-e", f"node={TIER_NODE}")
        served("fast")

    return timed(until_served)


def site_until_served() -> None:
    done = playbook("site.yml", timeout=RUN_SECONDS)
    assert done.code == 0, done.output
    served()


def remove_and_bring_back() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tiers.json")
        file.write_text(json.dumps({"tiers": [inventory.tiers()["fast"]]}))
        arguments = ("-e", f"node={LEAVES}", "-e", f"@{file}")
        removed = timed(lambda: succeed("playbooks/remove_node.yml", *arguments))
    return removed, timed(site_until_served)


def grow() -> float:
    """From the command on a bare machine to a node that has been given to jobs; it leaves again."""
    with tempfile.TemporaryDirectory() as folder:
        succeed("playbooks/lab_up.yml", *WITH_COMES)
        try:
            grown = timed(lambda: succeed("site.yml", *WITH_COMES, "--limit", f"{CONTROLLER},{COMES}"))
            succeed("playbooks/remove_node.yml", *WITH_COMES, "-e", f"node={COMES}")
        finally:
            machines.take_away(Path(folder), COMES, *WITH_COMES)
    return grown


def prepare_engine() -> None:
    """Builds the other engine, and asks it what models take: what an upgrade does once, however often it is made."""
    sources = [sys.executable, "tools/fetch_lab_sources.py", "--other-engine", str(CACHE / "sources")]
    subprocess.run(sources, cwd=lab.ROOT, check=True)
    upgrade()
    roll_back()
    served()


def figures(rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in ACTIONS}
    prepare_engine()
    for number in range(1, rounds + 1):
        found[LOOK].append(timed(lambda: cluster.run(CONTROLLER, "gleaner status")))
        found[HOLD].append(timed(lambda: tier("held")))
        found[START].append(timed(start_until_served))
        found[MODEL].append(add_model())
        found[ENGINE].append(timed(upgrade))
        found[ROLLBACK].append(timed(roll_back))
        found[GROW].append(grow())
        removed, back = remove_and_bring_back()
        found[REMOVE].append(removed)
        found[BACK].append(back)
        found[REPLACE].append(replace())
        found[KEY].append(timed(lambda: change_key("-e", f"vault_server_key={OTHER_KEY}")))
        change_key()
        shown = {name: round(values[-1], 1) for name, values in found.items() if values}
        print(f"round {number}: {shown}", flush=True)
    # Once, since the builds go, too.
    found[TAKE].append(timed(lambda: succeed("playbooks/remove.yml")))
    found[RETURN].append(timed(site_until_served))
    return found


def missed(found: Mapping[str, Sequence[float]]) -> list[str]:
    return [name for name, bar in BARS.items() if max(found[name]) > bar]


def text_of(found: Mapping[str, Sequence[float]], about: Mapping[str, str]) -> str:
    rows = []
    for name, values in found.items():
        bar = f"{BARS[name]:.0f} s: {'missed' if name in missed(found) else 'met'}" if name in BARS else ""
        rows.append((name, len(values), f"{statistics.median(values):.1f}", f"{max(values):.1f}", bar))
    return "\n\n".join([report.facts(about), report.table(("action", "figures", "median, s", "worst, s", "bar"), rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-report", action="store_true", help="leave docs/operations.md alone")
    arguments = parser.parse_args()
    about = lab.machine()
    found = figures(arguments.rounds)
    text = text_of(found, about)
    print(text)
    if not arguments.no_report:
        report.write("day-two", text, DOCUMENT)
    return 1 if missed(found) else 0


if __name__ == "__main__":
    sys.exit(main())
