"""How long what an administrator does on a running cluster takes, into docs/operations.md.

Beside a lab that serves and is taken away afterwards, since machines of it are destroyed:
`GLEANER_LAB_ID=5 PYTHONPATH=src tools/with_lab .venv/bin/python -m benchmarks.day_two`. Exits with 1 when a bar is
missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import lab, report
from tests.lab import cluster, inventory, machines
from tests.lab.ansible import succeed
from tests.lab.cluster import CONTROLLER, PORT, SPLIT_PORT, TIER_NODE

DOCUMENT = lab.ROOT / "docs" / "operations.md"
REPLACE_BAR_SECONDS = 180.0
SERVED_SECONDS = 180.0
# A node that only a tier needs which the inventory can do without.
LEAVES = "vasp-03"

LOOK, HOLD, START = "look: `gleaner status`", "hold a tier", "start a tier, until it serves"
REPLACE, REMOVE, BACK = "replace a node, bare machine to serving", "remove a node", "bring it back by `site.yml`"
BARS = {REPLACE: REPLACE_BAR_SECONDS}


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def tier(state: str) -> None:
    succeed("playbooks/tier.yml", "-e", "tier=fast", "-e", f"state={state}")


def start_until_served() -> None:
    tier("started")
    cluster.wait_served(SERVED_SECONDS)


def replace() -> float:
    """From the command on a bare machine to an answer of the tier that was on it."""
    machines.replace(TIER_NODE)

    def until_served() -> None:
        succeed("playbooks/replace_node.yml", "-e", f"node={TIER_NODE}")
        cluster.wait_served(SERVED_SECONDS)

    return timed(until_served)


def remove_and_bring_back() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tiers.json")
        file.write_text(json.dumps({"tiers": [inventory.tiers()["fast"]]}))
        arguments = ("-e", f"node={LEAVES}", "-e", f"@{file}")
        removed = timed(lambda: succeed("playbooks/remove_node.yml", *arguments))

    def back() -> None:
        succeed("site.yml")
        for port in (PORT, SPLIT_PORT):
            cluster.wait_served(SERVED_SECONDS, port)

    return removed, timed(back)


def figures(rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in (LOOK, HOLD, START, REPLACE, REMOVE, BACK)}
    for number in range(1, rounds + 1):
        found[LOOK].append(timed(lambda: cluster.run(CONTROLLER, "gleaner status")))
        found[HOLD].append(timed(lambda: tier("held")))
        found[START].append(timed(start_until_served))
        found[REPLACE].append(replace())
        removed, back = remove_and_bring_back()
        found[REMOVE].append(removed)
        found[BACK].append(back)
        print(f"round {number}: { ({name: round(values[-1], 1) for name, values in found.items()}) }", flush=True)
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
    found = figures(arguments.rounds)
    text = text_of(found, lab.machine())
    print(text)
    if not arguments.no_report:
        report.write("day-two", text, DOCUMENT)
    return 1 if missed(found) else 0


if __name__ == "__main__":
    sys.exit(main())
