"""What of a worker's cache is believed after a kill, a full disk, or a new limit."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from gleaner import tensor_cache

MIB = 1 << 20


def tensor(folder: Path, name: str, age_seconds: float = 60, size: int = MIB) -> Path:
    path = folder / "rpc" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "rpc").iterdir()}


def test_without_a_mark_nothing_is_believed(tmp_path: Path) -> None:
    tensor(tmp_path, "a")
    assert tensor_cache.make_sound(tmp_path, 10)
    assert names(tmp_path) == set()


def test_what_came_after_the_mark_is_not_believed(tmp_path: Path) -> None:
    tensor(tmp_path, "whole")
    tensor_cache.mark_whole(tmp_path)
    tensor(tmp_path, "torn", age_seconds=-1)
    assert tensor_cache.make_sound(tmp_path, 10)
    assert names(tmp_path) == {"whole"}
    assert (tmp_path / tensor_cache.MARK).stat().st_size == 0


def test_a_mark_does_not_cover_what_is_written_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor(tmp_path, "whole")
    flush = os.fsync

    def slow(descriptor: int) -> None:
        flush(descriptor)
        time.sleep(0.05)
        tensor(tmp_path, "torn", age_seconds=0)

    monkeypatch.setattr(os, "fsync", slow)
    tensor_cache.mark_whole(tmp_path)
    tensor_cache.make_sound(tmp_path, 10)
    assert names(tmp_path) == {"whole"}


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for number in range(4):
        tensor(tmp_path, str(number), age_seconds=100 - number)
    tensor_cache.mark_whole(tmp_path)
    assert tensor_cache.make_sound(tmp_path, 2)
    assert names(tmp_path) == {"2", "3"}


def test_a_disk_without_room_for_the_limit_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tensor(tmp_path, "a")
    tensor_cache.mark_whole(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    for free, usable in ((9 * MIB, True), (9 * MIB - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert tensor_cache.make_sound(tmp_path, 10) is usable
    assert "has 8 MiB left, wanted 9: weights are sent anew" in capfd.readouterr().err


def test_a_folder_that_is_not_there_is_not_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not tensor_cache.make_sound(tmp_path / "none", 10)
    tensor_cache.mark_whole(tmp_path / "none")
    assert capfd.readouterr().err.count("cache: ") == 2
