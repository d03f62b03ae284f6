"""What a cluster that somebody else runs lacks, and hosts that cannot work, are named before anything is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab import cluster
from tests.lab.ansible import Run, playbook
from tests.lab.cluster import CONTROLLER, run

SLURM_CONF = "/etc/slurm/slurm.conf"
SITE_CONF = "/etc/slurm/site.conf"
PREEMPTION = "PreemptMode=REQUEUE"
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
    cluster.wait_until("slurmctld answers", lambda: cluster.host(CONTROLLER).run("scontrol ping").rc == 0)


def policy(variables: str, *options: str) -> Run:
    return playbook("playbooks/cluster.yml", "--tags", "slurm_preemption", "-e", variables, *options)


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


def test_accounting_that_does_not_answer_is_not_taken_for_empty() -> None:
    run(CONTROLLER, "systemctl stop slurmdbd")
    try:
        refused = policy(FOREIGN)
    finally:
        run(CONTROLLER, "systemctl start slurmdbd")
    assert refused.failed == {CONTROLLER}, refused.output
    assert "The accounting does not answer" in refused.text
    assert "Connection refused" in refused.text


def test_lines_that_slurmctld_has_not_read_yet_are_read_when_asked() -> None:
    with foreign_cluster("s/^Preempt/#&/"):
        run(CONTROLLER, f"sed -i 's/^#Preempt/Preempt/' {SITE_CONF}")
        applied = policy(APPLY)
        assert applied.code == 0, applied.output
        assert preempt_mode() == "REQUEUE"


def test_what_would_lose_jobs_is_not_done_even_when_asked() -> None:
    with foreign_cluster("s/cons_tres/linear/; /^SelectTypeParameters/d"):
        before = run(CONTROLLER, f"cat {SITE_CONF}")
        refused = policy(APPLY)
        assert refused.failed == {CONTROLLER}, refused.output
        assert "\n  SelectType=select/cons_tres\n" in refused.output
        assert "drained cluster" in refused.text
        assert refused.changed[CONTROLLER] == 0
        assert run(CONTROLLER, f"cat {SITE_CONF}") == before


def test_a_host_that_does_not_see_the_shared_folder_is_refused_by_name() -> None:
    run("vasp-03", "mount -t tmpfs elsewhere /cluster/shared")
    try:
        refused = playbook("playbooks/cluster.yml", "--tags", "cluster_base")
    finally:
        run("vasp-03", "umount /cluster/shared")
    assert refused.failed == {"vasp-03"}, refused.output
    assert "vasp-03: shared_dir = /cluster/shared there is not the file system that slurm-ctl sees" in refused.text
    assert set(refused.changed.values()) == {0}


@contextmanager
def processor_without(flag: str, name: str) -> Iterator[None]:
    """A host whose processor cannot do what the flag of /proc/cpuinfo says."""
    run(name, f"sed 's/ {flag}\\b//' /proc/cpuinfo >/run/cpuinfo && mount --bind /run/cpuinfo /proc/cpuinfo")
    try:
        yield
    finally:
        run(name, "umount /proc/cpuinfo && rm /run/cpuinfo")


def test_a_processor_below_the_declared_level_is_refused_by_name() -> None:
    with processor_without("avx2", "vasp-03"):
        refused = playbook("playbooks/engine.yml", "--limit", "vasp-03")
    assert refused.failed == {"vasp-03"}, refused.output
    assert (
        "llama_cpp_cpu_level = x86-64-v3; the processor of vasp-03 lacks avx2; "
        "set llama_cpp_cpu_level to the level that every node has"
    ) in refused.text
    assert refused.changed == {"vasp-03": 0}
    # On a host that has everything, later tasks would change nothing either.
    assert "Install what compiles" not in refused.output


def test_hosts_without_time_synchronisation_are_refused_by_name() -> None:
    refused = playbook("playbooks/cluster.yml", "--tags", "cluster_base", "-e", "cluster_time_source=ntp")
    assert refused.failed == set(cluster.HOSTS), refused.output
    for name in cluster.HOSTS:
        assert f"{name}: NTPSynchronized = no" in refused.text
    assert set(refused.changed.values()) == {0}
