"""Models that are added to the inventory while the tier serves: bad ones change nothing, good ones need no restart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab import cluster
from tests.lab.ansible import ROOT, Run, playbook, succeed
from tests.lab.cluster import SMOLLM2, TIER_NODE, TINY, run

VISIBLE = "/scratch/ai/models"
OFFERS = "/cluster/shared/offers"
ADDED = "added-while-serving"
BESIDE = "beside-the-broken"


def offered(name: str, **differences: str) -> dict[str, Any]:
    """The small model under another name."""
    models: list[dict[str, Any]] = yaml.safe_load((ROOT / "inventories/lab/group_vars/all/models.yml").read_text())[
        "models"
    ]
    (tiny,) = (model for model in models if model["name"] == TINY)
    return {**tiny, "name": name, **differences}


def offer(tmp_path: Path, *models: dict[str, Any]) -> Run:
    """Run the tiers' playbook with more models in the inventory."""
    known = yaml.safe_load((ROOT / "inventories/lab/group_vars/all/models.yml").read_text())["models"]
    file = tmp_path / "models.json"
    file.write_text(json.dumps({"models": [*known, *models]}))
    return playbook("playbooks/tiers.yml", "-e", f"@{file}")


@pytest.fixture(scope="module", autouse=True)
def _inventory_is_restored() -> Iterator[None]:
    yield
    run(TIER_NODE, f"rm -rf {OFFERS} {VISIBLE}/{{{ADDED},{BESIDE}}}.gguf")
    succeed("playbooks/tiers.yml")


def visible() -> set[str]:
    return set(run(TIER_NODE, f"ls {VISIBLE}").split())


def test_corrupt_models_are_refused_by_name_and_break_nothing(tmp_path: Path) -> None:
    # The sum of the inventory, but no model; and a whole model that is not the one that was ordered.
    broken = f"{OFFERS}/broken.gguf"
    run(TIER_NODE, f"mkdir -p {OFFERS} && (printf XXXX; tail --bytes=+5 {VISIBLE}/{TINY}.gguf) > {broken}")
    broken_sum = run(TIER_NODE, f"sha256sum {broken}").split()[0]
    wrong_sum = hashlib.sha256(b"another model").hexdigest()
    before, server = visible(), cluster.router_pid()

    refused = offer(
        tmp_path,
        offered("broken", source=f"file://{broken}", sha256=broken_sum),
        offered("changed", sha256=wrong_sum),
        offered(BESIDE),
    )
    assert refused.failed == {TIER_NODE}, refused.output
    assert "broken: " in refused.text
    assert f"changed: sha256: got {offered('x')['sha256']}, want {wrong_sum}" in refused.text
    assert visible() == before | {f"{BESIDE}.gguf"}
    assert cluster.router_pid() == server
    assert cluster.complete(SMOLLM2).status == 200
    assert not {"broken", "changed"} & set(cluster.model_states())
    assert cluster.complete(BESIDE).status == 200, "the good one of a run that failed is served"


def test_a_model_added_to_the_inventory_is_served_without_a_restart(tmp_path: Path) -> None:
    job, server = cluster.running_job(), cluster.router_pid()
    assert ADDED not in cluster.model_states()

    run_ = offer(tmp_path, offered(ADDED))
    assert run_.code == 0, run_.output
    assert cluster.complete(ADDED).status == 200
    assert (cluster.running_job(), cluster.router_pid()) == (job, server)
