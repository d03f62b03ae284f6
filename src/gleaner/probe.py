"""A GET that never blocks, for loops that watch several servers at once."""

from __future__ import annotations

import errno
import http.client
import io
import os
import selectors
import socket
import time

from gleaner.heartbeat import let_go

BODY_LIMIT = 4 << 20


class _Received:
    """Bytes in the place of a socket, for http.client's parser."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


class Probe:
    """One request. Register with a selector, call `advance` on events and ticks until `done`.

    `status` is the HTTP status or None; `failure` is `refused`, `timeout` or an error text. `connected`: the other host
    answered at all, since its kernel does so even for a program that hangs; it has `connect_timeout` seconds for that.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        address: str,
        port: int,
        path: str,
        timeout: float,
        key: str = "",
        connect_timeout: float | None = None,
    ) -> None:
        self._selector = selector
        now = time.monotonic()
        self._deadline = now + timeout
        self._connect_deadline = self._deadline if connect_timeout is None else now + connect_timeout
        lines = [f"GET {path} HTTP/1.1", f"Host: {address}:{port}", "Connection: close"]
        lines += [f"Authorization: Bearer {key}"] if key else []
        self._request = "".join(f"{line}\r\n" for line in [*lines, ""]).encode()
        self._answer = bytearray()
        self.status: int | None = None
        self.body = b""
        self.failure: str | None = None
        self.done = False
        self.connected = False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        code = self._socket.connect_ex((address, port))
        if code not in (0, errno.EINPROGRESS):
            self._fail(code)
            return
        selector.register(self._socket, selectors.EVENT_WRITE, self)

    def advance(self) -> bool:
        """Do what can be done now; true when the request is over."""
        if self.done:
            return True
        try:
            self._step()
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(error.errno or errno.EIO)
        if not self.done and time.monotonic() >= (self._deadline if self.connected else self._connect_deadline):
            self.failure = "timeout"
            self.close()
        return self.done

    def _step(self) -> None:
        if self._request:
            code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self._fail(code)
                return
            try:
                self._request = self._request[self._socket.send(self._request) :]
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
                return
            self.connected = True
            if self._request:
                return
            self._selector.modify(self._socket, selectors.EVENT_READ, self)
        while True:
            data = self._socket.recv(65536)
            self._answer += data
            if self._parse(ended=not data):
                self.close()
                return
            if not data or len(self._answer) > BODY_LIMIT:
                self.failure = "answer is not HTTP, or cut short, or too long"
                self.close()
                return

    def _parse(self, ended: bool) -> bool:
        """Take the answer if it is whole; `ended` says that the server closed the connection."""
        if b"\r\n\r\n" not in self._answer:
            return False
        response = http.client.HTTPResponse(_Received(bytes(self._answer)))  # type: ignore[arg-type]
        try:
            response.begin()
            if response.length is None and not response.chunked and not ended:
                return False
            body = response.read()
        except (http.client.HTTPException, ValueError):
            return False
        self.status, self.body = response.status, body
        return True

    def _fail(self, code: int) -> None:
        self.failure = "refused" if code == errno.ECONNREFUSED else os.strerror(code)
        self.close()

    def close(self) -> None:
        if not self.done:
            self.done = True
            let_go(self._selector, self._socket)
