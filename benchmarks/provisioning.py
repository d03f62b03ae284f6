"""How the time of site.yml grows with the hosts: on bare ones, and once more when there is nothing to do.

Has a lab of its own, id 7 unless GLEANER_LAB_ID names one, which it takes down before and after each size:
`python -m benchmarks.provisioning`. Writes docs/benchmarks.md; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import lab, report

SIZES = (4, 8, 16)
# The lab's own inventory: a controller and three nodes, the last of which is vasp-03 with the octet 13.
OWN_HOSTS, LAST_NODE, LAST_OCTET = 4, 3, 13
SECOND_RUN_BAR_SECONDS = 60
# Of time and of computing for each host: what two runs of the same size differ by is no growth.
NOISE = 1.05
# Twice the hosts take three times as long: nearer to the square than to a line. Short tasks tell nothing.
SQUARE_EXPONENT = 1.58
TOLD_SECONDS = 1.0
SLOWEST = 15


def more_nodes(hosts: int) -> str:
    """An inventory of what the lab's own lacks of so many hosts.

    Raises ValueError for less than its own.
    """
    if hosts < OWN_HOSTS:
        raise ValueError(f"--hosts {hosts}; wanted at least {OWN_HOSTS}, which {lab.INVENTORY} has")
    lines = [
        f"        vasp-{LAST_NODE + more:02}: {{lab_octet: {LAST_OCTET + more}}}"
        for more in range(1, hosts - OWN_HOSTS + 1)
    ]
    return "\n".join(["all:", "  children:", "    slurm_nodes:", "      hosts:" + ("" if lines else " {}"), *lines, ""])


@contextmanager
def lab_of(id_: str, hosts: int) -> Iterator[lab.Lab]:
    """Bare hosts, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="gleaner-") as folder:
        inventory = Path(folder) / "more.yml"
        inventory.write_text(more_nodes(hosts))
        here = lab.Lab(id_, more=str(inventory))
        here.playbook("playbooks/lab_down.yml")
        try:
            here.playbook("playbooks/lab_up.yml")
            yield here
        finally:
            here.playbook("playbooks/lab_down.yml")


def run(here: lab.Lab) -> lab.Play:
    # With skipped hosts a heading comes when its task begins, else with its first result.
    return here.playbook("site.yml", ANSIBLE_DISPLAY_SKIPPED_HOSTS="true")


def profile(play: lab.Play) -> dict[str, float]:
    """Seconds of each task by its name, which may run more than once."""
    tasks: dict[str, float] = defaultdict(float)
    for seconds, name in play.tasks:
        tasks[name] += seconds
    return dict(tasks)


def exponent(seconds: Mapping[int, float]) -> float:
    """The k of seconds ~ hosts^k, by least squares of the logarithms; 0 for a single size."""
    points = [(math.log(hosts), math.log(max(one, 1e-3))) for hosts, one in seconds.items()]
    middle_x, middle_y = (sum(values) / len(points) for values in zip(*points))
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else 0.0


def growth(plays: Mapping[int, lab.Play]) -> list[tuple[str, dict[int, float], float]]:
    """Tasks that all sizes have, their seconds and their exponent; those that take longest first."""
    profiles = {hosts: profile(play) for hosts, play in plays.items()}
    largest = profiles[max(profiles)]
    tasks = []
    for name in sorted(largest, key=largest.__getitem__, reverse=True):
        seconds = {hosts: one[name] for hosts, one in profiles.items() if name in one}
        if len(seconds) == len(profiles):
            tasks.append((name, seconds, exponent(seconds)))
    return tasks


def squares(plays: Mapping[int, lab.Play]) -> list[str]:
    """Tasks that take longer than noise and grow with the square of the hosts."""
    largest = max(plays)
    return [name for name, seconds, k in growth(plays) if seconds[largest] >= TOLD_SECONDS and k >= SQUARE_EXPONENT]


def verdicts(first: Mapping[int, lab.Play], second: Mapping[int, lab.Play]) -> list[tuple[str, str, bool]]:
    """Each bar: what it is about, what was measured, whether it is met."""
    bars = []
    if OWN_HOSTS in second:
        seconds = second[OWN_HOSTS].seconds
        what = f"second run on {OWN_HOSTS} hosts, at most {SECOND_RUN_BAR_SECONDS} s"
        bars.append((what, f"{seconds:.1f} s", seconds <= SECOND_RUN_BAR_SECONDS))
    for which, plays in (("bare hosts", first), ("second run", second)):
        small, large = min(plays), max(plays)
        for what, of in (("seconds", "seconds"), ("CPU seconds here", "cpu_seconds")):
            there, here = (getattr(plays[hosts], of) / hosts for hosts in (large, small))
            name = f"{which}: {what} for each host, with {large} no more than with {small}"
            bars.append((name, f"{there:.2f} and {here:.2f}", there <= here * NOISE))
        found = squares(plays)
        bars.append((f"{which}: no task grows with the square of the hosts", ", ".join(found) or "none", not found))
    return bars


def table(plays: Mapping[int, lab.Play]) -> str:
    rows = [
        (
            hosts,
            f"{play.seconds:.1f}",
            f"{play.seconds / hosts:.2f}",
            f"{play.cpu_seconds:.1f}",
            f"{play.cpu_seconds / hosts:.2f}",
        )
        for hosts, play in sorted(plays.items())
    ]
    return report.table(("hosts", "s", "s for each host", "CPU s of the control machine", "for each host"), rows)


def tasks_table(plays: Mapping[int, lab.Play]) -> str:
    sizes = sorted(plays)
    rows = [
        (name, *(f"{seconds[size]:.1f}" for size in sizes), f"{k:.2f}") for name, seconds, k in growth(plays)[:SLOWEST]
    ]
    return report.table(("task", *(f"{size} hosts, s" for size in sizes), "exponent"), rows)


def provisioning_report(about: Mapping[str, str], first: Mapping[int, lab.Play], second: Mapping[int, lab.Play]) -> str:
    bars = [(what, measured, "met" if met else "missed") for what, measured, met in verdicts(first, second)]
    return "\n\n".join(
        [
            report.facts(about),
            "`site.yml` on bare hosts:",
            table(first),
            "`site.yml` again, `changed=0`:",
            table(second),
            report.table(("bar", "measured", ""), bars),
            "The slowest tasks on bare hosts. Exponent: twice the hosts take 2 to the power of it times as long.",
            tasks_table(first),
            "The slowest tasks of the second run:",
            tasks_table(second),
        ]
    )


def measure(id_: str, sizes: Sequence[int]) -> tuple[dict[int, lab.Play], dict[int, lab.Play]]:
    """Both runs with each number of hosts; RuntimeError when a second one changes something."""
    first: dict[int, lab.Play] = {}
    second: dict[int, lab.Play] = {}
    for hosts in sizes:
        with lab_of(id_, hosts) as here:
            first[hosts] = run(here)
            second[hosts] = run(here)
        if second[hosts].changed:
            raise RuntimeError(f"the second run of site.yml changed {dict(second[hosts].changed)}; wanted nothing")
        print(f"{hosts} hosts: {first[hosts].seconds:.1f} s, again: {second[hosts].seconds:.1f} s", flush=True)
    return first, second


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=list(SIZES), help="with the controller")
    parser.add_argument("--no-report", action="store_true", help="leave docs/benchmarks.md alone")
    arguments = parser.parse_args()

    id_ = os.environ.get("GLEANER_LAB_ID") or "7"
    about = {**lab.machine(), "ansible-core": lab.ansible_version()}
    if not (Path(lab.Lab(id_).variable("slurm-ctl", "lab_cache")) / "apt" / id_).exists():
        print("filling the package cache", flush=True)
        measure(id_, [OWN_HOSTS])
    first, second = measure(id_, arguments.hosts)
    text = provisioning_report(about, first, second)
    print(text)
    if not arguments.no_report:
        report.write("provisioning", text)
    return 0 if all(met for _, _, met in verdicts(first, second)) else 1


if __name__ == "__main__":
    sys.exit(main())
