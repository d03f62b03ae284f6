"""One line per change for people, and READY/WATCHDOG for systemd."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable

# Whose lines these are, and what takes them instead of stderr.
_label = ""
_taker: Callable[[str], object] | None = None


def sign(label: str) -> None:
    """Have each line begin with this, behind its time."""
    global _label
    _label = label


def divert(taker: Callable[[str], object]) -> None:
    """Have lines taken by this instead of written to stderr; it adds what they begin with."""
    global _taker
    _taker = taker


def stamp(at: float | None = None) -> str:
    """A unix time, or now, as lines in files have it: UTC with milliseconds."""
    millis = int((time.time() if at is None else at) * 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(millis // 1000)) + f".{millis % 1000:03d}Z"


def say(text: str) -> None:
    """Write one line to stderr; the journal stamps lines itself, a log file gets UTC with milliseconds.

    A full or vanished log file must not end a program that holds GPUs, so write errors are dropped.
    """
    # One record, one line: text may carry a foreign error message.
    line = " ".join(text.split())
    if _taker is not None:
        _taker(line)
        return
    if _label:
        line = f"{_label}: {line}"
    if not _to_journal():
        line = f"{stamp()} {line}"
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return


def _to_journal() -> bool:
    """stderr is the very stream that systemd named, not one that a child redirected."""
    try:
        stat = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


class OnChange:
    """Says a text for a key only when it differs from the last one said for that key."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def say(self, key: str, text: str) -> bool:
        """Say the text if it is new for the key; true when it was."""
        if self._last.get(key) == text:
            return False
        self._last[key] = text
        say(text)
        return True

    def clear(self, key: str) -> bool:
        """Forget the key; true when something had been said for it."""
        return self._last.pop(key, None) is not None


def notify(state: str) -> None:
    """Tell systemd `READY=1`, `WATCHDOG=1` or `STATUS=…`; does nothing outside a Type=notify unit."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            say(f"systemd notification failed: {error}")
