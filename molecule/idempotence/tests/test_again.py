"""site.yml limited to a node of a finished cluster changes nothing; a replaced node is brought back by it.

That a run of the whole changes nothing, dry or not, is a claim of the README, and tested with its commands.
"""

from __future__ import annotations

from tests.lab import cluster
from tests.lab.ansible import ROOT, playbook, succeed
from tests.lab.cluster import SMOLLM2, TIER_NODE, run


def test_a_replaced_node_is_brought_back_by_a_run_limited_to_it() -> None:
    """First the run limited to the finished node, which is safe, then to a virgin one of the same name."""
    limited = succeed("site.yml", "--limit", TIER_NODE)
    assert limited.changed == {TIER_NODE: 0}, limited.output
    assert cluster.ask("/health").status == 200

    cluster.forget(TIER_NODE)
    replaced = playbook(str(ROOT / "molecule/idempotence/replace_machine.yml"), "-e", f"machine={TIER_NODE}")
    assert replaced.code == 0, replaced.output
    answer = cluster.ask("/health", timeout=cluster.ANSWER_SECONDS)
    cluster.assert_away(answer)
    assert cluster.host(TIER_NODE).run("command -v slurmd").rc != 0

    limited = succeed("site.yml", "--limit", TIER_NODE)
    assert limited.failed == set()
    cluster.wait_served(180)
    assert cluster.complete(SMOLLM2).status == 200
    assert cluster.running_job().node == TIER_NODE
    assert run(TIER_NODE, "systemctl is-active slurmd munge gleaner-firewall").split() == ["active"] * 3
