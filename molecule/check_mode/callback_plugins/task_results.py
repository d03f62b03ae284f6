"""Records what became of every task on every host, for a test that compares two runs."""

from __future__ import annotations

import json
import os
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: task_results
type: aggregate
short_description: Write each task's result on each host to a file
description:
  - One JSON object a line with C(host), C(task), C(path), and whether it C(changed), to the file that
    the environment variable C(TASK_RESULTS) names.
author: Gleaner
"""


class CallbackModule(CallbackBase):  # type: ignore[misc]
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "task_results"
    CALLBACK_NEEDS_ENABLED = True

    def v2_runner_on_ok(self, result: Any) -> None:
        task = result.task
        entry = {
            "host": result.host.get_name(),
            "task": task.get_name(),
            "path": task.get_path() or "",
            "changed": bool(result.result.get("changed", False)),
        }
        with open(os.environ["TASK_RESULTS"], "a") as file:
            file.write(json.dumps(entry) + "\n")
