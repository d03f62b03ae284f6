"""A supervisor's sign of life: `<tier>.alive` in the registry folder, from the start of its job to the end.

Slurm may go on for half an hour to say that a job runs whose node lost its power. The endpoint record cannot tell,
since there is none while a model loads.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gleaner import files
from gleaner.journal import OnChange, say

BEAT_SECONDS = 5.0
LOOK_SECONDS = 1.0
SIZE_LIMIT = 4096


@dataclass(frozen=True)
class Sign:
    """Job and restart that gave it, and how many that makes."""

    job: int
    restart: int
    seq: int

    @property
    def run(self) -> tuple[int, int]:
        return self.job, self.restart


def path_of(registry: Path, tier: str) -> Path:
    """No tier's record has this name: a tier's own has no dot."""
    return registry / f"{tier}.alive"


def write(registry: Path, tier: str, sign: Sign) -> None:
    value = {"v": 1, "job": sign.job, "restart": sign.restart, "seq": sign.seq}
    files.write_atomic(path_of(registry, tier), (json.dumps(value) + "\n").encode())


def read(registry: Path, tier: str) -> Sign | None:
    """The tier's last sign, None when there is none. OSError or ValueError when the registry does not say."""
    # Without its folder the registry is not mounted. Listing it also makes a client of NFS look for new names.
    if path_of(registry, tier).name not in os.listdir(registry):
        return None
    try:
        value = json.loads(files.read_bounded(path_of(registry, tier), SIZE_LIMIT))
        return Sign(int(value["job"]), int(value["restart"]), int(value["seq"]))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a sign of life ({error!r})") from None


def require_room(registry: Path) -> None:
    """OSError when a supervisor could not write a sign: the folder is not its own, or the file system is full."""
    status, room = os.stat(registry), os.statvfs(registry)
    if os.geteuid() not in (0, status.st_uid) or not status.st_mode & stat.S_IWUSR:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    # File systems that make their inodes as they need them say that they have none.
    if room.f_bavail == 0 or (room.f_files and room.f_favail == 0):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def remove(registry: Path, tier: str, run: tuple[int, int]) -> None:
    """Remove the tier's sign if this job and restart gave it."""
    sign = read(registry, tier)
    if sign is not None and sign.run == run:
        path_of(registry, tier).unlink(missing_ok=True)


class Pulse:
    """Gives signs for as long as a program's loop turns.

    They are written by a thread, because a shared file system can hang; but a loop that hangs gives none.
    """

    def __init__(self, registry: Path, tier: str, run: tuple[int, int], beat_seconds: float = BEAT_SECONDS) -> None:
        self._registry, self._tier, self._run = registry, tier, run
        self._beat_seconds = beat_seconds
        self._turns = 0
        self._stop = threading.Event()
        self._changes = OnChange()
        self._thread = threading.Thread(target=self._work, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def turn(self) -> None:
        """The loop has turned once more."""
        self._turns += 1

    def stop(self, timeout_seconds: float) -> None:
        """Take the sign away; when the file system hangs, it stays."""
        self._stop.set()
        self._thread.join(timeout_seconds)

    def _work(self) -> None:
        turns, seq = -1, 0
        while not self._stop.is_set():
            if turns != self._turns:
                turns, seq = self._turns, seq + 1
                self._write(seq)
            self._stop.wait(self._beat_seconds)
        try:
            remove(self._registry, self._tier, self._run)
        except (OSError, ValueError) as error:
            say(f"sign of life: cannot be removed: {error}")

    def _write(self, seq: int) -> None:
        try:
            write(self._registry, self._tier, Sign(*self._run, seq))
        except OSError as error:
            self._changes.say("write", f"sign of life: cannot be written to {self._registry}: {error.strerror}")
            return
        if self._changes.clear("write"):
            say("sign of life: written again")


class Look:
    """Looks for signs in a thread: a shared file system can hang, and whoever looks must not hang with it."""

    def __init__(self, registry: Path) -> None:
        self._registry = registry
        self._changes = OnChange()
        self._thread: threading.Thread | None = None

    def signs(self, tiers: Sequence[str]) -> dict[str, Sign | None]:
        """The last sign of each tier, None when there is none. Tiers of which nothing can be said are left out."""
        found: dict[str, Sign | None] = {}
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._read, args=(tiers, found), name="look", daemon=True)
            self._thread.start()
            self._thread.join(LOOK_SECONDS)
        if self._thread.is_alive():
            self._changes.say("hang", f"{self._registry}: no answer: nothing is known of signs of life")
            return {}
        self._changes.clear("hang")
        return found

    def _read(self, tiers: Sequence[str], found: dict[str, Sign | None]) -> None:
        try:
            require_room(self._registry)
        except OSError as error:
            self._changes.say("room", f"{self._registry}: no sign of life can be written: {error.strerror}")
            return
        self._changes.clear("room")
        for tier in tiers:
            try:
                found[tier] = read(self._registry, tier)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                self._changes.say(tier, f"{tier}: nothing is known of its signs of life: {self._registry}: {why}")
            else:
                self._changes.clear(tier)
