"""long_command: started once, followed in few words, and its end told with its cause."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

from action_plugins import long_command as action
from action_plugins.long_command import (
    Look,
    Progress,
    Reporter,
    cause,
    clock,
    log_lines,
    look_from,
    progress_of,
)
from library.long_command import LongCommandError, environment_line, fingerprint, is_running, start_command

MODULE = Path(__file__).parents[2] / "library" / "long_command.py"
NINJA = re.compile(r"\[(?P<done>\d+)/(?P<total>\d+)\]")
PERCENT = re.compile(r"(?P<percent>[\d.]+)%")

LOG = "/var/log/gleaner/build.log"
RUNNING = "LoadState=loaded\nActiveState=active\nSubState=running\nResult=success\n" \
    "ExecMainStatus=0\nExecMainStartTimestampMonotonic=100000000\nUptime=251.40\n--\n"  # fmt: skip
DONE = RUNNING.replace("SubState=running", "SubState=exited")
FAILED = (
    RUNNING.replace("=active", "=failed")
    .replace("SubState=running", "SubState=failed")
    .replace("Result=success", "Result=exit-code")
    .replace("ExecMainStatus=0", "ExecMainStatus=3")
)


def unit(**changes: str) -> dict[str, str]:
    return {"LoadState": "loaded", "ActiveState": "active", "SubState": "running", **changes}


# --- what is seen -----------------------------------------------------------------------------------------


def test_a_look_over_a_terminal_is_read() -> None:
    look = look_from((RUNNING + "[1/2] a\n\n[2/2] b\n").replace("\n", "\r\n"))
    assert look.running
    assert look.seconds == pytest.approx(151.4)
    assert look.lines == ["[1/2] a", "[2/2] b"]


def test_something_else_is_no_look() -> None:
    with pytest.raises(ValueError, match=r"sh: systemctl: not found"):
        look_from("sh: systemctl: not found\n--\n")


@pytest.mark.parametrize(
    ("properties", "running", "succeeded"),
    [
        (unit(), True, False),
        (unit(ActiveState="activating", SubState="start"), True, False),
        (unit(SubState="exited"), False, True),
        (unit(ActiveState="failed", SubState="failed"), False, False),
        (unit(LoadState="not-found", ActiveState="inactive", SubState="dead"), False, False),
    ],
)
def test_states_of_the_unit(properties: dict[str, str], running: bool, succeeded: bool) -> None:
    look = Look(properties, 1.0, [])
    assert (look.running, look.succeeded) == (running, succeeded)


def test_log_lines_lose_colours_and_carriage_returns() -> None:
    assert log_lines("\x1b[1mok\x1b[0m\r 10%\r 20%\n\n\x07") == ["ok", " 10%", " 20%"]


@pytest.mark.parametrize(
    ("lines", "regex", "expected"),
    [
        (["[1/270] a", "[27/270] b", "warning: c"], NINJA, Progress("10 % [27/270]", 10.0)),
        (["10% 20%"], PERCENT, Progress("20 %", 20.0)),
        (["[1/0] x"], NINJA, Progress("[1/0]")),
        (["10...0% x"], PERCENT, Progress("10...0%")),
        (["configuring", "checking"], NINJA, Progress("checking")),
        (["checking"], None, Progress("checking")),
        (["x" * 500], None, Progress("x" * action.LINE_WIDTH)),
        ([], NINJA, Progress("")),
    ],
)  # fmt: skip
def test_progress(lines: list[str], regex: re.Pattern[str] | None, expected: Progress) -> None:
    assert progress_of(lines, regex) == expected


def test_a_regex_without_groups_shows_what_it_matched() -> None:
    assert progress_of(["stage 3 of many"], re.compile(r"stage \d")) == Progress("stage 3")


def test_lines_are_printed_on_a_step_and_now_and_then() -> None:
    reporter = Reporter()
    steps = [(0.0, 0), (3.0, 2), (6.0, 5), (9.0, 6), (20.0, 9), (22.0, 9), (35.0, 9)]
    due = [at for at, percent in steps if reporter.is_due(Progress("", float(percent)), at)]
    assert due == [0.0, 6.0, 22.0]


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (151.9, "02:31"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"Result": "exit-code", "ExecMainStatus": "3"}, "exit code 3"),
        ({"Result": "exit-code", "ExecMainStatus": "217"}, "exit code 217, its user does not exist"),
        ({"Result": "timeout", "ExecMainStatus": "15"}, "longer than timeout_seconds=60"),
        ({"Result": "oom-kill", "ExecMainStatus": "9"}, "out of memory"),
        ({"Result": "signal", "ExecMainStatus": "11"}, "signal 11"),
        ({"LoadState": "not-found", "Result": "success", "ExecMainStatus": "0"}, "its unit is gone"),
    ],
)
def test_the_cause_is_told_in_words(properties: dict[str, str], words: str) -> None:
    assert words in cause(Look(properties, 1.0, []), 60)


# --- following --------------------------------------------------------------------------------------------


class Follower(action.ActionModule):
    """The action with a host that gives prepared answers."""

    def __init__(self, args: dict[str, Any], started: list[dict[str, Any]], answers: list[Any], no_log: bool) -> None:
        self._task = type("Task", (), {"args": args, "no_log": no_log, "async_val": 0, "check_mode": False})()
        self._connection = type("C", (), {"_shell": type("S", (), {"tmpdir": None})()})()
        self.started, self.answers, self.commands = started, answers, list[str]()

    def _execute_module(self, **_: Any) -> dict[str, Any]:
        return dict(self.started.pop(0) if len(self.started) > 1 else self.started[0])

    def _remove_tmp_path(self, _: str | None) -> None:
        pass

    def _low_level_execute_command(self, command: str) -> dict[str, str]:
        self.commands.append(command)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {"stdout": answer}


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []

    class FakeDisplay:
        def display(self, line: str) -> None:
            lines.append(line)

    monkeypatch.setattr(action, "Display", FakeDisplay)
    monkeypatch.setattr(ActionBase, "run", lambda self, tmp, task_vars: {})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return lines


def follow(
    answers: list[Any],
    no_log: bool = False,
    attached: bool = False,
    told: str = "",
    again: dict[str, Any] | None = None,
    **args: Any,
) -> dict[str, Any]:
    started = {"changed": True, "follow": True, "attached": attached, "log": LOG, "told": told}
    task = {"name": "build", "argv": ["make", "-j 2"], "chdir": "/src", **args}
    follower = Follower(task, [started, *([again] if again else [])], answers, no_log)
    result: dict[str, Any] = follower.run(task_vars={"inventory_hostname": "vasp-01"})
    assert follower.answers == []
    return result


def test_success_is_followed_and_taken_away(printed: list[str]) -> None:
    answers = [RUNNING + "[123/270] b\n", RUNNING + "[124/270] c\n", DONE, "all\n"]
    result = follow(answers, title="build llama.cpp", progress_regex=NINJA.pattern)
    assert printed == ["  vasp-01 | build llama.cpp: 46 % [123/270] 02:31"]
    assert result["changed"] is True
    assert not result.get("failed")
    assert (result["seconds"], result["exit_code"]) == (151, 0)
    assert result["diff"] == {"prepared": "+ run in /src: make '-j 2'\n"}


def test_the_diff_holds_what_the_condition_told(printed: list[str]) -> None:
    result = follow([DONE, ""], told="old is to be removed\n")
    assert result["diff"] == {"prepared": "+ run in /src: make '-j 2'\nold is to be removed\n"}
    assert "told" not in result


def test_failure_brings_the_end_of_the_log(printed: list[str]) -> None:
    result = follow([FAILED, "".join(f"line {number}\n" for number in range(50))])
    assert result["failed"] is True
    assert result["exit_code"] == 3
    head, *lines = result["msg"].splitlines()
    assert head == f"build: exit code 3. Last lines of {LOG} on vasp-01:"
    assert lines == [f"line {number}" for number in range(20, 50)]


def test_attaching_is_said(printed: list[str]) -> None:
    follow([DONE, ""], attached=True)
    assert printed == ["  vasp-01 | build: runs already since an earlier play, following it"]


def test_what_was_attached_to_may_have_begun_with_files_of_before(printed: list[str]) -> None:
    more = {"changed": True, "follow": True, "attached": False, "log": LOG, "told": ""}
    result = follow([DONE, "", FAILED, "bad\n"], attached=True, again=more, unless=["check"])
    assert result["failed"] is True
    done = follow([DONE, ""], attached=True, again={"changed": False, "follow": False}, unless=["check"])
    assert (done["changed"], done.get("failed")) == (True, None)
    refused = follow([DONE, ""], attached=True, again={"failed": True, "msg": "another"}, unless=["check"])
    assert refused["msg"] == "another"


def test_a_short_loss_of_the_connection_is_survived(printed: list[str]) -> None:
    assert not follow([AnsibleConnectionFailure("gone"), "garbage", DONE, ""]).get("failed")


def test_a_long_loss_of_the_connection_is_told(printed: list[str]) -> None:
    with pytest.raises(AnsibleConnectionFailure):
        follow([AnsibleConnectionFailure("gone")] * action.LOST_LOOKS)
    with pytest.raises(AnsibleActionFail, match="the next run attaches to it"):
        follow(["garbage"] * action.LOST_LOOKS)


def test_no_log_hides_the_log(printed: list[str]) -> None:
    follow([RUNNING + "secret\n", DONE, ""], no_log=True)
    assert printed == ["  vasp-01 | build: 02:31"]


def test_a_broken_regex_is_refused_before_anything_starts(printed: list[str]) -> None:
    with pytest.raises(AnsibleActionFail, match=r"progress_regex: '\(' is no regular expression"):
        follow([], progress_regex="(")


# --- starting ---------------------------------------------------------------------------------------------


def test_the_same_command_has_the_same_mark_whatever_the_order() -> None:
    same = fingerprint(["a"], "root", None, {"X": "1", "Y": "2"})
    assert same == fingerprint(["a"], "root", None, {"Y": "2", "X": "1"})
    others = [
        fingerprint(["a", ""], "root", None, {"X": "1", "Y": "2"}),
        fingerprint(["a"], "ai", None, {"X": "1", "Y": "2"}),
        fingerprint(["a"], "root", "/", {"X": "1", "Y": "2"}),
        fingerprint(["a"], "root", None, {"X": "1", "Y": "3"}),
    ]
    assert len({same, *others}) == 5


def test_environment_files_keep_quotes_dollars_and_newlines() -> None:
    # Read back by systemd 252 and 257 as written here.
    assert environment_line("A", "a'b\"c\\d $x `e` %n\nl2") == 'A="a\'b\\"c\\\\d \\$x \\`e\\` %n\nl2"\n'


def test_systemd_expands_no_variables_of_the_command() -> None:
    params = {"name": "b", "title": "t", "user": "root", "chdir": "/src", "timeout_seconds": 60, "nice": 5}
    command = start_command({**params, "argv": ["sh", "-c", "echo $HOME ${X}"]}, "m", Path("/run/e"), Path(LOG))
    assert command[-4:] == ["--", "sh", "-c", "echo $$HOME $${X}"]
    assert {"--property=WorkingDirectory=/src", "--property=RuntimeMaxSec=60"} < set(command)


MARK = "0123456789abcdef"


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        (unit(Description=f"t [gleaner {MARK}]"), True),
        (unit(Description=f"t [gleaner {MARK}]", SubState="exited"), False),
        (unit(Description="t [gleaner ffffffffffffffff]", SubState="exited"), False),
        (unit(Description=f"t [gleaner {MARK}]", ActiveState="failed", SubState="failed"), False),
        (unit(Description="build.service", LoadState="not-found", ActiveState="inactive"), False),
    ],
)
def test_only_the_running_same_command_is_attached_to(properties: dict[str, str], expected: bool) -> None:
    assert is_running(properties, MARK) is expected


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ("t [gleaner ffffffffffffffff]", "different command"),
        ("OpenBSD Secure Shell server", "no long_command"),
    ],
)
def test_a_name_that_is_taken_is_refused(description: str, words: str) -> None:
    with pytest.raises(LongCommandError, match=words):
        is_running(unit(Description=description), MARK)


FAKE = """#!{python}
import json, pathlib, sys
folder = pathlib.Path({folder!r})
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv) + chr(10))
if "show" in sys.argv:
    print("LoadState=not-found", "ActiveState=inactive", "SubState=dead", "Description=x", sep=chr(10))
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    for name in ("systemctl", "systemd-run"):
        (tmp_path / name).write_text(FAKE.format(python=sys.executable, folder=str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    return tmp_path


# The module with its folders in a place of the test's own, which says whether the machine has systemd.
ELSEWHERE = """
import pathlib, sys
sys.path.insert(0, {root!r})
from library import long_command
long_command.SYSTEMD_RUNS = pathlib.Path({folder!r}, "systemd")
long_command.RUN_DIRECTORY = pathlib.Path({folder!r}, "run")
long_command.LOG_DIRECTORY = pathlib.Path({folder!r}, "log")
long_command.main()
"""


def run_module(path: Path, **more: Any) -> dict[str, Any]:
    arguments = {
        "name": "build",
        "argv": ["make"],
        "_ansible_remote_tmp": str(path),
        "_ansible_check_mode": True,
    }
    (path / "systemd").mkdir()
    program = ELSEWHERE.format(root=str(MODULE.parents[1]), folder=str(path))
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": {**arguments, **more}}),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{path}:/usr/bin:/bin"},
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("condition", "changed"),
    [
        ({}, True),
        ({"creates": "/nonexistent/file"}, True),
        ({"creates": "/"}, False),
        ({"unless": ["true"]}, False),
        ({"unless": ["false"]}, True),
        ({"unless": ["/nonexistent/program"]}, True),
        ({"unless": ["true"], "chdir": "/nonexistent"}, True),
        ({"unless": ["true"], "user": "nobody-yet"}, True),
        ({"unless": ["sh", "-c", 'test "$V" = 1'], "environment": {"V": 1}}, False),
    ],
)
def test_check_mode_knows_what_is_done_and_starts_nothing(host: Path, condition: dict[str, Any], changed: bool) -> None:
    result = run_module(host, **{"user": pwd.getpwuid(os.geteuid()).pw_name, **condition})
    assert result["changed"] is changed
    assert result["follow"] is False
    assert "systemd-run" not in (host / "calls").read_text()


def test_what_the_condition_tells_is_kept_for_the_diff(host: Path) -> None:
    result = run_module(host, user=pwd.getpwuid(os.geteuid()).pw_name, unless=["sh", "-c", "echo to do; exit 3"])
    assert (result["changed"], result["told"]) == (True, "to do\n")


def test_a_name_that_is_no_unit_is_refused(host: Path) -> None:
    result = run_module(host, name="a b")
    assert result["failed"] is True
    assert "only letters, digits" in result["msg"]


# --- where systemd is not PID 1 ---------------------------------------------------------------------------


class Machine:
    """A machine without systemd: the module runs on it, and the action's looks are taken with real commands."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr(action, "SYSTEMD_RUNS", str(folder / "systemd"))
        monkeypatch.setattr(action, "RUN_DIRECTORY", str(folder / "run"))

    def run(self, *argv: str, **more: Any) -> dict[str, Any]:
        user = pwd.getpwuid(os.geteuid()).pw_name
        arguments = {"name": "build", "argv": argv, "user": user, "_ansible_remote_tmp": str(self.folder), **more}
        program = ELSEWHERE.format(root=str(MODULE.parents[1]), folder=str(self.folder))
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
            capture_output=True,
            text=True,
            check=False,
            # Whoever inherits the module's output and stays would hold this up.
            timeout=10,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def look(self) -> Look:
        command = action.look_command("build", str(self.folder / "log/build.log"))
        return look_from(subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False).stdout)

    def end(self) -> Look:
        deadline = time.monotonic() + 10
        while (look := self.look()).running:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return look


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def wait_for(file: Path) -> None:
    """A command has come as far as to make a file."""
    deadline = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_systemd_a_command_is_followed_to_its_end(machine: Machine) -> None:
    go = machine.folder / "go"
    script = f"echo one; until [ -e {go} ]; do sleep 0.05; done; echo two $WORD"
    started = machine.run("sh", "-c", script, environment={"WORD": "x"})
    assert (started["changed"], started["follow"], started["attached"]) == (True, True, False)
    assert machine.look().running
    # The same command is attached to, and a different one refused.
    assert machine.run("sh", "-c", script, environment={"WORD": "x"})["attached"] is True
    assert "a different command of that name still runs" in machine.run("true")["msg"]

    go.touch()
    look = machine.end()
    assert look.succeeded
    assert look.lines == ["one", "two x"]


@pytest.mark.parametrize(
    ("argv", "more", "words"),
    [
        (["sh", "-c", "exit 3"], {}, "exit code 3"),
        (["sh", "-c", "kill -9 $$"], {}, "signal 9 ended it"),
        (["sleep", "60"], {"timeout_seconds": 1}, "longer than timeout_seconds=1"),
    ],
)
def test_without_systemd_the_cause_is_told(machine: Machine, argv: list[str], more: dict[str, Any], words: str) -> None:
    assert machine.run(*argv, **more)["follow"] is True
    look = machine.end()
    assert not look.succeeded
    assert words in cause(look, more.get("timeout_seconds", 60))
    # A result that nobody fetched is no reason not to start again.
    assert machine.run("true")["follow"] is True


def test_without_systemd_a_command_that_cannot_be_started_is_told(machine: Machine) -> None:
    assert "No such file or directory: '/nonexistent/program'" in machine.run("/nonexistent/program")["msg"]
    assert "it cannot be started" in machine.run("true", user="nobody-yet")["msg"]


def test_without_systemd_a_command_that_was_killed_with_all_the_rest_is_gone(machine: Machine) -> None:
    pids = machine.folder / "pids"
    machine.run("sh", "-c", f"echo $PPID $$ >{pids}.part; mv {pids}.part {pids}; sleep 60")
    wait_for(pids)
    for pid in pids.read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    look = machine.end()
    assert "its unit is gone" in cause(look, 60)
    assert machine.run("true")["attached"] is False
