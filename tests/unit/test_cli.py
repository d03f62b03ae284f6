"""The command line, and what `status` says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from gleaner import cli, keeper, record, slurm, status
from gleaner.states import Tier
from tests.unit.fakes import Home, home, queue_line

RECORD = record.Record("fast", 41, 0, "vasp-02", 8080, ("one",), 0, 1)
RUNNING = slurm.Job(41, "llama-14b", "RUNNING", 0, False, 60, "vasp-02", "None")


def pending(reason: str) -> slurm.Job:
    return slurm.Job(41, "llama-14b", "PENDING", 0, False, 0, "", reason)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: gleaner {command}" in capsys.readouterr().out


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_unknown_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve"])
    assert caught.value.code == 2
    assert "invalid choice: 'serve'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("jobs", "reading", "routed", "kept", "state"),
    [
        (None, RECORD, True, {}, Tier.UNKNOWN),
        ([], record.Withdrawn(), False, {}, Tier.ABSENT),
        ([], record.Withdrawn(), False, {"failures": 2}, Tier.PAUSED),
        ([], record.Withdrawn(), False, {"held": True, "failures": 2}, Tier.HELD),
        ([], record.Withdrawn(), False, {"why": "job 41 was cancelled; asking accounting by whom"}, Tier.PAUSED),
        ([RUNNING], RECORD, True, {"job": 41, "ending": True}, Tier.YIELDING),
        ([RUNNING], RECORD, True, {"job": 40, "ending": True}, Tier.SERVING),
        ([pending("Resources")], record.Withdrawn(), False, {"job": 41, "ending": True}, Tier.QUEUED),
        ([pending("Resources")], record.Withdrawn(), False, {}, Tier.QUEUED),
        ([pending("JobHeldUser")], record.Withdrawn(), False, {}, Tier.HELD),
        ([RUNNING], record.Withdrawn(), False, {}, Tier.LOADING),
        ([RUNNING], RECORD, False, {}, Tier.UNROUTED),
        ([RUNNING], RECORD, True, {}, Tier.SERVING),
        ([slurm.Job(41, "n", "RUNNING", 0, True, 60, "vasp-02", "None")], RECORD, True, {}, Tier.YIELDING),
        (
            [slurm.Job(41, "n", "COMPLETING", 0, False, 60, "vasp-02", "None")],
            RECORD,
            False,
            {},
            Tier.YIELDING,
        ),
    ],
)
def test_state_in_one_word(
    jobs: list[slurm.Job] | None, reading: record.Reading, routed: bool, kept: dict[str, Any], state: Tier
) -> None:
    assert status.state_of(jobs, reading, routed, keeper.TierState(**kept)) is state


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    with home() as made:
        for name, value in made.environment().items():
            monkeypatch.setenv(name, value)
        made.set(made.root / "gateway.json", json.dumps(made.gateway_config()))
        made.set(made.root / "keeper.json", json.dumps(made.keeper_config(made.root / "run.slurm")))
        yield made


def run_status(place: Home, *more: str) -> int:
    return cli.main(
        [
            "status",
            "--config",
            str(place.root / "gateway.json"),
            "--keeper",
            str(place.root / "keeper.json"),
            *more,
        ]
    )


def test_status_for_people_and_programs(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "queue", queue_line())
    record.write(place.registry, RECORD)
    place.set(place.root / "fast.up")
    assert run_status(place) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "fast",
        "serving",
        "job",
        "41",
        "on",
        "vasp-02",
    ]
    assert run_status(place, "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["state"], told["job"], told["node"], told["models"]) == ("serving", 41, "vasp-02", ["one"])


def test_status_says_why_a_tier_is_held(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {"fast": keeper.TierState(held=True, why="job 41 was cancelled by uid 1000")}
    keeper.save_state(place.root / "keeper-state.json", kept)
    assert run_status(place) == 0
    assert "held      (job 41 was cancelled by uid 1000)" in capsys.readouterr().out


def test_status_says_why_a_job_is_ended(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "queue", queue_line())
    kept = {
        "fast": keeper.TierState(job=41, ending=True, why="job 41 is being replaced: its plan is not the current one")
    }
    keeper.save_state(place.root / "keeper-state.json", kept)
    assert run_status(place) == 0
    assert "yielding  job 41 on vasp-02 (job 41 is being replaced" in capsys.readouterr().out


def test_status_says_for_whom_a_tier_makes_way(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {"fast": keeper.TierState(why="reasoning (priority 20) wants vasp-02")}
    keeper.save_state(place.root / "keeper-state.json", kept)
    assert run_status(place) == 0
    assert "paused    (reasoning (priority 20) wants vasp-02)" in capsys.readouterr().out


def test_status_without_slurm(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "squeue.fails", "Unable to contact slurm controller")
    assert run_status(place) == 0
    told = capsys.readouterr()
    assert "unknown" in told.out
    assert "Unable to contact" in told.err


def test_status_without_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--config", "/nonexistent"]) == 2
    assert "/nonexistent: cannot be read: No such file" in capsys.readouterr().err


def test_closed_pipe_is_no_traceback(place: Home) -> None:
    place.set(place.slurm / "queue", queue_line())
    reader, writer = os.pipe()
    os.close(reader)
    import subprocess

    from tests.unit.fakes import PYTHON

    done = subprocess.run(
        [PYTHON, str(place.pyz), "states"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=place.environment(),
        check=False,
    )
    os.close(writer)
    assert b"Traceback" not in done.stderr
