"""slurm_node_state: a drain has one reason, and only whoever gave it ends it; no job is ever cancelled."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.slurm_node_state import Job, Node, NodeError, drain_needed, kept_drain, parse_jobs, parse_node

MODULE = Path(__file__).parents[2] / "library" / "slurm_node_state.py"
REPLACED = "gleaner: replaced"

# What scontrol 24.11.5 prints for each node, shortened.
SHOWN = (
    "NodeName=vasp-01 NodeAddr=127.0.0.1 CoresPerSocket=40  CPUAlloc=8 CPUTot=40 State=MIXED ThreadsPerCore=1 "
    "TmpDisk=0 Partitions=gpu_vasp,gpu_ai  BootTime=2026-11-29T08:00:00 \n"
    "NodeName=vasp-02 NodeAddr=127.0.0.1 Arch=x86_64 CPUTot=40 State=IDLE+DRAIN Partitions=gpu_vasp,gpu_ai "
    "Reason=gleaner: replaced [root@2026-11-29T08:10:00] \n"
    "NodeName=vasp-03 NodeAddr=127.0.0.1 Arch=x86_64 CPUTot=40 State=DOWN+DRAIN+NOT_RESPONDING "
    "Reason=fan 3 = loud [root@2026-11-29T08:10:00] \n"
)

# Keeps each node's line in a file, and the calls beside it.
SLURM = r"""#!/bin/sh
cd "$FAKE" || exit 1
echo "$(basename "$0") $*" >>calls
if [ -e fails ]; then cat fails >&2; exit 1; fi
case "$(basename "$0") $1 $2" in
"scontrol show node") cat nodes ;;
"scontrol show config")
    echo "SlurmUser               = slurm(64030)"
    echo "SlurmdPort              = $SLURMD_PORT" ;;
"scontrol update "*)
    node=${2#NodeName=}
    case "$3" in
    State=DRAIN) state="IDLE+DRAIN Reason=${4#Reason=} [root@2026-11-29T09:00:00]" ;;
    State=RESUME) state=IDLE ;;
    esac
    [ -e stays ] || sed -i "/NodeName=$node /s/State=.*/State=$state/" nodes ;;
"scontrol show hostnames") echo "$3" | tr , '\n' ;;
"squeue --noheader --states=pending") cat waiting ;;
squeue*) cat jobs; if [ -e after ]; then mv after jobs; fi ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("scontrol", "squeue"):
        (tmp_path / name).write_text(SLURM)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "nodes").write_text(SHOWN)
    (tmp_path / "jobs").write_text("")
    (tmp_path / "waiting").write_text("")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("SLURMD_PORT", "1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def module(check: bool = False, **arguments: Any) -> dict[str, Any]:
    more = {"_ansible_check_mode": check, "_ansible_remote_tmp": "/tmp", "_ansible_keep_remote_files": False}
    done = subprocess.run(
        [sys.executable, str(MODULE)],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": {**arguments, **more}}),
        capture_output=True,
        text=True,
        check=False,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def updates(folder: Path) -> list[str]:
    return [line for line in (folder / "calls").read_text().splitlines() if " update " in line]


def test_a_node_is_read_with_its_reason_and_whose_it_is() -> None:
    mixed, drained, dead = (parse_node(line) for line in SHOWN.splitlines())
    assert (mixed.told, mixed.up, mixed.answers) == ("MIXED", True, True)
    assert (drained.told, drained.by, drained.up) == ("IDLE+DRAIN (gleaner: replaced)", "root", False)
    assert (dead.reason, dead.answers, dead.down) == ("fan 3 = loud", False, True)


@pytest.mark.parametrize("state", ["IDLE*", "DOWN*", "IDLE+NOT_RESPONDING", "MIXED*+DRAIN"])
def test_a_node_that_does_not_answer_is_not_up(state: str) -> None:
    node = parse_node(f"NodeName=vasp-01 State={state}")
    assert not node.answers
    assert not node.up


def test_a_line_that_is_no_node_is_refused() -> None:
    with pytest.raises(NodeError, match="cannot read the node 'No nodes'"):
        parse_node("No nodes")


def test_jobs_are_read_with_whatever_name() -> None:
    text = "812                             |alice   |RUNNING  |a|b   \n"
    assert parse_jobs(text) == [Job("812", "alice", "RUNNING", "a|b")]
    assert str(parse_jobs(text)[0]) == "job 812 of alice (a|b, running)"


@pytest.mark.parametrize(
    ("flags", "reason", "by", "needed"),
    [
        ([], "", "", True),
        (["DRAIN"], REPLACED, "root", False),
        (["DRAIN"], "fan", "root", False),
        (["DRAIN"], "gres/gpu count reported lower than configured (0 < 1)", "slurm", True),
        ([], "Not responding", "slurm", True),
    ],
)
def test_a_drain_of_a_person_is_one_already(flags: list[str], reason: str, by: str, needed: bool) -> None:
    node = Node("vasp-02", "IDLE", frozenset(flags), reason, by)
    assert drain_needed(node, REPLACED, "slurm") is needed


@pytest.mark.parametrize(
    ("state", "flags", "reason", "by", "kept"),
    [
        ("IDLE", ["DRAIN"], REPLACED, "root", ""),
        ("DOWN", [], "Node unexpectedly rebooted", "slurm", ""),
        ("DOWN*", ["DRAIN"], "Not responding", "slurm", ""),
        ("DOWN", [], "Node unexpectedly rebooted", "alice", "Node unexpectedly rebooted (by alice)"),
        ("IDLE", ["DRAIN"], "fan", "root", "fan (by root)"),
        ("IDLE", ["DRAIN"], "Low RealMemory", "slurm", "Low RealMemory (by slurm)"),
        ("IDLE", [], "old words", "root", ""),
    ],
)
def test_only_its_own_drain_and_what_was_said_of_the_old_machine_is_ended(
    state: str, flags: list[str], reason: str, by: str, kept: str
) -> None:
    assert kept_drain(Node("vasp-02", state, frozenset(flags), reason, by), REPLACED, "slurm") == kept


def test_a_drain_names_the_jobs_that_run_on(slurm: Path) -> None:
    (slurm / "jobs").write_text("812|alice|RUNNING|relax\n")
    done = module(name="vasp-01", state="drained", reason=REPLACED)
    assert done["changed"]
    assert (done["before"], done["after"]) == ("MIXED", "IDLE+DRAIN (gleaner: replaced)")
    (job,) = done["jobs"]
    assert (job["user"], job["words"]) == ("alice", "job 812 of alice (relax, running)")
    assert updates(slurm) == ["scontrol update NodeName=vasp-01 State=DRAIN Reason=gleaner: replaced"]


def test_a_second_drain_changes_nothing(slurm: Path) -> None:
    assert not module(name="vasp-02", state="drained", reason=REPLACED)["changed"]
    assert updates(slurm) == []


def test_jobs_are_waited_for(slurm: Path) -> None:
    (slurm / "jobs").write_text("812|ai-inference|RUNNING|llama-14b\n")
    (slurm / "after").write_text("")
    assert module(name="vasp-01", state="drained", reason=REPLACED, wait_seconds=60)["jobs"] == []


def test_a_job_that_stays_is_named_and_not_cancelled(slurm: Path) -> None:
    (slurm / "jobs").write_text("812|alice|RUNNING|relax\n")
    done = module(name="vasp-01", state="drained", reason=REPLACED, wait_seconds=1)
    assert done["failed"]
    assert "still has after 1 s: job 812 of alice (relax, running)" in done["msg"]
    assert "nothing is cancelled" in done["msg"]
    assert "scancel" not in (slurm / "calls").read_text()


def test_a_dry_run_asks_and_changes_nothing(slurm: Path) -> None:
    (slurm / "jobs").write_text("812|alice|RUNNING|relax\n")
    done = module(check=True, name="vasp-01", state="drained", reason=REPLACED, wait_seconds=60)
    assert done["changed"]
    assert done["diff"] == {"before": "vasp-01: MIXED\n", "after": "vasp-01: MIXED+DRAIN (gleaner: replaced)\n"}
    assert len(done["jobs"]) == 1
    assert module(check=True, name="vasp-02", state="resumed", reason=REPLACED)["after"] == "IDLE"
    assert updates(slurm) == []


def test_a_node_is_resumed_and_waited_for(slurm: Path) -> None:
    done = module(name="vasp-02", state="resumed", reason=REPLACED, wait_seconds=5)
    assert (done["changed"], done["after"], done["up"], done["kept"]) == (True, "IDLE", True, "")
    assert not module(name="vasp-02", state="resumed", reason=REPLACED, wait_seconds=5)["changed"]
    assert len(updates(slurm)) == 1


def test_a_drain_of_a_person_stays_and_is_told(slurm: Path) -> None:
    done = module(name="vasp-03", state="resumed", reason=REPLACED, wait_seconds=5)
    assert (done["changed"], done["kept"]) == (False, "fan 3 = loud (by root)")
    assert "vasp-03 stays away: fan 3 = loud (by root)" in str(done["warnings"])
    assert updates(slurm) == []


def test_a_node_that_does_not_come_back_is_told(slurm: Path) -> None:
    (slurm / "stays").write_text("")
    done = module(name="vasp-02", state="resumed", reason=REPLACED, wait_seconds=1)
    assert done["failed"]
    assert "after 1 s Slurm starts nothing there: IDLE+DRAIN (gleaner: replaced)" in done["msg"]


def test_an_unknown_node_is_refused_with_those_that_are_known(slurm: Path) -> None:
    done = module(name="vasp-9", state="drained", reason=REPLACED)
    assert done["msg"] == "name: got 'vasp-9', want a node that Slurm knows: vasp-01, vasp-02, vasp-03"
    done = module(name="vasp-9", state="drained", reason=REPLACED, missing_ok=True)
    assert (done["changed"], done["known"]) == (False, False)
    assert updates(slurm) == []


def test_a_slurm_that_does_not_answer_is_told(slurm: Path) -> None:
    (slurm / "fails").write_text("slurm_load_node error: Unable to contact slurm controller\n")
    done = module(name="vasp-01", state="drained", reason=REPLACED)
    assert "scontrol show node --oneliner: slurm_load_node error: Unable to contact slurm controller" in done["msg"]


def test_a_drain_wants_a_reason(slurm: Path) -> None:
    assert "reason" in module(name="vasp-01", state="drained")["msg"]
    assert not (slurm / "calls").exists()


def test_a_node_that_has_joined_is_told_by_its_own_port(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as slurmd:
        monkeypatch.setenv("SLURMD_PORT", f"{slurmd.getsockname()[1]}-7000")
        done = module(name="vasp-02", state="joined", reason=REPLACED, wait_seconds=5)
    assert (done["changed"], done["listens"], done["answers"], done["up"]) == (False, True, True, False)
    assert updates(slurm) == []


def test_a_node_that_does_not_answer_has_not_joined(slurm: Path) -> None:
    done = module(name="vasp-03", state="joined", reason=REPLACED, wait_seconds=1)
    assert "vasp-03: its slurmd has not answered within 1 s: DOWN+DRAIN+NOT_RESPONDING (fan 3 = loud)" in done["msg"]
    assert not module(check=True, name="vasp-03", state="joined", reason=REPLACED, wait_seconds=1)["listens"]


@pytest.mark.parametrize(
    "state",
    [
        "IDLE+DRAIN+INVALID_REG Reason=gleaner: replaced [root@2026-11-29T08:10:00]",
        "IDLE+DRAIN Reason=gres/gpu count reported lower than configured (0 < 1) [slurm@2026-11-29T08:10:00]",
    ],
)
def test_a_node_with_less_than_declared_has_not_joined(slurm: Path, state: str) -> None:
    (slurm / "nodes").write_text(f"NodeName=vasp-02 NodeAddr=127.0.0.1 State={state}\n")
    done = module(name="vasp-02", state="joined", reason=REPLACED, wait_seconds=1)
    assert "Slurm does not find there what it was told of the node" in done["msg"]
    assert "hostvars[vasp-02].cpus, .memory_mib and .gpus" in done["msg"]


def test_jobs_that_wait_for_the_very_node_are_named(slurm: Path) -> None:
    (slurm / "waiting").write_text(
        "813|alice|PENDING|vasp-01,vasp-02|relax\n814|alice|PENDING||any|thing\n815|bob|PENDING|vasp-02|md\n"
    )
    done = module(check=True, name="vasp-01", state="drained", reason=REPLACED)
    assert [job["words"] for job in done["wanted_by"]] == ["job 813 of alice (relax, pending)"]


def test_a_drain_of_another_playbook_of_ours_becomes_this_one() -> None:
    began = Node("vasp-01", "IDLE", frozenset({"DRAIN"}), "gleaner: being provisioned", "root")
    assert drain_needed(began, REPLACED, "slurm")
    assert not drain_needed(Node("vasp-01", "IDLE", frozenset({"DRAIN"}), "fan is loud", "root"), REPLACED, "slurm")
