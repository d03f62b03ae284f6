"""Start a long command on a host, follow it, and show the person how far it is."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

# As in the module, which is sent to the host and shares no code with this.
SYSTEMD_RUNS = "/run/systemd/system"
RUN_DIRECTORY = "/run/gleaner-jobs"
QUIET_SECONDS = 15.0
PERCENT_STEP = 5.0
LINE_WIDTH = 72
LOOK_BYTES = 4096
FAILURE_BYTES = 16384
FAILURE_LINES = 30
FIRST_LOOK_SECONDS = 0.5
# Looks that may fail in a row: a short loss of the network is no reason to leave a build of ten minutes.
LOST_LOOKS = 5

# Exit codes with which systemd itself gives up, systemd.exec(5).
SYSTEMD_EXITS = {
    "200": "its folder (chdir) does not exist or admits not its user",
    "203": "its program (argv[0]) cannot be executed",
    "217": "its user does not exist",
}


@dataclass(frozen=True)
class Look:
    """What one look at the unit saw: its properties, the time since its start, the end of its log."""

    unit: Mapping[str, str]
    seconds: float
    lines: Sequence[str]

    @property
    def running(self) -> bool:
        active = self.unit.get("ActiveState") in ("active", "activating", "deactivating")
        return active and self.unit.get("SubState") != "exited"

    @property
    def succeeded(self) -> bool:
        return self.unit.get("SubState") == "exited"


@dataclass(frozen=True)
class Progress:
    text: str
    percent: float | None = None


def log_lines(text: str) -> list[str]:
    """Return the lines of a log that have something on them; programs also start over with a bare return."""
    printable = (
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]", "", line) for line in re.split(r"[\r\n]+", text)
    )
    return [line.rstrip() for line in printable if line.strip()]


def look_from(text: str) -> Look:
    """Parse the output of :func:`look_command`.

    Raises ValueError when it is something else.
    """
    # Over a terminal, which ssh has when ansible does not send Python, lines end in CR LF.
    head, mark, tail = text.replace("\r\n", "\n").partition("\n--\n")
    unit = dict(line.split("=", 1) for line in head.splitlines() if "=" in line)
    if not mark or "ActiveState" not in unit:
        raise ValueError(" ".join(text.split())[:300] or "no answer")
    started = int(unit.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
    seconds = max(0.0, float(unit["Uptime"]) - started) if started else 0.0
    return Look(unit, seconds, log_lines(tail))


def look_command(name: str, log: str) -> str:
    """A few small programs and no Python: the host is busy with the command itself."""
    wanted = "LoadState,ActiveState,SubState,Result,ExecMainStatus,ExecMainStartTimestampMonotonic"
    stand_in = f"{RUN_DIRECTORY}/{shlex.quote(name)}"
    return (
        f"if [ -d {SYSTEMD_RUNS} ]; then systemctl show --property={wanted} {shlex.quote(name)}.service; "
        # Nobody stays with a command that is still called running: it was killed with all the rest.
        f"elif flock --nonblock {stand_in}.lock true && grep -q ^SubState=running {stand_in}.unit; then "
        "echo LoadState=not-found; echo ActiveState=inactive; "
        f"else cat {stand_in}.unit; fi; "
        "read -r up rest </proc/uptime; echo Uptime=$up; echo --; "
        f"tail -c {LOOK_BYTES} {shlex.quote(log)}"
    )


def progress_of(lines: Sequence[str], regex: re.Pattern[str] | None) -> Progress:
    """Return how far the command is by its last matching line, or the last line itself."""
    for line in reversed(lines) if regex else ():
        matches = list(regex.finditer(line)) if regex else []
        if not matches:
            continue
        groups = matches[-1].groupdict()
        try:
            if groups.get("total"):
                done, total = groups["done"], groups["total"]
                percent = 100 * float(done) / float(total)
                return Progress(f"{percent:.0f} % [{done}/{total}]", percent)
            if groups.get("percent"):
                percent = float(groups["percent"])
                return Progress(f"{percent:.0f} %", percent)
        except (TypeError, ValueError, ZeroDivisionError):
            pass
        return Progress(matches[-1].group().strip()[:LINE_WIDTH])
    return Progress(lines[-1].strip()[:LINE_WIDTH] if lines else "")


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


class Reporter:
    """Decides when a line is worth printing: on a step of progress, else now and then to show life."""

    def __init__(self) -> None:
        self._printed_at: float | None = None
        self._percent = 0.0

    def is_due(self, progress: Progress, now: float) -> bool:
        due = self._printed_at is None or now - self._printed_at >= QUIET_SECONDS
        due = due or (progress.percent is not None and progress.percent >= self._percent + PERCENT_STEP)
        if due:
            self._printed_at = now
            self._percent = progress.percent or self._percent
        return due


def cause(look: Look, timeout_seconds: object) -> str:
    """Say in words why the command did not succeed."""
    result, status = look.unit.get("Result", ""), look.unit.get("ExecMainStatus", "")
    if look.unit.get("LoadState") == "not-found":
        return "its unit is gone: the host was restarted, or somebody stopped it. Run this again"
    if result == "timeout":
        return f"it was ended because it took longer than timeout_seconds={timeout_seconds}"
    if result == "oom-kill":
        return "the host ran out of memory and killed it"
    if result in ("signal", "core-dump"):
        return f"signal {status} ended it"
    return f"exit code {status}" + (f", {SYSTEMD_EXITS[status]}" if status in SYSTEMD_EXITS else "")


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no types
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        args = self._task.args
        try:
            regex = re.compile(args["progress_regex"]) if args.get("progress_regex") else None
        except re.error as error:
            raise AnsibleActionFail(
                f"progress_regex: {args['progress_regex']!r} is no regular expression: {error}. Correct it."
            ) from None
        result: dict[str, Any] = self._execute_module(module_name="long_command", module_args=args, task_vars=task_vars)
        follow, told = result.pop("follow", False), result.pop("told", "")
        if result.get("changed") and not result.get("failed"):
            result["diff"] = {"prepared": self._command_text(follow) + told}
        if follow:
            host = (task_vars or {})["inventory_hostname"]
            result.update(self._follow(str(args["name"]), result, regex, host))
            if result.get("attached") and not result.get("failed") and (args.get("unless") or args.get("creates")):
                # It may have begun before what this run has written: a second look tells whether all is done.
                again = self._execute_module(module_name="long_command", module_args=args, task_vars=task_vars)
                if again.get("failed"):
                    result = again
                elif again.get("follow"):
                    result.update(self._follow(str(args["name"]), again, regex, host))
        self._remove_tmp_path(self._connection._shell.tmpdir)
        return result

    def _command_text(self, follow: bool) -> str:
        args = self._task.args
        command = shlex.join(str(word) for word in args["argv"])
        where = "".join(f" {word} {args[key]}" for word, key in (("in", "chdir"), ("as", "user")) if args.get(key))
        return f"+ {'run' if follow else 'would run'}{where}: {command}\n"

    def _follow(
        self, name: str, started: Mapping[str, Any], regex: re.Pattern[str] | None, host: str
    ) -> dict[str, Any]:
        args = self._task.args
        title, log = str(args.get("title") or name), str(started["log"])
        poll_seconds = float(args.get("poll_seconds", 3))
        display, reporter = Display(), Reporter()
        if started.get("attached"):
            display.display(f"  {host} | {title}: runs already since an earlier play, following it")
        delay = FIRST_LOOK_SECONDS
        while True:
            time.sleep(min(delay, poll_seconds))
            delay *= 2
            look = self._look(name, log)
            if not look.running:
                break
            progress = progress_of(look.lines, regex)
            if reporter.is_due(progress, time.monotonic()):
                text = "" if self._task.no_log else progress.text
                display.display(f"  {host} | {title}: {text} {clock(look.seconds)}".replace(":  ", ": "))
        lines = log_lines(self._end(name, log))[-FAILURE_LINES:]
        result = {"seconds": int(look.seconds)}
        if look.unit.get("LoadState") != "not-found":
            # systemd says 0 of a unit that it does not know.
            result["exit_code"] = int(look.unit.get("ExecMainStatus") or 0)
        if look.succeeded:
            return result
        return {
            **result,
            "failed": True,
            "msg": f"{title}: {cause(look, args.get('timeout_seconds', 3600))}. "
            + "\n".join([f"Last lines of {log} on {host}:", *(lines or ["(none)"])]),
        }

    def _look(self, name: str, log: str) -> Look:
        for attempt in range(1, LOST_LOOKS + 1):
            try:
                return look_from(self._low_level_execute_command(look_command(name, log))["stdout"])
            except (AnsibleConnectionFailure, ValueError) as error:
                if attempt == LOST_LOOKS:
                    if isinstance(error, AnsibleConnectionFailure):
                        raise
                    raise AnsibleActionFail(
                        f"The unit {name} cannot be read on this host: {error}. "
                        "Its command goes on; the next run attaches to it."
                    ) from None
                time.sleep(attempt)
        raise AssertionError("unreachable")

    def _end(self, name: str, log: str) -> str:
        """Take the unit away, whose result is known now, and return the end of its log."""
        unit = f"{shlex.quote(name)}.service"
        stand_in = f"{RUN_DIRECTORY}/{shlex.quote(name)}"
        command = (
            f"if [ -d {SYSTEMD_RUNS} ]; then systemctl stop {unit}; systemctl reset-failed {unit}; "
            f"else rm -f {stand_in}.unit {stand_in}.lock; fi 2>/dev/null; "
            f"tail -c {FAILURE_BYTES} {shlex.quote(log)}"
        )
        return str(self._low_level_execute_command(command)["stdout"])
