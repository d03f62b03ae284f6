"""site.yml on virgin hosts: the dry run names what the real one then does, and touches nothing."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import cluster
from tests.lab.ansible import ROOT, Run, playbook
from tests.lab.cluster import HOSTS, run

NAMED_SHARE = 0.95
SPURIOUS_SHARE = 0.15

# Tasks of which a dry run cannot know; each with the reason.
EXCEPTIONS: dict[str, str] = {}

Snapshot = dict[str, str]


def snapshot(name: str) -> Snapshot:
    """Every file of /etc with its sum, owner and mode, and every package with its version."""
    files = run(name, "cd /etc && find . -printf '%p %y %m %u %g %l\\n' && find . -type f -exec sha256sum {} +")
    packages = run(name, "dpkg-query --show --showformat='${Package} ${Version} ${Status}\\n'")
    return {"/etc": files, "packages": packages}


@dataclass(frozen=True)
class Runs:
    """The dry run and the real one, with each host's state before and after the dry one."""

    before: dict[str, Snapshot]
    after: dict[str, Snapshot]
    dry: Run
    real: Run
    dry_changes: Counter[tuple[str, str]]
    real_changes: Counter[tuple[str, str]]


def changes(file: Path) -> Counter[tuple[str, str]]:
    """How often each task changed something: (host, task)."""
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return Counter(
        (entry["host"], f"{entry['task']} ({os.path.relpath(entry['path'], ROOT)})")
        for entry in entries
        if entry["changed"]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("check_mode")
    for name in HOSTS:
        assert cluster.host(name).run("command -v munged slurmd slurmctld nginx").rc != 0, (
            f"{name} is no virgin host: take the lab down first (playbooks/lab_down.yml)"
        )

    def site(log: str, *arguments: str) -> Run:
        return playbook(
            "site.yml",
            *arguments,
            timeout=1200,
            ANSIBLE_CALLBACK_PLUGINS=str(ROOT / "molecule/check_mode/callback_plugins"),
            ANSIBLE_CALLBACKS_ENABLED="task_results",
            TASK_RESULTS=str(folder / log),
        )

    before = {name: snapshot(name) for name in HOSTS}
    dry = site("dry", "--check", "--diff")
    after = {name: snapshot(name) for name in HOSTS}
    real = site("real")
    return Runs(before, after, dry, real, changes(folder / "dry"), changes(folder / "real"))


def test_the_dry_run_succeeds_on_virgin_hosts(runs: Runs) -> None:
    assert runs.dry.code == 0, runs.dry.output


@pytest.mark.parametrize("what", ["/etc", "packages"])
def test_the_dry_run_touches_nothing(runs: Runs, what: str) -> None:
    for name in HOSTS:
        before, after = (set(state[name][what].splitlines()) for state in (runs.before, runs.after))
        assert sorted(after - before) == [], name
        assert sorted(before - after) == [], name


def test_the_dry_run_shows_what_files_would_hold(runs: Runs) -> None:
    assert "+ClusterName=lab" in runs.dry.output
    assert "+    listen" in runs.dry.output


def test_the_real_run_succeeds_and_the_tier_is_served(runs: Runs) -> None:
    assert runs.real.code == 0, runs.real.output
    cluster.wait_served()
    assert cluster.complete(cluster.SMOLLM2).status == 200


def test_the_dry_run_named_what_the_real_one_changed(runs: Runs) -> None:
    expected = Counter(
        {key: count for key, count in runs.real_changes.items() if key[1].partition(" (")[0] not in EXCEPTIONS}
    )
    missed = expected - runs.dry_changes
    share = 1 - missed.total() / expected.total()
    assert share >= NAMED_SHARE, f"{share:.0%} named; missed: {sorted(missed)}"


def test_the_dry_run_named_little_that_the_real_one_did_not_change(runs: Runs) -> None:
    # Packages start their services themselves, which a dry run cannot know.
    spurious = runs.dry_changes - runs.real_changes
    assert spurious.total() <= SPURIOUS_SHARE * runs.real_changes.total(), sorted(spurious)
