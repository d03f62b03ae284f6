"""Runs the programs of ansible-core that belong to this Python, under the project's own configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILTERS = sorted(path.stem for path in (ROOT / "filter_plugins").glob("*.yml"))


def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Output without colours; the exit status is the caller's to judge."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "LC_ALL": "C.UTF-8",
    }
    command = [str(Path(sys.executable).with_name(program)), *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
