"""What a cluster that somebody else runs lacks, and hosts that cannot work, are named before anything is done."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import cluster
from tests.lab.ansible import playbook
from tests.lab.cluster import CONTROLLER, run

SLURM_CONF = "/etc/slurm/slurm.conf"
PREEMPTION = "PreemptMode=REQUEUE"


@pytest.fixture
def foreign_cluster() -> Iterator[None]:
    """A cluster whose administrator has not heard of preemption."""
    run(CONTROLLER, f"cp --preserve {SLURM_CONF} /root/slurm.conf")
    edits = "s/^Preempt/#&/; s/AllowQos=vasp_priority/AllowQos=ALL/"
    run(CONTROLLER, f"sed -i '{edits}' {SLURM_CONF} && systemctl restart slurmctld")
    yield
    run(CONTROLLER, f"mv /root/slurm.conf {SLURM_CONF} && rm -f {SLURM_CONF}.*~ && systemctl restart slurmctld")
    cluster.wait_served()


def preempt_mode() -> str:
    lines = run(CONTROLLER, "scontrol show config").splitlines()
    return next(line.partition("=")[2].strip() for line in lines if line.startswith("PreemptMode "))


def test_a_cluster_managed_elsewhere_is_told_its_missing_lines_and_changed_only_when_asked(
    foreign_cluster: None,
) -> None:
    cluster.wait_until("slurmctld answers", lambda: cluster.host(CONTROLLER).run("scontrol ping").rc == 0)
    assert preempt_mode() == "OFF"

    # A partition that jobs are in is not to be taken away from under them: the missing one has another name.
    missing = '{"slurm_manage_cluster": false, "slurm_ai_partition": "gpu_idle"}'
    refused = playbook("playbooks/cluster.yml", "-e", missing)
    assert refused.code != 0
    assert refused.failed == {CONTROLLER}
    for line in (
        "PreemptType=preempt/qos",
        PREEMPTION,
        "PreemptParameters=send_user_signal",
        "PartitionName=gpu_vasp AllowQos=vasp_priority",
        "PartitionName=gpu_idle Nodes=vasp-01,vasp-02,vasp-03 AllowQos=ai_opportunistic",
    ):
        assert line in refused.output, refused.output
    assert "slurm_apply_policy=true" in refused.output
    assert refused.changed[CONTROLLER] == 0
    assert preempt_mode() == "OFF"

    applied = playbook("playbooks/cluster.yml", "-e", '{"slurm_manage_cluster": false, "slurm_apply_policy": true}')
    assert applied.code == 0, applied.output
    assert preempt_mode() == "REQUEUE"
    assert "AllowQos=vasp_priority" in run(CONTROLLER, "scontrol show partition gpu_vasp")

    again = playbook("playbooks/cluster.yml", "-e", '{"slurm_manage_cluster": false}')
    assert again.code == 0, again.output
    assert set(again.changed.values()) == {0}


def test_a_host_that_does_not_see_the_shared_folder_is_refused_by_name() -> None:
    run("vasp-03", "mount -t tmpfs elsewhere /cluster/shared")
    try:
        refused = playbook("playbooks/cluster.yml", "--tags", "cluster_base")
    finally:
        run("vasp-03", "umount /cluster/shared")
    assert refused.failed == {"vasp-03"}, refused.output
    assert "vasp-03: shared_dir = /cluster/shared there is not the file system that slurm-ctl sees" in refused.text
    assert set(refused.changed.values()) == {0}


def test_hosts_without_time_synchronisation_are_refused_by_name() -> None:
    refused = playbook("playbooks/cluster.yml", "--tags", "cluster_base", "-e", "cluster_time_source=ntp")
    assert refused.failed == set(cluster.HOSTS), refused.output
    for name in cluster.HOSTS:
        assert f"{name}: NTPSynchronized = no" in refused.text
    assert set(refused.changed.values()) == {0}
