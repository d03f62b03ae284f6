"""The line on which a supervisor tells the gateway that its tier is withdrawn, and hears when nothing is routed to it.

A shared file system may show the removal of a record seconds later, and Slurm is asked once a second. The gateway
connects to the supervisor of what it routes: supervisors know no gateway. Without the line everything goes on, slower.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import selectors
import socket
import time

from gleaner.heartbeat import Channel, ChannelClosed, Message, let_go

# Of the messages below.
VERSION = 1
# Nothing is said on a line for days: the kernel asks whether the other end is there, and firewalls see it live.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
CONNECT_SECONDS = 2.0

Run = tuple[int, int]


def _token(key: str, run: Run) -> str:
    """Shows that the gateway has the key of llama-server, without showing it."""
    return hmac.new(key.encode(), "gateway {} {}".format(*run).encode(), "sha256").hexdigest()


def greeting(key: str, run: Run) -> Message:
    return {"gateway": VERSION, "token": _token(key, run)}


def is_greeting(message: Message) -> bool:
    return "gateway" in message


def check_greeting(message: Message, key: str, run: Run) -> None:
    """ValueError when the sender is not the gateway of this run's tier."""
    token = message.get("token")
    if not key or not isinstance(token, str) or not hmac.compare_digest(token.encode(), _token(key, run).encode()):
        raise ValueError("wrong token of a gateway")
    if message["gateway"] != VERSION:
        raise ValueError("the gateway has another version of gleaner: run playbooks/gateway.yml")


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel notice an end that is gone without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def withdrawn(seq: int) -> Message:
    """From the supervisor: what was published is void, up to the record with this `seq`."""
    return {"withdrawn": seq}


def away(seq: int) -> Message:
    """The gateway's answer: it takes no request for the tier any more. One whose body still comes may follow."""
    return {"away": seq}


class Line:
    """The gateway's end, which never blocks. Call `advance` on events and ticks until `done`."""

    def __init__(self, selector: selectors.BaseSelector, run: Run, address: str, port: int, key: str) -> None:
        self.run = run
        self.done = False
        self.failure = ""
        """Why there is no line any more."""
        self.withdrawn: int | None = None
        """The last `seq` that is void, once the supervisor has said so."""
        self._answered: int | None = None
        self._selector = selector
        self._deadline = time.monotonic() + CONNECT_SECONDS
        self._hello = greeting(key, run)
        self._channel: Channel | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        code = self._socket.connect_ex((address, port))
        selector.register(self._socket, selectors.EVENT_WRITE)
        if code not in (0, errno.EINPROGRESS):
            self._fail(code)

    def advance(self) -> None:
        if self.done:
            return
        try:
            if self._channel is None and not self._connected():
                return
            assert self._channel is not None
            self._channel.flush()
            for message in self._channel.receive():
                seq = message.get("withdrawn")
                if isinstance(seq, int):
                    self.withdrawn = seq
        except (ValueError, ChannelClosed) as error:
            self.failure = str(error)
            self.close()

    def _connected(self) -> bool:
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(code)
            return False
        try:
            self._socket.getpeername()
        except OSError:
            if time.monotonic() >= self._deadline:
                self._fail(errno.ETIMEDOUT)
            return False
        self._channel = Channel(self._socket)
        keep_alive(self._socket)
        self._selector.modify(self._socket, selectors.EVENT_READ)
        self._channel.send(self._hello)
        return True

    def answer(self) -> None:
        """Nothing is routed to what was withdrawn."""
        if self._channel is None or self.done or self.withdrawn is None or self._answered == self.withdrawn:
            return
        self._answered = self.withdrawn
        with contextlib.suppress(ChannelClosed):
            self._channel.send(away(self.withdrawn))

    def _fail(self, code: int) -> None:
        self.failure = os.strerror(code)
        self.close()

    def close(self) -> None:
        if not self.done:
            self.done = True
            let_go(self._selector, self._socket)
