"""docs/sizing.md holds the planner's own figures and rules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from benchmarks import report
from gleaner import rules

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "sizing.md"


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizing_docs", ROOT / "tools" / "sizing_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_clusters_numbers_are_the_planners() -> None:
    text = DOCUMENT.read_text()
    assert report.replace(text, "seed", tool().section()) == text, (
        "docs/sizing.md has drifted: run PYTHONPATH=src:. python tools/sizing_docs.py"
    )


def test_the_rules_are_the_planners() -> None:
    text = DOCUMENT.read_text()
    assert report.replace(text, "rules", rules.table()) == text, (
        "docs/sizing.md has drifted: run PYTHONPATH=src:. python tools/sizing_docs.py"
    )
