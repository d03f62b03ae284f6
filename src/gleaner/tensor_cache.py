"""The RPC server's cache of tensors on a node's own disk: bounded, and free of what was not written to its end.

ggml-rpc-server writes a tensor to its final name, looks at no error, and later takes any file of that name for good
weights. A kill in the middle of a first load would be answered with nonsense for ever. So files count only once a tier
that loaded them was ready: then they are brought to the disk, and a mark is written; what is younger than it goes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gleaner.journal import say

MARK = "whole"


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    written_ns: int
    used_ns: int


def _files(directory: Path) -> Iterator[_File]:
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(OSError):
                status = path.stat()
                if path != directory / MARK:
                    used = max(status.st_atime_ns, status.st_mtime_ns)
                    yield _File(path, status.st_size, status.st_mtime_ns, used)


def _remove(file: _File) -> bool:
    try:
        file.path.unlink()
    except FileNotFoundError:
        pass  # another one prunes here, too
    except OSError as error:
        say(f"cache: {file.path} cannot be removed: {error.strerror}")
        return False
    return True


def make_sound(directory: Path, limit_mib: int) -> bool:
    """Remove what may be torn, then what was used longest ago until the limit is kept; true when there is room for use.

    A disk that fills while tensors are written would tear them unseen: without room for all that the limit allows, the
    cache had better not be used.
    """
    try:
        whole_ns = (directory / MARK).stat().st_mtime_ns
    except OSError:
        whole_ns = -1
    kept = [file for file in _files(directory) if file.written_ns <= whole_ns or not _remove(file)]
    size, limit = sum(file.size for file in kept), limit_mib << 20
    for file in sorted(kept, key=lambda one: one.used_ns):
        if size <= limit:
            break
        if _remove(file):
            size -= file.size
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        say(f"cache: {directory} cannot be used: {error.strerror}")
        return False
    if free < limit - size:
        say(f"cache: {directory} has {free >> 20} MiB left, wanted {(limit - size) >> 20}: weights are sent anew")
        return False
    return True


def mark_whole(directory: Path) -> None:
    """All files that are there now are whole: bring them to the disk, and say so for the next start.

    That takes its time; what is written meanwhile, perhaps by a next start already, is not meant.
    """
    mark, now_ns = directory / MARK, time.time_ns()
    try:
        for file in _files(directory):
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        mark.touch(0o600)
        os.utime(mark, ns=(now_ns, now_ns))
    except OSError as error:
        say(f"cache: {directory} cannot be marked as whole: {error.strerror}")
