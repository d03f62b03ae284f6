"""The slurm.conf keys that preemption needs, by version, and what an existing cluster lacks."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize("mode", ["GANG,REQUEUE", "CANCEL", "GANG,SUSPEND", "CANCEL,WITHIN"])
def test_the_sites_own_way_to_preempt_stays(mode: str) -> None:
    live = config(PreemptMode=mode, PreemptParameters="send_user_signal")
    assert slurmconf.policy_gap(live, "24.11.5") == []


def with_default_memory(key: str, value: str) -> str:
    return f"{CONFIG}{key:<23} = {value}\n"


@pytest.mark.parametrize(
    "lines",
    [
        ["PreemptMode=REQUEUE", "SelectTypeParameters=CR_Core_Memory", "GresTypes=gpu"],
        ["PartitionName=gpu_ai Nodes=vasp-01"],
        [],
    ],
)
@pytest.mark.parametrize("key", ["DefMemPerCPU", "DefMemPerNode"])
def test_what_makes_jobs_wait_at_worst_may_be_applied(lines: list[str], key: str) -> None:
    assert slurmconf.by_hand(lines, with_default_memory(key, "1000")) == []


def test_a_cluster_that_counts_nodes_is_told_so_by_the_line_that_would_lose_its_jobs() -> None:
    live = config(SelectType="select/linear", SelectTypeParameters="NONE", PreemptParameters="send_user_signal")
    gap = slurmconf.policy_gap(live, "24.11.5")
    assert gap == ["SelectTypeParameters=CR_Core_Memory", "SelectType=select/cons_tres"]
    (reason,) = slurmconf.by_hand(gap, with_default_memory("DefMemPerCPU", "1000"))
    assert reason.startswith("SelectType=select/cons_tres: in a drained cluster")


@pytest.mark.parametrize("live", [CONFIG, *(with_default_memory("DefMemPerNode", one) for one in ("UNLIMITED", "0"))])
def test_memory_that_no_default_bounds_is_not_made_a_consumable_unasked(live: str) -> None:
    (reason,) = slurmconf.by_hand(["SelectTypeParameters=CR_CPU_Memory", "JobRequeue=1"], live)
    assert reason.startswith("SelectTypeParameters=CR_CPU_Memory: with DefMemPerCPU or DefMemPerNode beside it")
    assert "each job without --mem would get all memory of its nodes" in reason


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("PreemptType", "preempt/none", "PreemptType=preempt/qos"),
        ("PreemptMode", "OFF", "PreemptMode=REQUEUE"),
        ("PreemptType", "(null)", "PreemptType=preempt/qos"),
        ("PreemptMode", "GANG", "PreemptMode=GANG,REQUEUE"),
        ("PreemptMode", "(null)", "PreemptMode=REQUEUE"),
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
PartitionName=batch AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES Nodes=vasp-[01-03] State=UP
PartitionName=gpu AllowGroups=physics AllowAccounts=physics AllowQos=normal,debug Nodes=vasp-[01-02] State=UP
"""
BATCH: dict[str, Any] = {"name": "batch", "qos": ["vasp_priority"], "account": "vasp", "default": True}
GPU: dict[str, Any] = {"name": "gpu", "qos": ["ai_opportunistic"], "account": "ai", "user": "ai-inference"}
SITE = ["vasp-01", "vasp-02"]


def test_a_partition_that_is_open_to_all_stays_so() -> None:
    assert slurmconf.partition_gap(PARTITIONS, [BATCH], SITE) == []


def test_a_partition_of_others_gains_what_its_lists_lack() -> None:
    assert slurmconf.partition_gap(PARTITIONS, [GPU], SITE) == [
        "PartitionName=gpu AllowQos=normal,debug,ai_opportunistic AllowAccounts=physics,ai "
        "AllowGroups=physics,ai-inference"
    ]


@pytest.mark.parametrize(
    ("groups", "change"),
    [
        ([], ["PartitionName=gpu AllowGroups=physics,ai-inference"]),
        (["users"], ["PartitionName=gpu AllowGroups=physics,users"]),
        (["users", "llm"], ["PartitionName=gpu AllowGroups=physics,users"]),
        (["users", "physics"], []),
        (["physics"], []),
    ],
)
def test_one_group_of_the_service_user_is_enough(groups: list[str], change: list[str]) -> None:
    live = "PartitionName=gpu AllowGroups=physics AllowAccounts=ai AllowQos=ai_opportunistic"
    assert slurmconf.partition_gap(live, [GPU], SITE, groups) == change


def test_a_partition_that_has_ours_lacks_nothing() -> None:
    live = "PartitionName=gpu AllowQos=ai_opportunistic,normal AllowAccounts=AI,physics DenyQos=x"
    assert slurmconf.partition_gap(live, [GPU], SITE) == []


@pytest.mark.parametrize("live", ["", "No partitions in the system\n"])
def test_missing_partitions_are_whole_lines(live: str) -> None:
    assert slurmconf.partition_gap(live, [BATCH, GPU], SITE) == [
        "PartitionName=batch Nodes=vasp-01,vasp-02 AllowQos=vasp_priority MaxTime=INFINITE State=UP",
        "PartitionName=gpu Nodes=vasp-01,vasp-02 AllowQos=ai_opportunistic MaxTime=INFINITE State=UP",
    ]


def test_anything_else_than_partitions_is_an_error() -> None:
    with pytest.raises(ValueError, match="not the output of `scontrol --oneliner show partition`"):
        slurmconf.partition_gap("slurm_load_partitions: Unable to contact slurm controller", [GPU], SITE)


NODE = (
    "NodeName={name} CPUAlloc=0 CPUEfctv=40 CPUTot=40 Gres=gpu:v100s:1(S:0),mps:100 OS=Linux 6.1 RealMemory=384000 "
    "MemSpecLimit=4000 Partitions=batch,gpu Reason=sold Gres=none [root@2026-11-29T08:00:00]\n"
)
ASKED: dict[str, Any] = {
    "cluster": "test",
    "nodes": SITE,
    "ai_qos": "ai_opportunistic",
    "partitions": [BATCH, GPU],
}
PLAN: dict[str, Any] = {
    "tier": "fast",
    "slurm": {"nodes": SITE, "node_count": 1, "gpus_per_node": 1, "cpus_per_node": 40, "mem_mib": 380000},
}


def nodes(*names: str, **changes: str) -> str:
    text = "".join(NODE.format(name=name) for name in names or SITE)
    for old, new in changes.items():
        text = re.sub(rf"\b{old}=\S+", f"{old}={new}", text)
    return text


def problems(live: str, partitions: str = PARTITIONS, show_config: str = CONFIG, **asked: Any) -> list[str]:
    found = slurmconf.cluster_problems(show_config, partitions, live, {**ASKED, **asked}, [PLAN])
    return [str(problem) for problem in found]


def test_a_cluster_that_can_bear_the_tiers_has_no_problem() -> None:
    assert problems(nodes()) == []


def test_a_node_that_slurm_does_not_know_is_named_alone() -> None:
    (problem,) = problems(nodes("vasp-01", Gres="(null)"))
    assert problem.startswith("groups['slurm_nodes'] = vasp-02; wanted nodes that Slurm knows (vasp-01); cure: add")
    assert "(none)" in problems("No nodes in the system\n")[0]


def test_another_name_of_the_cluster_is_a_problem() -> None:
    (problem,) = problems(nodes(), cluster="lab")
    assert problem.startswith("cluster_name = lab; wanted test,")


def test_what_would_lock_out_users_without_an_association_is_the_sites_to_do() -> None:
    for value in ("none", "(null)"):
        (problem,) = problems(nodes(), show_config=config(AccountingStorageEnforce=value))
        assert problem.startswith("AccountingStorageEnforce = none; wanted associations at least")


def test_the_sites_own_preemption_is_not_ended() -> None:
    (problem,) = problems(nodes(), show_config=config(PreemptType="preempt/partition_prio"))
    assert problem.startswith("PreemptType = preempt/partition_prio; wanted preempt/qos, or none yet")
    assert "the site's own preemption would end" in problem
    for none in ("preempt/none", "none", "(null)"):
        assert problems(nodes(), show_config=config(PreemptType=none)) == []


def test_a_time_in_which_no_tier_could_be_preempted_is_named() -> None:
    (problem,) = problems(nodes(), show_config=f"{CONFIG}PreemptExemptTime = 01:00:00\n")
    assert problem.startswith("PreemptExemptTime = 01:00:00; wanted 00:00:00, as QoS ai_opportunistic would inherit")
    for none in ("00:00:00", "NONE", "-1", "(null)"):
        assert problems(nodes(), show_config=f"{CONFIG}PreemptExemptTime = {none}\n") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"Gres": "(null)"}, "gpus of vasp-01 = 1 for the tier fast, where Slurm knows 0 (Gres=); wanted"),
        ({"Gres": "mps:100"}, "gpus of vasp-01 = 1 for the tier fast, where Slurm knows 0 (Gres=mps:100); wanted"),
        ({"CPUEfctv": "39"}, "cpus of vasp-01 = 40 for the tier fast, where Slurm hands out 39; wanted at most 39"),
        ({"RealMemory": "1"}, "memory_mib of vasp-01 = 380000 MiB for the tier fast, where Slurm hands out -3999;"),
        ({"Partitions": "batch"}, "slurm_ai_partition = gpu, which lacks vasp-01; wanted a partition with every node"),
    ],
)
def test_a_node_that_cannot_bear_a_tier_is_named(changes: dict[str, str], expected: str) -> None:
    first, second = problems(nodes(**changes))
    assert first.startswith(expected)
    assert second.startswith(expected.replace("vasp-01", "vasp-02"))


@pytest.mark.parametrize("gres", ["gpu", "gpu:1", "gpu:v100s:2(S:0-1)", "mps:1,gpu:a:1(S:0,1),gpu:b:1"])
def test_gpus_are_counted_in_every_notation(gres: str) -> None:
    assert problems(nodes(Gres=gres)) == []


def test_our_partition_holds_no_node_that_nothing_was_installed_on() -> None:
    (problem,) = problems(nodes(*SITE, "old-01"))
    assert problem.startswith(
        "slurm_ai_partition = gpu, which holds old-01; wanted a partition of nodes of the inventory"
    )
    pinned = {**PLAN, "slurm": {**PLAN["slurm"], "node_count": 2}}
    assert slurmconf.cluster_problems(CONFIG, PARTITIONS, nodes(*SITE, "old-01"), ASKED, [pinned]) == []


def test_a_partition_that_is_not_there_yet_holds_nothing_wrong() -> None:
    assert problems(nodes(*SITE, "old-01"), partitions="") == []


def test_a_qos_that_a_partition_denies_is_named() -> None:
    (problem,) = problems(nodes(), PARTITIONS.replace("AllowQos=normal,debug", "DenyQos=ai_opportunistic"))
    assert problem.startswith("QoS of partition gpu = ai_opportunistic; wanted a QoS that its DenyQos does not name")


def test_an_account_that_a_partition_denies_is_named() -> None:
    (problem,) = problems(nodes(), PARTITIONS.replace("AllowAccounts=physics", "DenyAccounts=chemistry,AI"))
    assert problem.startswith(
        "account of partition gpu = ai; wanted an account that its DenyAccounts does not name (chemistry, AI); cure:"
    )


def test_qos_whose_jobs_wait_are_named() -> None:
    shown = "normal|\nvasp_priority|\ndebug|scavenger,ai_opportunistic\nai_opportunistic|\nscavenger|\n"
    assert slurmconf.waiting_qos(shown, "ai_opportunistic", ["vasp_priority"]) == ["normal", "scavenger"]


FILE = """\
# the site's own
preemptmode = off   # as agreed
GresTypes=mps,\\
gpu
PreemptMode=suspend
NodeName=vasp-[01-03] CPUs=40
Include gpu.conf
PartitionName=debug Nodes=ALL # allowqos=none
PartitionName=gpu_vasp Nodes=ALL \\
   allowqos=normal,vasp_priority \\
   MaxTime=7-0  # a week
"""
INCLUDED = "PartitionName=gpu Nodes=vasp-01 AllowAccounts=physics\nPrologFlags=x11\n"
PATH, OTHER = "/etc/slurm/slurm.conf", "/etc/slurm/gpu.conf"


def written(*lines: str, known: tuple[str, ...] = ()) -> str:
    return slurmconf.with_lines({PATH: FILE}, lines, known)[PATH]


def test_lines_replace_their_key_and_new_ones_stand_before_the_nodes() -> None:
    assert written("PreemptMode=REQUEUE", "PreemptType=preempt/qos").splitlines()[:6] == [
        "# the site's own",
        "GresTypes=mps,\\",
        "gpu",
        "PreemptMode=REQUEUE",
        "PreemptType=preempt/qos",
        "NodeName=vasp-[01-03] CPUs=40",
    ]


def test_a_line_that_goes_on_is_replaced_whole() -> None:
    assert written("GresTypes=gpu") == FILE.replace("GresTypes=mps,\\\ngpu", "GresTypes=gpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "PreemptType=preempt/none SchedulerType=sched/backfill\n",
            "PreemptType=preempt/qos SchedulerType=sched/backfill\n",
        ),
        ("SchedulerType=a  preempttype = preempt/none # b\n", "SchedulerType=a  PreemptType=preempt/qos # b\n"),
        (
            "SchedulerType=a \\\n  PreemptType=none \\\n  JobRequeue=1\n",
            "SchedulerType=a \\\n  PreemptType=preempt/qos \\\n  JobRequeue=1\n",
        ),
        ("PreemptType=none JobRequeue=1\nPreemptType=none\n", " JobRequeue=1\nPreemptType=preempt/qos\n"),
        ("JobRequeue=1 # PreemptType=none\n", "JobRequeue=1 # PreemptType=none\nPreemptType=preempt/qos\n"),
        ("PreemptType=none \\  \n# not PreemptType=a\n", "PreemptType=preempt/qos \\  \n# not PreemptType=a\n"),
        ("JobRequeue=1 # goes on \\\nPreemptType=none\n", "JobRequeue=1 # goes on \\\nPreemptType=preempt/qos\n"),
        (
            "NodeName=a Reason=b \\\nPreemptType=none\n",
            "PreemptType=preempt/qos\nNodeName=a Reason=b \\\nPreemptType=none\n",
        ),
    ],
)
def test_only_the_key_itself_is_replaced(text: str, expected: str) -> None:
    once = slurmconf.with_lines({PATH: text}, ["PreemptType=preempt/qos"])
    assert once == {PATH: expected}
    assert slurmconf.with_lines(once, ["PreemptType=preempt/qos"]) == once


def test_an_option_of_a_partition_is_no_key_of_the_cluster() -> None:
    text = "PartitionName=a Nodes=b \\\n  PreemptMode=off \\\n  State=UP\n"
    assert slurmconf.with_lines({PATH: text}, ["PreemptMode=REQUEUE"]) == {PATH: f"PreemptMode=REQUEUE\n{text}"}


def test_a_remark_behind_a_line_stays() -> None:
    once = slurmconf.with_lines({PATH: "preemptmode = off   # as agreed\n"}, ["PreemptMode=REQUEUE"])
    assert once == {PATH: "PreemptMode=REQUEUE   # as agreed\n"}


def test_a_partition_keeps_its_other_options_and_its_shape() -> None:
    text = written("PartitionName=gpu_vasp AllowQos=vasp_priority State=UP", known=("gpu_vasp", "debug"))
    assert text == FILE.replace("allowqos=normal,vasp_priority", "AllowQos=vasp_priority").replace(
        "MaxTime=7-0  # a week", "MaxTime=7-0 State=UP # a week"
    )


def test_an_option_in_a_remark_is_none() -> None:
    text = written("PartitionName=debug AllowQos=normal")
    assert "\nPartitionName=debug Nodes=ALL AllowQos=normal # allowqos=none\n" in text


def test_a_new_partition_is_added_at_the_end() -> None:
    line = "PartitionName=gpu_ai Nodes=vasp-01 AllowQos=ai_opportunistic"
    assert written(line, known=("gpu_vasp", "debug")) == f"{FILE}{line}\n"


def test_what_an_included_file_has_is_changed_there() -> None:
    lines = ["PartitionName=gpu AllowAccounts=physics,ai", "PrologFlags=alloc"]
    assert slurmconf.with_lines({PATH: FILE, OTHER: INCLUDED}, lines, ["gpu"]) == {
        PATH: FILE,
        OTHER: "PartitionName=gpu Nodes=vasp-01 AllowAccounts=physics,ai\nPrologFlags=alloc\n",
    }


def test_a_partition_that_no_file_has_is_not_defined_twice() -> None:
    with pytest.raises(ValueError, match=r"partition gpu_ai is defined in none of /etc/slurm/slurm\.conf; wanted"):
        written("PartitionName=gpu_ai AllowQos=ai_opportunistic", known=("gpu_ai",))


def test_lines_that_hold_change_nothing() -> None:
    lines = ["PreemptMode=REQUEUE", "PartitionName=gpu_vasp AllowQos=vasp_priority", "JobRequeue=1"]
    once = written(*lines)
    assert slurmconf.with_lines({PATH: once}, lines) == {PATH: once}


def test_included_files_are_found_beside_it_or_by_their_paths() -> None:
    text = "Include gpu.conf\n  include /srv/site.conf # ours\n#Include no.conf\nIncludeX=1\n"
    assert slurmconf.included(text, PATH) == [OTHER, "/srv/site.conf"]


AI = {"qos": "ai_opportunistic", "account": "ai", "user": "ai-inference"}
PAYING = {"qos": ["vasp_priority"], "account": "vasp", "users": ["alice"]}


def test_what_others_have_is_only_widened_but_for_the_qos_of_the_tiers() -> None:
    ours = slurmconf.accounting_policy(AI, PAYING, 30)
    assert not any(entry.get("widen") for entries in ours.values() for entry in entries)
    theirs = slurmconf.accounting_policy(AI, PAYING, 30, managed=False)
    assert [entry["name"] for entries in theirs.values() for entry in entries if not entry.get("widen")] == [AI["qos"]]
    # Theirs may have none either, and a paying job is never to come second.
    assert "priority" not in theirs["qos"][0]
