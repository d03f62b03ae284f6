"""Models come and go while the tier serves: bad ones change nothing, good ones need no restart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
LEAVING = "leaving-while-serving"
FRAGILE = "fragile"
STRAY = "brought-by-hand"


def offered(name: str, of: str = TINY, **differences: str) -> dict[str, Any]:
    """A model of the inventory under another name."""
    models: list[dict[str, Any]] = yaml.safe_load((ROOT / "inventories/lab/group_vars/all/models.yml").read_text())[
        "models"
    ]
    (model,) = (model for model in models if model["name"] == of)
    return {**model, "name": name, **differences}


def offer(tmp_path: Path, *models: dict[str, Any], arguments: tuple[str, ...] = ()) -> Run:
    """Run the tiers' playbook with more models in the inventory."""
    known = yaml.safe_load((ROOT / "inventories/lab/group_vars/all/models.yml").read_text())["models"]
    file = tmp_path / "models.json"
    file.write_text(json.dumps({"models": [*known, *models]}))
    return playbook("playbooks/tiers.yml", "-e", f"@{file}", *arguments)


@pytest.fixture(scope="module", autouse=True)
def _inventory_is_restored() -> Iterator[None]:
    before = visible()
    yield
    # A file that was changed since it was staged is not ours to remove.
    run(TIER_NODE, f"rm -rf {OFFERS} {VISIBLE}/{{{STRAY},{FRAGILE}}}.gguf")
    succeed("playbooks/tiers.yml")
    assert visible() == before


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


def test_a_model_that_leaves_the_inventory_is_let_go_and_deleted(tmp_path: Path) -> None:
    """And one that is damaged on disk is out of sight, even while no other copy of it can be had."""
    job, server = cluster.running_job(), cluster.router_pid()
    source = f"{OFFERS}/{FRAGILE}.gguf"
    run(TIER_NODE, f"mkdir -p {OFFERS} && cp {VISIBLE}/{TINY}.gguf {source}")
    fragile = offered(FRAGILE, source=f"file://{source}")
    both = offer(tmp_path, offered(LEAVING, SMOLLM2), fragile)
    assert both.code == 0, both.output
    assert cluster.complete(FRAGILE).status == 200

    run(TIER_NODE, f"rm {source}; printf XXXX | dd of={VISIBLE}/{FRAGILE}.gguf conv=notrunc status=none")
    run(TIER_NODE, f"echo mine > {VISIBLE}/{STRAY}.gguf")
    dry = offer(tmp_path, fragile, arguments=("--check", "--diff"))
    for told in (
        f"{FRAGILE} was not verified, to be read before it is served",
        f"{LEAVING} is no longer in the inventory, to be removed",
        f"{STRAY}.gguf is not in the inventory and was not staged by gleaner, left alone",
    ):
        assert told in dry.text
    assert visible() >= {f"{name}.gguf" for name in (FRAGILE, LEAVING, STRAY)}, "a dry run took something away"

    # At work for half a minute, or for longer where the machine has other things to do: it is given its time.
    cluster.stream(LEAVING, 1)
    speed = 20 / cluster.stream(LEAVING, 20).seconds
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cluster.stream, LEAVING, min(1900, int(30 * speed)))
        refused = offer(tmp_path, fragile, arguments=("--diff", "-e", "model_store_drain_seconds=240"))
        assert cluster.is_whole(answer.result())
    assert refused.failed == {TIER_NODE}, refused.output
    assert f"{source}" in refused.text
    assert visible() & {f"{name}.gguf" for name in (FRAGILE, LEAVING, STRAY)} == {f"{STRAY}.gguf"}
    assert run(TIER_NODE, f"find /scratch/ai -name '{LEAVING}*'") == ""
    assert not {FRAGILE, LEAVING} & set(cluster.model_states())
    assert 400 <= cluster.complete(LEAVING).status < 500
    assert cluster.complete(SMOLLM2).status == 200
    assert (cluster.running_job(), cluster.router_pid()) == (job, server)
