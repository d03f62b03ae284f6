"""The line between an agent and its supervisor: JSON lines over TCP, one beat a second each way.

The agent's first line carries the token of the job (GLEANER_TOKEN). Whoever hears nothing for
SILENCE_SECONDS acts as if the other were dead. Where a tier needs two networks there is a line over each: the first
one carries orders and answers, the other only beats, so that a cut of either network is noticed.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import selectors
import signal
import socket
import time
from typing import Any

# Of the messages; agent and supervisor of one job have to have the same.
VERSION = 5
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 5.0
LINE_LIMIT = 64 << 10
GREETING_LIMIT = 1024

Message = dict[str, Any]


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel:
    """One non-blocking connection that carries JSON objects, one a line."""

    def __init__(self, sock: socket.socket, limit: int = LINE_LIMIT) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.limit = limit
        self.heard = time.monotonic()
        self._in = bytearray()
        self._out = bytearray()

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self.heard

    def mind_silence(self) -> None:
        """ChannelClosed when the other side has not been heard for too long."""
        if self.silent_seconds > SILENCE_SECONDS:
            raise ChannelClosed(f"silent for {SILENCE_SECONDS:g} s")

    def receive(self) -> list[Message]:
        """Whole messages that are here; ValueError for what is no message, ChannelClosed at the end."""
        closed = False
        # What is beyond the limit waits in the socket: a sender that never pauses must not hold us here.
        while not closed and len(self._in) <= self.limit:
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                break
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            closed = not data
            self._in += data
        if len(self._in) > self.limit and b"\n" not in self._in:
            raise ValueError(f"line longer than {self.limit} bytes")
        messages = []
        while b"\n" in self._in:
            line, _, rest = self._in.partition(b"\n")
            self._in = bytearray(rest)
            if len(line) > self.limit:
                raise ValueError(f"line longer than {self.limit} bytes")
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError("line is not JSON") from None
            if not isinstance(message, dict):
                raise ValueError("line is not a JSON object")
            messages.append(message)
        if messages:
            self.heard = time.monotonic()
        if closed and not messages:
            raise ChannelClosed("connection closed")
        return messages

    def send(self, message: Message) -> None:
        """Send, or keep for `flush` what the network does not take now."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(line) > LINE_LIMIT or len(self._out) > 4 * LINE_LIMIT:
            raise ChannelClosed("the other side does not read")
        self._out += line
        self.flush()

    def flush(self) -> None:
        while self._out:
            try:
                sent = self.socket.send(self._out)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            del self._out[:sent]

    def close(self) -> None:
        self.socket.close()


def let_go(selector: selectors.BaseSelector, sock: socket.socket) -> None:
    """Close a socket that a selector may watch."""
    with contextlib.suppress(KeyError, ValueError):
        selector.unregister(sock)
    sock.close()


def listen(address: str) -> socket.socket:
    """A listening socket on a port that the kernel chooses."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.bind((address, 0))
    sock.listen(16)
    sock.setblocking(False)
    return sock


def greeting(token: str, node: str, network: int = 0) -> Message:
    return {"hello": VERSION, "token": token, "node": node, "network": network}


def greeted_by(message: Message, token: str) -> tuple[str, int]:
    """The node that sends this first line, and over which network; ValueError when it is no greeting of ours."""
    got, node, network = message.get("token"), message.get("node"), message.get("network")
    if "hello" not in message or not isinstance(got, str) or not isinstance(node, str):
        raise ValueError("first line is no greeting")
    if not hmac.compare_digest(got.encode(), token.encode()):
        raise ValueError("wrong token")
    if message["hello"] != VERSION:
        raise ValueError(f"{node} has another version of gleaner: run playbooks/tiers.yml without --limit")
    if not isinstance(network, int):
        raise ValueError("first line names no network")
    return node, network


class Signals:
    """Signals as bytes on a socket, for a selector loop."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self.socket, self._writer = socket.socketpair()
        self.socket.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in numbers}

    def receive(self) -> set[int]:
        got: set[int] = set()
        with contextlib.suppress(BlockingIOError):
            got.update(self.socket.recv(4096))
        return got

    def deafen(self) -> None:
        """For a program that is about to exit: late signals are still caught, and told to nobody."""
        signal.set_wakeup_fd(-1)

    def close(self) -> None:
        """Give the signals back. Not for a program that is about to exit: a late TERM must not kill it."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.socket.close()
        self._writer.close()


def node_name() -> str:
    """Slurm's name for this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]
