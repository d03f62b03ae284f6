"""The variable tables of docs/roles.md are what the roles say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gleaner import plan, site
from tests.docs.readme import ROOT
from tools import role_docs

ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())


def defaults(role: Path) -> dict[str, Any]:
    file = role / "defaults" / "main.yml"
    return (yaml.safe_load(file.read_text()) if file.exists() else None) or {}


def options(role: Path) -> dict[str, Any]:
    specs = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    return {name: option for spec in specs.values() for name, option in spec.get("options", {}).items()}


def test_document_is_what_the_roles_say() -> None:
    assert (ROOT / "docs" / "roles.md").read_text() == role_docs.document(), (
        "docs/roles.md has drifted: run python tools/role_docs.py > docs/roles.md"
    )


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_default_is_described(role: Path) -> None:
    assert not defaults(role).keys() - options(role).keys()


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_variable_is_required_or_has_a_default(role: Path) -> None:
    given = defaults(role).keys()
    bare = [name for name, one in options(role).items() if not one.get("required") and name not in given]
    assert not bare
    both = [name for name, one in options(role).items() if one.get("required") and name in given]
    assert not both


def test_a_table_cell_holds_no_bar() -> None:
    text = "{{ a | b }}"
    rows = list(role_docs.rows({"x": {"description": text}, "y": {"default": text, "description": "C(x)"}}, {}))
    assert rows == [
        "| `x` | str |  | {{ a \\| b }} |",
        "| `y` | str | `{{ a \\| b }}` | `x` |",
    ]


def test_what_roles_and_planner_have_to_agree_on_is_the_same() -> None:
    assert str(site.RPC_PORT) in defaults(ROOT / "roles/tier_node")["tier_node_rpc_ports"]
    assert defaults(ROOT / "roles/rpc_worker")["rpc_worker_cache_directory"] == plan.RPC_CACHE_DIR
