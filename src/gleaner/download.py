"""A file from its source to a disk: resumed after an interruption, measured, hashed on its way."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gleaner import files

PROGRESS_SECONDS = 5.0
NETWORK_SECONDS = 60.0
ATTEMPTS = 5
GIB = 1 << 30
# Left free on the disk beside the file, so that logs and caches still find room.
SPARE_BYTES = 64 << 20


class DownloadError(Exception):
    """The file cannot be brought; the text says why and what cures it."""


@dataclass(frozen=True)
class Source:
    """What is brought: its name for people, where it is, what it must be."""

    name: str
    url: str
    sha256: str
    size_bytes: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    """More headers of the requests for it, which go to this very place: by no proxy, and not on to another one."""


class Progress:
    """A line about every five seconds, and one at the end."""

    def __init__(self, name: str, total: int | None) -> None:
        self._name, self._total = name, total
        self._at = time.monotonic()

    def show(self, done: int, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._at < PROGRESS_SECONDS:
            return
        self._at = now
        if self._total:
            share = f"{100 * done // self._total} % {done / GIB:.1f}/{self._total / GIB:.1f} GiB"
        else:
            share = f"{done / GIB:.1f} GiB"
        print(f"{self._name} {share}", flush=True)


def require_space(name: str, folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted + SPARE_BYTES:
        raise DownloadError(
            f"{folder}: got {free} bytes free, want {wanted + SPARE_BYTES} for {name}: "
            "free space on that disk or do without the file"
        )


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


@contextlib.contextmanager
def opened(source: Source, offset: int) -> Iterator[tuple[BinaryIO | http.client.HTTPResponse, int, int | None]]:
    """The source from `offset`: stream, offset that it really starts at, whole size if known."""
    parts = urllib.parse.urlsplit(source.url)
    if parts.scheme == "file":
        path = Path(urllib.parse.unquote(parts.path))
        with path.open("rb") as stream:
            stream.seek(offset)
            yield stream, offset, path.stat().st_size
        return
    request = urllib.request.Request(source.url, headers={"User-Agent": "gleaner", **dict(source.headers)})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    here: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({}), _Stay()] if source.headers else []
    opener = urllib.request.build_opener(*here)
    with opener.open(request, timeout=NETWORK_SECONDS) as response:
        length = response.headers.get("Content-Length", "")
        start = offset if response.status == 206 else 0
        yield response, start, start + int(length) if length.isdigit() else None


def fetch(source: Source, part: Path) -> str:
    """Bring the source into `part`, resuming what is there; its sha256, right or wrong."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _fetch_once(source, part)
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                # The part is as long as the source, or longer: the hash decides, or it starts anew.
                digest = files.hash_file(part, Progress(source.name, None).show)
                if digest == source.sha256:
                    return digest
                part.unlink()
                continue
            if error.code < 500 or attempt == ATTEMPTS:
                raise DownloadError(f"{source.url}: HTTP {error.code} {error.reason}") from None
        # Before Python 3.10 socket.timeout is not TimeoutError.
        except (urllib.error.URLError, http.client.HTTPException, socket.timeout, ConnectionError) as error:
            if attempt == ATTEMPTS:
                raise DownloadError(f"{source.url}: {error}; what came is kept for the next run") from None
        print(f"{source.name} interrupted, resuming ({attempt} of {ATTEMPTS - 1})", flush=True)
        time.sleep(min(2**attempt, 10) / 2)
    raise DownloadError(f"{source.url}: no whole answer in {ATTEMPTS} attempts; what came is kept for the next run")


def _fetch_once(source: Source, part: Path) -> str:
    have = part.stat().st_size if part.exists() else 0
    with opened(source, have) as (stream, start, total), part.open("r+b" if have else "wb") as target:
        if total is not None:
            require_space(source.name, part.parent, total - have)
            if source.size_bytes is not None and total != source.size_bytes:
                raise DownloadError(
                    f"{source.url}: got {total} bytes, want size_bytes={source.size_bytes}: "
                    "the source has changed, or the inventory is wrong"
                )
        target.truncate(start)
        progress = Progress(source.name, total)
        digest, done = hashlib.sha256(), 0
        while done < start and (data := target.read(min(files.CHUNK, start - done))):
            digest.update(data)
            done += len(data)
            progress.show(done)
        target.seek(start)
        most = source.size_bytes or total
        while data := stream.read(files.CHUNK):
            if most is None:
                # Nobody knows how much comes: the disk is others', too.
                require_space(source.name, part.parent, len(data))
            elif done + len(data) > most:
                raise DownloadError(f"{source.url}: sends more than {most} bytes: the source has changed")
            target.write(data)
            digest.update(data)
            done += len(data)
            progress.show(done)
        target.flush()
        os.fsync(target.fileno())
        if total is not None and done < total:
            raise http.client.IncompleteRead(b"", total - done)
        progress.show(done, last=True)
    return digest.hexdigest()
