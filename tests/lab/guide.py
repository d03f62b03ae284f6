"""The examples of the guide for clients, as they stand in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def examples(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_program(program: str, file: Path, proxy: str = "") -> str:
    """What one of its Python programs prints; through a proxy, if one is given."""
    file.write_text(program)
    surroundings = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, str(file)],
        env={**surroundings, **({"HTTP_PROXY": proxy} if proxy else {})},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
