"""A job that went with its node's power is not called running for ever, nor is anything of others lost sight of."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab import cluster
from tests.lab.ansible import succeed
from tests.lab.cluster import CONTROLLER, Job, run

NODE = "vasp-03"
ENGINE = "/cluster/shared/ai/llama.cpp"
BOOKS = "/var/lib/slurm/slurmctld/job_state"
ONLY = ("playbooks/cluster.yml", "--limit", NODE, "--tags", "slurm_node")


def job(number: int) -> Job | None:
    return next((one for one in cluster.jobs() if one.id == number), None)


def age(number: int) -> int:
    """Seconds since its start."""
    minutes, _, seconds = run(CONTROLLER, f"squeue --noheader --jobs={number} --Format=TimeUsed").partition(":")
    return 60 * int(minutes) + int(seconds)


@pytest.fixture(scope="module")
def lost() -> Iterator[Job]:
    """A job whose node and whose controller were both without power for a moment."""
    number = cluster.submit(f"-p gpu_vasp --nodelist={NODE} --requeue --wrap='sleep 600'")
    before = cluster.wait_until("it runs", lambda: one if (one := job(number)) and one.state == "RUNNING" else None)
    # slurmctld writes its state down some seconds after a change, later on a machine whose disk is busy.
    run(CONTROLLER, f"touch /run/it-runs && scontrol update JobId={number} Comment=books")
    cluster.wait_until("it is in slurmctld's books", lambda: run(CONTROLLER, f"find {BOOKS} -newer /run/it-runs"))
    cluster.wait_until("slurmctld has nothing more to write", lambda: age(number) > 12)
    # The tier that has this node, too, goes on.
    run(NODE, f"systemctl stop slurmd && pkill -KILL --full 'slurmstepd: .{number}[.]' && pkill -KILL -u alice")
    run(CONTROLLER, "systemctl kill --signal=KILL slurmctld && systemctl restart slurmctld")
    run(NODE, "systemctl start slurmd")
    cluster.wait_slurm_answers()
    yield before
    cluster.cancel(number)


def test_what_is_left_of_it_hides_no_memory_of_other_jobs(lost: Job) -> None:
    # For Slurm, the socket of the slurmstepd that was killed is in the way of all others.
    said = cluster.host(NODE).run("scontrol listpids")
    assert said.rc == 1, said
    assert "Unable to connect to slurmstepd" in said.stderr
    told = json.loads(run(NODE, f"gleaner node --engine={ENGINE} --smi="))
    assert told["problems"] == []
    (other,) = told["jobs"]
    assert other["job"] == cluster.running_job(cluster.SPLIT_JOB).id
    assert other["host_mib"] > 0


def test_a_lost_job_is_put_back_into_the_queue(lost: Job) -> None:
    cluster.wait_until("it is no young job any more", lambda: age(lost.id) > 31)
    assert job(lost.id) == lost
    dry = succeed(*ONLY, "--check")
    assert dry.changed == {NODE: 0}
    assert job(lost.id) == lost

    found = succeed(*ONLY)
    assert found.changed == {NODE: 1}, found.output
    back = job(lost.id)
    assert back is not None
    assert back.restarts == lost.restarts + 1
    assert succeed(*ONLY).changed == {NODE: 0}


def test_accounting_is_there_before_slurmctld_starts() -> None:
    run(CONTROLLER, "systemctl stop slurmctld slurmdbd")
    run(CONTROLLER, "systemctl start --no-block slurmctld; sleep 2; systemctl start slurmdbd")
    cluster.wait_slurm_answers()
    said = run(CONTROLLER, "journalctl --unit=slurmctld --output=cat --lines=40 --no-pager")
    assert "Association database appears down" not in said.rpartition("slurmctld version")[2]
    cluster.wait_served()
