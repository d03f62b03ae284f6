"""The event log of the supervisors: what happened to each run of a tier's job, and when, to the millisecond.

One file per job, `events/<job>.jsonl` beside the registry, so that it has one writer at a time also on a shared file
system. `gleaner report` reads it.
"""

from __future__ import annotations

import enum
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
FILE_LIMIT = 64 << 20
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
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(repr(error)) from None


def read(folder: Path, since: float, problems: list[str]) -> list[Event]:
    """All events of jobs that told any since then, oldest first; what cannot be read is named in `problems`.

    Also the older ones of such a job, since what it is doing may have begun long ago.
    """
    found: list[Event] = []
    for path in sorted(folder.iterdir()):
        if _NAME.fullmatch(path.name) is None:
            continue
        try:
            # Nothing is written to a file after its last event.
            if path.stat().st_mtime >= since - 60:
                found += _lines(path, problems)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return sorted(found, key=lambda event: event.at)


def _lines(path: Path, problems: list[str]) -> Iterator[Event]:
    bad = 0
    with path.open("rb") as stream:
        for line in stream.read(FILE_LIMIT).splitlines():
            try:
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
        self._changes = OnChange()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="events", daemon=True)
        self._thread.start()

    def add(self, kind: Kind, at: float | None = None, **more: Any) -> None:
        """Note that this happens now, or happened at this unix time."""
        self._queue.put(Event(time.time() if at is None else at, self._tier, *self._run, kind, more))

    def close(self, timeout_seconds: float) -> None:
        """Write what is left, in so much time at most; the rest goes to the supervisor's own log."""
        self._queue.put(None)
        self._ending.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            say(f"events: {self._path.parent} does not answer")
        for event in list(self._kept):
            say(f"event not written: {event.encode().decode().strip()}")

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
        """Append all that is kept; one call, so that a line is whole or not there."""
        if not self._kept:
            return
        data = b"".join(event.encode() for event in self._kept)
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                written = os.write(fd, data)
                if written < len(data):
                    raise OSError(28, "only a part could be written")
            finally:
                os.close(fd)
        except OSError as error:
            self._changes.say("write", f"events: cannot be written to {self._path}: {error.strerror}")
            return
        self._kept.clear()
        if self._changes.clear("write"):
            say("events: written again")
