"""How long it takes from bare hosts to Slurm, to a serving site, and how long a second run takes.

Has a lab of its own, id 7 unless GLEANER_LAB_ID names one, which it takes down before and after:
`python -m benchmarks.bring_up`. Writes docs/benchmarks.md; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import lab, report

CLUSTER_BAR_SECONDS = 120
SECOND_RUN_BAR_SECONDS = 60
COLD_BAR_SECONDS = 20 * 60
WARM_BAR_SECONDS = 5 * 60
IDLE_WAIT_SECONDS = 60
SLOWEST = 10


@dataclass
class Figures:
    """Seconds of each round, and of `make up`."""

    boot: list[float] = field(default_factory=list)
    cluster: list[float] = field(default_factory=list)
    first_run: list[float] = field(default_factory=list)
    second_run: list[float] = field(default_factory=list)
    cluster_tasks: list[tuple[float, str]] = field(default_factory=list)
    second_run_tasks: list[tuple[float, str]] = field(default_factory=list)
    make_up: dict[str, float] = field(default_factory=dict)


def wait_for_three_idle_nodes(ssh: list[str]) -> None:
    """Accounting knows the cluster, and Slurm would start a job on each node at once."""
    deadline = time.monotonic() + IDLE_WAIT_SECONDS
    while True:
        nodes = lab.output(ssh, "sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        if sorted(set(nodes)) == ["vasp-01 idle", "vasp-02 idle", "vasp-03 idle"]:
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {IDLE_WAIT_SECONDS} s sinfo says {nodes}; wanted three idle nodes")
        time.sleep(0.5)
    clusters = lab.output(ssh, "sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=cluster")
    if clusters != "lab":
        raise RuntimeError(f"accounting knows the clusters {clusters!r}; wanted 'lab'")


def bare_hosts_to_slurm(here: lab.Lab, figures: Figures) -> None:
    here.playbook("playbooks/lab_down.yml")
    figures.boot.append(here.playbook("playbooks/lab_up.yml").seconds)
    ssh = here.ssh("slurm-ctl")
    began = time.monotonic()
    play = here.playbook("playbooks/cluster.yml")
    wait_for_three_idle_nodes(ssh)
    figures.cluster.append(time.monotonic() - began)
    figures.cluster_tasks = sorted(play.tasks, reverse=True)[:SLOWEST]
    print(f"bare hosts to Slurm: {figures.cluster[-1]:.1f} s", flush=True)


def whole_site_twice(here: lab.Lab, figures: Figures) -> None:
    figures.first_run.append(here.playbook("site.yml").seconds)
    second = here.playbook("site.yml")
    if second.changed:
        raise RuntimeError(f"the second run of site.yml changed {dict(second.changed)}; wanted nothing")
    figures.second_run.append(second.seconds)
    print(f"site.yml: {figures.first_run[-1]:.1f} s, again: {second.seconds:.1f} s", flush=True)
    figures.second_run_tasks = sorted(second.tasks, reverse=True)[:SLOWEST]


def make_up(id_: str, figures: Figures) -> None:
    """`make up` in a fresh clone: with empty caches, and once more with the caches that the first left."""
    with tempfile.TemporaryDirectory(prefix="gleaner-", dir="/var/tmp") as folder:
        clone, cache = Path(folder) / "clone", Path(folder) / "cache"
        subprocess.run(["git", "clone", "--quiet", str(lab.ROOT), str(clone)], check=True)
        environment = os.environ | {"GLEANER_LAB_ID": id_, "GLEANER_CACHE": str(cache)}

        def make(target: str) -> float:
            began = time.monotonic()
            subprocess.run(["make", target], cwd=clone, env=environment, check=True)
            return time.monotonic() - began

        try:
            figures.make_up["from nothing"] = make("up")
            make("down")
            shutil.rmtree(clone / ".venv")
            figures.make_up["with warm caches"] = make("up")
        finally:
            make("distclean")


def slowest(tasks: list[tuple[float, str]]) -> str:
    return report.table(("task", "s"), [(task, f"{seconds:.1f}") for seconds, task in tasks])


def bring_up_report(about: dict[str, str], figures: Figures, host_versions: str) -> str:
    def row(what: str, seconds: list[float], bar: float | None) -> tuple[str, ...]:
        middle = statistics.median(seconds)
        verdict = "" if bar is None else f"{bar} s: {'met' if middle <= bar else 'missed'}"
        return what, str(len(seconds)), f"{middle:.1f}", " ".join(f"{one:.1f}" for one in seconds), verdict

    rows = [
        row("`playbooks/lab_up.yml`: four hosts booted", figures.boot, None),
        row(
            "`playbooks/cluster.yml`: bare hosts to Slurm with accounting and three idle nodes",
            figures.cluster,
            CLUSTER_BAR_SECONDS,
        ),
        row("`site.yml` after that, compiler cache warm", figures.first_run, None),
        row("`site.yml` again, nothing changed", figures.second_run, SECOND_RUN_BAR_SECONDS),
    ]
    bars = {"from nothing": COLD_BAR_SECONDS, "with warm caches": WARM_BAR_SECONDS}
    rows += [row(f"`make up` {how}", [seconds], bars[how]) for how, seconds in figures.make_up.items()]
    return "\n\n".join(
        [
            report.facts(about | {"versions": host_versions}),
            report.table(("what", "rounds", "median, s", "each round, s", "bar"), rows),
            "The slowest tasks of the last `playbooks/cluster.yml`, in s:",
            slowest(figures.cluster_tasks),
            "The slowest tasks of the last second run of `site.yml`, in s:",
            slowest(figures.second_run_tasks),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--make-up", action="store_true", help="also time `make up` in a fresh clone (20 minutes)")
    parser.add_argument("--no-report", action="store_true", help="leave docs/benchmarks.md alone")
    arguments = parser.parse_args()

    here = lab.Lab(os.environ.get("GLEANER_LAB_ID") or "7")
    figures = Figures()
    about = dict(lab.machine())
    try:
        if not (Path(here.variable("slurm-ctl", "lab_cache")) / "apt" / here.id).exists():
            # The bar is with packages in the lab's cache: one round fills it and does not count.
            print("filling the package cache", flush=True)
            bare_hosts_to_slurm(here, Figures())
            whole_site_twice(here, Figures())
        for _ in range(arguments.rounds):
            bare_hosts_to_slurm(here, figures)
            whole_site_twice(here, figures)
        ssh = here.ssh("slurm-ctl")
        versions = f"Slurm {lab.output(ssh, 'sinfo', '--version').split()[-1]}, ansible-core {lab.ansible_version()}"
    finally:
        here.playbook("playbooks/lab_down.yml")
    if arguments.make_up:
        make_up(here.id, figures)

    text = bring_up_report(about, figures, versions)
    print(text)
    if not arguments.no_report:
        report.write("bring-up", text)
    missed = (
        statistics.median(figures.cluster) > CLUSTER_BAR_SECONDS
        or statistics.median(figures.second_run) > SECOND_RUN_BAR_SECONDS
        or figures.make_up.get("from nothing", 0) > COLD_BAR_SECONDS
        or figures.make_up.get("with warm caches", 0) > WARM_BAR_SECONDS
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
