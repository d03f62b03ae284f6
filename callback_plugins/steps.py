"""Numbers the steps of a long playbook, and says at its end in which one it failed and what to do."""

from __future__ import annotations

from typing import Any

from ansible.plugins.callback import CallbackBase
from ansible.template import Templar

DOCUMENTATION = r"""
---
name: steps
type: aggregate
short_description: Say which step of a playbook failed
description:
  - A play is of the step that its variable C(step) names, also one of an imported playbook that was given the variable.
  - When the run has failed, hosts that could not be reached among it, the step of the last play is named, with what
    the play's variable C(step_cure) says is to be done. A failing play ends a run, and so cannot tell it itself.
"""


class CallbackModule(CallbackBase):  # type: ignore[misc]  # ansible-core ships no types
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "steps"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.step = self.cure = ""

    def v2_playbook_on_play_start(self, play: Any) -> None:
        given = play.get_vars()
        templar = Templar(loader=play._loader, variables=play.get_variable_manager().get_vars(play=play))
        step = str(templar.template(given.get("step", "")))
        if step and step != self.step:
            self._display.banner(f"STEP {step}")
        self.step, self.cure = step, str(templar.template(given.get("step_cure", "")))

    def v2_playbook_on_stats(self, stats: Any) -> None:
        if self.step and (stats.failures or stats.dark):
            self._display.error(f"step {self.step}: failed. {self.cure}".strip(), wrap_text=False)
