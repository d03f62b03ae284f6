#!/usr/bin/env python3
"""Print docs/roles.md: every variable of every role, from its argument specs and its defaults."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Roles and their variables

<!-- Made by `python tools/role_docs.py > docs/roles.md`; a test fails when this file differs. -->

Playbooks and group_vars pass what a role needs; docs/inventory.md describes what a site writes. A default that names
another variable in braces is that variable's value. Why a default is what it is stands beside it in the role's
`defaults/main.yml`.
"""


def plain(text: str | list[str]) -> str:
    """Ansible's documentation markup as Markdown, on one line and without table bars."""
    words = " ".join(text) if isinstance(text, list) else text
    return re.sub(r"[CVO]\(([^)]*)\)", r"`\1`", " ".join(words.split())).replace("|", "\\|")


def value(default: object) -> str:
    """A default as YAML on one line; a text as it is, without YAML's quotes."""
    shown = (
        default
        if isinstance(default, str) and default
        else yaml.safe_dump(default, default_flow_style=True, width=10_000, sort_keys=False)
    )
    return "`" + " ".join(shown.removesuffix("\n...\n").split()).replace("|", "\\|") + "`"


def type_of(option: dict[str, Any]) -> str:
    kind = str(option.get("type", "str"))
    kind += f" of {option['elements']}" if "elements" in option else ""
    return f"{kind}: {', '.join(map(str, option['choices']))}" if "choices" in option else kind


def rows(options: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """A table row for each variable, and for each key of those that are dictionaries."""
    for name, option in options.items():
        if option.get("required"):
            default = "required"
        elif name in defaults and not prefix:
            default = value(defaults[name])
        else:
            default = value(option["default"]) if "default" in option else ""
        yield f"| `{prefix}{name}` | {type_of(option)} | {default} | {plain(option['description'])} |"
        inner = f"{prefix}{name}{'[]' if option.get('type') == 'list' else ''}."
        yield from rows(option.get("options", {}), defaults, inner)


def section(role: Path) -> str:
    """What is said of one role."""
    specs = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    file = role / "defaults" / "main.yml"
    defaults: dict[str, Any] = (yaml.safe_load(file.read_text()) if file.exists() else None) or {}
    parts = [f"## {role.name}"]
    for entry, spec in specs.items():
        options = spec.get("options", {})
        begin = "" if entry == "main" else f"`tasks_from: {entry}`: "
        parts.append(f"{begin}**{plain(spec['short_description'])}.** {plain(spec.get('description', ''))}".strip())
        if entry != "main" and options and options == specs["main"].get("options"):
            parts.append("Takes the same variables.")
        elif options:
            table = ["| variable | type | default | meaning |", "|---|---|---|---|", *rows(options, defaults)]
            parts.append("\n".join(table))
    return "\n\n".join(parts)


def document(roles: Path = ROOT / "roles") -> str:
    """The whole of docs/roles.md."""
    return "\n".join([HEAD, *(section(role) + "\n" for role in sorted(roles.iterdir()) if role.is_dir())])


if __name__ == "__main__":
    sys.stdout.write(document())
