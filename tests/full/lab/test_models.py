"""What molecule's scenario `fast_tier` begins: models leave while they work, or are damaged on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gleaner import gguf
from tests.lab import cluster, models
from tests.lab.ansible import CACHE, ROOT
from tests.lab.cluster import SMOLLM2, TIER_NODE, TINY, run
from tests.lab.models import OFFERS, VISIBLE, offer, offered, visible

LEAVING = "leaving-while-serving"
FRAGILE = "fragile"
STRAY = "brought-by-hand"
SPLIT = "tiny-in-parts"
SOURCES = CACHE / "sources"


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


def answer_of(model: str) -> str:
    """What the model says when it is not left to chance."""
    wish = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    return str(cluster.ask("/v1/completions", wish).json["choices"][0]["text"])


@pytest.fixture
def in_parts(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The tiny model in three parts on the shared file system, and its entry for the inventory."""
    parts = models.split(SOURCES / f"{TINY}.gguf", tmp_path, SPLIT, 3)
    assert [part.name for part in parts] == [f"{SPLIT}-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    # Beside those of the inventory, which is where a path to header facts leads.
    header = ROOT / f"inventories/lab/models/{SPLIT}.json"
    run(TIER_NODE, f"mkdir -p {OFFERS}")
    for part in parts:
        cluster.bring(TIER_NODE, part, f"{OFFERS}/{part.name}")
    header.write_text(gguf.render(gguf.inspect(str(parts[0]))))
    try:
        yield {
            "name": SPLIT,
            "header": f"models/{SPLIT}.json",
            "parts": [
                {
                    "source": f"file://{OFFERS}/{part.name}",
                    "sha256": hashlib.sha256(part.read_bytes()).hexdigest(),
                    "size_bytes": part.stat().st_size,
                }
                for part in parts
            ],
        }
    finally:
        header.unlink()


def test_a_split_model_is_served_and_goes_again(tmp_path: Path, in_parts: dict[str, Any]) -> None:
    done = offer(tmp_path, in_parts)
    assert done.code == 0, done.output
    assert SPLIT in visible()
    assert len(run(TIER_NODE, f"ls {VISIBLE}/{SPLIT}").split()) == 3
    assert cluster.complete(SPLIT).status == 200
    # The weights are those of the whole one.
    assert answer_of(SPLIT) == answer_of(TINY)
    again = offer(tmp_path, in_parts)
    assert set(again.changed.values()) == {0}, again.output
    assert offer(tmp_path).code == 0
    assert SPLIT not in visible()
    assert SPLIT not in cluster.model_states()
