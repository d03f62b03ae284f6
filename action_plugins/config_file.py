"""Render a template to a host: ansible.builtin.template, with a check mode that holds on a virgin host.

The host is asked by host_file first whether it has that text, which is quicker than core's own way.
"""

from __future__ import annotations

import re
from typing import Any

from ansible.plugins.action.template import ActionModule as TemplateAction

UNKNOWN_OWNER = re.compile(r"failed to look up (?P<kind>user|group) (?P<name>.+)$")


def owner_to_come(result: dict[str, Any]) -> dict[str, Any] | None:
    """Return what check mode says instead of a failure over an owner that an earlier task would have made.

    ``None`` when the result is no such failure.
    """
    unknown = UNKNOWN_OWNER.search(str(result.get("msg", ""))) if result.get("failed") else None
    if unknown is None:
        return None
    kind, name = unknown["kind"], unknown["name"]
    attribute = "owner" if kind == "user" else "group"
    return {
        "changed": True,
        "dest": result.get("path"),
        "msg": f"{kind} {name} does not exist yet on this host",
        "diff": [{"before": f"{attribute}: {result.get(attribute)}\n", "after": f"{attribute}: {name}\n"}],
    }


def with_destination_headers(result: dict[str, Any], dest: str) -> dict[str, Any]:
    """Name the destination in the diff, where core names a temporary file of the controller.

    Without this two runs of the same check never print the same text.
    """
    diff = result.get("diff")
    for part in diff if isinstance(diff, list) else []:
        if "after_header" in part:
            part["after_header"] = dest
    return result


class CopiesByHostFile:
    """Ansible's loaders, but that what core's template copies with, C(ansible.legacy.copy), is host_file."""

    def __init__(self, loaders: Any) -> None:
        self._loaders = loaders

    def __getattr__(self, name: str) -> Any:
        return self if name == "action_loader" else getattr(self._loaders, name)

    def get(self, name: str, *args: Any, **options: Any) -> Any:
        loader = self._loaders.action_loader
        return loader.get("host_file" if name == "ansible.legacy.copy" else name, *args, **options)


class ActionModule(TemplateAction):  # type: ignore[misc]  # ansible-core ships no types
    # What is copied has a folder made for it when it has to be.
    TRANSFERS_FILES = False
    _shared_loader_obj: Any

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        self._shared_loader_obj = CopiesByHostFile(self._shared_loader_obj)
        result: dict[str, Any] = super().run(tmp, task_vars)
        if self._task.check_mode:
            result = owner_to_come(result) or result
        return with_destination_headers(result, str(self._task.args.get("dest")))
