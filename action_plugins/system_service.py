"""Manage a systemd unit: ansible.builtin.systemd_service, with a check mode that holds on a virgin host.

A unit that runs as it should is found so by one look, and no module runs for it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

UNIT_NOT_FOUND = "Could not find the requested service"
JOURNAL_LINES = 20
# What makes a unit read its files: its start, or the last change of its state, which a reload is, too.
SINCE = {"restarted": "InactiveExitTimestamp", "reloaded": "StateChangeTimestamp"}
SHOWN = "LoadState,NeedDaemonReload,ConditionResult,ActiveState,ReloadResult,InactiveExitTimestamp,StateChangeTimestamp"
# Options of which a look tells whether they are met.
JUDGED = {"name", "state", "enabled", "daemon_reload"}
# Of the service that they start on demand a look at them does not tell whether systemd has its unit file as it is.
STARTERS = (".socket", ".timer", ".path")
MARK = "\n--\n"


def unit_to_come(result: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return what check mode says instead of a failure over a unit that an earlier task would have brought.

    ``None`` when the result is no such failure.
    """
    if not (result.get("failed") and str(result.get("msg", "")).startswith(UNIT_NOT_FOUND)):
        return None
    return {
        "changed": True,
        "name": name,
        "msg": f"{name} does not exist yet on this host: it comes with its package or unit file",
    }


def look_command(name: str, reads: Sequence[str]) -> str:
    """One way to the host for all that is asked of the unit, its files and the clock that dates both."""
    show = f"export LC_ALL=C; systemctl show --timestamp=us+utc --property={SHOWN} {shlex.quote(name)}"
    # Asked apart: systemctl show has it from when the unit was loaded.
    enabled = f'echo "IsEnabled=$(systemctl is-enabled {shlex.quote(name)})"'
    stat = shlex.join(["stat", "--dereference", "--format=%.9Y %n", "--", *reads])
    return f"{show} && {enabled} && echo -- && date +%s.%N" + (f" && {stat}" if reads else "")


def seconds_of(timestamp: str) -> Decimal | None:
    """A moment as systemd shows it, in s since 1970; ``None`` for one that has not been.

    Raises ValueError for another form.
    """
    if timestamp in ("", "n/a"):
        return None
    moment = datetime.strptime(timestamp.partition(" ")[2], "%Y-%m-%d %H:%M:%S.%f %Z").replace(tzinfo=timezone.utc)
    return Decimal(int(moment.timestamp())) + Decimal(moment.microsecond) / 1_000_000


@dataclass(frozen=True)
class Look:
    """A unit, and the files that it reads: moments are in s of the host's own clock."""

    unit: Mapping[str, str]
    now: Decimal
    changed: Mapping[str, Decimal]

    @classmethod
    def from_text(cls, text: str) -> Look:
        """Parse the output of :func:`look_command`; ValueError when it is something else."""
        # Over a terminal, which ssh has when ansible does not send Python, lines end in CR LF.
        head, mark, tail = text.replace("\r\n", "\n").partition(MARK)
        if not mark:
            raise ValueError(" ".join(text.split())[:300] or "no answer")
        now, *files = tail.splitlines()
        dates = (line.partition(" ") for line in files)
        unit = dict(line.split("=", 1) for line in head.splitlines() if "=" in line)
        return cls(unit, Decimal(now), {path: Decimal(moment) for moment, _, path in dates})

    def stale(self, by: str) -> list[str]:
        """Files that the running unit has not read as they are now: it was last `restarted`, or `reloaded`, before.

        A moment that is still to come was dated by a clock that has been set back since, and proves nothing.
        """
        if self.unit["ActiveState"] not in ("active", "reloading"):
            return []
        since = seconds_of(self.unit[SINCE[by]])
        if since is None:
            return []
        # After a reload that failed the unit goes on with what it had.
        failed = by == "reloaded" and self.unit.get("ReloadResult", "success") != "success"
        return [
            path for path, moment in self.changed.items() if failed or moment > since or max(moment, since) > self.now
        ]

    def is_as_wanted(self, args: Mapping[str, Any], by: str) -> bool:
        """Whether the module has nothing to do: the unit runs, from the unit files that are on disk, and at boot.

        False also where a look does not tell.
        """
        wanted = {
            "LoadState": "loaded",
            "NeedDaemonReload": "no",
            "ActiveState": "active",
            **({"IsEnabled": "enabled"} if args.get("enabled") is True else {}),
        }
        return (
            set(args) <= JUDGED
            and not str(args.get("name")).endswith(STARTERS)
            and args.get("state") == "started"
            and args.get("enabled", True) is True
            and all(self.unit.get(name) == value for name, value in wanted.items())
            and self.unit.get("ConditionResult") != "no"
            and not self.stale(by)
        )

    def to_come(self) -> list[str]:
        """Files that were changed in the future, and would count as changed after each restart until it has come."""
        return [path for path, moment in self.changed.items() if moment > self.now]


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no types
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        reads, by = args.pop("reads", []), args.pop("reads_when", "restarted")
        if by not in SINCE:
            raise AnsibleActionFail(f"reads_when = {by!r}; wanted one of {', '.join(SINCE)}")
        name = str(args.get("name") or args.get("service") or args.get("unit") or "")
        if args.get("state") == "started" and self._is_as_wanted(name, args, [str(path) for path in reads], by):
            return {"changed": False, "name": name, "state": "started"}
        result: dict[str, Any] = self._execute_module(
            module_name="ansible.legacy.systemd_service", module_args=args, task_vars=task_vars
        )
        if self._task.check_mode:
            result = unit_to_come(result, name) or result
        if not result.get("failed") and "status" in result:
            started = not self._task.check_mode and args.get("state") in ("started", "restarted")
            self._look(result, name, [str(path) for path in reads], by, started)
        if result.get("failed") and name and not self._task.check_mode:
            result["msg"] = self._with_journal(str(result.get("msg", "")), name)
        self._remove_tmp_path(self._connection._shell.tmpdir)
        return result

    def _is_as_wanted(self, name: str, args: Mapping[str, Any], reads: list[str], by: str) -> bool:
        done = self._low_level_execute_command(look_command(name, reads))
        try:
            return done.get("rc") == 0 and Look.from_text(str(done.get("stdout", ""))).is_as_wanted(args, by)
        except (ValueError, ArithmeticError):
            # The module, and the look behind it, say what is wrong.
            return False

    def _look(self, result: dict[str, Any], name: str, reads: list[str], by: str, started: bool) -> None:
        """Say what systemctl does not: that a unit did not start, or runs with older files than those on disk."""
        if not (reads or started):
            return
        done = self._low_level_execute_command(look_command(name, reads))
        try:
            # In check mode on a virgin host files are still to come.
            if done.get("rc") != 0 and not self._task.check_mode:
                raise ValueError(str(done.get("stderr") or done.get("stdout") or "no answer").strip())
            look = Look.from_text(str(done.get("stdout", "")))
            stale = look.stale(by)
        except (ValueError, ArithmeticError) as error:
            result.update(failed=True, msg=f"{name} and what it reads cannot be looked at on this host: {error}")
            return
        # systemctl counts a unit as started that systemd did not start, since one of its conditions is not met.
        if started and look.unit.get("ConditionResult") == "no":
            result.update(failed=True, msg=f"{name} was not started: a condition of its unit is not met")
        elif stale:
            text = f"{name} runs since before a change of {', '.join(stale)}"
            result.update(changed=True, stale=stale, msg=text, diff={"prepared": f"{text}\n"})
            if look.to_come() and not self._task.check_mode:
                self._low_level_execute_command(shlex.join(["touch", "--no-create", "--", *look.to_come()]))

    def _with_journal(self, message: str, name: str) -> str:
        """systemctl only says that the journal knows why: bring it, where the person is looking."""
        journal = self._low_level_execute_command(
            f"journalctl --no-pager --output=cat --lines={JOURNAL_LINES} --unit={shlex.quote(name)}"
        )
        lines = journal.get("stdout", "").strip() if journal.get("rc") == 0 else ""
        return f"{message}\nLast lines of its journal:\n{lines}" if lines else message
