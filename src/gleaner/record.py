"""Endpoint record v1: one JSON file per running tier in the registry folder on the shared file system."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from gleaner import files
from gleaner.journal import OnChange, say

SIZE_LIMIT = 4096
MODELS_LIMIT = 24
BEAT_SECONDS = 2.0
# The first beats are quicker: a reader routes only what it has seen alive.
FIRST_BEATS = 3
FIRST_BEAT_SECONDS = 0.5
STALE_SECONDS = 10.0

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")
# What the inventory may call a tier: a narrower rule here would refuse the records of a valid one.
_TIER = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_INTEGER_LIMIT = 2**53


@dataclass(frozen=True)
class Record:
    """One tier's endpoint. `started` is unix seconds, for people only; freshness is told by `seq`."""

    tier: str
    job: int
    restart: int
    host: str
    port: int
    models: tuple[str, ...]
    started: int
    seq: int
    supervisor: str = ""
    """The node on which the supervisor listens for the gateway, and its port there; empty and 0: it does not."""
    line: int = 0

    @property
    def run(self) -> tuple[int, int]:
        """Job and restart: who wrote it."""
        return self.job, self.restart

    def encode(self) -> bytes:
        """The record's bytes; ValueError when no reader would accept them."""
        value = {"v": 1, **dataclasses.asdict(self), "models": list(self.models)}
        data = (json.dumps(value, separators=(",", ":")) + "\n").encode()
        parse(data)
        return data


def parse(data: bytes) -> Record:
    """Read a record, trusting nothing. ValueError names the field, what was got and what is wanted."""
    if len(data) > SIZE_LIMIT:
        raise ValueError(f"record: got {len(data)} bytes, want at most {SIZE_LIMIT}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse, parse_float=_refuse)
    except RecursionError:
        raise ValueError("record: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"record: not a JSON document: {_short(str(error))}") from None
    if not isinstance(value, dict):
        raise ValueError(f"record: got a JSON {type(value).__name__}, want an object")
    version = value.get("v")
    if isinstance(version, bool) or version != 1:
        raise ValueError(f"record: v: got {_short(version)}, want 1")
    # Fields that are not known are a newer supervisor's: nodes are updated before the gateway.
    return Record(
        tier=_text(value, "tier", _TIER),
        job=_integer(value, "job", 1),
        restart=_integer(value, "restart", 0),
        host=_text(value, "host", _HOST),
        port=_integer(value, "port", 1, 65535),
        models=_models(value),
        started=_integer(value, "started", 0),
        seq=_integer(value, "seq", 0),
        supervisor=_text(value, "supervisor", _HOST) if value.get("supervisor", "") else "",
        line=_integer(value, "line", 0, 65535) if "line" in value else 0,
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a field is given twice")
    return value


def _refuse(text: str) -> Any:
    raise ValueError(f"number {_short(text)} is not an integer")


def _short(value: object) -> str:
    """A foreign value made safe for a log line."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _field(value: dict[str, Any], name: str) -> Any:
    if name not in value:
        raise ValueError(f"record: {name}: missing")
    return value[name]


def _integer(value: dict[str, Any], name: str, low: int, high: int = _INTEGER_LIMIT) -> int:
    got = _field(value, name)
    if not isinstance(got, int) or isinstance(got, bool) or not low <= got <= high:
        raise ValueError(f"record: {name}: got {_short(got)}, want an integer from {low} to {high}")
    return got


def _text(value: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    got = _field(value, name)
    if not isinstance(got, str) or not pattern.fullmatch(got):
        raise ValueError(f"record: {name}: got {_short(got)}, want a string like {pattern.pattern}")
    return got


def _models(value: dict[str, Any]) -> tuple[str, ...]:
    got = _field(value, "models")
    if not isinstance(got, list) or len(got) > MODELS_LIMIT:
        raise ValueError(f"record: models: got {_short(got)}, want a list of at most {MODELS_LIMIT} names")
    for name in got:
        if not isinstance(name, str) or not _MODEL.fullmatch(name):
            raise ValueError(f"record: models: got {_short(name)}, want a string like {_MODEL.pattern}")
    return tuple(got)


def path_of(registry: Path, tier: str) -> Path:
    return registry / f"{tier}.json"


def write(registry: Path, record: Record) -> None:
    files.write_atomic(path_of(registry, record.tier), record.encode())


def remove(registry: Path, tier: str, run: tuple[int, int]) -> bool:
    """Remove the tier's record if this job and restart wrote it; false when it is somebody else's."""
    path = path_of(registry, tier)
    try:
        record = parse(files.read_bounded(path, SIZE_LIMIT))
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    if record.run != run:
        return False
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return True


@dataclass(frozen=True)
class Withdrawn:
    """There is no record: the tier withdrew itself, or never served."""


@dataclass(frozen=True)
class Unreadable:
    """A record that cannot be believed: EIO, ESTALE, garbage. It says nothing about the tier."""

    why: str


Reading = Union[Record, Withdrawn, Unreadable]


def read(registry: Path, tier: str) -> Reading:
    """Read a tier's record; a missing file and an unreadable one are different things."""
    path = path_of(registry, tier)
    try:
        try:
            record = parse(files.read_bounded(path, SIZE_LIMIT))
        except FileNotFoundError:
            # Without its folder the registry is not mounted, which withdraws nothing. Looking may fail, too.
            if registry.is_dir():
                return Withdrawn()
            return Unreadable(f"{registry}: registry folder is missing: is the shared file system mounted?")
    except OSError as error:
        return Unreadable(f"{path}: {error.strerror}")
    except ValueError as error:
        return Unreadable(f"{path}: {error}")
    if record.tier != tier:
        return Unreadable(f"{path}: record: tier: got {record.tier}, want {tier}")
    return record


class Publisher:
    """Keeps a record in the registry and bumps its `seq`.

    A thread of its own, because a shared file system can hang, and a supervisor that hangs with it
    would lose its agents.
    """

    def __init__(self, registry: Path, beat_seconds: float = BEAT_SECONDS) -> None:
        self._registry = registry
        self._beat_seconds = beat_seconds
        self._wake = threading.Condition()
        self._wanted: Record | None = None
        self._written: Record | None = None
        self._seq = 0
        self._changes = OnChange()
        threading.Thread(target=self._work, name="record", daemon=True).start()

    def publish(self, record: Record) -> None:
        with self._wake:
            self._wanted = record
            self._wake.notify_all()

    def retract(self) -> int:
        """Ask for the record's removal; the last `seq` that a reader may still find."""
        with self._wake:
            self._wanted = None
            self._wake.notify_all()
            return self._seq

    def withdraw(self, timeout_seconds: float) -> bool:
        """The same; true when it was gone in time."""
        self.retract()
        with self._wake:
            return self._wake.wait_for(lambda: self._written is None, timeout_seconds)

    def _work(self) -> None:
        beats = 0
        with self._wake:
            while True:
                wanted = self._wanted
                if wanted is not None:
                    self._seq += 1
                    # Noted before the attempt: a write that failed half-way may have left a record.
                    self._written = wanted
                    self._unlocked(lambda r=wanted: self._write(r))
                    if self._wanted is wanted:
                        beats += 1
                        quick = min(FIRST_BEAT_SECONDS, self._beat_seconds)
                        self._wake.wait(quick if beats <= FIRST_BEATS else self._beat_seconds)
                elif self._written is not None:
                    beats = 0
                    done = self._unlocked(lambda r=self._written: self._remove(r))
                    if self._wanted is None:
                        if done:
                            self._written = None
                            self._wake.notify_all()
                        else:
                            self._wake.wait(self._beat_seconds)
                else:
                    self._wake.wait()

    def _unlocked(self, work: Any) -> Any:
        self._wake.release()
        try:
            return work()
        except Exception:
            # The thread must live: nobody else can withdraw the record.
            self._changes.say("fault", f"record: a fault of gleaner, please report it: {traceback.format_exc()}")
            return False
        finally:
            self._wake.acquire()

    def _write(self, record: Record) -> None:
        try:
            write(self._registry, dataclasses.replace(record, seq=self._seq))
        except OSError as error:
            self._changes.say("write", f"record: cannot be written to {self._registry}: {error.strerror}")
            return
        except ValueError as error:
            self._changes.say("write", f"record: no reader would accept it, so it is not written: {error}")
            return
        if self._changes.clear("write"):
            say("record: written again")

    def _remove(self, record: Record) -> bool:
        try:
            if not remove(self._registry, record.tier, record.run):
                say(f"record: {path_of(self._registry, record.tier)} is another job's now and stays")
        except OSError as error:
            self._changes.say("remove", f"record: cannot be removed from {self._registry}: {error.strerror}")
            return False
        return True
