"""The logs of a tier's job: each line says when, of which tier, job, restart and node it is, in files that stay small.

    2026-11-29T08:40:39.123Z reasoning 41.0 vasp-03: text

A shared file system can hang or be full. Whoever writes is never made to wait for it: a thread of its own writes, what
it cannot keep meanwhile is lost, and how much that was is said.
"""

from __future__ import annotations

import calendar
import collections
import contextlib
import functools
import os
import re
import select
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gleaner.journal import OnChange, say, stamp

# Of a file; with its old ones it takes four times as much.
LIMIT = 16 << 20
GENERATIONS = 3
# Slurm's own words: one or two lines a run.
SLURM_LIMIT = 1 << 20
# What is kept for a file system that does not take it.
ROOM = 1 << 20
LINE_LIMIT = 4096
CHUNK = 64 << 10
# A reader on another host sees what was written when the file is closed: so often at most.
BATCH_SECONDS = 0.2
RETRY_SECONDS = 2.0
ASIDE_SECONDS = 0.1
# A line that has no end yet is shown after so long a silence: it may be the last word of a server that hangs.
PARTIAL_SECONDS = 1.0

_CLEAN = bytes(ord(" ") if byte in b"\t\r" else ord("?") if byte < 32 or byte == 127 else byte for byte in range(256))
_LINE = re.compile(
    rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{3})Z "
    rb"(?:([a-z0-9][a-z0-9_-]{0,39}) (\d{1,10})\.(\d{1,10}) ([A-Za-z0-9][A-Za-z0-9._-]{0,62}): )?(.*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Label:
    """Whose line it is."""

    tier: str
    job: int
    restart: int
    node: str

    def __str__(self) -> str:
        return f"{self.tier} {self.job}.{self.restart} {self.node}"


@dataclass(frozen=True)
class Line:
    """One line as it was read. `at` is unix seconds; no label when an older version wrote it."""

    at: float
    label: Label | None
    text: bytes


@functools.lru_cache(maxsize=16)
def _seconds(moment: bytes) -> int:
    """Many lines are of the same second."""
    return calendar.timegm(time.strptime(moment.decode(), "%Y-%m-%dT%H:%M:%S"))


def parse(line: bytes) -> Line | None:
    """Read a line without its end; None when it does not say when it is from."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    moment, millis, tier, job, restart, node, text = match.groups()
    try:
        at = _seconds(moment) + int(millis) / 1000
    except (ValueError, OverflowError):
        return None
    label = Label(tier.decode(), int(job), int(restart), node.decode()) if tier else None
    return Line(at, label, text)


def generation(path: Path, number: int) -> Path:
    """The file itself for 0; the older, the higher."""
    return path.with_name(f"{path.name}.{number}") if number else path


def rotate(path: Path, seen: os.stat_result, generations: int = GENERATIONS) -> None:
    """Rename a file that was seen to be large, and its older ones; the oldest goes. Not when another writer has."""
    for number in reversed(range(generations)):
        with contextlib.suppress(FileNotFoundError):
            if not _still(path, seen):
                return
            generation(path, number).rename(generation(path, number + 1))


def _still(path: Path, seen: os.stat_result) -> bool:
    """The same file, and not smaller. It is opened: a shared file system may not know yet what another host did."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        now = os.fstat(fd)
    finally:
        os.close(fd)
    return os.path.samestat(now, seen) and now.st_size >= seen.st_size


def keep_small(path: Path, limit: int = SLURM_LIMIT) -> None:
    """Put a file aside that others append to, each for a while, when it is larger than the limit in bytes."""
    try:
        seen = path.stat()
        if seen.st_size > limit:
            rotate(path, seen, 1)
    except FileNotFoundError:
        return
    except OSError as error:
        say(f"{path}: cannot be kept small: {error.strerror}")


class File:
    """Takes lines at once, and appends them to a file in a thread of its own."""

    def __init__(self, path: Path | None, label: str, limit: int = LIMIT, room: int = ROOM) -> None:
        """Without a path, the file is stderr as it is, and not kept small. `limit` and `room` are bytes."""
        self.path = path
        self._label, self._limit, self._room = label, limit, room
        self._changed = threading.Condition()
        self._lines: collections.deque[bytes] = collections.deque()
        self._size = 0
        self._lost = 0
        self._closing = False
        self._changes = OnChange()
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """A line of our own program."""
        self.put([text.encode(errors="replace")])

    def put(self, texts: list[bytes]) -> None:
        """Lines of a program that say nothing but their text."""
        begin = f"{stamp()} {self._label}: ".encode()
        self._add([begin + text + b"\n" for text in texts])

    def pass_on(self, texts: list[bytes]) -> None:
        """Lines of which some say already whose they are. All get the time of here: one file has one clock."""
        now, lines = stamp(), []
        for text in texts:
            line = parse(text)
            label, rest = (self._label, text) if line is None else (line.label or self._label, line.text)
            lines.append(f"{now} {label}: ".encode() + rest + b"\n")
        self._add(lines)

    def _add(self, lines: list[bytes]) -> None:
        with self._changed:
            for line in lines:
                # What is lost is one gap, told where it is.
                if self._lost or self._size + len(line) > self._room:
                    self._lost += 1
                else:
                    self._lines.append(line)
                    self._size += len(line)
            self._changed.notify_all()

    def close(self, timeout_seconds: float) -> None:
        """Write what is left, in so much time at most."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._say_aside(f"{self.path}: the last lines are not written: the file system does not answer")

    def _say_aside(self, text: str) -> None:
        """Say it on stderr itself: all else that is said may come here, where nothing is taken any more."""
        line = f"{stamp()} {self._label}: {text}\n".encode()

        def write() -> None:
            # There is no other place to say that this one fails, too.
            with contextlib.suppress(OSError):
                os.write(2, line)

        # It may be a file of the same file system.
        thread = threading.Thread(target=write, name="aside", daemon=True)
        thread.start()
        thread.join(ASIDE_SECONDS)

    def _take(self) -> bytes:
        """All that is here, and how much is not."""
        if self._lost:
            text = f"{stamp()} {self._label}: {self._lost} lines were lost: {self._place} did not take them in time\n"
            self._lines.append(text.encode())
        data = b"".join(self._lines)
        self._lines.clear()
        self._size = self._lost = 0
        return data

    @property
    def _place(self) -> str:
        return "stderr" if self.path is None else str(self.path.parent)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closing)
                data = self._take()
            if not data:
                return
            while data := self._write(data):
                if self._pause(RETRY_SECONDS) and (data := self._write(data)):
                    self._say_aside(f"{self.path}: {data.count(10)} lines are not written")
                    return
            self._pause(BATCH_SECONDS)

    def _pause(self, seconds: float) -> bool:
        """Wait; true at once when the file is to be closed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closing, seconds)

    def _write(self, data: bytes) -> bytes:
        """Append by one call; what did not go in comes back."""
        try:
            written = os.write(2, data) if self.path is None else self._append(self.path, data)
        except OSError as error:
            self._changes.say("write", f"log: cannot be written to {self._place}: {error.strerror}")
            return data
        if written == len(data):
            self._changes.clear("write")
        return data[written:]

    def _append(self, path: Path, data: bytes) -> int:
        # The folder of a job that writes nothing for long is taken away as an old one. Nothing is made above it: the
        # shared folder may not be mounted.
        path.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            seen = path.stat()
            if seen.st_size >= self._limit:
                rotate(path, seen)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            return os.write(fd, data)
        finally:
            os.close(fd)


def own(label: str) -> File:
    """The file that is this program's stderr; as it is, where it is none that we may open and rename."""
    try:
        about, path = os.fstat(2), Path(os.readlink("/proc/self/fd/2"))
        ours = stat.S_ISREG(about.st_mode) and os.path.samestat(about, path.stat())
    except OSError:
        return File(None, label)
    ours = ours and os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    return File(path if ours else None, label)


class Reader:
    """Reads what programs say, in a thread of its own, until all that could say something are gone."""

    def __init__(self, descriptor: int, take: Callable[[list[bytes]], object]) -> None:
        """The descriptor is the reader's from now on."""
        self._descriptor, self._take = descriptor, take
        self._thread = threading.Thread(target=self._work, name="reader", daemon=True)
        self._thread.start()

    def join(self, timeout_seconds: float) -> None:
        """Wait for the last word, so long at most."""
        self._thread.join(timeout_seconds)

    def _work(self) -> None:
        poll, partial = select.poll(), b""
        poll.register(self._descriptor, select.POLLIN)
        while True:
            if not poll.poll(PARTIAL_SECONDS * 1000 if partial else None):
                self._tell([partial + "…".encode()])
                partial = b""
                continue
            data = os.read(self._descriptor, CHUNK)
            if not data:
                break
            *lines, partial = (partial + data).split(b"\n")
            if len(partial) > LINE_LIMIT:
                *whole, partial = _pieces(partial)
                lines += whole
            self._tell(lines)
        self._tell([partial])
        os.close(self._descriptor)

    def _tell(self, lines: list[bytes]) -> None:
        told = [piece for line in lines for piece in _pieces(line.translate(_CLEAN).rstrip())]
        if told:
            self._take(told)


def _pieces(line: bytes) -> Iterator[bytes]:
    """A line in pieces that are short enough; nothing for an empty one."""
    for begin in range(0, len(line), LINE_LIMIT):
        yield line[begin : begin + LINE_LIMIT]
