"""Verified model files of this node, for other nodes of the site (`gleaner lend`).

A node that is new or was replaced gets 45 GB from its neighbour, not from the other side of a slow line. A file is
asked for by its sha256, so that whoever asks can tell whether it is the right one. systemd holds the socket and starts
the program for the first request; it ends by itself, so that nothing runs beside a paying job without need.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import http.client
import http.server
import os
import re
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gleaner import files
from gleaner.journal import say

EXIT_REFUSED = 2

# The first socket that systemd hands over (sd_listen_fds(3)).
FIRST_SOCKET = 3
ASK_SECONDS = 3.0
IDLE_SECONDS = 60.0
_RANGE = re.compile(r"bytes=(\d+)-")
_PATH = re.compile(r"/([0-9a-f]{64})")


def permit(key: str, sha256: str) -> str:
    """What shows that one is of this site, without showing the key: it opens this one file."""
    return hmac.new(bytes.fromhex(key), f"lend {sha256}".encode(), hashlib.sha256).hexdigest()


# Asking


@dataclass(frozen=True)
class Lender:
    """A node that has a file."""

    place: str
    url: str
    headers: tuple[tuple[str, str], ...]


def who_has(lenders: Sequence[str], sha256: str) -> Iterator[Lender]:
    """Nodes that lend the file, each asked when the one before did not do; none without the key of the site."""
    if not lenders:
        return
    try:
        headers = (("Authorization", f"Bearer {permit(files.read_key(files.server_key_path()), sha256)}"),)
    except ValueError as error:
        print(f"no other node is asked: {error}", flush=True)
        return
    for base in lenders:
        parts = urllib.parse.urlsplit(base)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=ASK_SECONDS)
        try:
            connection.request("HEAD", f"/{sha256}", headers=dict(headers))
            if connection.getresponse().status == http.HTTPStatus.OK:
                yield Lender(parts.netloc, f"{base}/{sha256}", headers)
        except (OSError, http.client.HTTPException):
            # Down, or not there yet: the next one, or the source, will do.
            continue
        finally:
            connection.close()


# Lending


def file_of(directory: Path, sha256: str) -> Path | None:
    """The visible file whose content was found to have this sum, if it is still the one that was read."""
    from gleaner import stage

    for name, entry in stage.verified_in(directory).items():
        # One that cannot be read does not hide the others.
        with contextlib.suppress(OSError, KeyError, TypeError, AttributeError):
            sums, marks = entry["sums"], entry["files"]
            for file_name, sum_ in zip(sorted(marks), sums):
                path = Path(directory, file_name) if len(sums) == 1 else Path(directory, name, file_name)
                if sum_ == sha256 and stage.fingerprint(path)[file_name] == marks[file_name]:
                    return path
    return None


class Server(http.server.ThreadingHTTPServer):
    """Takes over a listening socket; knows when it last had something to do."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, directory: Path, key: str) -> None:
        super().__init__(listening.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.directory, self.key = directory, key
        self.lock = threading.Lock()
        self.busy, self.idle_since = 0, time.monotonic()

    def mark(self, change: int) -> None:
        with self.lock:
            self.busy += change
            self.idle_since = time.monotonic()

    def serve_until_idle(self, seconds: float) -> None:
        self.timeout = min(seconds, 1.0)
        while self.busy or time.monotonic() - self.idle_since < seconds:
            self.handle_request()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    timeout = 60.0

    def handle(self) -> None:
        self.server.mark(+1)
        try:
            super().handle()
        except OSError as error:
            say(f"{self.client_address[0]} left: {error}")
        finally:
            self.server.mark(-1)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        asked = _PATH.fullmatch(self.path)
        given = self.headers.get("Authorization", "")
        wanted = f"Bearer {permit(self.server.key, asked[1] if asked else '')}"
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            self.send_error(http.HTTPStatus.UNAUTHORIZED)
            return
        path = file_of(self.server.directory, asked[1]) if asked else None
        if path is None:
            self.send_error(http.HTTPStatus.NOT_FOUND)
            return
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            match = _RANGE.fullmatch(self.headers.get("Range", ""))
            start = int(match[1]) if match else 0
            if start > size:
                self.send_error(http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
            self.send_response(http.HTTPStatus.PARTIAL_CONTENT if start else http.HTTPStatus.OK)
            self.send_header("Content-Length", str(size - start))
            self.end_headers()
            if with_body:
                say(f"lends {path.name} to {self.client_address[0]}, from byte {start}")
                self.wfile.flush()
                # By the socket's own method, which waits where the receiver is slow.
                self.connection.sendfile(stream, start)

    def log_message(self, format: str, *args: object) -> None:
        """Only what is lent is worth a line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Started by gleaner-lend.socket, which hands the socket over."
    parser.add_argument("--directory", type=Path, required=True, help="folder of the models")


def run(args: argparse.Namespace) -> int:
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        print("error: no socket was handed over: `gleaner lend` is started by gleaner-lend.socket", file=sys.stderr)
        return EXIT_REFUSED
    try:
        key = files.read_key(files.server_key_path())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    with socket.socket(fileno=FIRST_SOCKET) as listening:
        Server(listening, args.directory, key).serve_until_idle(IDLE_SECONDS)
    return 0
