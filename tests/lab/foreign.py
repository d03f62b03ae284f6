"""The lab's own cluster as if somebody else kept its slurm.conf and its accounting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab import cluster
from tests.lab.ansible import Run, playbook
from tests.lab.cluster import CONTROLLER, run

SLURM_CONF = "/etc/slurm/slurm.conf"
SITE_CONF = "/etc/slurm/site.conf"
FOREIGN = '{"slurm_manage_cluster": false}'
APPLY = '{"slurm_manage_cluster": false, "slurm_apply_policy": true}'
QOS = "sacctmgr -i modify qos name=ai_opportunistic set GraceTime"


@contextmanager
def foreign_cluster(edits: str) -> Iterator[None]:
    """A cluster whose administrator keeps slurm.conf elsewhere, edited by sed."""
    run(CONTROLLER, f"cp --preserve {SLURM_CONF} /root/slurm.conf")
    try:
        run(CONTROLLER, f"mv {SLURM_CONF} {SITE_CONF} && ln -s {SITE_CONF} {SLURM_CONF}")
        run(CONTROLLER, f"sed -i '{edits}' {SITE_CONF}")
        restart_slurmctld()
        yield
    finally:
        run(CONTROLLER, f"mv -f /root/slurm.conf {SLURM_CONF} && rm -f {SITE_CONF}* {SLURM_CONF}.*~; {QOS}=30")
        restart_slurmctld()
        run(CONTROLLER, "scontrol reconfigure")
        cluster.wait_served()


def restart_slurmctld() -> None:
    run(CONTROLLER, "systemctl restart slurmctld")
    cluster.wait_slurm_answers()


def policy(variables: str, *options: str) -> Run:
    return playbook("playbooks/cluster.yml", "--tags", "slurm_preemption", "-e", variables, *options)
