"""What a cluster that somebody else runs lacks, and hosts that cannot work, are named before anything is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab import cluster
from tests.lab.ansible import playbook
from tests.lab.cluster import CONTROLLER, run
from tests.lab.foreign import APPLY, FOREIGN, SITE_CONF, foreign_cluster, policy


def test_accounting_that_does_not_answer_is_not_taken_for_empty() -> None:
    run(CONTROLLER, "systemctl stop slurmdbd")
    try:
        refused = policy(FOREIGN)
    finally:
        run(CONTROLLER, "systemctl start slurmdbd")
    assert refused.failed == {CONTROLLER}, refused.output
    assert "The accounting does not answer" in refused.text
    assert "Connection refused" in refused.text


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
