"""What molecule's scenario `fast_tier` begins: models leave while they work, or are damaged on disk."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab import cluster, models
from tests.lab.cluster import SMOLLM2, TIER_NODE, TINY, run
from tests.lab.models import OFFERS, VISIBLE, offer, offered, visible

LEAVING = "leaving-while-serving"
FRAGILE = "fragile"
STRAY = "brought-by-hand"


@pytest.fixture(scope="module", autouse=True)
def _inventory_is_restored() -> Iterator[None]:
    cluster.wait_served()
    # A file that was changed since it was staged is not ours to remove.
    with models.restored(STRAY, FRAGILE):
        yield


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
