"""tier_jobs_absent: the tiers' jobs are drained or cancelled, other jobs of the same user are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULE = Path(__file__).parents[2] / "library" / "tier_jobs_absent.py"
QUEUE = """\
11|RUNNING|64200|vasp-02|llama-14b|gleaner:0123
12|PENDING|64200||llama-72b|gleaner:4567
13|RUNNING|64200|vasp-03|notebook|a | of the site
14|RUNNING|64200|vasp-01|renamed|gleaner:89ab
15|RUNNING|1000|vasp-01|llama-14b|gleaner:of another
"""
# Slurm in a folder: each job a line of the queue, which a signal or a cancel takes out, if it is one that obeys.
PROGRAMS = {
    "squeue": """#!/bin/sh
cat "$FAKE/queue"
""",
    "scancel": """#!/bin/sh
echo "$*" >>"$FAKE/calls"
for id; do :; done
case "$FAKE_DEAF:$*" in
signal:--batch*) ;;
all:*) ;;
done:*) echo "scancel: error: Kill job error on job id $id: Job/step already completing or completed" >&2; exit 1 ;;
*) sed -i "/^$id|/d" "$FAKE/queue" ;;
esac
""",
}


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in PROGRAMS.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "queue").write_text(QUEUE)
        (folder / "calls").touch()

    def absent(self, deaf: str = "", **arguments: Any) -> dict[str, Any]:
        given = {"uid": 64200, "names": ["llama-14b", "llama-72b"], "drain_seconds": 1, "wait_seconds": 1, **arguments}
        done = subprocess.run(
            [sys.executable, str(MODULE)],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": given}),
            env={
                **os.environ,
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                "FAKE": str(self.folder),
                "FAKE_DEAF": deaf,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    @property
    def left(self) -> list[str]:
        return [line.partition("|")[0] for line in (self.folder / "queue").read_text().splitlines()]

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_what_runs_is_told_to_drain_and_what_waits_is_cancelled(slurm: Slurm) -> None:
    result = slurm.absent(_ansible_diff=True)
    assert slurm.calls == ["--batch --signal=TERM 11", "12", "--batch --signal=TERM 14"]
    assert slurm.left == ["13", "15"]
    assert result["changed"] is True
    assert result["diff"]["before"].splitlines()[0] == "llama-14b: job 11, running on vasp-02"
    assert slurm.absent()["changed"] is False


def test_one_that_does_not_yield_is_cancelled(slurm: Slurm) -> None:
    assert slurm.absent(deaf="signal")["changed"] is True
    assert slurm.calls[-2:] == ["11", "14"]
    assert slurm.left == ["13", "15"]


def test_one_that_cannot_be_ended_is_named(slurm: Slurm) -> None:
    result = slurm.absent(deaf="all")
    assert result["failed"] is True
    assert "llama-14b: job 11, running on vasp-02" in result["msg"]
    assert "notebook" not in result["msg"]


COMPLETING = "11|COMPLETING|64200|vasp-02|llama-14b|gleaner:0123\n"


@pytest.mark.parametrize("deaf", ["all", "done"])
def test_one_that_completes_on_a_dead_node_is_no_failure(slurm: Slurm, deaf: str) -> None:
    (slurm.folder / "queue").write_text(COMPLETING)
    result = slurm.absent(deaf=deaf)
    assert result["changed"] is False
    assert result["completing"] == ["llama-14b: job 11, completing on vasp-02"]


def test_one_that_completes_is_told_once_not_to_come_back(slurm: Slurm) -> None:
    (slurm.folder / "queue").write_text(COMPLETING)
    slurm.absent(deaf="all", drain_seconds=3)
    assert slurm.calls == ["11"]


def test_one_that_comes_back_all_the_same_is_cancelled_by_a_later_run(slurm: Slurm) -> None:
    (slurm.folder / "queue").write_text(COMPLETING.replace("COMPLETING", "PENDING"))
    assert slurm.absent()["changed"] is True
    assert slurm.left == []


def test_a_dry_run_leaves_one_that_completes(slurm: Slurm) -> None:
    (slurm.folder / "queue").write_text(COMPLETING)
    result = slurm.absent(_ansible_check_mode=True)
    assert (result["changed"], slurm.calls) == (False, [])


def test_a_dry_run_names_them_and_ends_none(slurm: Slurm) -> None:
    result = slurm.absent(_ansible_check_mode=True)
    assert (result["changed"], len(result["jobs"]), slurm.calls) == (True, 3, [])


def test_a_slurm_that_does_not_answer_is_no_empty_queue(slurm: Slurm) -> None:
    (slurm.folder / "queue").unlink()
    result = slurm.absent()
    assert result["failed"] is True
    assert "squeue" in result["msg"]
