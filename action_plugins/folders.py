"""Make folders of a host: ansible.builtin.file for several, after one look at all of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

KEYS = {"path", "owner", "group", "mode"}
OCTAL = re.compile(r"[0-7]{3,5}")
FORMAT = "%F|%u|%U|%g|%G|%a|%n"


def wanted_folders(value: object) -> list[dict[str, Any]]:
    """The option's value as options of the file module; ValueError says what is wrong with it."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"folders = {value!r}; wanted a list of at least one")
    for one in value:
        if not isinstance(one, Mapping) or set(one) - KEYS or not one.get("path"):
            raise ValueError(
                f"folders = {one!r}; wanted a path, and of {', '.join(sorted(KEYS - {'path'}))} what counts"
            )
        if not (isinstance(one.get("mode"), str) and OCTAL.fullmatch(one["mode"])):
            raise ValueError(f"folders: mode of {one['path']} = {one.get('mode')!r}; wanted octal digits in quotes")
    return [{key: one[key] for key in one if one[key] is not None} for one in value]


def look_command(folders: Sequence[Mapping[str, Any]]) -> str:
    """A line of :data:`FORMAT`, in English, for each that is there; a link is not followed."""
    return "export LC_ALL=C; " + shlex.join(
        ["stat", f"--format={FORMAT}", "--", *(str(one["path"]) for one in folders)]
    )


def is_owner(wanted: object, number: str, name: str) -> bool:
    """Whether it is this one who is meant, by id or by name; nobody in particular is anybody."""
    return wanted is None or str(wanted) == (number if str(wanted).isdecimal() else name)


def to_make(folders: Sequence[Mapping[str, Any]], answer: str) -> list[Mapping[str, Any]]:
    """Those that are not as they should be, by the host's answer to :func:`look_command`."""
    lines = (line.split("|", 6) for line in answer.splitlines())
    seen = {line[6]: line[:6] for line in lines if len(line) == 7}

    def is_as_wanted(one: Mapping[str, Any]) -> bool:
        kind, user, user_name, group, group_name, mode = seen[str(one["path"])]
        return (
            kind == "directory"
            and is_owner(one.get("owner"), user, user_name)
            and is_owner(one.get("group"), group, group_name)
            and int(one["mode"], 8) == int(mode, 8)
        )

    return [one for one in folders if str(one["path"]) not in seen or not is_as_wanted(one)]


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no types
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        try:
            folders = wanted_folders(self._task.args.get("folders"))
        except ValueError as error:
            raise AnsibleActionFail(str(error)) from None
        # It fails where one is missing, and says no less of the others.
        seen = self._low_level_execute_command(look_command(folders))
        diffs: list[Any] = []
        for one in to_make(folders, str(seen.get("stdout", ""))):
            made = self._execute_module(
                module_name="ansible.legacy.file", module_args={**one, "state": "directory"}, task_vars=task_vars
            )
            if made.get("failed"):
                return {**made, "msg": f"{one['path']}: {made.get('msg', '')}"}
            if made.get("changed"):
                diffs.append(made.get("diff", {}))
        return {"changed": bool(diffs), "diff": diffs}
