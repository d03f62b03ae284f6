"""system_service: a unit to come is a change in check mode, a failed start shows its journal, old files are seen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from action_plugins.system_service import Look, look_command, unit_to_come

ROOT = Path(__file__).parents[2]

PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  tasks:
    - system_service: {name: nginx, state: started, enabled: true%(options)s}
      notify: Restart nginx
      environment: {PATH: "%(bin)s:/usr/bin:/bin"}
  handlers:
    - name: Restart nginx
      debug: {msg: told}
"""
# systemctl of a host whose unit is not there, or is there and does not start, or is skipped for a condition.
SYSTEMCTL = """#!/bin/sh
case "$1" in
  show)
    printf 'Id=nginx.service\\nLoadState=%(load)s\\nActiveState=%(active)s\\nConditionResult=%(condition)s\\n'
    printf 'InactiveExitTimestamp=Sun 2026-11-29 08:00:00.500000 UTC\\nStateChangeTimestamp=\\n' ;;
  is-enabled) echo enabled ;;
  start) [ %(condition)s = no ] || { echo 'Job for nginx.service failed.' >&2; exit 1; } ;;
esac
"""
JOURNAL = "#!/bin/sh\necho 'nginx: [emerg] bind() to 0.0.0.0:8080 failed'\n"


def play(
    folder: Path, load: str, *options: str, condition: str = "yes", active: str = "inactive", reads: Path | None = None,
    more: Mapping[str, str] | None = None, python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    systemctl = SYSTEMCTL % {"load": load, "condition": condition, "active": active}
    # What is shown later counts.
    systemctl = systemctl.replace(
        "    printf 'InactiveExit",
        "".join(f"    printf '{name}={value}\\n'\n" for name, value in (more or {}).items())
        + "    printf 'InactiveExit",
    )
    for name, text in (("systemctl", systemctl), ("journalctl", JOURNAL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / "play.yml").write_text(PLAYBOOK % {"bin": programs, "options": f", reads: [{reads}]" if reads else ""})
    return subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local",
         "play.yml", *options],
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_PYTHON_INTERPRETER": python,
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


# The fake unit was started at half past that second.
STARTED = 1795939200


def at(path: Path, seconds: float) -> Path:
    path.touch()
    os.utime(path, (seconds, seconds))
    return path


@pytest.mark.parametrize("options", [(), ("--check", "--diff")])
def test_a_unit_that_is_older_than_its_file_notifies_the_handler(tmp_path: Path, options: tuple[str, ...]) -> None:
    file = at(tmp_path / "nginx.conf", STARTED + 0.6)
    done = play(tmp_path, "loaded", *options, active="active", reads=file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RUNNING HANDLER [Restart nginx]" in done.stdout
    if options:
        assert f"nginx runs since before a change of {file}" in done.stdout


def test_a_unit_that_has_read_its_file_is_left_alone(tmp_path: Path) -> None:
    done = play(tmp_path, "loaded", active="active", reads=at(tmp_path / "nginx.conf", STARTED + 0.4))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=0" in done.stdout


def test_a_file_that_is_not_there_is_a_failure_but_for_a_dry_run(tmp_path: Path) -> None:
    missing = tmp_path / "nginx.conf"
    done = play(tmp_path, "loaded", active="active", reads=missing)
    assert done.returncode == 2
    assert f"'{missing}': No such file or directory" in done.stdout
    assert play(tmp_path, "loaded", "--check", active="active", reads=missing).returncode == 0


def test_a_file_from_the_future_counts_once(tmp_path: Path) -> None:
    file = at(tmp_path / "nginx.conf", 2 * STARTED)
    assert "changed=1" in play(tmp_path, "loaded", "--check", active="active", reads=file).stdout
    assert file.stat().st_mtime == 2 * STARTED
    done = play(tmp_path, "loaded", active="active", reads=file)
    assert "RUNNING HANDLER [Restart nginx]" in done.stdout
    assert file.stat().st_mtime < 2 * STARTED


def look(moment: str, now: str = "1795939300", **unit: str) -> Look:
    shown = {
        "ActiveState": "active",
        "InactiveExitTimestamp": "Sun 2026-11-29 08:00:00.500000 UTC",
        "StateChangeTimestamp": "Sun 2026-11-29 08:00:20.000000 UTC",
        **unit,
    }
    lines = "".join(f"{name}={value}\n" for name, value in shown.items())
    return Look.from_text(f"{lines}--\n{now}.000000000\n{moment} /etc/a b\n")


@pytest.mark.parametrize(
    ("moment", "by", "stale"),
    [
        ("1795939200.499999999", "restarted", False),
        ("1795939200.500000000", "restarted", False),
        ("1795939200.500000001", "restarted", True),
        ("1795939219.999999999", "restarted", True),
        ("1795939219.999999999", "reloaded", False),
        ("1795939220.000000001", "reloaded", True),
    ],
)
def test_files_are_compared_to_the_nanosecond(moment: str, by: str, stale: bool) -> None:
    assert look(moment).stale(by) == (["/etc/a b"] if stale else [])


def test_what_does_not_run_has_read_nothing_old() -> None:
    assert look("1795939290", ActiveState="inactive").stale("restarted") == []
    assert look("1795939290", InactiveExitTimestamp="").stale("restarted") == []


def test_a_reload_that_failed_has_read_nothing() -> None:
    assert look("1795939100", ReloadResult="exit-code").stale("reloaded") == ["/etc/a b"]
    assert look("1795939100", ReloadResult="success").stale("reloaded") == []
    assert look("1795939100", ReloadResult="exit-code").stale("restarted") == []


def test_a_start_in_the_future_proves_nothing() -> None:
    assert look("1795939100", now="1795939150").stale("restarted") == ["/etc/a b"]


@pytest.mark.parametrize("text", ["", "ActiveState=active\n", "a=b\n--\n", "a=b\n--\nnow\n"])
def test_an_answer_of_another_kind_is_no_answer(text: str) -> None:
    with pytest.raises((ValueError, ArithmeticError)):
        Look.from_text(text)


WELL = {"LoadState": "loaded", "IsEnabled": "enabled", "NeedDaemonReload": "no", "ConditionResult": "yes"}
RUNS = {"name": "nginx", "state": "started", "enabled": True, "daemon_reload": True}


def test_a_unit_that_runs_as_it_should_needs_no_module(tmp_path: Path) -> None:
    file = at(tmp_path / "nginx.conf", STARTED + 0.4)
    for options in ((), ("--check",)):
        done = play(tmp_path, "loaded", *options, active="active", reads=file, more=WELL, python="/no/python")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "changed=0" in done.stdout
    at(file, STARTED + 0.6)
    assert play(tmp_path, "loaded", active="active", reads=file, more=WELL, python="/no/python").returncode != 0


@pytest.mark.parametrize(
    "otherwise",
    [
        {"LoadState": "not-found"},
        {"IsEnabled": "disabled"},
        {"IsEnabled": "enabled-runtime"},
        {"IsEnabled": ""},
        {"NeedDaemonReload": "yes"},
        {"NeedDaemonReload": ""},
        {"ConditionResult": "no"},
        {"ActiveState": "activating"},
        {"ActiveState": "failed"},
    ],
)
def test_any_other_unit_is_left_to_the_module(otherwise: dict[str, str]) -> None:
    assert look("1795939100", **WELL).is_as_wanted(RUNS, "restarted")
    assert not look("1795939100", **{**WELL, **otherwise}).is_as_wanted(RUNS, "restarted")


@pytest.mark.parametrize(
    "otherwise",
    [
        {"state": "restarted"},
        {"state": "stopped"},
        {"enabled": False},
        {"masked": False},
        {"scope": "user"},
        {"name": "gleaner-lend.socket"},
    ],
)
def test_a_look_judges_no_other_wish(otherwise: dict[str, object]) -> None:
    assert not look("1795939100", **WELL).is_as_wanted({**RUNS, **otherwise}, "restarted")


def test_paths_are_words() -> None:
    assert look_command("nginx", ["/etc/a b"]).endswith("-- '/etc/a b'")
