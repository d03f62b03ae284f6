"""The command line, and what `status` says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from gleaner import cli, keeper, record, slurm, status
from gleaner.states import Tier
from tests.unit.fakes import Home, home

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
def place() -> Iterator[Home]:
    with home() as made:
        yield made


def test_closed_pipe_is_no_traceback(place: Home) -> None:
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
