"""system_service: a unit to come is a change in check mode, and a failed start shows its journal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from action_plugins.system_service import unit_to_come

ROOT = Path(__file__).parents[2]

PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  tasks:
    - system_service: {name: nginx, state: started, enabled: true}
      environment: {PATH: "%(bin)s:/usr/bin:/bin"}
"""
# systemctl of a host whose unit is not there, or is there and does not start, or is skipped for a condition.
SYSTEMCTL = """#!/bin/sh
case "$1" in
  show) printf 'Id=nginx.service\\nLoadState=%(load)s\\nActiveState=inactive\\nConditionResult=%(condition)s\\n' ;;
  is-enabled) echo enabled ;;
  start) [ %(condition)s = no ] || { echo 'Job for nginx.service failed.' >&2; exit 1; } ;;
esac
"""
JOURNAL = "#!/bin/sh\necho 'nginx: [emerg] bind() to 0.0.0.0:8080 failed'\n"


def play(folder: Path, load: str, *options: str, condition: str = "yes") -> subprocess.CompletedProcess[str]:
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("systemctl", SYSTEMCTL % {"load": load, "condition": condition}), ("journalctl", JOURNAL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / "play.yml").write_text(PLAYBOOK % {"bin": programs})
    return subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local",
         "play.yml", *options],
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            "PATH": f"{programs}:{os.environ['PATH']}",
        },
    )  # fmt: skip


def test_check_takes_a_missing_unit_for_a_change(tmp_path: Path) -> None:
    done = play(tmp_path, "not-found", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=1" in done.stdout


def test_the_real_run_fails_on_a_missing_unit(tmp_path: Path) -> None:
    done = play(tmp_path, "not-found")
    assert done.returncode == 2
    assert "Could not find the requested service nginx" in done.stdout


def test_a_failed_start_shows_the_journal(tmp_path: Path) -> None:
    done = play(tmp_path, "loaded")
    assert done.returncode == 2
    assert "Unable to start service nginx" in done.stdout
    assert "bind() to 0.0.0.0:8080 failed" in done.stdout


@pytest.mark.parametrize(
    "result",
    [
        {"failed": True, "msg": "Error loading unit file 'nginx': bad-setting"},
        {"changed": True, "msg": "Could not find the requested service nginx: host"},
    ],
)
def test_any_other_result_is_left_alone(result: dict[str, object]) -> None:
    assert unit_to_come(result, "nginx") is None


def test_a_unit_that_is_skipped_for_its_condition_is_no_success(tmp_path: Path) -> None:
    done = play(tmp_path, "loaded", condition="no")
    assert done.returncode == 2
    assert "nginx was not started: a condition of its unit is not met" in done.stdout
