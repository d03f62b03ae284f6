"""The line between agent and supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from gleaner import heartbeat
from gleaner.heartbeat import Channel, ChannelClosed


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    with (
        contextlib.closing(heartbeat.listen("127.0.0.1")) as listener,
        socket.create_connection(listener.getsockname()) as far,
    ):
        near, _ = listener.accept()
        with contextlib.closing(Channel(near)) as channel:
            yield channel, far


def receive(channel: Channel) -> list[heartbeat.Message]:
    for _ in range(200):
        if messages := channel.receive():
            return messages
        time.sleep(0.005)
    raise AssertionError("nothing came")


def test_whole_lines_only(pair: tuple[Channel, socket.socket]) -> None:
    channel, far = pair
    far.sendall(b'{"beat"')
    time.sleep(0.05)
    assert channel.receive() == []
    far.sendall(b':1}\n{"beat":2}\n{"be')
    assert receive(channel) == [{"beat": 1}, {"beat": 2}]
    far.sendall(b'at":3}\n')
    far.close()
    assert receive(channel) == [{"beat": 3}]
    with pytest.raises(ChannelClosed):
        receive(channel)


@pytest.mark.parametrize("line", [b"no\n", b"[]\n", b"1\n", b"\xff\n", b"[" * 50000 + b"\n", b"x" * 70000])
def test_garbage_is_an_error(pair: tuple[Channel, socket.socket], line: bytes) -> None:
    channel, far = pair
    far.sendall(line)
    with pytest.raises(ValueError, match="line"):
        receive(channel)


def test_sender_that_never_pauses_does_not_hold_the_reader(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    channel.limit = 1024

    class Flood:
        def recv(self, size: int) -> bytes:
            self.read = getattr(self, "read", 0) + size
            assert self.read < 1 << 24, "still reading"
            return b"{}\n" * (size // 3)

    flood, real = Flood(), channel.socket
    channel.socket = flood  # type: ignore[assignment]
    try:
        assert channel.receive()[0] == {}
    finally:
        channel.socket = real


def test_silence_is_measured(pair: tuple[Channel, socket.socket]) -> None:
    channel, far = pair
    time.sleep(0.2)
    assert channel.silent_seconds >= 0.2
    far.sendall(b"{}\n")
    receive(channel)
    assert channel.silent_seconds < 0.2


def test_reader_that_stops_reading_is_closed_not_waited_for(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    began = time.monotonic()

    def fill() -> None:
        for _ in range(1000):
            channel.send({"fill": "x" * 60000})

    with pytest.raises(ChannelClosed, match="does not read"):
        fill()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"hello": heartbeat.VERSION},
        {"token": "t", "node": "n", "network": 0},
        {"hello": heartbeat.VERSION, "token": 5, "node": "n", "network": 0},
        {"hello": heartbeat.VERSION, "token": "wrong", "node": "n", "network": 0},
        {"hello": heartbeat.VERSION, "token": "t", "node": None, "network": 0},
        {"hello": heartbeat.VERSION, "token": "t", "node": "n"},
    ],
)
def test_greeting_without_the_token_is_refused(message: heartbeat.Message) -> None:
    with pytest.raises(ValueError, match=r"token|greeting|network"):
        heartbeat.greeted_by(message, "t")


def test_greeting_of_another_version_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"^vasp-02 has another version of gleaner: run playbooks/tiers.yml without"):
        heartbeat.greeted_by({"hello": 1, "token": "t", "node": "vasp-02"}, "t")


def test_greeting_names_the_node_and_the_network() -> None:
    assert heartbeat.greeted_by(heartbeat.greeting("t", "vasp-02"), "t") == ("vasp-02", 0)
    assert heartbeat.greeted_by(heartbeat.greeting("t", "vasp-02", 1), "t") == ("vasp-02", 1)


def test_signals_wake_the_loop() -> None:
    with contextlib.closing(heartbeat.Signals(signal.SIGUSR1)) as signals:
        assert signals.receive() == set()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.receive() == {signal.SIGUSR1}
