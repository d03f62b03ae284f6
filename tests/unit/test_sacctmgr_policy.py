"""sacctmgr_policy: declaration and live state become the fewest commands, in an order that works."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library import sacctmgr_policy
from library.sacctmgr_policy import Accounting, as_text, commands, seconds, spoken, wanted_accounting

MODULE = Path(__file__).parents[2] / "library" / "sacctmgr_policy.py"

POLICY: dict[str, Any] = {
    "cluster": "beefcake2",
    "qos": [
        {"name": "vasp_priority", "priority": 1000, "preempt": ["ai_opportunistic"]},
        {"name": "ai_opportunistic", "priority": 100, "grace_time_seconds": 30, "preempt_mode": "requeue"},
    ],
    "accounts": [
        {
            "name": "ai",
            "description": "AI service",
            "qos": ["ai_opportunistic"],
            "default_qos": "ai_opportunistic",
        },
        {"name": "vasp", "qos": ["vasp_priority"], "default_qos": "vasp_priority"},
    ],
    "users": [
        {"name": "ai-inference", "accounts": ["ai"], "default_account": "ai"},
        {"name": "alice", "accounts": ["vasp"]},
    ],
}

# What sacctmgr 24.11.5 prints after this policy was applied; 22.05.8 prints the same.
SHOWN = {
    "cluster": "beefcake2\n",
    "qos": "normal|0|00:00:00||cluster|\n"
    "ai_opportunistic|100|00:00:30||requeue|\n"
    "vasp_priority|1000|00:00:00|ai_opportunistic|cluster|\n",
    "account": "ai|ai service|gleaner\nroot|default root account|root\nvasp|account name|vasp\n",
    "assoc": "root||||normal|\nroot|root|||normal|\n"
    "ai|||root|ai_opportunistic|ai_opportunistic\nai|ai-inference|||ai_opportunistic|ai_opportunistic\n"
    "vasp|||root|vasp_priority|vasp_priority\nvasp|alice|||vasp_priority|vasp_priority\n",
    "user": "ai-inference|ai|None\nalice|vasp|None\nroot|root|Administrator\n",
}
REFUSED = "sacctmgr: error: Sending PersistInit msg: Connection refused"


def policy(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(POLICY), **changes}


def plan(declared: dict[str, Any], live: Accounting) -> list[str]:
    return [spoken(c).removeprefix("sacctmgr -i ") for c in commands("beefcake2", wanted_accounting(declared), live)]


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Accounting:
    monkeypatch.setattr(sacctmgr_policy, "sacctmgr", lambda *arguments: SHOWN[arguments[2]])
    return sacctmgr_policy.live_accounting("beefcake2")


def test_virgin_cluster_gets_everything_in_an_order_that_works() -> None:
    assert plan(POLICY, Accounting()) == [
        "add cluster name=beefcake2",
        "add qos name=ai_opportunistic Priority=100 GraceTime=30 PreemptMode=requeue",
        "add qos name=vasp_priority Priority=1000 Preempt=ai_opportunistic",
        "add account name=ai cluster=beefcake2 'Description=ai service' QOS=ai_opportunistic "
        "DefaultQOS=ai_opportunistic",
        "add account name=vasp cluster=beefcake2 QOS=vasp_priority DefaultQOS=vasp_priority",
        "add user name=ai-inference cluster=beefcake2 account=ai DefaultAccount=ai",
        "add user name=alice cluster=beefcake2 account=vasp",
    ]


def test_what_slurm_shows_afterwards_needs_nothing(live: Accounting) -> None:
    assert plan(POLICY, live) == []


@pytest.mark.parametrize(
    ("section", "entry", "expected"),
    [
        (
            "qos",
            {"name": "ai_opportunistic", "grace_time_seconds": 60},
            "qos name=ai_opportunistic set GraceTime=60",
        ),
        ("qos", {"name": "vasp_priority", "preempt": []}, "qos name=vasp_priority set Preempt="),
        ("qos", {"name": "normal", "flags": ["NoDecay"]}, "qos name=normal set Flags=nodecay"),
        (
            "accounts",
            {"name": "vasp", "qos": ["normal", "vasp_priority"]},
            "account name=vasp cluster=beefcake2 set QOS=normal,vasp_priority",
        ),
        (
            "accounts",
            {"name": "vasp", "organization": "Physics"},
            "account name=vasp set Organization=physics",
        ),
        (
            "users",
            {"name": "alice", "accounts": ["vasp"], "admin_level": "operator"},
            "user name=alice set AdminLevel=operator",
        ),
    ],
)
def test_one_difference_is_one_command(live: Accounting, section: str, entry: dict[str, Any], expected: str) -> None:
    declared = {"cluster": "beefcake2", "qos": [], "accounts": [], "users": [], section: [entry]}
    assert plan(declared, live) == [f"modify {expected}"]


def test_flags_are_cleared_by_minus_one(live: Accounting) -> None:
    live.qos["normal"]["flags"] = frozenset({"nodecay"})
    assert plan(policy(qos=[{"name": "normal", "flags": []}], accounts=[], users=[]), live) == [
        "modify qos name=normal set Flags=-1"
    ]


def test_attributes_that_are_not_given_are_left_alone(live: Accounting) -> None:
    live.qos["ai_opportunistic"].update(priority=7, flags=frozenset({"nodecay"}))
    bare = {"name": "ai_opportunistic", "grace_time_seconds": None, "flags": None}
    assert plan(policy(qos=[bare], accounts=[], users=[]), live) == []


def test_a_second_account_joins_and_becomes_the_default(live: Accounting) -> None:
    users = [{"name": "alice", "accounts": ["vasp", "ai"], "default_account": "ai"}]
    assert plan(policy(users=users), live) == [
        "add user name=alice cluster=beefcake2 account=ai",
        "modify user name=alice cluster=beefcake2 set DefaultAccount=ai",
    ]


def test_a_user_of_another_cluster_gets_the_default_account_with_the_first_membership(
    live: Accounting,
) -> None:
    live.users["bob"] = {"default_account": "", "admin_level": "none"}
    users = [{"name": "bob", "accounts": ["vasp"], "default_account": "vasp", "admin_level": "operator"}]
    assert plan(policy(users=users), live) == [
        "add user name=bob cluster=beefcake2 account=vasp DefaultAccount=vasp",
        "modify user name=bob set AdminLevel=operator",
    ]


WIDENED: dict[str, Any] = {
    "cluster": "beefcake2",
    "qos": [{"name": "vasp_priority", "priority": 7, "preempt": ["scavenger"], "widen": True}],
    "accounts": [{"name": "vasp", "qos": ["normal"], "default_qos": "normal", "widen": True}],
    "users": [{"name": "alice", "accounts": ["ai"], "default_account": "ai", "widen": True}],
}


def test_what_others_manage_only_gains_what_it_lacks(live: Accounting) -> None:
    assert plan(WIDENED, live) == [
        "modify qos name=vasp_priority set Preempt+=scavenger",
        "modify account name=vasp cluster=beefcake2 set QOS+=normal",
        "add user name=alice cluster=beefcake2 account=ai",
    ]


def test_what_others_manage_and_have_already_lacks_nothing(live: Accounting) -> None:
    live.qos["vasp_priority"]["preempt"] |= {"scavenger"}
    live.associations["vasp"]["qos"] |= {"normal"}
    live.memberships["alice"].add("ai")
    assert plan(WIDENED, live) == []


def test_what_is_to_be_widened_and_is_not_there_is_made_whole() -> None:
    assert plan(WIDENED, Accounting(clusters={"beefcake2"})) == [
        "add qos name=vasp_priority Priority=7 Preempt=scavenger",
        "add account name=vasp cluster=beefcake2 QOS=normal DefaultQOS=normal",
        "add user name=alice cluster=beefcake2 account=ai DefaultAccount=ai",
    ]


def test_the_diff_of_what_others_manage_shows_it_as_it_will_be(live: Accounting) -> None:
    wanted = wanted_accounting(WIDENED)
    after = as_text("beefcake2", sacctmgr_policy.settled(wanted, live), wanted)
    assert "priority: 1000" in after
    assert "preempt: ai_opportunistic, scavenger" in after
    assert "default_qos: vasp_priority" in after
    assert "default_account: vasp" in after


def test_parents_come_before_their_children() -> None:
    accounts = [{"name": "child", "parent": "top"}, {"name": "top"}]
    todo = plan(policy(accounts=accounts, qos=[], users=[]), Accounting())
    assert [command.split()[2] for command in todo[1:]] == ["name=top", "name=child"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"accounts": [{"name": "ai", "qos": ["a"], "default_qos": "b"}]},
            r"default_qos of account ai is 'b', which is not in its qos \['a'\]",
        ),
        (
            {"users": [{"name": "al", "accounts": ["x"], "default_account": "y"}]},
            r"default_account of user al is 'y', which is not in the user's accounts \['x'\]",
        ),
        ({"users": [{"name": "al", "accounts": []}]}, "user al has no accounts"),
        (
            {"qos": [{"name": "a", "preempt": ["b"]}, {"name": "b", "preempt": ["a"]}]},
            r"qos\.preempt: .* is a circle",
        ),
        ({"accounts": [{"name": "a", "parent": "a"}]}, r"accounts\.parent: a -> a is a circle"),
    ],
)
def test_contradictions_are_refused_with_the_cure(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(policy(**changes), Accounting())


@pytest.mark.parametrize(("text", "expected"), [("", 0), ("00:00:30", 30), ("01:00:00", 3600), ("1-01:01:01", 90061)])
def test_grace_times_are_read(text: str, expected: int) -> None:
    assert seconds(text) == expected


def test_the_diff_shows_only_what_is_declared(live: Accounting) -> None:
    wanted = wanted_accounting(policy(accounts=[], users=[]))
    before = as_text("beefcake2", live, wanted)
    assert before == as_text("beefcake2", wanted, wanted)
    assert "normal" not in before
    assert as_text("beefcake2", Accounting(), wanted) == "cluster:\nqos:\naccounts:\nusers:\n"


FAKE = """#!{python}
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + chr(10))
if (folder / "down").exists():
    print({refused!r}, file=sys.stderr)
    sys.exit(1)
if sys.argv[1] == "-nP":
    shown = folder / ("after" if (folder / "changed").exists() else "before")
    sys.stdout.write(json.loads(shown.read_text())[sys.argv[3]])
elif (folder / "obeys").exists():
    (folder / "changed").touch()
else:
    print("You gave a bad qos", file=sys.stderr)
    sys.exit(1)
"""
VIRGIN = {"cluster": "", "qos": "normal|0|00:00:00||cluster|\n", "account": "", "assoc": "", "user": ""}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    program = tmp_path / "sacctmgr"
    program.write_text(FAKE.format(python=sys.executable, folder=str(tmp_path), refused=REFUSED))
    program.chmod(0o755)
    (tmp_path / "before").write_text(json.dumps(VIRGIN))
    (tmp_path / "after").write_text(json.dumps(SHOWN))
    return tmp_path


def run_module(path: Path, **more: Any) -> dict[str, Any]:
    arguments = {**policy(), "_ansible_remote_tmp": str(path), **more}
    done = subprocess.run(
        [sys.executable, str(MODULE)],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(path)},
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def changing_calls(host: Path) -> list[list[str]]:
    calls = [json.loads(line) for line in (host / "calls").read_text().splitlines()]
    return [call for call in calls if call[0] != "-nP"]


def test_real_run_applies_and_reads_back(host: Path) -> None:
    (host / "obeys").touch()
    result = run_module(host)
    assert result["changed"] is True
    assert not result.get("failed")
    assert len(changing_calls(host)) == len(result["commands"]) == 7
    assert run_module(host)["changed"] is False


def test_a_refusal_is_told_with_the_command(host: Path) -> None:
    result = run_module(host)
    assert result["failed"] is True
    assert "sacctmgr -i add cluster name=beefcake2: You gave a bad qos" in result["msg"]


def test_check_mode_reads_only(host: Path) -> None:
    result = run_module(host, _ansible_check_mode=True)
    assert result["changed"] is True
    assert changing_calls(host) == []


@pytest.mark.parametrize("virgin", ["no program", "no slurmdbd"])
def test_check_mode_on_a_virgin_host_names_everything(host: Path, virgin: str) -> None:
    if virgin == "no program":
        (host / "sacctmgr").unlink()
    (host / "down").touch()
    result = run_module(host, _ansible_check_mode=True)
    assert result["changed"] is True
    assert len(result["commands"]) == 7
    assert result["diff"]["before"] == "cluster:\nqos:\naccounts:\nusers:\n"


def test_real_run_without_slurmdbd_fails_after_the_wait(host: Path) -> None:
    (host / "down").touch()
    result = run_module(host, wait_seconds=1)
    assert result["failed"] is True
    assert "slurmdbd did not answer within wait_seconds=1" in result["msg"]
    assert len((host / "calls").read_text().splitlines()) >= 2


def test_a_slurmdbd_that_is_still_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([sacctmgr_policy.SlurmdbdUnreachableError(), sacctmgr_policy.SlurmdbdUnreachableError()])

    def live_accounting(cluster: str) -> Accounting:
        for error in answers:
            raise error
        return Accounting(clusters={cluster})

    monkeypatch.setattr(sacctmgr_policy, "live_accounting", live_accounting)
    monkeypatch.setattr(sacctmgr_policy, "RETRY_SECONDS", 0.0)
    assert sacctmgr_policy.live_accounting_within("beefcake2", 60).clusters == {"beefcake2"}
