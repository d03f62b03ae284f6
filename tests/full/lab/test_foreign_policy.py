"""A cluster that somebody else runs is told what its policy lacks, and changed only when that is asked for."""

from __future__ import annotations

from tests.lab import cluster
from tests.lab.ansible import playbook
from tests.lab.cluster import CONTROLLER, run
from tests.lab.foreign import APPLY, FOREIGN, QOS, SITE_CONF, SLURM_CONF, foreign_cluster, policy

PREEMPTION = "PreemptMode=REQUEUE"


def preempt_mode() -> str:
    lines = run(CONTROLLER, "scontrol show config").splitlines()
    return next(line.partition("=")[2].strip() for line in lines if line.startswith("PreemptMode "))


def grace() -> str:
    return run(CONTROLLER, "sacctmgr --noheader --parsable2 show qos ai_opportunistic format=GraceTime")


def test_a_cluster_managed_elsewhere_is_told_what_it_lacks_and_changed_only_when_asked() -> None:
    with foreign_cluster("s/^Preempt/#&/; s/AllowQos=vasp_priority/AllowQos=normal/"):
        run(CONTROLLER, f"{QOS}=31")
        assert preempt_mode() == "OFF"

        # A partition that jobs are in is not to be taken away from under them: the missing one has another name.
        missing = '{"slurm_manage_cluster": false, "slurm_ai_partition": "gpu_idle"}'
        refused = policy(missing)
        assert refused.code != 0
        assert refused.failed == {CONTROLLER}
        for line in (
            "PreemptType=preempt/qos",
            PREEMPTION,
            "PreemptParameters=send_user_signal",
            "PartitionName=gpu_vasp AllowQos=normal,vasp_priority",
            "PartitionName=gpu_idle Nodes=vasp-01,vasp-02,vasp-03 AllowQos=ai_opportunistic MaxTime=INFINITE State=UP",
            f"{QOS}=30",
        ):
            assert f"\n  {line}\n" in refused.output, refused.output
        assert "restart slurmctld" in refused.output
        assert "slurm_apply_policy=true" in refused.output
        assert refused.changed[CONTROLLER] == 0
        assert (preempt_mode(), grace()) == ("OFF", "00:00:31")

        applied = policy(APPLY)
        assert applied.code == 0, applied.output
        assert (preempt_mode(), grace()) == ("REQUEUE", "00:00:30")
        assert "AllowQos=normal,vasp_priority" in run(CONTROLLER, "scontrol show partition gpu_vasp")
        cluster.wait_until(
            "nodes have it, too", lambda: PREEMPTION in run("vasp-01", "cat /run/slurm/conf/slurm.conf").splitlines()
        )
        assert cluster.host(CONTROLLER).file(SLURM_CONF).linked_to == SITE_CONF
        assert cluster.host(CONTROLLER).file(SITE_CONF).mode == 0o644

        again = playbook("playbooks/cluster.yml", "-e", FOREIGN)
        assert again.code == 0, again.output
        assert set(again.changed.values()) == {0}


def test_accounting_managed_elsewhere_is_told_its_commands_and_changed_only_when_asked() -> None:
    run(CONTROLLER, f"{QOS}=31")
    try:
        for dry in ([], ["--check"]):
            refused = policy(FOREIGN, *dry)
            assert refused.failed == {CONTROLLER}, refused.output
            assert f"the cluster lacks:\n  {QOS}=30\nwanted" in refused.output, refused.output
            assert refused.changed[CONTROLLER] == 0
            assert grace() == "00:00:31"

        applied = policy(APPLY)
        assert applied.code == 0, applied.output
        # The accounting, and slurmctld, which starts anew with it.
        assert applied.changed[CONTROLLER] == 2
        assert grace() == "00:00:30"

        again = policy(FOREIGN)
        assert again.code == 0, again.output
        assert again.changed[CONTROLLER] == 0
    finally:
        run(CONTROLLER, f"{QOS}=30")


def test_lines_that_slurmctld_has_not_read_yet_are_read_when_asked() -> None:
    with foreign_cluster("s/^Preempt/#&/"):
        run(CONTROLLER, f"sed -i 's/^#Preempt/Preempt/' {SITE_CONF}")
        applied = policy(APPLY)
        assert applied.code == 0, applied.output
        assert preempt_mode() == "REQUEUE"
