"""Runs a playbook without its hosts: files are rendered to a folder, what would ask or change a host has no effect."""

from __future__ import annotations

from typing import Any

from ansible.plugins.strategy.linear import StrategyModule as LinearStrategy

DOCUMENTATION = """
name: render
short_description: Render every file of a play
description:
  - Tasks that write a file from a template or from the roles' files write it below E(GLEANER_RENDER_TO) instead.
  - Tasks that ask a host, or change it, answer what C(canned_result) knows; assertions about answers are not made.
author: Gleaner
"""

WRITES = ("config_file", "host_file", "ansible.builtin.template", "ansible.builtin.copy")
# These are done by ansible itself, with no host.
LOCAL = (
    "ansible.builtin.set_fact",
    "ansible.builtin.validate_argument_spec",
    "ansible.builtin.debug",
    "ansible.builtin.include_tasks",
    "ansible.builtin.include_role",
    "ansible.builtin.include_vars",
    "meta",
    "ansible.builtin.meta",
)


class StrategyModule(LinearStrategy):  # type: ignore[misc]  # ansible-core ships no types
    def _queue_task(self, host: Any, task: Any, task_vars: dict[str, Any], play_context: Any) -> None:
        if task.action not in LOCAL and task.delegate_to != "localhost":
            writes = task.action in WRITES
            task = task.copy()
            # What is only asked of a host is not even worked out: it may build on earlier answers.
            task.args = {"asked": dict(task.args)} if writes else {"register": task.register}
            task.action = "render_file" if writes else "canned_result"
            task.delegate_to, task.until, task.changed_when, task.failed_when = None, [], [], []
        super()._queue_task(host, task, task_vars, play_context)
