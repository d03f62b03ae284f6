"""config_file in check mode: on a virgin host every file is named, and nothing is red."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from action_plugins.config_file import owner_to_come, with_destination_headers

ROOT = Path(__file__).parents[2]

PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  tasks:
    - config_file:
        src: unit.conf.j2
        dest: "%(dest)s/of/a/package/unit.conf"
        owner: nobody-yet
        mode: "0644"
        validate: /usr/sbin/program-of-a-package %%s
    - config_file: {src: unit.conf.j2, dest: "%(dest)s/same", owner: nobody-yet, mode: "0644"}
"""


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local",
         "--check", "--diff", "play.yml"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        },
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "play.yml").write_text(PLAYBOOK % {"dest": tmp_path / "host"})
    (tmp_path / "unit.conf.j2").write_text("for {{ inventory_hostname }}\n")
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "same").write_text("for localhost\n")
    return tmp_path


def test_check_of_a_virgin_host_names_every_file_and_writes_none(folder: Path) -> None:
    done = check(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=2" in done.stdout
    assert f"+++ after: {folder}/host/of/a/package/unit.conf\n@@ -0,0 +1 @@\n+for localhost\n" in done.stdout
    assert "+owner: nobody-yet" in done.stdout
    assert [path.name for path in (folder / "host").iterdir()] == ["same"]


def test_two_checks_print_the_same_text(folder: Path) -> None:
    assert check(folder).stdout == check(folder).stdout


@pytest.mark.parametrize(
    ("message", "attribute"),
    [
        ("chown failed: failed to look up user slurm", "owner"),
        ("chgrp failed: failed to look up group slurm", "group"),
    ],
)
def test_an_owner_to_come_is_a_change(message: str, attribute: str) -> None:
    result = owner_to_come({"failed": True, "msg": message, "owner": "root", "group": "root", "path": "/etc/x"})
    assert result is not None
    assert result["changed"] is True
    assert "failed" not in result
    assert result["diff"] == [{"before": f"{attribute}: root\n", "after": f"{attribute}: slurm\n"}]


@pytest.mark.parametrize(
    "result",
    [
        {"failed": True, "msg": "chmod failed: Operation not permitted"},
        {"changed": True, "msg": "failed to look up user slurm"},
        {"changed": False},
    ],
)
def test_any_other_result_is_left_alone(result: dict[str, object]) -> None:
    assert owner_to_come(result) is None


def test_only_text_diffs_get_the_destination() -> None:
    attributes = {"before": {"mode": "0644"}, "after": {"mode": "0600"}}
    text = {"before": "", "after": "a", "after_header": "/root/.ansible/tmp/x"}
    result = with_destination_headers({"diff": [attributes, text]}, "/etc/x")
    assert result["diff"] == [attributes, {"before": "", "after": "a", "after_header": "/etc/x"}]
    assert with_destination_headers({"diff": attributes}, "/etc/x") == {"diff": attributes}
