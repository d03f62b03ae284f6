"""A fourth node comes into a cluster that serves: in one command, drained until all is there, and no stream notices."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab import cluster, split
from tests.lab.ansible import LAB_ID, playbook, succeed
from tests.lab.cluster import CONTROLLER, PORT, SMOLLM2, SPLIT_JOB, SPLIT_PORT, THINKING, TIER_NODE, run
from tests.lab.inventory import tiers

NODE = "vasp-04"
WITH = ("-i", "tests/full/day_two/inventory")
GROW = ("--limit", f"{CONTROLLER},{NODE}")
CURE = f"ansible-playbook site.yml --limit {CONTROLLER},{NODE}"
# Long beside one answer, and a minute or two where two processors have all else to do as well.
STREAM_TOKENS = 300
REASON = "gleaner: being provisioned"
ADDRESS, RPC_ADDRESS = f"10.213.{LAB_ID}.14", f"10.214.{LAB_ID}.14"


@pytest.fixture(scope="module", autouse=True)
def _a_bare_machine_beside_a_site_that_serves() -> None:
    succeed("playbooks/lab_up.yml", *WITH)
    cluster.wait_served()
    split.wait_served()


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """One long stream after the other on each tier, of which none is cut or refused; and the tiers' jobs stay."""
    over = threading.Event()

    def keep_asking(port: int, model: str) -> list[cluster.Answer]:
        answers = []
        while not over.is_set():
            answers.append(cluster.stream(model, STREAM_TOKENS, port))
        return answers

    before = jobs_and_processes()
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking, *which) for which in ((PORT, SMOLLM2), (SPLIT_PORT, THINKING))]
        try:
            yield
        finally:
            over.set()
    for one in asking:
        answers = one.result()
        assert answers
        assert [answer for answer in answers if not cluster.is_whole(answer)] == []
    assert jobs_and_processes() == before


def jobs_and_processes() -> tuple[object, ...]:
    router = cluster.running_job()
    servers = cluster.pids(router.node, "llama-server --models-dir")
    return router, servers, cluster.running_job(SPLIT_JOB), split.parts()


def digests() -> dict[str, str]:
    return {
        tier["tier"]: tier["digest"] for tier in json.loads(run(CONTROLLER, "cat /etc/gleaner/keeper.json"))["tiers"]
    }


def node_says() -> str:
    """State and reason of the new node, in Slurm's words."""
    return run(CONTROLLER, f"sinfo --noheader --partition=gpu_vasp --nodes={NODE} --format='%T %E'")


def peers_of(node: str, name: str) -> set[str]:
    """A set of the node's running firewall."""
    return set(re.findall(r"10\.21[34]\.\d+\.\d+", run(node, f"nft list set inet gleaner {name}")))


def router_of_two(folder: Path) -> tuple[str, ...]:
    """The inventory's tiers, the router of which may have the new node, too."""
    file = folder / "tiers.json"
    file.write_text(json.dumps({"tiers": [{**tiers()["fast"], "nodes": [TIER_NODE, NODE]}, tiers()["reasoning"]]}))
    return ("-e", f"@{file}")


def test_a_node_that_slurm_does_not_know_is_refused_before_it_is_touched() -> None:
    refused = playbook("site.yml", *WITH, "--limit", NODE)
    assert refused.code != 0
    assert f"{NODE}: unknown to Slurm on {CONTROLLER}" in refused.text
    assert f"cure: {CURE}" in refused.text
    assert refused.changed == {NODE: 0}
    assert cluster.host(NODE).run("id ai-inference").rc != 0


def test_a_slurm_that_does_not_answer_is_no_answer() -> None:
    run(CONTROLLER, "systemctl stop slurmctld")
    try:
        refused = playbook("site.yml", *WITH, "--limit", TIER_NODE)
    finally:
        run(CONTROLLER, "systemctl start slurmctld")
    assert refused.code != 0
    assert f"{CONTROLLER}: scontrol show node: " in refused.text
    assert f"cure: ansible-playbook site.yml --limit {CONTROLLER},{TIER_NODE}" in refused.text
    assert refused.changed == {TIER_NODE: 0}
    cluster.wait_slurm_answers()
    cluster.wait_served()
    split.wait_served()


def test_half_a_node_gets_no_job() -> None:
    """Slurm has it, as after a run that ended there; what comes after it alone does not give it to jobs."""
    known = digests()
    with streaming():
        succeed("playbooks/cluster.yml", *WITH, *GROW)
        # Until it has registered it is called drained*.
        cluster.wait_until("it is drained", lambda: node_says() == f"drained {REASON}")
        succeed("playbooks/tiers.yml", *WITH, "--limit", NODE)
        assert node_says() == f"drained {REASON}"
    assert digests() == known


def test_it_is_in_service_after_one_command_and_no_stream_notices() -> None:
    known = digests()
    with streaming():
        grown = succeed("site.yml", *WITH, *GROW)
    assert grown.failed == set()
    assert node_says() == "idle none"
    assert digests() == known
    for peer in (*cluster.NODES, NODE):
        assert RPC_ADDRESS in peers_of(peer, "rpc_peers")
        assert ADDRESS in peers_of(peer, "lend_peers")
    job = cluster.submit(f"--partition=gpu_vasp --nodelist={NODE} --gres=gpu:1 --wrap='sleep 600'")
    try:
        cluster.wait_until(
            "alice's job runs there",
            lambda: any((one.id, one.state, one.node) == (job, "RUNNING", NODE) for one in cluster.jobs()),
        )
    finally:
        cluster.cancel(job)


def test_a_tier_that_may_use_it_goes_there_when_it_has_to_and_not_before(tmp_path: Path) -> None:
    before = digests()
    with streaming():
        succeed("site.yml", *WITH, *GROW, *router_of_two(tmp_path))
    after = digests()
    assert after["reasoning"] == before["reasoning"]
    assert after["fast"] != before["fast"]
    assert after["fast"].partition("-")[0] == before["fast"].partition("-")[0]
    paying = cluster.submit(f"--partition=gpu_vasp --nodelist={TIER_NODE} --gres=gpu:1 --wrap='sleep 600'")
    try:
        cluster.wait_until("the tier runs on the new node", lambda: cluster.running_job().node == NODE)
        cluster.wait_until(
            "it answers there", lambda: cluster.ask("/health").status == 200 and cluster.complete(SMOLLM2).status == 200
        )
    finally:
        cluster.cancel(paying)


def test_a_second_run_changes_nothing_anywhere(tmp_path: Path) -> None:
    again = succeed("site.yml", *WITH, *router_of_two(tmp_path))
    assert set(again.changed.values()) == {0}, again.output


def test_a_run_over_any_host_alone_is_safe_while_both_tiers_stream(tmp_path: Path) -> None:
    tiers_as_they_are = router_of_two(tmp_path)
    with streaming():
        for host in (*cluster.HOSTS, NODE):
            done = succeed("site.yml", *WITH, *tiers_as_they_are, "--limit", host)
            assert done.changed == {host: 0}, done.output


def test_a_peer_that_is_dead_is_named_and_ends_no_run(tmp_path: Path) -> None:
    dead = tmp_path / "dead.yml"
    dead.write_text("slurm_nodes: {hosts: {vasp-05: {lab_octet: 15}}}\n")
    told = succeed("site.yml", *WITH, "-i", str(dead), "--check", "--limit", NODE)
    assert f"vasp-05 has not heard of {NODE}" in told.text
    assert f"{cluster.HEAD} has not heard" not in told.text
