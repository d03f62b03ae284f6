"""The commands that the README shows, and where each of them is meant to be typed.

A line of a `console` block is a command for the machine with the checkout, a line of an `sh` block one for the
controller. `text` blocks are pictures.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"console", "sh", "text"}


def blocks() -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return BLOCK.findall((ROOT / "README.md").read_text())


def commands(language: str) -> list[str]:
    return [line for kind, text in blocks() if kind == language for line in text.splitlines() if line.strip()]


def make_targets() -> list[str]:
    return [command.split()[1] for command in commands("console") if command.startswith("make ")]


def on_this_machine() -> list[str]:
    """Commands beside make, for the machine with the checkout."""
    return [command for command in commands("console") if not command.startswith("make ")]


def on_the_controller() -> list[str]:
    return commands("sh")
