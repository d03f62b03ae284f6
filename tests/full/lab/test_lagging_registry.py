"""The controller sees the registry half a minute late, as some shared file systems may: routing does not wait for it.

mergerfs, which is made to be told how long the kernel may believe what it knew, stands between the registry and the
controller; the records below it are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import preemption
from benchmarks.preemption import FAST, IDLE, SHORT
from gleaner.events import Kind
from tests.lab import cluster, preempt
from tests.lab.cluster import CONTROLLER, REGISTRY, TIER_NODE, run

LAG_SECONDS = 30
SOURCE = "/run/registry"
OPTIONS = ",".join(
    [
        "allow_other",
        "cache.files=full",
        *(f"cache.{what}={LAG_SECONDS}" for what in ("attr", "entry", "negative_entry", "readdir")),
    ]
)


@pytest.fixture(scope="module")
def _lagging() -> Iterator[None]:
    preempt.wait_served()
    preemption.prepare(preempt.controller())
    run(CONTROLLER, "apt-get -y -q install mergerfs >/dev/null")
    run(CONTROLLER, "[ -e /dev/fuse ] || mknod /dev/fuse c 10 229")
    run(CONTROLLER, f"mkdir -p {SOURCE} && mount --bind {REGISTRY} {SOURCE}")
    run(CONTROLLER, f"mergerfs -o {OPTIONS} {SOURCE} {REGISTRY}")
    try:
        yield
    finally:
        run(CONTROLLER, f"umount --lazy {REGISTRY}; umount {SOURCE}; rmdir {SOURCE}; rm -r {preemption.FOLDER}")
        cluster.wait_served()


@pytest.mark.usefixtures("_lagging")
def test_the_lag_is_real() -> None:
    """A file that a node takes away is there for the controller all the same."""
    run(TIER_NODE, f"touch {REGISTRY}/probe")
    run(CONTROLLER, f"cat {SOURCE}/probe && cat {REGISTRY}/probe")
    run(TIER_NODE, f"rm {REGISTRY}/probe")
    assert cluster.host(CONTROLLER).run(f"stat {SOURCE}/probe").rc != 0
    assert cluster.host(CONTROLLER).run(f"stat {REGISTRY}/probe").rc == 0


@pytest.mark.usefixtures("_lagging")
@pytest.mark.parametrize("case", [IDLE, SHORT])
def test_a_withdrawal_does_not_wait_for_the_file_system(case: str) -> None:
    job = preempt.tier_job(FAST)
    played = preemption.play(preempt.controller(), case, 0.0)
    assert played.wrong == ()
    assert played.stream is None or played.stream.done
    (drained,) = [one for one in preempt.told(FAST, job.id) if one.restart == job.restarts and one.kind is Kind.DRAINED]
    assert drained.more["whole"]
    # Known before the file system could tell, and before the record there would have been stale.
    (yielded,) = played.yields
    assert yielded.last_served - yielded.signalled < LAG_SECONDS / 2
