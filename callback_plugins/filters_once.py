"""Loads the filters before ansible forks for its first task, so that its forks need not each load them again."""

from __future__ import annotations

from typing import Any

from ansible.plugins.callback import CallbackBase
from ansible.plugins.loader import filter_loader

DOCUMENTATION = r"""
---
name: filters_once
type: aggregate
short_description: Load filters once
description:
  - What a play first does with a filter it does in a fork, and so does each later fork, since none leaves to the next
    what it has imported.
"""


class CallbackModule(CallbackBase):  # type: ignore[misc]  # ansible-core ships no types
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "filters_once"
    CALLBACK_NEEDS_ENABLED = True

    def v2_playbook_on_start(self, playbook: Any) -> None:
        # Any filter of ours has all of them found and imported.
        filter_loader.get("site_plans")
