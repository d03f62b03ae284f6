"""Every playbook and every file of tasks, read by ansible over the first cluster's inventory.

The render runs what site.yml leads to; here are the others, too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.lab.ansible import ROOT, surroundings
from tests.render.beefcake2 import INVENTORY

PLAYBOOKS = ("site.yml", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "playbooks").glob("*.yml")))
ROLES = {path.name for path in (ROOT / "roles").iterdir()}


def check(*playbooks: str) -> subprocess.CompletedProcess[str]:
    """One process for all of them: its start takes longer than what it does."""
    return subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "--syntax-check", "--inventory", INVENTORY, *playbooks],
        cwd=ROOT,
        env=surroundings(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def importing(folder: Path, tasks: list[tuple[str, str]]) -> str:
    """A playbook that imports files of tasks, each by its role and its name: includes are read only when they run."""
    imports = [{"ansible.builtin.import_role": {"name": role, "tasks_from": name}} for role, name in tasks]
    path = folder / "roles.yml"
    path.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": imports}]))
    return str(path)


def roles_in(value: Any) -> Iterator[str]:
    """Names of roles in a playbook, or in a part of it."""
    if isinstance(value, list):
        for item in value:
            yield from roles_in(item)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key == "roles":
                yield from (item if isinstance(item, str) else item["role"] for item in inner)
            elif key in ("ansible.builtin.import_role", "ansible.builtin.include_role"):
                yield inner["name"]
            else:
                yield from roles_in(inner)


def test_every_playbook_and_every_file_of_tasks_can_be_read(tmp_path: Path) -> None:
    tasks = [(path.parts[-3], path.stem) for path in sorted((ROOT / "roles").glob("*/tasks/*.yml"))]
    assert {role for role, _ in tasks} == ROLES
    playbooks = [*PLAYBOOKS, importing(tmp_path, tasks)]
    done = check(*playbooks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^playbook: (.+)$", done.stdout, flags=re.MULTILINE) == playbooks


def test_a_file_of_tasks_that_is_spoilt_is_not(tmp_path: Path) -> None:
    spoilt = tmp_path / "roles/spoilt/tasks/more.yml"
    spoilt.parent.mkdir(parents=True)
    spoilt.write_text("- name: Spoilt\n  ansible.builtin.no_such_module:\n")
    done = check(importing(tmp_path, [("spoilt", "more")]))
    assert done.returncode != 0
    assert "no_such_module" in done.stderr


def test_every_role_is_of_a_playbook_that_was_read() -> None:
    # Its role makes containers, which a cluster has not.
    cluster = [name for name in PLAYBOOKS if not name.startswith("playbooks/lab_")]
    assert {role for name in cluster for role in roles_in(yaml.safe_load((ROOT / name).read_text()))} == ROLES - {
        "lab_host"
    }


def test_each_play_ends_the_run_over_a_lost_host_or_says_that_it_does_not() -> None:
    """As ansible.cfg has it: any_errors_fatal alone does not."""
    plays = [
        (path.name, play)
        for path in sorted((ROOT / "playbooks").glob("*.yml"))
        for play in yaml.safe_load(path.read_text())
        if "hosts" in play
    ]
    assert len(plays) > 40
    goes_on = [
        f"{name}: {play['name']}"
        for name, play in plays
        if play.get("any_errors_fatal") is not False and play.get("max_fail_percentage") != 0
    ]
    assert goes_on == []
