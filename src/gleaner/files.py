"""Small file helpers: whole-or-not writes, bounded reads, our own command line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

JSON_LIMIT = 1 << 20
CHUNK = 4 << 20
# What llama-server demands of whoever asks it. On a node it is the service user's, on the controller root's.
SERVER_KEY = Path("/etc/gleaner/server.key")
KEY_LIMIT = 1024
# The program as a node has it; a link to the version that was installed last.
PROGRAM = Path("/usr/local/bin/gleaner")


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` so that a reader sees the old bytes or the new ones, nothing between."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as stream:
            # The caller's umask must not hide from other users what they are to read.
            os.fchmod(fd, mode)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_bounded(path: Path, limit: int) -> bytes:
    """The file's bytes; ValueError when it is no regular file or longer than `limit`."""
    # O_NONBLOCK: a FIFO put in the file's place must not hang the reader.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: longer than {limit} bytes")
    return data


def hash_file(path: Path, told: Callable[[int], object] = lambda _: None) -> str:
    """The file's sha256; `told` is called with the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
            done += len(data)
            told(done)
    return digest.hexdigest()


def load_config(path: Path) -> dict[str, Any]:
    """A JSON object with `"v": 1`; ValueError names the file and what is wrong."""
    try:
        value = json.loads(read_bounded(path, JSON_LIMIT))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON document: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, want an object")
    if value.get("v") != 1:
        raise ValueError(f"{path}: v: got {value.get('v')!r}, want 1: written by another version of gleaner?")
    return value


def server_key_path() -> Path:
    """Where this host has the key of llama-server; tests have it elsewhere."""
    return Path(os.environ.get("GLEANER_SERVER_KEY_FILE") or SERVER_KEY)


def read_key(path: Path) -> str:
    """The key of llama-server; ValueError names the file and what is wrong, never the key."""
    try:
        key = read_bounded(path, KEY_LIMIT).decode("ascii", errors="replace").strip()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): run playbooks/tiers.yml") from None
    if not re.fullmatch(r"[0-9a-f]{64}", key):
        raise ValueError(f"{path}: got {len(key)} characters, want 64 hexadecimal digits: run playbooks/tiers.yml")
    return key


def own_file() -> str:
    """The file without which `own_command` cannot work."""
    home = Path(__file__).resolve().parent.parent
    return str(home) if home.is_file() else sys.executable


def own_command() -> list[str]:
    """The command line that starts this very program, from a zipapp or from a source tree."""
    home = own_file()
    return [sys.executable, "-m", "gleaner"] if home == sys.executable else [sys.executable, home]
