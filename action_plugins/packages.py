"""Install Debian packages: ansible.builtin.apt, after a look whether they are installed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
FORMAT = "${db:Status-Abbrev}|${Architecture}|${Package}\n"
# Those that apt would take away again when nothing needs them any more.
AUTOMATIC = r"""awk 'BEGIN { RS = "" } /\nAuto-Installed: 1/ { print "automatic||" $2 }' /var/lib/apt/extended_states"""
# An older index may name files that the mirror has no more.
INDEX_SECONDS = 86400


def wanted_names(value: object) -> list[str]:
    """The option's value as a list; ValueError says what is wrong with it."""
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not names or not all(isinstance(name, str) and NAME.fullmatch(name) for name in names):
        raise ValueError(f"name = {value!r}; wanted names of Debian packages")
    return [str(name) for name in names]


def look_command(names: Sequence[str]) -> str:
    """Lines of three words: how each package is, which ones nobody asked for, and this machine's architecture."""
    query = shlex.join(["dpkg-query", "--show", f"--showformat={FORMAT}", *names])
    return f'{query}; {AUTOMATIC}; echo "native|$(dpkg --print-architecture)|"'


def installed(answer: str) -> set[str]:
    """Packages that are whole: wanted or held, unpacked and configured, without an error (dpkg-query(1)).

    Of this machine's architecture or of none, and asked for: apt marks others so when they are installed by name.
    """
    lines = [line.split("|") for line in answer.splitlines() if line.count("|") == 2]
    native = {"all", *(architecture for kind, architecture, _ in lines if kind == "native")}
    automatic = {name for kind, _, name in lines if kind == "automatic"}
    whole = {name for kind, architecture, name in lines if kind in ("ii ", "hi ") and architecture in native}
    return whole - automatic


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no types
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        try:
            names = wanted_names(self._task.args.get("name"))
        except ValueError as error:
            raise AnsibleActionFail(str(error)) from None
        # dpkg-query fails where it does not know one, and says no less of the others.
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
