"""Filters for what a compiler brings along."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# Ansible loads this file by its path and knows nothing of src/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gleaner import cuda


def apt_driver_changes(simulated: str, packages: str, loaded: bool) -> list[str]:
    return cuda.driver_changes(str(simulated), str(packages), bool(loaded))


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"apt_driver_changes": apt_driver_changes}
