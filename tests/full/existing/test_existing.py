"""The whole product on a Slurm that somebody else set up by hand: told what it lacks, given no more than that.

On a lab whose hosts are booted and nothing more; its cluster is made by prepare.yml.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab import ansible, cluster
from tests.lab.ansible import Run
from tests.lab.cluster import CONTROLLER, HOSTS, JOB_NAME, NODES, SERVICE_USER, SPLIT_JOB, SPLIT_PORT, run

HERE = Path(__file__).parent
SITE = ["-i", str(HERE / "inventory")]
APPLY = ["-e", json.dumps({"slurm_apply_policy": True})]
# The first run builds llama.cpp where the compiler's cache is cold.
SITE_SECONDS = 1800

# Slurm 22.05, of Debian 12, has another name for it.
OLD = os.environ.get("GLEANER_LAB_SUITE") == "bookworm"
SIGNAL = "SlurmctldParameters=preempt_send_user_signal" if OLD else "PreemptParameters=send_user_signal"
ENFORCE = "AccountingStorageEnforce=associations,limits,qos"
PARTITION = "PartitionName=gpu AllowQos=physics_prio,debug,ai_opportunistic AllowAccounts=physics,ai"
LINES = [SIGNAL, ENFORCE, PARTITION]
COMMANDS = [
    "sacctmgr -i add qos name=ai_opportunistic GraceTime=30 PreemptMode=requeue",
    "sacctmgr -i modify qos name=physics_prio set Preempt+=ai_opportunistic",
    "sacctmgr -i add account name=ai cluster=faraday QOS=ai_opportunistic DefaultQOS=ai_opportunistic",
    "sacctmgr -i add user name=ai-inference cluster=faraday account=ai DefaultAccount=ai",
]
# What is changed in the files, as an administrator would see it in a diff.
FILES_DIFF = {
    "slurm.conf": [
        "-AccountingStorageEnforce=associations,\\",
        "-limits",
        f"+{ENFORCE}",
        f"+{SIGNAL}",
    ],
    "partitions.conf": [
        "-   MaxTime=2-0 allowaccounts=physics \\",
        "+   MaxTime=2-0 AllowAccounts=physics,ai \\",
        "-   AllowQos=physics_prio,debug State=UP   # extended in May",
        "+   AllowQos=physics_prio,debug,ai_opportunistic State=UP   # extended in May",
    ],
}
SHOWN = {
    "qos": "Name,Priority,GraceTime,Preempt,PreemptMode,Flags,MaxWall,MaxJobsPU,MaxTRESPU",
    "account": "Account,Description,Organization",
    "assoc": "Account,User,Partition,ParentName,Share,QOS,DefaultQOS,MaxJobs,GrpTRES",
    "user": "User,DefaultAccount,AdminLevel",
}


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    """The cluster of faraday, whose own job runs."""
    ansible.succeed(str(HERE / "prepare.yml"), *SITE)
    cluster.wait_until("all nodes are idle", lambda: idle() == set(NODES))


def site(*options: str, playbook: str = "site.yml") -> Run:
    return ansible.playbook(playbook, *SITE, *options, timeout=SITE_SECONDS)


def idle() -> set[str]:
    return set(run(CONTROLLER, "sinfo --noheader --Node --states=idle --format=%N --partition=gpu").split())


def files(name: str) -> dict[str, str]:
    """The site's own files on a host; not the copies that were kept beside them."""
    listed = run(name, "find /etc/slurm -maxdepth 1 -type f -printf '%f\\n'").split()
    return {one: run(name, f"cat /etc/slurm/{one}") for one in listed if not one.endswith("~")}


def accounting() -> dict[str, list[str]]:
    return {
        what: sorted(run(CONTROLLER, f"sacctmgr -nP show {what} format={columns}").splitlines())
        for what, columns in SHOWN.items()
    }


def slurmctld() -> str:
    return run(CONTROLLER, "systemctl show --property=MainPID,ExecMainStartTimestampMonotonic slurmctld")


def everything() -> object:
    """What a run that is refused may not change: files, accounting, the daemon, users, packages, the shared folder."""
    hosts = {
        name: (
            files(name),
            run(name, "getent passwd"),
            run(name, "dpkg-query --show"),
            run(name, "find /cluster/shared /etc/systemd/system /usr/local | sort"),
        )
        for name in HOSTS
    }
    return hosts, accounting(), slurmctld()


def printed(refused: Run) -> list[str]:
    """The lines that a refusal prints, in their order."""
    (block,) = re.findall(r"the cluster lacks:\n((?: .*\n)+) *wanted:", refused.output)
    return [line.strip() for line in block.splitlines()]


def changes(before: str, after: str) -> list[str]:
    """The lines that a diff shows as removed or added, without their places."""
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in diff if not line.startswith(("---", "+++", "@@"))]


def partition(name: str) -> str:
    return run(CONTROLLER, f"scontrol --oneliner show partition {name}")


@pytest.fixture(scope="module")
def before(prepared: None) -> tuple[dict[str, str], dict[str, list[str]], str]:
    return files(CONTROLLER), accounting(), partition("batch")


@pytest.mark.parametrize("options", [[], ["--check", "--diff"]], ids=["real", "check"])
def test_a_cluster_that_lacks_something_is_told_all_of_it_and_nothing_is_changed(options: list[str]) -> None:
    untouched = everything()
    refused = site(*options)
    assert refused.code != 0
    assert refused.failed == {CONTROLLER}, refused.output
    assert printed(refused) == [*LINES, *COMMANDS], refused.output
    assert "slurm_apply_policy=true" in refused.output
    assert set(refused.changed.values()) == {0}
    assert everything() == untouched


def test_a_node_that_slurm_does_not_know_is_refused_whatever_may_be_applied(tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.write_text("[cluster:children]\nslurm_nodes\n\n[slurm_nodes]\nvasp-09 lab_octet=19\n")
    untouched = everything()
    refused = site(*APPLY, "-i", str(more))
    assert refused.code != 0
    assert "groups['slurm_nodes'] = vasp-09; wanted nodes that Slurm knows" in refused.text, refused.output
    assert "cure: add their NodeName lines to slurm.conf" in refused.text
    assert everything() == untouched


def test_another_clusters_name_is_refused() -> None:
    refused = site(*APPLY, "-e", "cluster_name=lab", playbook="playbooks/cluster.yml")
    assert refused.failed == {CONTROLLER}, refused.output
    assert "cluster_name = lab; wanted faraday" in refused.text.replace("Faraday", "faraday"), refused.output
    assert set(refused.changed.values()) == {0}


def gpus() -> set[str]:
    return set(re.findall(r" Gres=(\S+)", run(CONTROLLER, "scontrol --oneliner show node vasp-[01-03]")))


@contextmanager
def without_gpus() -> Iterator[None]:
    """No node of Slurm has GPUs, neither in its slurm.conf nor in what it told slurmctld."""
    try:
        _edit_everywhere("mv /etc/slurm/gres.conf /root/ && sed -i 's/ Gres=gpu:v100s:1//' /etc/slurm/slurm.conf")
        cluster.wait_until("Slurm knows no GPU", lambda: gpus() == {"(null)"})
        yield
    finally:
        _edit_everywhere(
            "mv /root/gres.conf /etc/slurm/ && sed -i '/^NodeName=vasp/s/$/ Gres=gpu:v100s:1/' /etc/slurm/slurm.conf"
        )
        cluster.wait_until("Slurm knows them", lambda: gpus() == {"gpu:v100s:1"} and idle() == set(NODES))


def _edit_everywhere(command: str) -> None:
    for name in HOSTS:
        run(name, command)
    run(CONTROLLER, "systemctl restart slurmctld")
    cluster.wait_slurm_answers()
    for name in NODES:
        run(name, "systemctl restart slurmd")


def test_gpus_that_slurm_does_not_hand_out_are_named() -> None:
    with without_gpus():
        refused = site(playbook="playbooks/cluster.yml")
    assert refused.failed == {CONTROLLER}, refused.output
    for name in NODES:
        assert f"gpus of {name} = 1 for the tier" in refused.text, refused.output
    assert set(refused.changed.values()) == {0}


def test_a_dry_run_that_would_apply_it_shows_the_lines_and_changes_nothing() -> None:
    untouched = everything()
    dry = site("--check", "--diff", *APPLY, playbook="playbooks/cluster.yml")
    assert dry.code == 0, dry.output
    for expected in FILES_DIFF.values():
        for line in expected:
            assert dry.output.count(f"\n{line}\n") == len(HOSTS), (line, dry.output)
    assert everything() == untouched


def test_what_it_lacks_is_added_and_nothing_else(
    before: tuple[dict[str, str], dict[str, list[str]], str],
) -> None:
    its_files, its_accounting, batch = before
    applied = site(*APPLY)
    assert applied.code == 0, applied.output
    for name in HOSTS:
        now = files(name)
        for path, text in its_files.items():
            if path in now:
                assert sorted(changes(text, now[path])) == sorted(FILES_DIFF.get(path, [])), (name, path)
        assert set(now) <= set(its_files)
    assert partition("batch") == batch
    assert "AllowAccounts=physics,ai " in partition("gpu")
    assert "AllowQos=physics_prio,debug,ai_opportunistic " in partition("gpu")

    for what, rows in accounting().items():
        gone = set(its_accounting[what]) - set(rows)
        new = set(rows) - set(its_accounting[what])
        if what == "qos":
            # One QoS has gained an entry; nothing else of it is another.
            (old,) = gone
            (ours,) = (row for row in new if row.startswith("ai_opportunistic|0|00:00:30||requeue|"))
            assert old.startswith("physics_prio|2000|00:00:00|scavenger|")
            assert new - {ours} == {old.replace("|scavenger|", "|ai_opportunistic,scavenger|")}
        else:
            assert not gone, what
            assert all(row.split("|")[0] in ("ai", SERVICE_USER) for row in new), new


def test_both_tiers_serve() -> None:
    cluster.wait_served()
    cluster.wait_served(port=SPLIT_PORT)
    assert cluster.complete(cluster.SMOLLM2).status == 200
    assert cluster.complete(cluster.THINKING, port=SPLIT_PORT).status == 200
    for name in (JOB_NAME, SPLIT_JOB):
        job = cluster.running_job(name)
        assert (job.user, job.account, job.qos) == (SERVICE_USER, "ai", "ai_opportunistic")


def test_a_job_of_the_sites_own_partition_takes_the_gpus_and_the_tier_comes_back() -> None:
    cluster.wait_served()
    tier = cluster.running_job()
    # Alice names neither account nor QoS nor partition: her own defaults are the site's.
    hers = cluster.submit(f"--gres=gpu:1 --nodelist={tier.node} --time=10 --wrap 'sleep 600'")
    try:
        job = cluster.wait_until(
            "alice's job runs", lambda: next((j for j in cluster.jobs() if j.id == hers and j.state == "RUNNING"), None)
        )
        assert (job.account, job.qos) == ("physics", "physics_prio")
        cluster.wait_until("clients are told", lambda: cluster.ask("/health").status == 503)
    finally:
        cluster.cancel(hers)
    cluster.wait_served()
    again = cluster.running_job()
    assert (again.id, again.restarts) == (tier.id, tier.restarts + 1)


def test_the_second_run_changes_nothing_with_or_without_leave() -> None:
    for options in ([], APPLY):
        pid, jobs = slurmctld(), {(job.id, job.restarts) for job in cluster.jobs()}
        again = site(*options)
        assert again.code == 0, again.output
        assert set(again.changed.values()) == {0}, again.output
        assert (slurmctld(), {(job.id, job.restarts) for job in cluster.jobs()}) == (pid, jobs)


@pytest.mark.parametrize("name", ["vasp-02", CONTROLLER])
def test_any_host_alone_is_left_as_it_is(name: str) -> None:
    alone = site("--limit", name)
    assert alone.code == 0, alone.output
    assert name in alone.changed
    assert set(alone.changed.values()) == {0}, alone.output


def test_qos_whose_jobs_wait_for_a_tier_are_named() -> None:
    said = site("--tags", "slurm_preemption", playbook="playbooks/cluster.yml")
    assert "QoS debug, normal, scavenger: their jobs do not take the GPUs back" in said.text, said.output


def test_the_sites_own_service_user_is_left_as_it_is() -> None:
    for name in HOSTS:
        fields = run(name, f"getent passwd {SERVICE_USER}").split(":")
        assert fields[5:] == ["/home/llm", "/bin/bash"]
        assert run(name, f"id --group --name {SERVICE_USER}") == "users"
        assert cluster.host(name).run(f"getent group {SERVICE_USER}").rc == 2


@contextmanager
def slurmctld_that_dies_of_the_signal() -> Iterator[None]:
    """The line is gone from slurm.conf, and slurmctld does not start with it."""
    unit = "/etc/systemd/system/slurmctld.service.d/dies.conf"
    check = '[Service]\\nExecStartPre=/bin/sh -c "! grep -q send_user_signal /etc/slurm/slurm.conf"\\n'
    try:
        run(CONTROLLER, "sed -i /send_user_signal/d /etc/slurm/slurm.conf && systemctl restart slurmctld")
        run(CONTROLLER, f"mkdir -p {unit.rpartition('/')[0]} && printf '{check}' >{unit} && systemctl daemon-reload")
        cluster.wait_slurm_answers()
        yield
    finally:
        run(CONTROLLER, f"rm -f {unit} && systemctl daemon-reload")


def test_a_slurmctld_that_does_not_come_back_has_its_own_configuration_again() -> None:
    with slurmctld_that_dies_of_the_signal():
        its_own, pid = {name: files(name) for name in HOSTS}, slurmctld()
        slurm_conf = its_own[CONTROLLER]["slurm.conf"]
        # The second run finds the line in the file already, and what was there before where the first has put it.
        with ansible.started("playbooks/cluster.yml", *SITE, *APPLY) as broken_off:
            cluster.wait_until("it is written", lambda: files(CONTROLLER)["slurm.conf"] != slurm_conf, 300, 0.05)
            broken_off.send_signal(signal.SIGKILL)
        assert slurmctld() == pid, "it was started anew before the run was killed"
        applied = site(*APPLY, playbook="playbooks/cluster.yml")
        assert applied.failed == {CONTROLLER}, applied.output
        assert f"slurmctld did not come back with {SIGNAL}" in applied.text, applied.output
        assert f"{CONTROLLER}: /etc/slurm/slurm.conf of /etc/slurm/slurm.conf." in applied.text
        # partitions.conf, too, which this change has not touched and an earlier run has.
        now = {name: files(name) for name in HOSTS}
        # The nodes are still to be told; the change is not one to go on with.
        assert now[CONTROLLER].pop("slurm.conf.untold").endswith("has not told the nodes yet")
        assert now == its_own
        assert "is UP" in run(CONTROLLER, "scontrol ping")

    said = site("--tags", "slurm_preemption", *APPLY, playbook="playbooks/cluster.yml")
    assert said.code == 0, said.output
    assert SIGNAL in files(CONTROLLER)["slurm.conf"].splitlines()
    assert "slurm.conf.untold" not in files(CONTROLLER)


def test_nodes_that_were_not_told_are_only_named_without_leave() -> None:
    run(CONTROLLER, "touch /etc/slurm/slurm.conf.untold")
    said = site("--tags", "slurm_preemption", playbook="playbooks/cluster.yml")
    assert said.code == 0, said.output
    assert set(said.changed.values()) == {0}
    assert "slurm.conf.untold is there: a run changed slurm.conf" in said.text
    told = site("--tags", "slurm_preemption", *APPLY, playbook="playbooks/cluster.yml")
    assert told.code == 0, told.output
    assert "slurm.conf.untold" not in files(CONTROLLER)


def test_leave_that_is_the_word_false_is_none() -> None:
    run(CONTROLLER, "sacctmgr -i modify qos ai_opportunistic set GraceTime=31")
    try:
        refused = site("-e", "slurm_apply_policy=false", playbook="playbooks/cluster.yml")
        assert refused.failed == {CONTROLLER}, refused.output
        assert printed(refused) == ["sacctmgr -i modify qos name=ai_opportunistic set GraceTime=30"], refused.output
        assert set(refused.changed.values()) == {0}
    finally:
        run(CONTROLLER, "sacctmgr -i modify qos ai_opportunistic set GraceTime=30")


def test_a_service_user_with_another_id_is_refused() -> None:
    refused = site("-e", "service_uid=64999", playbook="playbooks/cluster.yml")
    assert refused.failed == set(HOSTS), refused.output
    assert f"service_uid = 64999, but {SERVICE_USER} has the id 64200 there" in refused.text
    assert set(refused.changed.values()) == {0}
