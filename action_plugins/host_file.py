"""Copy a file or a text to a host: ansible.builtin.copy, which first looks whether the host has it.

On a finished cluster nearly every file is as it should be. What a shell can see of one costs some milliseconds there;
each of core's two modules, stat and file, starts a Python that compiles what it was sent with.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action.copy import ActionModule as CopyAction

# What a look can judge, with the value that it judges where only one will do; other options are left to core.
JUDGED = {"src", "content", "dest", "owner", "group", "mode", "validate", "force"}
ONLY = {"follow": False, "backup": False, "remote_src": False}
OCTAL = re.compile(r"[0-7]{3,5}")
FORMAT = "%F|%u|%U|%g|%G|%a"
# Somewhere in the answer: a terminal, which ssh has for a look, brings whatever else is said at a login.
SEEN = re.compile(
    r"^regular (?:empty )?file\|(?P<uid>\d+)\|(?P<user>[^|]+)\|(?P<gid>\d+)\|(?P<group>[^|]+)\|(?P<mode>[0-7]+)\n"
    r"(?P<sha256>[0-9a-f]{64})  -$",
    re.MULTILINE,
)
VAULT = b"$ANSIBLE_VAULT"


def look_command(path: str) -> str:
    """One line of :data:`FORMAT`, in English, and one of sha256sum; a link is not followed."""
    quoted = shlex.quote(path)
    return f"export LC_ALL=C; stat --format={shlex.quote(FORMAT)} -- {quoted} && sha256sum < {quoted}"


def wanted_bytes(args: Mapping[str, Any]) -> bytes | None:
    """What the file is to hold; ``None`` where only core knows."""
    content, source = args.get("content"), args.get("src")
    if isinstance(content, str):
        return content.encode()
    # A relative path is searched for by core, a vault opened.
    if content is None and isinstance(source, str) and Path(source).is_absolute() and Path(source).is_file():
        read = Path(source).read_bytes()
        return None if read.startswith(VAULT) else read
    return None


def is_owner(wanted: object, number: str, name: str) -> bool:
    """Whether it is this one who is meant, by id or by name; nobody in particular is anybody."""
    return wanted is None or str(wanted) == (number if str(wanted).isdecimal() else name)


def can_look(args: Mapping[str, Any]) -> bool:
    """Whether a look tells all that core would."""
    mode = args.get("mode")
    rest = {name: value for name, value in args.items() if name not in JUDGED and value is not None}
    return (
        all(name in ONLY and value is ONLY[name] for name, value in rest.items())
        and isinstance(args.get("dest"), str)
        and (mode is None or (isinstance(mode, str) and OCTAL.fullmatch(mode) is not None))
    )


def is_as_wanted(args: Mapping[str, Any], content: bytes, answer: str) -> bool:
    """Whether the host's answer to :func:`look_command` is the file that is wanted, to the last bit of its mode.

    Without force any content will do, as with core.
    """
    seen = SEEN.search(answer.replace("\r\n", "\n"))
    return (
        seen is not None
        and is_owner(args.get("owner"), seen["uid"], seen["user"])
        and is_owner(args.get("group"), seen["gid"], seen["group"])
        and (args.get("mode") is None or int(args["mode"], 8) == int(seen["mode"], 8))
        and (args.get("force") is False or seen["sha256"] == hashlib.sha256(content).hexdigest())
    )


class ActionModule(CopyAction):  # type: ignore[misc]  # ansible-core ships no types
    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        args = self._task.args
        content = wanted_bytes(args) if can_look(args) else None
        if content is not None:
            seen = self._low_level_execute_command(look_command(args["dest"]))
            if seen.get("rc") == 0 and is_as_wanted(args, content, str(seen.get("stdout", ""))):
                return {"changed": False, "dest": args["dest"]}
        result: dict[str, Any] = super().run(tmp, task_vars)
        return result
