"""A node leaves the cluster, alive or dead, and what must not happen meanwhile does not."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.lab import cluster, inventory, machines, preempt
from tests.lab.ansible import Run, playbook
from tests.lab.cluster import CONTROLLER, TIER_NODE, run

REMOVE = "playbooks/remove_node.yml"
LEAVES = "vasp-03"
# A dead machine's job is waited for until Slurm gives it up.
PLAYBOOK_SECONDS = 1500


@pytest.fixture
def without(tmp_path: Path) -> list[str]:
    """Arguments with tiers that need the node no more."""
    fast = inventory.tiers()["fast"]
    file = tmp_path / "tiers.json"
    file.write_text(json.dumps({"tiers": [fast]}))
    return ["-e", f"node={LEAVES}", "-e", f"@{file}"]


def removed(arguments: list[str], *more: str) -> Run:
    done = playbook(REMOVE, *arguments, *more, timeout=PLAYBOOK_SECONDS)
    assert done.code == 0, done.output
    return done


def knows(node: str) -> bool:
    return node in run(CONTROLLER, "sinfo --noheader --Node --format=%N").split()


def come_back() -> None:
    """The node is provisioned anew, as part of the whole."""
    done = playbook("site.yml", timeout=PLAYBOOK_SECONDS)
    assert done.code == 0, done.output
    cluster.wait_served(180)
    cluster.wait_served(180, cluster.SPLIT_PORT)


def test_a_node_that_a_tier_needs_stays_and_the_tier_is_named() -> None:
    refused = playbook(REMOVE, "-e", f"node={LEAVES}")
    assert refused.code != 0
    assert f"tiers[reasoning].workers = {LEAVES}; wanted without {LEAVES}; cure: change these lines" in refused.text
    assert all(changed == 0 for changed in refused.changed.values()), refused.output
    assert knows(LEAVES)


def test_a_run_that_leaves_the_node_out_is_refused(without: list[str]) -> None:
    refused = playbook(REMOVE, *without, "--limit", CONTROLLER)
    assert refused.code != 0
    assert f"--limit = {CONTROLLER}; wanted none, or one with {LEAVES} and {CONTROLLER}" in refused.text
    assert knows(LEAVES)


def test_a_node_that_is_only_cut_off_from_ssh_is_not_dead(without: list[str]) -> None:
    refused = playbook(REMOVE, *without, "-e", "node_is_dead=true")
    assert refused.code != 0
    assert f"{LEAVES} is cut off from ssh only: its slurmd answers" in refused.text
    assert knows(LEAVES)


def test_a_job_that_waits_for_the_very_node_is_named_before_it_would_be_lost(without: list[str]) -> None:
    job = cluster.submit(f"-p gpu_vasp --nodelist={LEAVES} --begin=now+1hour --wrap 'sleep 1'")
    try:
        refused = playbook(REMOVE, *without)
        assert refused.code != 0
        assert f"job {job} of alice" in refused.text
        assert f"must have {LEAVES}, and nothing was changed" in refused.text
        assert all(changed == 0 for changed in refused.changed.values()), refused.output
        assert "DRAIN" not in run(CONTROLLER, f"scontrol show node {LEAVES}")
    finally:
        cluster.cancel(job)


def test_whoever_thinks_better_of_it_half_way_gets_the_node_back(without: list[str]) -> None:
    """A paying job stays longer than it is waited for."""
    job = cluster.submit(f"-p gpu_vasp --nodelist={LEAVES} --time=30 --wrap 'sleep 1800'")
    try:
        preempt.wait_runs(job)
        broken_off = playbook(REMOVE, *without, "-e", "remove_node_wait_seconds=1", timeout=PLAYBOOK_SECONDS)
        assert broken_off.code != 0
        assert f"{LEAVES} is drained, and still has after" in broken_off.text
        assert "step 2 of 4: tiers leave the node, their streams first: failed." in broken_off.text
        assert preempt.runs(job), "the paying job was ended"
    finally:
        cluster.cancel(job)
    come_back()
    assert "DRAIN" not in run(CONTROLLER, f"scontrol show node {LEAVES}")


def test_a_tier_that_moves_serves_while_a_job_of_others_is_waited_for(tmp_path: Path) -> None:
    """And a job that asks for the very node meanwhile is named before it would be lost."""
    file = tmp_path / "tiers.json"
    file.write_text(json.dumps({"tiers": [{**inventory.tiers()["fast"], "nodes": [LEAVES]}]}))
    arguments = ["-e", f"node={TIER_NODE}", "-e", f"@{file}", "-e", "remove_node_wait_seconds=900"]
    paying = cluster.submit(f"-p gpu_vasp --nodelist={TIER_NODE} --time=30 --wrap 'sleep 1800'")
    waiting = None
    try:
        preempt.wait_runs(paying)
        with ThreadPoolExecutor(1) as pool:
            leaving = pool.submit(playbook, REMOVE, *arguments, timeout=PLAYBOOK_SECONDS)
            try:
                cluster.wait_until("the tier serves on the other node", lambda: served_on(LEAVES), 300)
                assert preempt.runs(paying), "the paying job was ended"
                waiting = cluster.submit(f"-p gpu_vasp --nodelist={TIER_NODE} --begin=now+1hour --wrap 'sleep 1'")
            finally:
                cluster.cancel(paying)
            broken_off = leaving.result()
        assert broken_off.code != 0
        assert f"job {waiting} of alice" in broken_off.text
        assert f"must have {TIER_NODE}, which stays drained" in broken_off.text
        assert knows(TIER_NODE)
    finally:
        if waiting is not None:
            cluster.cancel(waiting)
    come_back()


def served_on(node: str) -> bool:
    job = cluster.tier_job()
    return job is not None and job.node == node and cluster.ask("/health").status == 200


def test_a_node_leaves_without_a_trace_and_the_others_serve_on(without: list[str]) -> None:
    cluster.wait_served()
    job = cluster.running_job()
    dry = removed(without, "--check", "--diff")
    assert "A dry run: nothing was changed." in dry.text
    assert knows(LEAVES)

    done = removed(without)
    assert f"Slurm does not know {LEAVES} any more. Take {LEAVES} from hosts.yml" in done.text
    assert not knows(LEAVES)
    assert cluster.running_job() == job, "the tier of another node was touched"
    assert cluster.ask("/health").status == 200
    assert run(LEAVES, "ls -d /etc/gleaner /usr/local/lib/gleaner 2>&1 | grep -c 'No such'") == "2"
    assert cluster.host(LEAVES).run("pgrep slurmd").rc != 0
    peers = run(TIER_NODE, "nft list table inet gleaner")
    assert cluster.address(LEAVES) not in peers
    assert cluster.rpc_address(LEAVES) not in peers

    again = removed(without)
    assert all(changed == 0 for changed in again.changed.values()), again.output
    come_back()
    assert knows(LEAVES)


def test_a_dead_node_leaves(without: list[str], tmp_path: Path) -> None:
    cluster.wait_served()
    job = cluster.running_job()
    machines.take_away(tmp_path, LEAVES)
    unreached = playbook(REMOVE, *without, timeout=PLAYBOOK_SECONDS)
    assert unreached.code != 0
    assert "step 3 of 4: what is ours goes from the node: failed." in unreached.text
    assert "-e node_is_dead=true" in unreached.text

    removed(without, "-e", "node_is_dead=true")
    assert not knows(LEAVES)
    assert cluster.running_job() == job
    again: Any = removed(without, "-e", "node_is_dead=true")
    assert all(changed == 0 for changed in again.changed.values()), again.output

    back = playbook("playbooks/lab_up.yml")
    assert back.code == 0, back.output
    cluster.forget(LEAVES)
    come_back()
