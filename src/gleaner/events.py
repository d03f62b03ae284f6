"""The event log of the supervisors: what happened to each run of a tier's job, and when, to the millisecond.

One file per job, `events/<job>.jsonl` beside the registry, so that it has one writer at a time also on a shared file
system. `gleaner report` reads it.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import json
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gleaner.journal import OnChange, say

VERSION = 1
WORDS_LIMIT = 300
LINE_LIMIT = 8192
RETRY_SECONDS = 2.0
_NAME = re.compile(r"(\d+)\.jsonl")


class Kind(enum.Enum):
    """What can happen to a run, in the order in which it does."""

    STARTED = "started"
    """The batch step runs; `nodes` and `gpus` are what it holds."""
    SERVING = "serving"
    """The record is published."""
    WITHDRAWN = "withdrawn"
    """The record is taken back; `why` in words."""
    SIGNALLED = "signalled"
    """Slurm or the keeper wants it to stop; `cause` as in gleaner.states."""
    DRAINED = "drained"
    """Nothing is in flight any more, or the budget is used up: `whole` tells which."""
    LEFT = "left"
    """Its processes are gone; `exit` is the supervisor's code."""


@dataclass(frozen=True)
class Event:
    """One line. `at` is unix time in seconds, by the clock of the node that had the batch step."""

    at: float
    tier: str
    job: int
    restart: int
    kind: Kind
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> tuple[int, int]:
        return self.job, self.restart

    def encode(self) -> bytes:
        value = {
            "v": VERSION,
            "at_ms": round(self.at * 1000),
            "tier": self.tier,
            "job": self.job,
            "restart": self.restart,
            "event": self.kind.value,
            **self.more,
        }
        return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def folder_of(registry: Path) -> Path:
    return registry.parent / "events"


def parse(line: bytes) -> Event:
    """Read one line; ValueError when it is none of ours."""
    try:
        value = json.loads(line)
        known = ("v", "at_ms", "tier", "job", "restart", "event")
        nodes, gpus = value.get("nodes", []), value.get("gpus", 0)
        if not isinstance(nodes, list) or not all(isinstance(name, str) for name in nodes) or not isinstance(gpus, int):
            raise ValueError(f"nodes, gpus: got {nodes!r}, {gpus!r}")
        if value["v"] != VERSION:
            raise ValueError(f"v: got {value['v']!r}, want {VERSION}")
        return Event(
            at=int(value["at_ms"]) / 1000,
            tier=str(value["tier"]),
            job=int(value["job"]),
            restart=int(value["restart"]),
            kind=Kind(value["event"]),
            more={key: content for key, content in value.items() if key not in known},
        )
    except (AttributeError, KeyError, OverflowError, TypeError, RecursionError) as error:
        raise ValueError(repr(error)) from None


def read(folder: Path, problems: list[str], changed_since: float = 0.0) -> list[Event]:
    """All events, oldest first; what cannot be read is named in `problems`.

    All: what a tier is doing may have begun long ago. A year of fifty preemptions a day is some 100,000 lines.
    With `changed_since`, in unix seconds, only those of jobs to which something has happened since then.
    """
    found: list[Event] = []
    for path in sorted(folder.iterdir()):
        if _NAME.fullmatch(path.name) is None:
            continue
        try:
            if path.lstat().st_mtime >= changed_since:
                found += _lines(path, problems)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return sorted(found, key=lambda event: event.at)


def _lines(path: Path, problems: list[str]) -> Iterator[Event]:
    bad = 0
    # The folder is the service user's, the reader is root: no links, and no pipe that would hang.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as stream:
        for line in iter(lambda: stream.readline(LINE_LIMIT), b""):
            try:
                if line.strip():
                    yield parse(line)
            except ValueError:
                bad += 1
    if bad:
        problems.append(f"{path}: {bad} lines are no events")


class Log:
    """Appends events in a thread of its own, since a shared file system can hang; what it does not take is said."""

    def __init__(self, registry: Path, tier: str, run: tuple[int, int]) -> None:
        self._path = folder_of(registry) / f"{run[0]}.jsonl"
        self._tier, self._run = tier, run
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._kept: list[Event] = []
        self._torn = False
        self._changes = OnChange()
        self._thread = threading.Thread(target=self._work, name="events", daemon=True)
        self._thread.start()

    def add(self, kind: Kind, at: float | None = None, **more: Any) -> None:
        """Note that this happens now, or happened at this unix time."""
        self._queue.put(Event(time.time() if at is None else at, self._tier, *self._run, kind, more))

    def close(self, timeout_seconds: float) -> None:
        """Write what is left, in so much time at most; the rest goes to the supervisor's own log."""
        self._queue.put(None)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            say(f"events: {self._path.parent} does not answer")
        for event in [*self._kept, *self._rest()]:
            say(f"event not written: {event.encode().decode().strip()}")

    def _rest(self) -> Iterator[Event]:
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._queue.get_nowait()
                if event is not None:
                    yield event

    def _work(self) -> None:
        while True:
            try:
                event = self._queue.get(timeout=RETRY_SECONDS if self._kept else None)
            except queue.Empty:
                self._write()
                continue
            if event is None:
                self._write()
                return
            self._kept.append(event)
            self._write()

    def _write(self) -> None:
        """Append all that is kept, by one call."""
        if not self._kept:
            return
        # After a part of a line that was written the next one begins anew.
        data = b"\n" * self._torn + b"".join(event.encode() for event in self._kept)
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                self._torn = os.write(fd, data) < len(data)
                if self._torn:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(fd)
        except OSError as error:
            self._changes.say("write", f"events: cannot be written to {self._path}: {error.strerror}")
            return
        self._kept.clear()
        if self._changes.clear("write"):
            say("events: written again")
