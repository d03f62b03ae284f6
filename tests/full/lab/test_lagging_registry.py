"""The gateway sees the registry half a minute late, as some shared file systems may: routing does not wait for it.

mergerfs can be told how long the kernel is to believe what it knew. It shows the registry in a second place, where the
updater reads it; the records below it are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import preemption
from benchmarks.preemption import FAST, IDLE, SHORT
from tests.lab import cluster, preempt
from tests.lab.cluster import CONTROLLER, REGISTRY, TIER_NODE, run

LAG_SECONDS = 30
LAGGING = "/run/lagging"
CONFIGURATION = "/etc/gleaner/gateway.json"
OPTIONS = ",".join(
    [
        "allow_other",
        "cache.files=full",
        "cache.readdir=true",
        *(f"cache.{what}={LAG_SECONDS}" for what in ("attr", "entry", "negative_entry")),
    ]
)
DRAIN_SECONDS = 5.0


@pytest.fixture(scope="module")
def tokens() -> Iterator[dict[str, int]]:
    """The updater reads the lagging registry while this module lasts."""
    preempt.wait_served()
    try:
        preemption.prepare(preempt.controller())
        wanted = {SHORT: preemption.short_tokens(preempt.controller().address, DRAIN_SECONDS)}
        run(CONTROLLER, "apt-get -y -q install mergerfs >/dev/null")
        run(CONTROLLER, f"[ -e /dev/fuse ] || mknod /dev/fuse c 10 229; mkdir -p {LAGGING}")
        run(CONTROLLER, f"mergerfs -o {OPTIONS} {REGISTRY} {LAGGING}")
        run(CONTROLLER, f"cp -p {CONFIGURATION} /run/gateway.json && sed -i 's|{REGISTRY}|{LAGGING}|' {CONFIGURATION}")
        run(CONTROLLER, "systemctl restart gleaner-upstream")
        yield wanted
    finally:
        host = cluster.host(CONTROLLER)
        host.run(f"[ ! -e /run/gateway.json ] || cp -p /run/gateway.json {CONFIGURATION}; rm -f /run/gateway.json")
        host.run(f"systemctl restart gleaner-upstream; umount --lazy {LAGGING}; rm -rf {preemption.FOLDER}")
        host.run("apt-get -y -q purge mergerfs")
        cluster.wait_served()


@pytest.mark.usefixtures("tokens")
def test_the_lag_is_real() -> None:
    """A file that a node takes away is there for the updater all the same."""
    run(TIER_NODE, f"touch {REGISTRY}/probe")
    run(CONTROLLER, f"stat {REGISTRY}/probe {LAGGING}/probe")
    run(TIER_NODE, f"rm {REGISTRY}/probe")
    assert cluster.host(CONTROLLER).run(f"stat {REGISTRY}/probe").rc != 0
    assert cluster.host(CONTROLLER).run(f"stat {LAGGING}/probe").rc == 0


@pytest.mark.parametrize("case", [IDLE, SHORT])
def test_a_withdrawal_does_not_wait_for_the_file_system(case: str, tokens: dict[str, int]) -> None:
    job = preempt.tier_job(FAST)
    played = preemption.play(preempt.controller(), case, 0.0, tokens.get(case, 0))
    assert played.wrong == ()
    assert played.stream is None or played.stream.done
    (yielded,) = played.yields
    assert yielded.last_sent - yielded.signalled < LAG_SECONDS / 2
    # And not only because Slurm is asked, too.
    assert "the gateway takes no request any more" in preempt.log(job.id)
    assert "its supervisor has withdrawn it" in run(
        CONTROLLER, "journalctl -u gleaner-upstream -o cat -n 40 --no-pager"
    )
