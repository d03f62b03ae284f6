"""Models come and go while the tier serves: bad ones change nothing, good ones need no restart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import cluster, models
from tests.lab.cluster import SMOLLM2, TIER_NODE, TINY, run
from tests.lab.models import OFFERS, VISIBLE, offer, offered, visible

ADDED = "added-while-serving"
BESIDE = "beside-the-broken"


@pytest.fixture(scope="module", autouse=True)
def _inventory_is_restored() -> Iterator[None]:
    with models.restored():
        yield


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
