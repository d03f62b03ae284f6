"""Write measured figures between two markers of docs/benchmarks.md."""

from __future__ import annotations

import os
import tempfile
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.lab import ROOT

DOCUMENT = ROOT / "docs" / "benchmarks.md"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def facts(rows: Mapping[str, str]) -> str:
    """A Markdown table of names and values."""
    return table(("", ""), [(f"**{name}**", value) for name, value in rows.items()])


def raw(title: str, figures: Mapping[str, Sequence[float]], digits: int) -> str:
    """All single figures, folded away."""
    lines = [
        line
        for name, values in figures.items()
        for line in (f"{name}:", *textwrap.wrap(" ".join(f"{value:.{digits}f}" for value in values), 110))
    ]
    return "\n".join(["<details><summary>" + title + "</summary>", "", "```text", *lines, "```", "", "</details>"])


def replace(text: str, section: str, body: str) -> str:
    """Put a body between the markers of a section; ValueError when the text lacks them."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"no markers of {section!r}; wanted the lines {begin} and {end}; cure: add them")
    return f"{before}{begin}\n\n{body.strip()}\n\n{end}{after}"


def write(section: str, body: str, document: Path = DOCUMENT) -> None:
    """Replace a section of the document in one step."""
    text = replace(document.read_text(), section, body)
    with tempfile.NamedTemporaryFile("w", dir=document.parent, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)
    os.replace(file.name, document)
