"""Filters are imported once, by the process from which ansible forks its workers."""

from __future__ import annotations

import subprocess
import sys

from tests.lab.ansible import ROOT, surroundings

PROGRAM = """
import sys
from ansible import constants
from ansible.plugins.loader import callback_loader, init_plugin_loader
init_plugin_loader()
for name in constants.CALLBACKS_ENABLED:
    callback_loader.get(name).v2_playbook_on_start(None)
print("gleaner.plan" in sys.modules)
"""


def test_the_first_task_finds_them_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=surroundings(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
