"""Gleaner is taken off a cluster and comes back: Slurm, a user's job and the models notice nothing of it.

The tests follow one another, and need a lab that serves. Behind the last one it does so again.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import cluster, preempt
from tests.lab.ansible import playbook, started, succeed
from tests.lab.cluster import CONTROLLER, HOSTS, NODES, SMOLLM2, SPLIT_PORT, THINKING, run

REMOVE = "playbooks/remove.yml"
UID = 64200
SITE_SECONDS = 1200
SITE = "/etc/nginx/sites-enabled/ai-inference"
# No job of the lab comes so far.
ANOTHERS = "ai/logs/900007"
PORTS = (8080, 8081, 8098, 50052)
# What the head of the playbook says of units, and of models.
DROP_IN = "/etc/systemd/system/slurmd.service.d/gleaner.conf"
STAYS = {
    CONTROLLER: {"/etc/systemd/system/slurmctld.service.d/gleaner.conf"},
    "vasp-01": {DROP_IN, "/scratch/ai"},
    "vasp-02": {DROP_IN, "/scratch/ai"},
    # A worker has no models, so that nothing is left in their folder.
    "vasp-03": {DROP_IN},
}
NAMES = ("*gleaner*", "*ai-inference*", "*llama*")
PLACES = "/etc /usr/local /var/lib /var/log /var/tmp /run /scratch /cluster/shared /root /opt"
SLURM = {
    CONTROLLER: ("munge", "mariadb", "slurmdbd", "slurmctld"),
    **dict.fromkeys(NODES, ("munge", "slurmd")),
}


def ours(name: str) -> set[str]:
    """What a host has by our names, but for models and Slurm's own books of jobs that were."""
    named = " -o ".join(
        [
            *(f"-name '{pattern}'" for pattern in NAMES),
            *(f"-path {path}" for path in ("/scratch/ai", "/cluster/shared/ai")),
        ]
    )
    left_out = " -o ".join(f"-path '{path}'" for path in ("/scratch/ai/models/*", "/var/lib/slurm/*", "/run/systemd/*"))
    return set(run(name, f"find {PLACES} -xdev \\( {left_out} \\) -prune -o \\( {named} \\) -print").splitlines())


def everything(name: str) -> str:
    """Names, kinds, sizes and owners of all that could be ours or nearly so; logs and books grow by themselves."""
    places = "/etc /usr/local /scratch /cluster/shared/scripts /cluster/shared/ai/plans /cluster/shared/ai/llama.cpp"
    return run(name, f"find {places} -xdev -printf '%p %y %s %u %m\\n' 2>&1 | sort")


def models() -> dict[str, str]:
    return {name: run(name, "find /scratch -name '*.gguf' -exec sha256sum {} + | sort") for name in NODES}


def slurm_as_it_is() -> str:
    """Configuration, partitions, nodes without what they do at the moment, and accounting."""
    return "\n".join(
        run(CONTROLLER, command)
        for command in (
            "sha256sum /etc/slurm/*.conf",
            "sinfo --noheader --format='%P %a %l %N %G %c %m'",
            "sacctmgr --noheader --parsable show qos format=name,priority,preempt,gracetime,preemptmode,flags",
            "sacctmgr --noheader --parsable show association format=cluster,account,user,qos,defaultqos",
        )
    )


def running_services() -> dict[str, str]:
    """Main processes of Slurm's services: another one would be a restart."""
    return {
        f"{name} {unit}": run(name, f"systemctl show --property=ActiveState,MainPID {unit}")
        for name, units in SLURM.items()
        for unit in units
    }


@dataclass
class Before:
    job: int
    models: dict[str, str]
    slurm: str
    services: dict[str, str]


@pytest.fixture(scope="module")
def before() -> Iterator[Before]:
    """The cluster as it serves, with a paying job that has a place beside the tiers."""
    preempt.wait_served()
    job = cluster.submit("-p gpu_vasp -w vasp-03 -c 1 --mem=100 --time=60 --wrap 'sleep 3600'")
    preempt.wait_runs(job)
    yield Before(job, models(), slurm_as_it_is(), running_services())
    run(CONTROLLER, f"scancel --quiet {job}")


def paying_job(job: int) -> cluster.Job:
    return next(one for one in cluster.jobs() if one.id == job)


def assert_noticed_nothing(before: Before) -> None:
    job = paying_job(before.job)
    assert (job.state, job.restarts) == ("RUNNING", 0)
    assert models() == before.models
    assert slurm_as_it_is() == before.slurm
    assert running_services() == before.services


def listening(name: str) -> set[int]:
    return {int(line.split()[3].rpartition(":")[2]) for line in run(name, "ss -Hltn").splitlines()}


def assert_gone(with_its_own_user: str = "") -> None:
    for name in HOSTS:
        assert ours(name) == STAYS[name] | ({"/var/lib/gleaner"} if name == with_its_own_user else set()), name
        assert cluster.host(name).run(f"pgrep --list-full --uid {UID}").stdout == "", name
        for book in ("passwd", "group"):
            known = cluster.host(name).run(f"getent {book} {cluster.SERVICE_USER}").rc == 0
            assert known == (name == with_its_own_user), name
        assert not listening(name) & set(PORTS), name
        assert run(name, "systemctl list-units --all --plain --no-legend 'gleaner*'") == "", name
        # Its exit code is 1 where there are none.
        assert cluster.host(name).run("systemctl list-unit-files --no-legend 'gleaner*'").stdout == "", name
    for name in NODES:
        assert "gleaner" not in run(name, "nft list tables"), name
        assert "50052" not in run(name, "cat /proc/sys/net/ipv4/ip_local_reserved_ports"), name
    assert {job.user for job in cluster.jobs()} == {"alice"}


def bring_back() -> None:
    done = playbook("site.yml", timeout=SITE_SECONDS)
    assert done.code == 0, done.output
    preempt.wait_served()


def test_a_dry_run_names_what_would_go_and_changes_nothing(before: Before) -> None:
    there = {name: everything(name) for name in HOSTS}
    jobs = [cluster.running_job(name).id for name in (cluster.JOB_NAME, cluster.SPLIT_JOB)]
    dry = succeed(REMOVE, "--check", "--diff")
    for words in (
        "-fast: serving",
        "-gleaner-keeper.service (runs)",
        "-gleaner-firewall.service (runs)",
        f"-{SITE}",
        "-/cluster/shared/ai/llama.cpp/",
        "-/cluster/shared/ai/plans/reasoning.json",
        "-/usr/local/lib/gleaner/",
        "-/scratch/ai/state/",
        "-llama-14b: job",
    ):
        assert words in dry.output, words
    assert ".gguf" not in dry.output
    assert all(dry.changed[name] for name in HOSTS)
    assert {name: everything(name) for name in HOSTS} == there
    assert [cluster.running_job(name).id for name in (cluster.JOB_NAME, cluster.SPLIT_JOB)] == jobs
    assert cluster.complete(SMOLLM2).status == 200
    assert_noticed_nothing(before)


def test_a_part_of_the_cluster_does_not_go_while_tiers_are_kept(before: Before) -> None:
    refused = playbook(REMOVE, "--limit", "vasp-03")
    assert refused.code != 0
    assert "ansible-playbook playbooks/remove_node.yml -e node=vasp-03" in refused.text
    # Nor with the controller alone: two nodes would keep what is ours, and nobody would know.
    refused = playbook(REMOVE, "--limit", f"{CONTROLLER},vasp-03")
    assert refused.code != 0
    assert "wanted no limit while tiers are kept: vasp-01, vasp-02 would be left" in refused.text
    assert cluster.complete(THINKING, port=SPLIT_PORT).status == 200
    assert_noticed_nothing(before)


def test_broken_off_in_the_middle_it_is_finished_by_the_next_run(before: Before) -> None:
    with started(REMOVE) as play:
        cluster.wait_until("a tier is held", lambda: cluster.tier_job() is None, 300)
        play.send_signal(signal.SIGKILL)
    # The hold is the keeper's, and outlives the run.
    assert cluster.tier_job() is None
    with started(REMOVE) as play:
        cluster.wait_until("nginx is not to serve", lambda: not cluster.host(CONTROLLER).file(SITE).exists, 300, 0.05)
        play.send_signal(signal.SIGKILL)
    # What a service before Gleaner logged there, as another user.
    run(CONTROLLER, f"cd /cluster/shared && mkdir -p {ANOTHERS} && touch {ANOTHERS}/rpc-vasp-03.log")
    succeed(REMOVE)
    run(CONTROLLER, f"cd /cluster/shared && rm {ANOTHERS}/rpc-vasp-03.log && rmdir -p {ANOTHERS}")
    assert_gone()
    assert_noticed_nothing(before)


def test_a_second_run_changes_nothing(before: Before) -> None:
    for again in (succeed(REMOVE), succeed(REMOVE, "--check", "--diff")):
        assert set(again.changed.values()) == {0}, again.output
    assert_gone()
    assert_noticed_nothing(before)


def test_one_command_brings_everything_back(before: Before) -> None:
    bring_back()
    assert cluster.complete(SMOLLM2).status == 200
    assert cluster.complete(THINKING, port=SPLIT_PORT).status == 200
    assert_noticed_nothing(before)


def test_a_node_that_does_not_answer_is_named_and_a_user_of_the_site_stays(before: Before, tmp_path: Path) -> None:
    nowhere = tmp_path / "hosts.yml"
    nowhere.write_text(f"all: {{hosts: {{vasp-03: {{ansible_host: {cluster.address('vasp-03')[:-2]}99}}}}}}\n")
    run("vasp-01", f"usermod --comment 'of the site' {cluster.SERVICE_USER}")
    done = playbook(REMOVE, "-i", str(nowhere))
    assert done.code != 0
    cure = f"ansible-playbook playbooks/remove.yml --limit {CONTROLLER},vasp-03"
    assert cure in done.text
    assert "vasp-01: the user ai-inference stays: Gleaner did not make it" in done.text
    assert ours("vasp-02") == STAYS["vasp-02"]
    assert "/usr/local/lib/gleaner" in ours("vasp-03")
    still = playbook(REMOVE, "-i", str(nowhere), "--limit", "vasp-03")
    assert still.code != 0
    assert cure in still.text
    succeed(REMOVE, "--limit", f"{CONTROLLER},vasp-03")
    assert_gone(with_its_own_user="vasp-01")
    assert_noticed_nothing(before)
    bring_back()
    assert "of the site" in run("vasp-01", f"getent passwd {cluster.SERVICE_USER}")
