"""Slurm with accounting and the policy by which paying jobs come first, as users and administrators meet it."""

from __future__ import annotations

import hashlib

import pytest
import yaml

from tests.lab import cluster
from tests.lab.ansible import ROOT
from tests.lab.cluster import CONTROLLER, HOSTS, NODES, SERVICE_USER, TIER_NODE, run


def sacctmgr(command: str) -> set[str]:
    return set(run(CONTROLLER, f"sacctmgr --noheader --parsable2 {command}").splitlines())


def test_three_nodes_with_a_gpu_each_are_ready() -> None:
    lines = run(CONTROLLER, "sinfo --noheader --Node --partition=gpu_vasp --format='%N %G %t'").splitlines()
    states = {node: (gres.partition("(")[0], state) for node, gres, state in map(str.split, lines)}
    assert set(states) == set(NODES)
    for node, (gres, state) in states.items():
        assert gres == "gpu:v100s:1", node
        assert state in ("mix", "alloc"), f"{node} has a tier, or a part of one"


def test_the_tier_holds_the_gpu_of_its_node_and_no_other() -> None:
    job = cluster.running_job()
    assert (job.node, job.qos, job.account, job.user) == (TIER_NODE, "ai_opportunistic", "ai", SERVICE_USER)
    held = run(CONTROLLER, f"scontrol show job --oneliner {job.id}")
    assert "gres/gpu=1" in held


def test_accounting_has_the_job_with_its_account_and_qos() -> None:
    job = cluster.running_job().id
    line = run(CONTROLLER, f"sacct -X -n -P -j {job} --format=User,Account,QOS,Partition,AllocTRES").splitlines()[-1]
    assert line.startswith(f"{SERVICE_USER}|ai|ai_opportunistic|gpu_ai|")
    assert "gres/gpu=1" in line


@pytest.mark.parametrize("node", NODES)
def test_nodes_get_their_configuration_from_the_controller(node: str) -> None:
    assert not cluster.host(node).file("/etc/slurm/slurm.conf").exists
    assert "ClusterName             = lab" in run(node, "scontrol show config")


def test_vasp_qos_preempts_the_opportunistic_one_and_is_the_default_of_its_account() -> None:
    qos = sacctmgr("show qos format=Name,Priority,GraceTime,Preempt,PreemptMode")
    assert "ai_opportunistic|100|00:00:30||requeue" in qos
    assert "vasp_priority|1000|00:00:00|ai_opportunistic|cluster" in qos
    assert "vasp|vasp_priority" in sacctmgr("show associations user=alice format=Account,DefaultQOS")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--partition=gpu_vasp --qos=ai_opportunistic", "Invalid qos"),
        ("--partition=gpu_ai --qos=ai_opportunistic", "Invalid qos"),
        # Refused rather than pending for ever, though the paying QoS is the user's own.
        ("--partition=gpu_ai", "Invalid qos"),
        ("--partition=gpu_vasp --account=ai", "Invalid account"),
    ],
)
def test_partitions_and_accounts_admit_nobody_else(options: str, why: str) -> None:
    refused = cluster.host(CONTROLLER).run(
        f"runuser -u alice -- sbatch --parsable --chdir=/tmp --output=/dev/null {options} --wrap true"
    )
    assert refused.rc != 0
    assert why in refused.stderr


def test_an_ordinary_sbatch_preempts_the_tier_which_comes_back() -> None:
    before = cluster.running_job()
    vasp = cluster.submit(f"-p gpu_vasp --gres=gpu:1 -w {TIER_NODE} --wrap 'sleep 300'")
    try:
        cluster.wait_until(
            "VASP runs", lambda: any(job.id == vasp and job.state == "RUNNING" for job in cluster.jobs()), 30
        )
        waiting = cluster.wait_until("the tier's job is queued again", cluster.tier_job)
        assert (waiting.id, waiting.state) == (before.id, "PENDING")
        cluster.assert_away(
            cluster.wait_until(
                "clients hear of it", lambda: a if (a := cluster.ask("/health")).status != 200 else None, 5
            )
        )
    finally:
        cluster.cancel(vasp)
    cluster.wait_served()
    after = cluster.running_job()
    assert (after.id, after.restarts) == (before.id, before.restarts + 1)


def test_nothing_of_ours_runs_as_root_but_the_updater() -> None:
    assert cluster.pids(TIER_NODE, "llama-server")
    assert cluster.pids(TIER_NODE, "gleaner.*supervise")
    assert cluster.pids(TIER_NODE, "gleaner.*agent")
    assert cluster.pids(CONTROLLER, "gleaner.*keep ")
    for name in HOSTS:
        assert not cluster.pids(name, "llama-server|gleaner-.*pyz (supervise|agent|keep)", "root"), name


@pytest.mark.parametrize("name", HOSTS)
def test_the_munge_key_is_for_munge_alone(name: str) -> None:
    key = cluster.host(name).file("/etc/munge/munge.key")
    assert (key.user, key.group, key.mode) == ("munge", "munge", 0o400)
    assert cluster.host(name).run("runuser -u alice -- cat /etc/munge/munge.key").rc != 0


def test_slurmdbd_conf_is_for_slurm_alone() -> None:
    config = cluster.host(CONTROLLER).file("/etc/slurm/slurmdbd.conf")
    assert (config.user, config.mode) == ("slurm", 0o600)


def test_no_secret_is_where_a_user_can_see_it() -> None:
    vault = yaml.safe_load((ROOT / "inventories/lab/group_vars/all/vault.yml").read_text())
    for name in HOSTS:
        seen = run(name, "ps axww -o args; journalctl --no-pager -o cat; systemctl show '*'")
        seen += cluster.run_as("alice", name, "ps", "axeww", "-o", "args").stdout
        where = [
            "/etc",
            "/run/log",
            "/var/log",
            "/cluster/shared/ai/logs",
            "/cluster/shared/ai/plans",
            "/scratch/ai/logs",
        ]
        seen += cluster.run_as("alice", name, "grep", "-rhIs", "", "--exclude-dir=ssl", *where).stdout
        # What hosts hold of the server's key is its hash.
        secrets = {**vault, "its hash": hashlib.sha256(vault["vault_server_key"].encode()).hexdigest()}
        for variable, secret in secrets.items():
            assert secret not in seen, f"{variable} on {name}"
