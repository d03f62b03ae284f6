"""Lines of a job's logs, and a file system that does not take them."""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gleaner import joblog, journal
from tests.unit.fakes import wait_for

LABEL = "fast 41.1 vasp-02"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., joblog.File]]:
    files = []

    def make(name: str = "router.log", **more: int) -> joblog.File:
        files.append(joblog.File(tmp_path / "41" / name, LABEL, **more))
        return files[-1]

    yield make
    for file in files:
        file.close(5)


@pytest.fixture
def pipe() -> Iterator[tuple[int, list[bytes]]]:
    """The end that a program writes to, and the lines that are read."""
    output, end = os.pipe2(os.O_CLOEXEC)
    lines: list[bytes] = []
    reader = joblog.Reader(output, lines.extend)
    yield end, lines
    os.close(end)
    reader.join(5)


def texts(path: Path) -> list[str]:
    """What the lines say; each has to say whose it is."""
    found = []
    for line in path.read_bytes().splitlines():
        read = joblog.parse(line)
        assert read is not None, line
        assert str(read.label) == LABEL
        found.append(read.text.decode())
    return found


def test_a_line_is_read_as_it_was_written(made: Callable[..., joblog.File]) -> None:
    file = made()
    file.put([b"a: b", "ü".encode()])
    file.close(5)
    assert file.path is not None
    assert texts(file.path) == ["a: b", "ü"]
    assert file.path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"2026-11-29T08:40:39.125Z fast 41.1 vasp-02: serving", b"serving"),
        (b"2026-11-29T08:40:39.125Z serving", b"serving"),
        (b"2026-11-29T08:40:39.125Z fast 41 vasp-02: serving", b"fast 41 vasp-02: serving"),
    ],
)
def test_a_line_without_a_label_is_one_of_an_older_version(line: bytes, text: bytes) -> None:
    read = joblog.parse(line)
    assert read is not None
    assert (read.at, read.text) == (1795941639.125, text)
    assert (read.label is None) is (text != b"serving" or b"fast" not in line)


@pytest.mark.parametrize("line", [b"", b"0.00.035 I srv", b"2026-13-29T08:40:39.125Z x", b"\xff\0"])
def test_what_says_no_time_is_no_line(line: bytes) -> None:
    assert joblog.parse(line) is None


def test_lines_of_others_keep_whose_they_are_and_get_the_time_of_here(made: Callable[..., joblog.File]) -> None:
    file = made()
    file.pass_on([b"2020-01-01T00:00:00.000Z fast 41.1 vasp-03: started", b"srun: error: x"])
    file.close(5)
    assert file.path is not None
    first, second = (joblog.parse(line) for line in file.path.read_bytes().splitlines())
    assert first is not None
    assert second is not None
    assert (str(first.label), first.text) == ("fast 41.1 vasp-03", b"started")
    assert (str(second.label), second.text) == (LABEL, b"srun: error: x")
    assert first.at == second.at > 1_600_000_000


def holds(path: Path, text: bytes) -> bool:
    return path.exists() and text in path.read_bytes()


def test_a_file_and_its_old_ones_stay_small(
    made: Callable[..., joblog.File], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joblog, "BATCH_SECONDS", 0.0)
    file = made(limit=1000)
    log = tmp_path / "41" / "router.log"
    for number in range(0, 200, 5):
        file.put([b"%04d " % one + b"x" * 50 for one in range(number, number + 5)])
        last = b"%04d " % (number + 4)
        wait_for(functools.partial(holds, log, last))
    file.close(5)
    names = {path.name: path.stat().st_size for path in (tmp_path / "41").iterdir()}
    assert set(names) == {"router.log", "router.log.1", "router.log.2", "router.log.3"}
    # One batch may be written to a file that has nearly reached its limit.
    assert max(names.values()) < 1000 + 5 * 120
    kept = [line for number in (3, 2, 1, 0) for line in texts(joblog.generation(log, number))]
    assert [line[:4] for line in kept] == [f"{number:04d}" for number in range(200 - len(kept), 200)]


class Hangs:
    """A file system that takes nothing until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.goes, self.reached = threading.Event(), threading.Event()
        really = os.open

        def slow(path: str, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_APPEND:
                self.reached.set()
                assert self.goes.wait(30)
            return really(path, flags, mode)

        monkeypatch.setattr(os, "open", slow)


def test_a_file_system_that_hangs_makes_nobody_wait_and_what_is_lost_is_counted(
    made: Callable[..., joblog.File], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Hangs(monkeypatch)
    file = made(room=10_000)
    file.put([b"first"])
    assert disk.reached.wait(10)
    # This very test would hang.
    for _ in range(1000):
        file.put([b"x" * 100])
    disk.goes.set()
    assert file.path is not None
    path = file.path
    wait_for(lambda: path.exists() and "were lost" in path.read_text())
    file.put([b"afterwards"])
    file.close(5)
    first, *kept, lost, last = texts(path)
    assert (first, last) == ("first", "afterwards")
    assert set(kept) == {"x" * 100}
    assert lost == f"{1000 - len(kept)} lines were lost: {path.parent} did not take them in time"
    assert 50 < len(kept) < 100


def test_a_full_file_system_is_tried_again(
    made: Callable[..., joblog.File], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joblog, "RETRY_SECONDS", 0.05)
    really, answers = os.write, [5, None, None]

    def full(descriptor: int, data: bytes) -> int:
        if not answers:
            return really(descriptor, data)
        part = answers.pop(0)
        if part is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(descriptor, data[:part])

    monkeypatch.setattr(os, "write", full)
    file = made()
    file.put([b"whole"])
    assert file.path is not None
    path = file.path
    wait_for(lambda: path.exists() and path.read_text().endswith("whole\n"))
    assert texts(path) == ["whole"]
    assert capfd.readouterr().err.count("No space left on device") == 1


def test_a_folder_that_was_taken_away_comes_back(made: Callable[..., joblog.File], tmp_path: Path) -> None:
    file = made()
    file.put([b"first"])
    wait_for((tmp_path / "41" / "router.log").exists)
    (tmp_path / "41" / "router.log").unlink()
    (tmp_path / "41").rmdir()
    file.put([b"second"])
    file.close(5)
    assert texts(tmp_path / "41" / "router.log") == ["second"]


def test_the_end_is_not_waited_for_longer_than_said(
    made: Callable[..., joblog.File], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = Hangs(monkeypatch)
    file = made()
    file.put([b"first"])
    assert disk.reached.wait(10)
    file.close(0.1)
    assert "the last lines are not written: the file system does not answer" in capfd.readouterr().err
    disk.goes.set()


@pytest.mark.parametrize("fails", [False, True])
def test_that_the_last_lines_are_lost_is_not_told_to_those_that_lose_them(
    made: Callable[..., joblog.File], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fails: bool
) -> None:
    disk = Hangs(monkeypatch)
    if fails:
        monkeypatch.setattr(joblog.File, "_append", lambda *_: os.write(-1, b""))
    file = made()
    monkeypatch.setattr(journal, "_taker", file.say)
    file.put([b"first"])
    assert fails or disk.reached.wait(10)
    file.close(10 if fails else 0.1)
    assert f"Z {LABEL}: {file.path}: " in (said := capfd.readouterr().err)
    assert "lines are not written" in said
    disk.goes.set()


def test_two_writers_put_a_file_aside_once(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    path.write_text("large")
    seen = path.stat()
    joblog.rotate(path, seen)
    path.write_text("new, and larger")
    joblog.rotate(path, seen)
    (tmp_path / "router.log.2").write_text("older")
    path.write_text("")
    joblog.rotate(path, path.stat())
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {
        "router.log.1": "",
        "router.log.2": "large",
        "router.log.3": "older",
    }


def test_a_file_that_another_writer_took_in_this_moment_is_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    path.write_text("large")
    seen = path.stat()
    path.unlink()
    joblog.rotate(path, seen)
    assert list(tmp_path.iterdir()) == []


def test_lines_are_told_whole(pipe: tuple[int, list[bytes]]) -> None:
    end, lines = pipe
    os.write(end, b"one\ntw")
    wait_for(lambda: lines == [b"one"])
    os.write(end, b"o\n\n  \nthree\r\n\x1b[31mred\n")
    wait_for(lambda: lines == [b"one", b"two", b"three", b"?[31mred"])


def test_a_line_without_an_end_is_told_after_a_while(
    pipe: tuple[int, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    end, lines = pipe
    os.write(end, b"I hang")
    wait_for(lambda: lines == ["I hang…".encode()])
    os.write(end, b" no more\n")
    wait_for(lambda: lines[1:] == [b" no more"])


def test_the_last_word_is_told_without_an_end() -> None:
    output, end = os.pipe2(os.O_CLOEXEC)
    lines: list[bytes] = []
    reader = joblog.Reader(output, lines.extend)
    os.write(end, b"abort")
    os.close(end)
    reader.join(5)
    assert lines == [b"abort"]


def test_an_endless_line_comes_in_pieces(pipe: tuple[int, list[bytes]]) -> None:
    end, lines = pipe
    for _ in range(100):
        os.write(end, b"x" * 1000)
    os.write(end, b"\n")
    wait_for(lambda: sum(len(line) for line in lines) == 100_000)
    assert max(len(line) for line in lines) == joblog.LINE_LIMIT


def test_stderr_that_is_no_file_is_written_to_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    file = joblog.File(None, LABEL)
    file.say("hello")
    file.close(5)
    assert capfd.readouterr().err.endswith(f"Z {LABEL}: hello\n")
