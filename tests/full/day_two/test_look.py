"""What is going on, told while things are going wrong: by `gleaner status`, and by playbooks/status.yml."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.preemption import FAST, REASONING
from tests.lab import cluster, preempt, split
from tests.lab.ansible import ROOT, playbook, succeed
from tests.lab.cluster import CONTROLLER, HOSTS, REGISTRY, TIER_NODE, run

PLAYBOOK = "playbooks/status.yml"
WORKER = cluster.WORKERS[0]
CONFIGURATION = "/etc/gleaner/gateway.json"
HANGING = "/run/hanging"
UNIT, PROGRAM = "hanging-registry", "/run/lagging_fs.py"
EXIT_UNSEEN = 3


@pytest.fixture(autouse=True)
def _served() -> None:
    preempt.wait_served()


def words(tier: str, status: dict[str, Any]) -> str:
    return next(str(line["words"]) for line in status["tiers"] if line["tier"] == tier)


def seen(tier: str, beginning: str) -> dict[str, Any]:
    """The first status in which a tier's sentence begins so."""

    def claim() -> dict[str, Any] | None:
        status = cluster.whole_status()
        return status if words(tier, status).startswith(beginning) else None

    return cluster.wait_until(f"{tier}: {beginning}", claim)


def test_memory_planned_and_measured_on_each_node() -> None:
    cluster.complete(cluster.SMOLLM2)
    told = succeed(PLAYBOOK)
    assert told.changed == dict.fromkeys(HOSTS, 0)
    for line in told.output.splitlines():
        if " host " in line:
            tier, _, _, planned, limit, _, now = line.strip(' ",').split()
            assert tier in preempt.BOTH
            assert 0 < int(now) <= int(planned) <= int(limit), line
    assert "3 of 3" in told.output
    assert "Problems" not in told.output


def test_for_whom_a_tier_waits_and_had_to_go() -> None:
    with preempt.paying(FAST) as job:
        status = seen(FAST, f"queued: waiting for GPUs behind job {job} of alice on {TIER_NODE} (")
        assert status["problems"] == []
        (node,) = (node for node in status["nodes"] if node["node"] == TIER_NODE)
        assert [one["job"] for one in node["jobs"]] == [job]
    preempt.wait_served()

    def last_for_the_job() -> dict[str, Any] | None:
        one: dict[str, Any] = cluster.whole_status()["preemptions"][0]
        return one if one["job_after"] == job else None

    last = cluster.wait_until("accounting has told for whom", last_for_the_job, 30)
    assert (last["tier"], last["user_after"]) == (FAST, "alice")
    assert last["whole"] is True
    assert last["away_seconds"] > 0


@pytest.mark.parametrize(
    ("hold", "said"), [("hold", "by an administrator (`scontrol hold`)"), ("uhold", "for its user (`scontrol uhold`)")]
)
def test_who_holds_a_job_in_slurm(hold: str, said: str) -> None:
    with preempt.paying(FAST):
        seen(FAST, "queued: ")
        job = next(line["job"] for line in cluster.whole_status()["tiers"] if line["tier"] == FAST)
        run(CONTROLLER, f"scontrol {hold} {job}")
        try:
            seen(FAST, f"held: job {job} is held in Slurm {said}; `scontrol release {job}` ends it")
        finally:
            run(CONTROLLER, f"scontrol release {job}")


def test_a_node_that_slurm_drains_is_named_with_the_reason() -> None:
    run(CONTROLLER, f"scontrol update nodename={WORKER} state=drain reason='a fan is loud'")
    try:
        (node,) = (node for node in cluster.whole_status()["nodes"] if node["node"] == WORKER)
        assert (node["words"], node["usable"], node["tiers"]) == ("draining", False, [REASONING])
        job = cluster.submit(f"-p gpu_vasp --gres=gpu:1 --nodelist={cluster.HEAD} --time=10 --wrap 'sleep 600'")
        try:
            behind = f"queued: waiting for GPUs behind job {job} of alice on {cluster.HEAD} ("
            said = words(REASONING, seen(REASONING, behind))
            assert f", and for {WORKER} (drained: a fan is loud [" in said
        finally:
            cluster.cancel(job)
    finally:
        run(CONTROLLER, f"scontrol update nodename={WORKER} state=resume")


def test_a_dead_node_is_named_and_the_others_are_told_of() -> None:
    # Ansible keeps its connections for a while, and this one leads nowhere then.
    succeed(PLAYBOOK)
    with split.cut(WORKER, "m", "r"):
        told = playbook(PLAYBOOK, "--check")
        assert told.code == 0, told.output
        assert f"{WORKER}: cannot be reached" in told.output
        assert "3 of 3" in told.output
        assert f"{FAST}       serving on {TIER_NODE}" in told.output
    cluster.wait_until("the node is reached again", lambda: split.reaches(WORKER), 30)
    split.wait_served()


def test_slurm_is_away() -> None:
    run(CONTROLLER, "systemctl stop slurmctld")
    try:
        # No command of Slurm is waited for longer, and after the first none is asked.
        done = cluster.host(CONTROLLER).run("timeout 60 gleaner status")
        assert done.rc == EXIT_UNSEEN, done.stdout + done.stderr
        assert f"{FAST}       unknown: Slurm does not answer" in done.stdout
        assert "Problems" in done.stdout
    finally:
        run(CONTROLLER, "systemctl start slurmctld")


@pytest.fixture
def configuration() -> Iterator[str]:
    """A configuration whose shared file system hangs: FUSE, and nobody who answers."""
    host = cluster.host(CONTROLLER)
    try:
        run(CONTROLLER, "apt-get -y -q install python3-fusepy >/dev/null")
        program = base64.b64encode((ROOT / "tests/lab/lagging_fs.py").read_bytes()).decode()
        run(CONTROLLER, f"echo {program} | base64 --decode > {PROGRAM}")
        run(CONTROLLER, f"[ -e /dev/fuse ] || mknod /dev/fuse c 10 229; mkdir -p {HANGING}")
        run(CONTROLLER, f"systemd-run --quiet --collect --unit={UNIT} python3 {PROGRAM} {REGISTRY} {HANGING} 1")
        cluster.wait_until("it is mounted", lambda: host.run(f"mountpoint -q {HANGING}").rc == 0, 10)
        run(CONTROLLER, f"sed 's|{REGISTRY}|{HANGING}/endpoints|' {CONFIGURATION} > /run/hanging.json")
        run(CONTROLLER, f"systemctl kill --signal=STOP {UNIT}")
        yield "/run/hanging.json"
    finally:
        host.run(f"systemctl kill --signal=KILL {UNIT}; umount --lazy {HANGING}; rmdir {HANGING}")
        host.run(f"rm -f {PROGRAM} /run/hanging.json; apt-get -y -q autoremove --purge python3-fusepy")


def test_the_shared_file_system_hangs(configuration: str) -> None:
    done = cluster.host(CONTROLLER).run(f"timeout 60 gleaner status --config {configuration}")
    assert done.rc == EXIT_UNSEEN, done.stdout + done.stderr
    assert f"{HANGING}: no answer within" in done.stdout
    assert f"job {preempt.tier_job(FAST).id}" in done.stdout, "what Slurm says is told"
