"""Ansible module: start a long command as a transient systemd unit; its action plugin follows it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: long_command
short_description: Run a long command on a host and show how far it is
description:
  - Runs a command as a transient systemd unit and follows it, printing its progress while it runs.
  - The command outlives a lost connection and an interrupted play. The next run attaches to it instead of
    starting another, and refuses when a unit of that name runs a different command. When what it attached to has
    ended, O(creates) and O(unless) are asked once more, since it may have begun with files of before.
  - The output goes to C(/var/log/gleaner/<name>.log) on the host, readable by root, one run at a time.
  - Where systemd is not PID 1, as on some machines that hold a lab, a small process of its own stands in for the unit.
author: Gleaner
options:
  name:
    description: Name of the unit, without C(.service).
    type: str
    required: true
  title:
    description: What is being done, for the person who waits. Default is O(name).
    type: str
  argv:
    description: The program and its arguments. No shell reads them.
    type: list
    elements: str
    required: true
  user:
    description: The user as whom the command runs. The task itself needs root.
    type: str
    default: root
  chdir:
    description: The folder in which the command runs.
    type: path
  environment:
    description: >-
      Variables of the command's environment. Never part of a command line or of the unit.
      The keyword C(environment) of the task does not reach the command.
    type: dict
    default: {}
  secret_environment:
    description: The same for values that may not be shown or logged. Two runs may differ in them alone.
    type: dict
    default: {}
  nice:
    description: Niceness of the command, so that the services of the host come first.
    type: int
    default: 0
  creates:
    description: A path that exists when there is nothing to do.
    type: path
  unless:
    description:
      - A command that only reads, run before, also in check mode. Exit 0 means that there is nothing to do.
      - It has the same user, folder and environment. When it cannot run at all, the work is to be done.
      - What it prints is part of the diff, so that it can say what is to be done.
    type: list
    elements: str
  progress_regex:
    description:
      - Searched in the last lines of the log; the last match counts. Named groups are C(done) and C(total),
        or C(percent). Without it the last line itself is shown.
    type: str
  timeout_seconds:
    description: Time after which systemd ends the command and the task fails.
    type: int
    default: 3600
  poll_seconds:
    description: Time between two looks at the command.
    type: float
    default: 3
attributes:
  check_mode:
    description: Says from O(creates) and O(unless) whether the command would run.
    support: full
  diff_mode:
    description: Shows the command, and what O(unless) printed.
    support: full
"""

EXAMPLES = r"""
- name: Build | Compile llama.cpp
  long_command:
    name: gleaner-build-llama-cpp
    title: build llama.cpp
    argv: [ninja, -C, /var/cache/gleaner/build, llama-server, ggml-rpc-server]
    creates: /cluster/shared/ai/llama.cpp/0.5.0-cpu/manifest.json
    nice: 10
    progress_regex: '\[(?P<done>\d+)/(?P<total>\d+)\]'
"""

RETURN = r"""
log:
  description: Path of the command's output on the host.
  returned: when the command ran
  type: str
  sample: /var/log/gleaner/gleaner-build-llama-cpp.log
seconds:
  description: Run time of the command.
  returned: when the command ran
  type: int
exit_code:
  description: Exit code of the command, or the number of the signal that ended it.
  returned: when the command ran
  type: int
"""

LOG_DIRECTORY = Path("/var/log/gleaner")
# Holds the environment of a command until systemd has read it: memory, for root only.
RUN_DIRECTORY = Path("/run/gleaner-jobs")
CONDITION_SECONDS = 300
SYSTEMD_RUNS = Path("/run/systemd/system")
UNIT_NAME = re.compile(r"[A-Za-z0-9:_.-]+")
MARK = re.compile(r"\[gleaner (?P<fingerprint>[0-9a-f]{16})\]$")


class LongCommandError(Exception):
    """The command cannot be started; the text says why."""


def fingerprint(argv: Sequence[str], user: str, chdir: str | None, environment: Mapping[str, str]) -> str:
    """Return what two runs have in common exactly when they run the same command."""
    text = json.dumps([list(argv), user, chdir, dict(environment)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment_line(name: str, value: str) -> str:
    """Return ``NAME="value"`` as systemd.exec(5) reads it from an EnvironmentFile."""
    for plain in ("\\", '"', "$", "`"):
        value = value.replace(plain, f"\\{plain}")
    return f'{name}="{value}"\n'


def start_command(params: Mapping[str, Any], mark: str, environment_file: Path, log: Path) -> list[str]:
    """Return the systemd-run command that starts the unit, and returns once the program was executed."""
    properties = {
        "Type": "exec",
        # Keeps the result until somebody has read it: a unit that is gone cannot say how it ended.
        "RemainAfterExit": "yes",
        "User": params["user"],
        "EnvironmentFile": environment_file,
        "StandardOutput": f"truncate:{log}",
        "StandardError": "inherit",
        "RuntimeMaxSec": params["timeout_seconds"],
        "Nice": params["nice"],
    }
    if params["chdir"]:
        properties["WorkingDirectory"] = params["chdir"]
    title = params["title"] or params["name"]
    return [
        "systemd-run",
        "--quiet",
        f"--unit={params['name']}",
        f"--description={title} [gleaner {mark}]",
        *(f"--property={name}={value}" for name, value in properties.items()),
        "--",
        # systemd would expand variables in the words of a command.
        *(word.replace("$", "$$") for word in params["argv"]),
    ]


def unit_properties(name: str) -> dict[str, str]:
    if not SYSTEMD_RUNS.is_dir():
        return StandIn(name).properties()
    shown = subprocess.run(
        ["systemctl", "show", f"{name}.service", "--property=LoadState,ActiveState,SubState,Description"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def is_running(unit: Mapping[str, str], mark: str) -> bool:
    """Return whether the unit runs this very command; a unit that only keeps a result does not run.

    Raises LongCommandError when the name belongs to something else.
    """
    if unit["LoadState"] == "not-found":
        return False
    found = MARK.search(unit["Description"])
    if found is None:
        raise LongCommandError(
            f"this is the name of a unit that is no long_command ({unit['Description']!r}). Choose another."
        )
    running = unit["ActiveState"] in ("active", "activating", "deactivating") and unit["SubState"] != "exited"
    if running and found["fingerprint"] != mark:
        raise LongCommandError(
            "a different command of that name still runs on this host. Wait for it, or end it there "
            "(systemctl stop), and run this again."
        )
    return running


def account_of(user: str) -> tuple[pwd.struct_passwd, dict[str, Any]]:
    """Return a user's account, and what makes a child of this process run as that user.

    Raises KeyError when there is no such user.
    """
    account = pwd.getpwnam(user)
    if account.pw_uid == os.geteuid():
        return account, {}
    groups = os.getgrouplist(account.pw_name, account.pw_gid)
    return account, {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": groups}


class StandIn:
    """Does what systemd does for a unit where it is not PID 1: starts a command, stays with it, keeps its result.

    The properties are in a file, in the words of systemd; a lock is held while somebody stays with the command.
    """

    def __init__(self, name: str) -> None:
        self._state = RUN_DIRECTORY / f"{name}.unit"
        self._lock = RUN_DIRECTORY / f"{name}.lock"

    def properties(self) -> dict[str, str]:
        gone = {"LoadState": "not-found", "ActiveState": "inactive", "SubState": "dead", "Description": ""}
        try:
            with self._lock.open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    attended = False
                except BlockingIOError:
                    attended = True
                shown = dict(line.split("=", 1) for line in self._state.read_text().splitlines())
        except (OSError, ValueError):
            return gone
        # A command that still runs by its file, and with which nobody stays, was killed with all the rest.
        return gone if shown.get("SubState") == "running" and not attended else {**gone, **shown}

    def forget(self) -> None:
        for file in (self._state, self._lock):
            file.unlink(missing_ok=True)

    def start(self, params: Mapping[str, Any], mark: str, environment: Mapping[str, str], log: Path) -> None:
        """Leave a process behind that stays with the command, and return when it has the lock.

        Raises LongCommandError when the command cannot be started.
        """
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            # The grandchild is nobody's child any more, and no terminal's.
            os.setsid()
            if os.fork() == 0:
                os.close(reading)
                with contextlib.suppress(BaseException):
                    self._stay(params, mark, environment, log, writing)
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        with open(reading) as answer:
            told = answer.read()
        if told != "started":
            raise LongCommandError(f"it cannot be started: {told or 'no word of why'}")

    def _stay(
        self, params: Mapping[str, Any], mark: str, environment: Mapping[str, str], log: Path, answer: int
    ) -> None:
        # Whoever waits for the end of this module's output is not to wait for the command.
        sink = os.open(log, os.O_WRONLY | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, target in ((0, nothing), (1, sink), (2, sink)):
            os.dup2(target, number)
        lock = self._lock.open("a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        description = f"{params['title'] or params['name']} [gleaner {mark}]"
        started = int(float(Path("/proc/uptime").read_text().split()[0]) * 1e6)
        state = {
            "LoadState": "loaded",
            "ActiveState": "active",
            "SubState": "running",
            "Result": "success",
            "ExecMainStatus": "0",
            "ExecMainStartTimestampMonotonic": str(started),
            "Description": description,
        }
        try:
            account, switch = account_of(params["user"])
            os.nice(params["nice"])
            process = subprocess.Popen(
                params["argv"],
                cwd=params["chdir"] or "/",
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": account.pw_dir, **environment},
                start_new_session=True,
                **switch,
            )
        except (OSError, KeyError) as error:
            os.write(answer, str(error).encode())
            return
        self._write(state)
        os.write(answer, b"started")
        os.close(answer)
        state["SubState"] = "exited"
        try:
            code = process.wait(params["timeout_seconds"])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            state["Result"] = "timeout"
        if code:
            state.update(ActiveState="failed", SubState="failed", ExecMainStatus=str(abs(code)))
            if state["Result"] == "success":
                state["Result"] = "signal" if code < 0 else "exit-code"
        self._write(state)

    def _write(self, state: Mapping[str, str]) -> None:
        part = self._state.with_suffix(".part")
        part.write_text("".join(f"{name}={value}\n" for name, value in state.items()))
        part.rename(self._state)


def condition(params: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[bool, str]:
    """Return whether there is nothing to do, and what the condition printed."""
    if params["creates"] and os.path.exists(params["creates"]):
        return True, ""
    if not params["unless"]:
        return False, ""
    try:
        account, switch = account_of(params["user"])
        done = subprocess.run(
            params["unless"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            cwd=params["chdir"],
            env={**os.environ, "HOME": account.pw_dir, **environment},
            timeout=CONDITION_SECONDS,
            **switch,
        )
    except (OSError, KeyError, subprocess.SubprocessError):
        # On a virgin host the program, its folder or its user is still to come.
        return False, ""
    return done.returncode == 0, done.stdout


def forget(name: str) -> None:
    """Take a unit away whose command has ended and whose result nobody fetched."""
    if not SYSTEMD_RUNS.is_dir():
        StandIn(name).forget()
        return
    for verb in ("stop", "reset-failed"):
        subprocess.run(["systemctl", verb, f"{name}.service"], capture_output=True, check=False)


def start(params: Mapping[str, Any], mark: str, environment: Mapping[str, str], log: Path) -> None:
    """Start the unit.

    Raises LongCommandError with systemd's words.
    """
    name = params["name"]
    LOG_DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    log.touch(mode=0o640)
    RUN_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    if not SYSTEMD_RUNS.is_dir():
        StandIn(name).start(params, mark, environment, log)
        return
    handle, path = tempfile.mkstemp(prefix=f"{name}.", dir=RUN_DIRECTORY)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.writelines(environment_line(key, value) for key, value in environment.items())
        done = subprocess.run(start_command(params, mark, Path(path), log), capture_output=True, text=True, check=False)
    finally:
        os.unlink(path)
    # A unit that could not become its user or enter its folder is there, and its result says so.
    if done.returncode != 0 and unit_properties(name)["LoadState"] == "not-found":
        raise LongCommandError(f"systemd did not start it: {done.stderr.strip()}")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "title": {"type": "str"},
            "argv": {"type": "list", "elements": "str", "required": True},
            "user": {"type": "str", "default": "root"},
            "chdir": {"type": "path"},
            "environment": {"type": "dict", "default": {}},
            "secret_environment": {"type": "dict", "default": {}, "no_log": True},
            "nice": {"type": "int", "default": 0},
            "creates": {"type": "path"},
            "unless": {"type": "list", "elements": "str"},
            "progress_regex": {"type": "str"},
            "timeout_seconds": {"type": "int", "default": 3600},
            "poll_seconds": {"type": "float", "default": 3},
        },
        supports_check_mode=True,
    )
    params = module.params
    plain = {name: str(value) for name, value in params["environment"].items()}
    environment = {**plain, **{name: str(value) for name, value in params["secret_environment"].items()}}
    log = LOG_DIRECTORY / f"{params['name']}.log"
    told = ""
    try:
        if not UNIT_NAME.fullmatch(params["name"]):
            raise LongCommandError("the name of a unit has only letters, digits and :_.- in it.")
        mark = fingerprint(params["argv"], params["user"], params["chdir"], plain)
        unit = unit_properties(params["name"])
        running = is_running(unit, mark)
        if not running:
            if unit["LoadState"] != "not-found" and not module.check_mode:
                forget(params["name"])
            nothing_to_do, told = condition(params, environment)
            if nothing_to_do:
                module.exit_json(changed=False, follow=False)
            if not module.check_mode:
                start(params, mark, environment, log)
    except LongCommandError as error:
        module.fail_json(msg=f"{params['title'] or params['name']}: unit {params['name']!r}: {error}")
    module.exit_json(changed=True, follow=not module.check_mode, attached=running, log=str(log), told=told)


if __name__ == "__main__":
    main()
