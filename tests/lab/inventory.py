"""The lab's inventory, and how tests change it under a running site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.lab.ansible import ROOT, Run, succeed


def tiers() -> dict[str, dict[str, Any]]:
    """The tiers that the lab has, by name."""
    found = yaml.safe_load((ROOT / "inventories/lab/group_vars/all/tiers.yml").read_text())["tiers"]
    return {tier["name"]: tier for tier in found}


def apply(folder: Path, *wanted: dict[str, Any]) -> Run:
    """What site.yml does for tiers, with these in the inventory."""
    file = folder / "tiers.json"
    file.write_text(json.dumps({"tiers": wanted}))
    return succeed("playbooks/tiers.yml", "playbooks/gateway.yml", "-e", f"@{file}")
