"""A node is lost while it serves, and one command makes a bare machine the node again, at no moment half of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.lab import cluster, machines, split
from tests.lab.ansible import Run, playbook
from tests.lab.cluster import CONTROLLER, HEAD, OTHER_KEY, SERVICE_USER, SMOLLM2, SPLIT_JOB, SPLIT_PORT, TIER_NODE, run

REPLACE = "playbooks/replace_node.yml"
OURS = "gleaner: replaced"
CURRENT = "/cluster/shared/ai/llama.cpp/current"


# A bare machine takes a minute or two; beside other labs several.
PLAYBOOK_SECONDS = 1500


def replace(*arguments: str) -> Run:
    return playbook(REPLACE, *arguments, timeout=PLAYBOOK_SECONDS)


def replaced(*arguments: str) -> Run:
    """A replacement that has to succeed."""
    done = replace(*arguments)
    assert done.code == 0, done.output
    return done


def node_fields(node: str) -> str:
    (line,) = run(CONTROLLER, f"scontrol show node --oneliner {node}").splitlines()
    return line


def state(node: str) -> str:
    (found,) = re.findall(r" State=(\S+)", node_fields(node))
    return str(found)


def reason(node: str) -> str:
    """Why it is drained; empty when it is not."""
    found = re.findall(r" Reason=(.*?) \[", node_fields(node))
    return str(found[0]) if found else ""


def is_in_service(node: str) -> bool:
    return not re.search(r"DRAIN|DOWN|NOT_RESPONDING|\*", state(node))


def test_a_dry_run_on_a_node_that_serves_changes_nothing() -> None:
    split.wait_served()
    job = cluster.running_job(SPLIT_JOB)
    dry = replaced("-e", f"node={HEAD}", "--check", "--diff")
    assert f"+{HEAD}: MIXED+DRAIN ({OURS})" in dry.output
    assert "A dry run: nothing was changed." in dry.text
    assert cluster.running_job(SPLIT_JOB) == job
    assert is_in_service(HEAD)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "node = undefined; wanted one of vasp-01, vasp-02, vasp-03"),
        (["-e", "node=vasp-99"], "node = vasp-99; wanted one of vasp-01, vasp-02, vasp-03"),
        (["-e", f"node={HEAD}", "--limit", HEAD], f"--limit = {HEAD}; wanted none"),
        (["-e", f"node={HEAD}", "-e", "replace_node_wait_seconds=long"], "replace_node_wait_seconds = long; wanted"),
        (
            ["-e", f"node={HEAD}", "-e", "llama_cpp_version=0.1.0-dev"],
            "llama_cpp_version = 0.1.0-dev; the tiers run with",
        ),
        (
            ["-e", f"node={HEAD}", "-e", f"vault_server_key={OTHER_KEY}"],
            "vault_server_key = another than the tiers serve with",
        ),
    ],
)
def test_an_order_that_cannot_be_meant_is_refused_with_its_cure(arguments: list[str], said: str) -> None:
    refused = replace(*arguments)
    assert refused.code != 0
    assert said in refused.text
    assert "cure: " in refused.text
    assert all(changed == 0 for changed in refused.changed.values()), refused.output


@pytest.fixture
def job_of_alice() -> Iterator[int]:
    """It has the GPU of the fast tier's node."""
    job = cluster.submit(f"--gres=gpu:1 --nodelist={TIER_NODE} --wrap='sleep 600'")
    try:
        cluster.wait_until(
            "alice's job runs", lambda: any(j.id == job and j.state == "RUNNING" for j in cluster.jobs())
        )
        yield job
    finally:
        cluster.cancel(job)
        cluster.wait_served()


def test_a_node_with_a_paying_job_is_refused_by_the_name_of_the_job(job_of_alice: int) -> None:
    refused = replace("-e", f"node={TIER_NODE}")
    assert refused.code != 0
    assert f"{TIER_NODE} has job {job_of_alice} of alice" in refused.text
    assert "and nothing was changed" in refused.text
    assert is_in_service(TIER_NODE)
    (job,) = (job for job in cluster.jobs() if job.id == job_of_alice)
    assert job.state == "RUNNING"


def test_a_machine_destroyed_in_the_middle_of_a_stream_is_replaced_by_one_command() -> None:
    split.wait_served()
    stream = split.streaming()
    keys = machines.replace(HEAD)
    stream.join(split.BACK_SECONDS)
    assert not stream.done
    cluster.assert_away(cluster.ask("/health", timeout=cluster.ANSWER_SECONDS, port=SPLIT_PORT))

    refused = replace("-e", f"node={HEAD}", "-e", json.dumps({"node_host_key": keys.old}))
    assert refused.code != 0
    assert f"node_host_key = {keys.old}; the machine shows SHA256:" in refused.text
    assert reason(HEAD) != OURS
    assert machines.key_of(HEAD) == keys.old

    # As after an update of the compiler, the same version would come out as another build.
    another = {"llama_cpp_extra_cmake_options": ["-DGGML_LTO=OFF"]}
    engine = run(CONTROLLER, f"readlink {CURRENT}")
    done = replaced("-e", f"node={HEAD}", "-e", json.dumps({"node_host_key": keys.new, **another}))
    assert run(CONTROLLER, f"readlink {CURRENT}") == engine
    assert "STEP 8 of 8" in done.text
    assert f"{HEAD} is in service, and a tier answers over it." in done.text
    assert machines.key_of(HEAD) == keys.new
    assert is_in_service(HEAD)
    assert cluster.complete(cluster.THINKING, port=SPLIT_PORT).status == 200
    assert HEAD.removeprefix("vasp-") in cluster.running_job(SPLIT_JOB).node
    assert run(HEAD, "systemctl is-active slurmd munge gleaner-firewall").split() == ["active"] * 3
    assert cluster.ask("/health").status == 200


def test_what_fails_leaves_the_node_drained_and_the_same_command_goes_on() -> None:
    """On the node of a router tier, whose machine is the same."""
    cluster.wait_served()
    failed = replace("-e", f"node={TIER_NODE}", "-e", json.dumps({"tier_node_packages": ["no-such-thing"]}))
    assert failed.code != 0
    assert "step 5 of 8: the tiers are planned anew" in failed.text
    assert f"{TIER_NODE} stays drained. Correct what is said above; the same command again goes on." in failed.text
    assert "DRAIN" in state(TIER_NODE)
    assert reason(TIER_NODE) == OURS
    cluster.assert_away(cluster.ask("/health", timeout=cluster.ANSWER_SECONDS))

    replaced("-e", f"node={TIER_NODE}")
    assert is_in_service(TIER_NODE)
    assert cluster.complete(SMOLLM2).status == 200
    # Nothing of the trial is left beside the tier.
    assert cluster.pids(TIER_NODE, "llama-server --model .* --host 127.0.0.1 --port", SERVICE_USER) == []


def test_a_drain_by_a_person_outlives_the_replacement_and_is_told() -> None:
    run(CONTROLLER, f"scontrol update NodeName={TIER_NODE} State=DRAIN Reason='fan is loud'")
    try:
        done = replaced("-e", f"node={TIER_NODE}")
        assert f"{TIER_NODE} stays drained by somebody else: fan is loud" in done.text
        assert reason(TIER_NODE) == "fan is loud"
    finally:
        run(CONTROLLER, f"scontrol update NodeName={TIER_NODE} State=RESUME")
        cluster.wait_served()
