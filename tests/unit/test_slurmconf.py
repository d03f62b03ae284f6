"""The slurm.conf keys that preemption needs, by version, and what an existing cluster lacks."""

from __future__ import annotations

from typing import Any

import pytest

from gleaner import slurmconf

# As `scontrol show config` of 24.11.5 prints it, cut to what matters here.
CONFIG = """\
Configuration data as of 2026-11-24T01:00:00
AccountingStorageEnforce = associations,limits,qos
ClusterName             = test
GresTypes               = gpu
JobRequeue              = 1
PreemptMode             = REQUEUE
PreemptParameters       = (null)
PreemptType             = preempt/qos
SelectType              = select/cons_tres
SelectTypeParameters    = CR_CORE_MEMORY
SlurmctldParameters     = enable_configless

Slurmctld(primary) at slurm-ctl is UP
"""


def config(**changes: str) -> str:
    lines = CONFIG.splitlines()
    for key, value in changes.items():
        lines = [f"{key:<23} = {value}" if line.split(" ")[0] == key else line for line in lines]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("slurm-wlm 24.11.5", "24.11.5"),
        ("slurm 22.05.8\n", "22.05.8"),
        ("24.11.5-4+deb13u1", "24.11.5"),
        ("1:23.02.7-1", "23.02.7"),
        ("25.11.0-0rc1", "25.11.0"),
    ],
)
def test_version_of(text: str, version: str) -> None:
    assert slurmconf.version_of(text) == version


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("NodeName=vasp-01 CPUs=40\nNodeName=vasp-02 CPUs=40\n", ["vasp-01", "vasp-02"]),
        ("NodeName=vasp-[01-03],gpu1 CPUs=40\n", ["vasp-01", "vasp-02", "vasp-03", "gpu1"]),
        ("NodeName=DEFAULT CPUs=40\n  nodename = vasp-01\n", ["vasp-01"]),
        ("#NodeName=vasp-01\nPartitionName=all Nodes=vasp-02\nDownNodes=vasp-03\n", []),
        ("NodeName=vasp-01 \\\n  CPUs=40\n", ["vasp-01"]),
    ],
)
def test_the_nodes_of_a_slurm_conf(text: str, names: list[str]) -> None:
    assert slurmconf.nodes(text) == names


@pytest.mark.parametrize("text", ["", "slurm", "2411", "24.11", "124.11.5"])
def test_text_without_a_version_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="holds no Slurm version"):
        slurmconf.version_of(text)


@pytest.mark.parametrize(
    ("version", "key", "value"),
    [
        ("22.05.8", "SlurmctldParameters", "preempt_send_user_signal"),
        ("23.02.0", "PreemptParameters", "send_user_signal"),
        ("24.11.5", "PreemptParameters", "send_user_signal"),
    ],
)
def test_signal_key_is_the_one_that_the_version_knows(version: str, key: str, value: str) -> None:
    settings = slurmconf.preemption_settings(version)
    assert settings == {"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE", key: value}


def test_only_the_signal_is_lacking() -> None:
    assert slurmconf.policy_gap(CONFIG, "24.11.5") == ["PreemptParameters=send_user_signal"]


@pytest.mark.parametrize(
    "parameters",
    [
        "send_user_signal",
        "youngest_first,send_user_signal",
        "send_user_signal, strict_order",
        "SEND_USER_SIGNAL",
    ],
)
def test_nothing_is_lacking_when_the_option_is_in_the_list(parameters: str) -> None:
    assert slurmconf.policy_gap(config(PreemptParameters=parameters), "24.11.5") == []


def test_options_that_are_there_are_kept() -> None:
    live = config(PreemptParameters="youngest_first,reorder_count=3")
    assert slurmconf.policy_gap(live, "24.11.5") == [
        "PreemptParameters=youngest_first,reorder_count=3,send_user_signal"
    ]


def test_a_longer_option_is_not_the_option() -> None:
    live = config(PreemptParameters="no_send_user_signal")
    assert slurmconf.policy_gap(live, "24.11.5") == ["PreemptParameters=no_send_user_signal,send_user_signal"]


def test_the_old_spelling_counts_in_new_versions() -> None:
    live = config(SlurmctldParameters="enable_configless,preempt_send_user_signal")
    assert slurmconf.policy_gap(live, "24.11.5") == []


def test_an_old_version_gets_the_old_key() -> None:
    assert slurmconf.policy_gap(CONFIG, "22.05.8") == ["SlurmctldParameters=enable_configless,preempt_send_user_signal"]


def test_gang_scheduling_beside_requeue_is_fine() -> None:
    live = config(PreemptMode="GANG,REQUEUE", PreemptParameters="send_user_signal")
    assert slurmconf.policy_gap(live, "24.11.5") == []


@pytest.mark.parametrize(
    ("lines", "losing"),
    [
        (["PreemptMode=REQUEUE", "SelectType=select/cons_tres"], ["SelectType=select/cons_tres"]),
        (["SelectTypeParameters=CR_Core_Memory", "PartitionName=gpu_ai Nodes=vasp-01", "GresTypes=gpu"], []),
        ([], []),
    ],
)
def test_another_select_plugin_loses_the_jobs(lines: list[str], losing: list[str]) -> None:
    assert slurmconf.losing_jobs(lines) == losing


def test_a_cluster_that_counts_nodes_is_told_so_by_the_line_that_would_lose_its_jobs() -> None:
    live = config(SelectType="select/linear", SelectTypeParameters="NONE", PreemptParameters="send_user_signal")
    gap = slurmconf.policy_gap(live, "24.11.5")
    assert gap == ["SelectTypeParameters=CR_Core_Memory", "SelectType=select/cons_tres"]
    assert slurmconf.losing_jobs(gap) == ["SelectType=select/cons_tres"]


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("PreemptType", "preempt/none", "PreemptType=preempt/qos"),
        ("PreemptMode", "OFF", "PreemptMode=REQUEUE"),
        ("PreemptMode", "CANCEL", "PreemptMode=REQUEUE"),
        ("PreemptMode", "GANG,SUSPEND", "PreemptMode=GANG,REQUEUE"),
        ("PreemptMode", "CANCEL,WITHIN", "PreemptMode=WITHIN,REQUEUE"),
        ("SelectType", "select/linear", "SelectType=select/cons_tres"),
        ("SelectTypeParameters", "NONE", "SelectTypeParameters=CR_Core_Memory"),
        ("SelectTypeParameters", "CR_CORE", "SelectTypeParameters=CR_CORE_Memory"),
        ("SelectTypeParameters", "CR_CPU,CR_LLN", "SelectTypeParameters=CR_CPU_Memory,CR_LLN"),
        (
            "SelectTypeParameters",
            "CR_CORE_DEFAULT_DIST_BLOCK",
            "SelectTypeParameters=CR_Core_Memory,CR_CORE_DEFAULT_DIST_BLOCK",
        ),
        ("GresTypes", "(null)", "GresTypes=gpu"),
        ("GresTypes", "mps", "GresTypes=mps,gpu"),
        ("AccountingStorageEnforce", "none", "AccountingStorageEnforce=qos"),
        (
            "AccountingStorageEnforce",
            "associations,limits",
            "AccountingStorageEnforce=associations,limits,qos",
        ),
        ("JobRequeue", "0", "JobRequeue=1"),
    ],
)
def test_each_lack_is_one_exact_line(key: str, value: str, line: str) -> None:
    live = config(PreemptParameters="send_user_signal", **{key: value})
    assert slurmconf.policy_gap(live, "24.11.5") == [line]


@pytest.mark.parametrize("text", ["", "slurm_load_ctl_conf error: Unable to contact slurm controller"])
def test_anything_else_than_the_configuration_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="not the output of `scontrol show config`"):
        slurmconf.policy_gap(text, "24.11.5")


PARTITIONS = """\
PartitionName=gpu_vasp AllowGroups=ALL AllowAccounts=ALL AllowQos=vasp_priority Default=YES Nodes=vasp-[01-03] State=UP
PartitionName=gpu_ai AllowGroups=ALL AllowAccounts=ALL AllowQos=ai_opportunistic Default=NO Nodes=vasp-[01-03] State=UP
"""
NODES = {"gpu_vasp": ["vasp-01", "vasp-02", "vasp-04"], "gpu_ai": ["vasp-01", "vasp-02"]}
WANTED: list[dict[str, Any]] = [
    {"name": "gpu_vasp", "qos": ["vasp_priority"], "default": True},
    {"name": "gpu_ai", "qos": ["ai_opportunistic"]},
]
SITE = ["vasp-01", "vasp-02"]


def test_partitions_that_are_right_lack_nothing() -> None:
    assert slurmconf.partition_gap(PARTITIONS, NODES, WANTED, SITE, "ai_opportunistic") == []


@pytest.mark.parametrize("live", ["", "No partitions in the system\n"])
def test_missing_partitions_are_whole_lines(live: str) -> None:
    assert slurmconf.partition_gap(live, {}, WANTED, SITE, "ai_opportunistic") == [
        "PartitionName=gpu_vasp Nodes=vasp-01,vasp-02 AllowQos=vasp_priority MaxTime=INFINITE State=UP",
        "PartitionName=gpu_ai Nodes=vasp-01,vasp-02 AllowQos=ai_opportunistic MaxTime=INFINITE State=UP",
    ]


def test_a_partition_that_admits_others_is_told_its_qos() -> None:
    live = PARTITIONS.replace("AllowQos=vasp_priority", "AllowQos=ALL")
    assert slurmconf.partition_gap(live, NODES, WANTED, SITE, "ai_opportunistic") == [
        "PartitionName=gpu_vasp AllowQos=vasp_priority"
    ]


def test_our_partition_holds_no_node_that_nothing_was_installed_on() -> None:
    nodes = NODES | {"gpu_ai": ["vasp-01", "vasp-02", "vasp-04"]}
    assert slurmconf.partition_gap(PARTITIONS, nodes, WANTED, SITE, "ai_opportunistic") == [
        "PartitionName=gpu_ai Nodes=vasp-01,vasp-02"
    ]


def test_anything_else_than_partitions_is_an_error() -> None:
    with pytest.raises(ValueError, match="not the output of `scontrol --oneliner show partition`"):
        slurmconf.partition_gap(
            "slurm_load_partitions: Unable to contact slurm controller", {}, WANTED, SITE, "ai_opportunistic"
        )


FILE = """\
# the site's own
preemptmode = off
GresTypes=gpu
NodeName=vasp-[01-03] CPUs=40
PartitionName=debug Nodes=ALL
PartitionName=gpu_vasp Nodes=ALL \\
   allowqos=normal,vasp_priority MaxTime=7-0
"""


def test_lines_replace_their_key_and_new_ones_stand_before_the_nodes() -> None:
    text = slurmconf.with_lines(FILE, ["PreemptMode=REQUEUE", "PreemptType=preempt/qos"])
    assert text.splitlines()[:5] == [
        "# the site's own",
        "PreemptMode=REQUEUE",
        "GresTypes=gpu",
        "PreemptType=preempt/qos",
        "NodeName=vasp-[01-03] CPUs=40",
    ]


def test_a_partition_keeps_its_other_options() -> None:
    text = slurmconf.with_lines(FILE, ["PartitionName=gpu_vasp AllowQos=vasp_priority State=UP"], ["gpu_vasp", "debug"])
    assert text.splitlines()[-1] == ("PartitionName=gpu_vasp Nodes=ALL AllowQos=vasp_priority MaxTime=7-0 State=UP")
    assert "PartitionName=debug Nodes=ALL" in text


def test_a_new_partition_is_added_at_the_end() -> None:
    line = "PartitionName=gpu_ai Nodes=vasp-01 AllowQos=ai_opportunistic"
    assert slurmconf.with_lines(FILE, [line], ["gpu_vasp", "debug"]).splitlines()[-1] == line


def test_a_partition_of_an_included_file_is_not_defined_twice() -> None:
    with pytest.raises(ValueError, match="partition gpu_ai is not defined in this file"):
        slurmconf.with_lines(FILE, ["PartitionName=gpu_ai AllowQos=ai_opportunistic"], ["gpu_ai"])


def test_lines_that_hold_change_nothing() -> None:
    lines = ["PreemptMode=REQUEUE", "PartitionName=gpu_vasp AllowQos=vasp_priority", "JobRequeue=1"]
    once = slurmconf.with_lines(FILE, lines)
    assert slurmconf.with_lines(once, lines) == once
