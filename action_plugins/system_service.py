"""Manage a systemd unit: ansible.builtin.systemd_service, with a check mode that holds on a virgin host."""

from __future__ import annotations

import shlex
from typing import Any

from ansible.plugins.action import ActionBase

UNIT_NOT_FOUND = "Could not find the requested service"
JOURNAL_LINES = 20


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


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no types
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        args = self._task.args
        name = str(args.get("name") or args.get("service") or args.get("unit") or "")
        result: dict[str, Any] = self._execute_module(
            module_name="ansible.legacy.systemd_service", module_args=args, task_vars=task_vars
        )
        if self._task.check_mode:
            result = unit_to_come(result, name) or result
        elif not result.get("failed") and args.get("state") in ("started", "restarted") and self._was_skipped(name):
            result.update(failed=True, msg=f"{name} was not started: a condition of its unit is not met")
        if result.get("failed") and name and not self._task.check_mode:
            result["msg"] = self._with_journal(str(result.get("msg", "")), name)
        self._remove_tmp_path(self._connection._shell.tmpdir)
        return result

    def _was_skipped(self, name: str) -> bool:
        """systemctl counts a unit as started that systemd did not start, since one of its conditions is not met."""
        shown = self._low_level_execute_command(f"systemctl show --property=ConditionResult {shlex.quote(name)}")
        return "ConditionResult=no" in str(shown.get("stdout", ""))

    def _with_journal(self, message: str, name: str) -> str:
        """systemctl only says that the journal knows why: bring it, where the person is looking."""
        journal = self._low_level_execute_command(
            f"journalctl --no-pager --output=cat --lines={JOURNAL_LINES} --unit={shlex.quote(name)}"
        )
        lines = journal.get("stdout", "").strip() if journal.get("rc") == 0 else ""
        return f"{message}\nLast lines of its journal:\n{lines}" if lines else message
