"""Signs of life: given while a loop turns, read without hanging, and never taken for a record."""

from __future__ import annotations

import errno
import os
import threading
import time
import types
from pathlib import Path

import pytest

from gleaner import life, record
from gleaner.life import Sign
from gleaner.record import Withdrawn
from tests.unit.fakes import wait_for


def seq_of(registry: Path) -> int:
    sign = life.read(registry, "fast")
    return sign.seq if sign else 0


def test_round_trip(tmp_path: Path) -> None:
    assert life.read(tmp_path, "fast") is None
    life.write(tmp_path, "fast", Sign(41, 2, 7))
    assert life.read(tmp_path, "fast") == Sign(41, 2, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["fast.alive"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"job":41}', '{"job":"x","restart":0,"seq":1}', "[" * 3000])
def test_garbage_says_nothing(tmp_path: Path, text: str) -> None:
    life.path_of(tmp_path, "fast").write_text(text)
    with pytest.raises(ValueError, match="not a sign of life"):
        life.read(tmp_path, "fast")


def test_missing_registry_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        life.read(tmp_path / "away", "fast")


def test_removed_only_by_who_gave_it(tmp_path: Path) -> None:
    life.write(tmp_path, "fast", Sign(41, 1, 1))
    life.remove(tmp_path, "fast", (41, 0))
    assert life.read(tmp_path, "fast") == Sign(41, 1, 1)
    life.remove(tmp_path, "fast", (41, 1))
    life.remove(tmp_path, "fast", (41, 1))
    assert life.read(tmp_path, "fast") is None


def test_a_sign_is_no_record(tmp_path: Path) -> None:
    life.write(tmp_path, "fast", Sign(41, 0, 1))
    assert record.read(tmp_path, "fast") == Withdrawn()
    assert record.remove(tmp_path, "fast", (41, 0))
    assert life.read(tmp_path, "fast") == Sign(41, 0, 1)
    with pytest.raises(ValueError, match="record: tier: missing"):
        record.parse(life.path_of(tmp_path, "fast").read_bytes())


def test_pulse_beats_while_the_loop_turns_and_only_then(tmp_path: Path) -> None:
    pulse = life.Pulse(tmp_path, "fast", (41, 0), beat_seconds=0.02)
    pulse.start()
    assert wait_for(lambda: seq_of(tmp_path)) == 1, "no sign before the first turn"
    time.sleep(0.1)
    assert seq_of(tmp_path) == 1
    for seq in (2, 3):
        pulse.turn()
        deadline = time.monotonic() + 5
        while seq_of(tmp_path) < seq and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seq_of(tmp_path) == seq
    pulse.stop(1.0)
    assert life.read(tmp_path, "fast") is None


def test_pulse_of_an_older_run_leaves_the_sign_of_the_next(tmp_path: Path) -> None:
    pulse = life.Pulse(tmp_path, "fast", (41, 0), beat_seconds=10)
    pulse.start()
    wait_for(lambda: seq_of(tmp_path))
    life.write(tmp_path, "fast", Sign(41, 1, 1))
    pulse.stop(1.0)
    assert life.read(tmp_path, "fast") == Sign(41, 1, 1)


def test_pulse_outlives_a_registry_that_is_away(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    registry = tmp_path / "registry"
    pulse = life.Pulse(registry, "fast", (41, 0), beat_seconds=0.02)
    pulse.start()
    for _ in range(3):
        pulse.turn()
        time.sleep(0.05)
    registry.mkdir()
    pulse.turn()
    assert wait_for(lambda: seq_of(registry))
    pulse.stop(1.0)
    told = capfd.readouterr().err
    assert told.count("cannot be written") == told.count("written again") == 1


def test_stop_does_not_wait_for_a_registry_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(life, "write", lambda *_: answer.wait(10))
    pulse = life.Pulse(tmp_path, "fast", (41, 0))
    pulse.start()
    began = time.monotonic()
    pulse.stop(0.2)
    assert time.monotonic() - began < 5.0
    answer.set()


def test_look_leaves_out_what_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    look = life.Look(tmp_path)
    life.write(tmp_path, "fast", Sign(41, 0, 1))
    life.path_of(tmp_path, "odd").write_text("{")
    for _ in range(2):
        assert look.signs(["fast", "odd", "slow"]) == {"fast": Sign(41, 0, 1), "slow": None}
    assert capfd.readouterr().err.count("odd: nothing is known") == 1
    for code in (errno.EIO, errno.ESTALE):

        def fail(_: object, code: int = code) -> list[str]:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", fail)
            assert look.signs(["fast"]) == {}
    assert look.signs(["fast"]) == {"fast": Sign(41, 0, 1)}


def test_look_does_not_wait_for_a_registry_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answer, genuine = threading.Event(), life.read
    asked = []

    def hang(registry: Path, tier: str) -> Sign | None:
        asked.append(tier)
        answer.wait(10)
        return genuine(registry, tier)

    monkeypatch.setattr(life, "LOOK_SECONDS", 1.0)
    monkeypatch.setattr(life, "read", hang)
    look = life.Look(tmp_path)
    assert look.signs(["fast"]) == {}
    began = time.monotonic()
    assert look.signs(["fast"]) == {}
    assert time.monotonic() - began < 1.0, "waited for the same answer again"
    assert asked == ["fast"]
    answer.set()
    assert wait_for(lambda: look.signs(["fast"]) == {"fast": None})
    assert capfd.readouterr().err.count("no answer") == 1


@pytest.mark.parametrize("fault", ["no blocks", "no inodes", "not mine"])
def test_where_no_sign_can_be_written_none_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    look = life.Look(tmp_path)
    assert look.signs(["fast"]) == {"fast": None}
    whole = os.statvfs(tmp_path)
    short = {"no blocks": {"f_bavail": 0}, "no inodes": {"f_favail": 0, "f_files": 1}}.get(fault, {})
    values = {name: getattr(whole, name) for name in ("f_bavail", "f_files", "f_favail")} | short
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(**values))
    if fault == "not mine":
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert look.signs(["fast"]) == {}
    assert "no sign of life can be written: " in capfd.readouterr().err
