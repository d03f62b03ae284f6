"""What docs/operations.md and docs/troubleshooting.md show as typed and printed.

A `console` block is a session: `$ ` stands before what is typed on the machine with the checkout, `slurm-ctl# ` before
what root types on that host. What is printed when all is well follows its command: `…` stands for a part of a line or,
alone on one, for lines, and `(nothing)` for no output. A comment before a block says what a test needs to know of it:

    <!-- run by: tests/full/lab/test_upgrade.py -->   that test runs its commands
    <!-- needs: gpu -->                               no test runs them, since the lab has none
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.docs.readme import ROOT

DOCUMENTS = tuple(ROOT / "docs" / name for name in ("operations.md", "troubleshooting.md"))
HERE = "$"
NOTHING = "(nothing)"
NEEDS = ("gpu", "tailnet")
BLOCK = re.compile(r"((?:^<!-- [\w ]+: [^\n]* -->\n)*)^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"^<!-- ([\w ]+): (.*) -->$", re.MULTILINE)
PROMPT = re.compile(r"^(?:(\$)|([a-z][a-z0-9-]*)#) (.+)$")
PLAYBOOK = re.compile(r"^\.venv/bin/ansible-playbook -i inventories/SITE ")


@dataclass(frozen=True)
class Command:
    """A command, where it is typed, and what it prints when all is well (nothing: whatever it likes)."""

    section: str
    host: str
    text: str
    well: tuple[str, ...] = ()
    needs: str = ""
    run_by: str = ""

    @property
    def name(self) -> str:
        return f"{self.section}: {self.text}"

    @property
    def arguments(self) -> list[str]:
        """Words of a playbook's command line behind the inventory; ValueError for what is none."""
        if not PLAYBOOK.match(self.text):
            raise ValueError(f"{self.text!r}: wanted a playbook's command line")
        return PLAYBOOK.sub("", self.text).split()


def sections(text: str) -> dict[str, str]:
    """The text below each heading of the second level."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def of_block(section: str, marks: dict[str, str], text: str) -> list[Command]:
    found: list[Command] = []
    printed: list[str] = []
    for line in text.splitlines():
        if match := PROMPT.match(line):
            printed = []
            host = match[1] or match[2]
            found.append(Command(section, host, match[3], (), marks.get("needs", ""), marks.get("run by", "")))
        elif not found:
            raise ValueError(f"{section}: {line!r} is printed before anything was typed")
        else:
            printed.append(line)
            last = found.pop()
            found.append(Command(last.section, last.host, last.text, tuple(printed), last.needs, last.run_by))
    return found


def commands(document: Path) -> list[Command]:
    """All commands of a document, in their order; ValueError for marks and blocks that nobody knows."""
    found: list[Command] = []
    read = 0
    text = document.read_text()
    for section, body in sections(text).items():
        for before, language, session in BLOCK.findall(body):
            read += 1
            marks = dict(MARK.findall(before))
            if unknown := marks.keys() - {"needs", "run by"}:
                raise ValueError(f"{document.name}: {section}: marks {sorted(unknown)}; wanted needs or run by")
            if language == "console":
                found.extend(of_block(section, marks, session))
            elif marks or language not in ("text", "yaml"):
                raise ValueError(f"{document.name}: {section}: a block of {language!r}; wanted console, text or yaml")
    if read * 2 != len(re.findall(r"^```", text, re.MULTILINE)):
        raise ValueError(f"{document.name}: a block before the first heading, or without its end")
    return found


def printed_as(well: tuple[str, ...], output: str) -> bool:
    """Whether a command has printed what it prints when all is well; the width of a gap is nobody's claim."""
    if well == (NOTHING,):
        return not output.strip()
    lines = [
        r"(?:.*\n)*" if line.strip() == "…" else re.sub(r"(?:\\ )+", " +", re.escape(line)).replace("…", ".*") + r" *\n"
        for line in well
    ]
    return re.fullmatch("".join(lines), output.strip("\n") + "\n") is not None
