"""What is going on, in words: by `gleaner status`, and by a playbook that changes nothing."""

from __future__ import annotations

import pytest

from benchmarks.preemption import FAST, REASONING
from tests.lab import cluster, preempt
from tests.lab.ansible import succeed
from tests.lab.cluster import CONTROLLER, HOSTS, NODES, TIER_NODE, run


@pytest.fixture(autouse=True)
def _served() -> None:
    preempt.wait_served()


def test_all_is_well() -> None:
    status = cluster.whole_status()
    assert [line["words"].partition(":")[0] for line in status["tiers"]] == [
        f"serving on {TIER_NODE}",
        f"serving on {cluster.HEAD}, {cluster.WORKERS[0]}",
    ]
    assert {node["node"]: (node["tiers"], node["gpus_held"], node["usable"]) for node in status["nodes"]} == {
        node: ([FAST] if node == TIER_NODE else [REASONING], 1, True) for node in NODES
    }
    assert {line["engine"] for line in status["tiers"]} == {status["versions"]["engine"]}
    assert status["problems"] == []
    assert max(len(line) for line in run(CONTROLLER, "gleaner status").splitlines()) <= 100


def test_the_playbook_adds_what_only_nodes_know() -> None:
    told = succeed("playbooks/status.yml", "--check", "--diff")
    assert told.changed == dict.fromkeys(HOSTS, 0)
    assert "0 of 32768             3 of 3           as here  the one in use" in told.output
    assert "Problems" not in told.output
