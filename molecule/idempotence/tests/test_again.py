"""site.yml on a finished cluster changes nothing, whole, dry or limited; a replaced node is brought back by it."""

from __future__ import annotations

from tests.lab import cluster
from tests.lab.ansible import ROOT, playbook, succeed
from tests.lab.cluster import HOSTS, SMOLLM2, TIER_NODE, run

NOTHING = dict.fromkeys((*HOSTS, "localhost"), 0)


def test_a_second_run_changes_nothing() -> None:
    job, server = cluster.running_job(), cluster.router_pid()
    again = succeed("site.yml")
    assert again.changed == NOTHING, again.output
    assert (cluster.running_job(), cluster.router_pid()) == (job, server)


def test_a_dry_run_names_nothing() -> None:
    dry = succeed("site.yml", "--check", "--diff")
    assert dry.changed == NOTHING, dry.output


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
