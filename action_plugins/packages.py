"""Install Debian packages: ansible.builtin.apt, after a look whether they are installed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
FORMAT = "${db:Status-Abbrev}|${Package}\n"
# An older index may name files that the mirror has no more.
INDEX_SECONDS = 86400


def wanted_names(value: object) -> list[str]:
    """The option's value as a list; ValueError says what is wrong with it."""
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not names or not all(isinstance(name, str) and NAME.fullmatch(name) for name in names):
        raise ValueError(f"name = {value!r}; wanted names of Debian packages")
    return [str(name) for name in names]


def look_command(names: Sequence[str]) -> str:
    return shlex.join(["dpkg-query", "--show", f"--showformat={FORMAT}", *names])


def installed(answer: str) -> set[str]:
    """Packages that are whole: wanted or held, unpacked and configured, without an error (dpkg-query(1))."""
    lines = (line.split("|") for line in answer.splitlines())
    return {line[1] for line in lines if len(line) == 2 and line[0] in ("ii ", "hi ")}


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no types
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        try:
            names = wanted_names(self._task.args.get("name"))
        except ValueError as error:
            raise AnsibleActionFail(str(error)) from None
        # It fails where dpkg does not know one, and says no less of the others.
        seen = self._low_level_execute_command(look_command(names))
        if installed(str(seen.get("stdout", ""))) >= set(names):
            return {"changed": False}
        done: dict[str, Any] = self._execute_module(
            module_name="ansible.legacy.apt",
            module_args={
                **self._task.args,
                "name": names,
                "install_recommends": False,
                "update_cache": True,
                "cache_valid_time": INDEX_SECONDS,
            },
            task_vars=task_vars,
        )
        return done
