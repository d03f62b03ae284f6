"""The gateway sees the registry half a minute late, as some shared file systems may: routing does not wait for it.

tests/lab/lagging_fs.py, on FUSE, shows it in a second place as it was half a minute ago, and there the updater reads.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator

import pytest

from benchmarks import preemption
from benchmarks.preemption import FAST, IDLE, SHORT
from tests.lab import cluster, preempt
from tests.lab.ansible import ROOT
from tests.lab.cluster import CONTROLLER, REGISTRY, TIER_NODE, run

LAG_SECONDS = 30
LAGGING = "/run/lagging"
CONFIGURATION = "/etc/gleaner/gateway.json"
UNIT, PROGRAM = "lagging-registry", "/run/lagging_fs.py"


@pytest.fixture(scope="module", autouse=True)
def _lag() -> Iterator[None]:
    """The updater reads the lagging registry while this module lasts."""
    preempt.wait_served()
    try:
        preemption.prepare(preempt.controller())
        run(CONTROLLER, "apt-get -y -q install python3-fusepy >/dev/null")
        program = base64.b64encode((ROOT / "tests/lab/lagging_fs.py").read_bytes()).decode()
        run(CONTROLLER, f"echo {program} | base64 --decode > {PROGRAM}")
        run(CONTROLLER, f"[ -e /dev/fuse ] || mknod /dev/fuse c 10 229; mkdir -p {LAGGING}")
        command = f"python3 {PROGRAM} {REGISTRY} {LAGGING} {LAG_SECONDS}"
        run(CONTROLLER, f"systemd-run --quiet --collect --unit={UNIT} {command}")
        cluster.wait_until(
            "it is mounted", lambda: cluster.host(CONTROLLER).run(f"mountpoint -q {LAGGING}").rc == 0, 10
        )
        run(CONTROLLER, f"cp -p {CONFIGURATION} /run/gateway.json && sed -i 's|{REGISTRY}|{LAGGING}|' {CONFIGURATION}")
        run(CONTROLLER, "systemctl restart gleaner-upstream")
        yield
    finally:
        host = cluster.host(CONTROLLER)
        host.run(f"[ ! -e /run/gateway.json ] || cp -p /run/gateway.json {CONFIGURATION}; rm -f /run/gateway.json")
        host.run(f"systemctl restart gleaner-upstream; umount --lazy {LAGGING}; systemctl stop {UNIT}; rmdir {LAGGING}")
        host.run(f"rm -rf {preemption.FOLDER} {PROGRAM}; apt-get -y -q autoremove --purge python3-fusepy")
        cluster.wait_served()


def test_the_lag_is_real() -> None:
    """A file that a node takes away is there for the updater all the same."""
    run(TIER_NODE, f"touch {REGISTRY}/probe")
    cluster.wait_until("it is shown", lambda: cluster.host(CONTROLLER).run(f"cat {LAGGING}/probe").rc == 0, 60)
    run(TIER_NODE, f"rm {REGISTRY}/probe")
    time.sleep(LAG_SECONDS / 3)
    assert cluster.host(CONTROLLER).run(f"cat {REGISTRY}/probe").rc != 0
    assert cluster.host(CONTROLLER).run(f"cat {LAGGING}/probe").rc == 0


@pytest.mark.parametrize("case", [IDLE, SHORT])
def test_a_withdrawal_does_not_wait_for_the_file_system(case: str) -> None:
    job = preempt.tier_job(FAST)
    played = preemption.play(preempt.controller(), case, 0.0, preempt.DRAIN_SECONDS)
    assert played.wrong == ()
    assert played.stream is None or played.stream.done
    (yielded,) = played.yields
    assert yielded.last_sent - yielded.signalled < LAG_SECONDS / 2
    # And not only because Slurm is asked, too.
    assert "the gateway takes no request any more" in preempt.log(job)
    assert "its supervisor has withdrawn it" in run(
        CONTROLLER, "journalctl -u gleaner-upstream -o cat -n 40 --no-pager"
    )
