"""A layer-split tier is whole or not there, whatever of it dies, freezes or is cut off; and it comes back by itself."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable

import pytest

from tests.lab import cluster, split
from tests.lab.cluster import HEAD, SPLIT_PORT, THINKING, WORKERS, run

(WORKER,) = WORKERS


@pytest.fixture(autouse=True)
def _served() -> None:
    split.wait_served()
    assert cluster.complete(THINKING, port=SPLIT_PORT).status == 200


def assert_goes(stream: split.Stream | None, reachable: tuple[str, ...], before: dict[str, list[int]]) -> None:
    """Since now: soon not routed, the stream over by then, and nothing left of what was there on reachable nodes."""
    begin = time.monotonic()
    answers = cluster.watch(lambda seen: seen[-1].status == 503, split.GONE_SECONDS, port=SPLIT_PORT)
    cluster.assert_away(answers[-1])
    gone = time.monotonic()
    assert gone - begin < split.GONE_SECONDS
    if stream is not None:
        stream.join(split.GONE_SECONDS + split.STREAM_SECONDS - (gone - begin))
        assert stream.error is not None, "the stream ended as if it were whole"
        assert not stream.done
    for node in reachable:
        cluster.wait_until(f"nothing is left on {node}", functools.partial(is_clear, node, before), split.GONE_SECONDS)


def is_clear(node: str, before: dict[str, list[int]]) -> bool:
    return not set(before[node]) & set(split.parts_of(node))


def assert_back() -> None:
    split.wait_served()
    assert cluster.complete(THINKING, 4, SPLIT_PORT).status == 200


def kill(node: str, find: Callable[[], int], signal: str) -> None:
    run(node, f"kill -{signal} {find()}")


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "generating"])
@pytest.mark.parametrize("signal", ["KILL", "STOP"])
@pytest.mark.parametrize(("node", "find"), [(WORKER, split.worker_pid), (HEAD, split.head_pid)], ids=["worker", "head"])
def test_a_process_that_dies_or_freezes(node: str, find: Callable[[], int], signal: str, busy: bool) -> None:
    before = split.parts()
    stream = split.Stream() if busy else None
    if stream is not None:
        stream.begin()
    kill(node, find, signal)
    assert_goes(stream, split.NODES, before)
    assert_back()


@pytest.mark.parametrize("networks", ["m", "r", "mr"], ids=["cluster-network", "rpc-network", "both-networks"])
@pytest.mark.parametrize("node", [WORKER, HEAD], ids=["worker", "head"])
def test_a_node_that_is_cut_off(node: str, networks: str) -> None:
    before = split.parts()
    stream = split.Stream()
    stream.begin()
    reachable = tuple(name for name in split.NODES if name != node or "m" not in networks)
    with split.cut(node, *networks):
        assert_goes(stream, reachable, before)
        # Long enough for the agent there, which hears nobody, to end what it started.
        time.sleep(split.GONE_SECONDS / 2)
    cluster.wait_until("the node is reached again", lambda: reaches(node), 30)
    assert is_clear(node, before), "left over on the node that was cut off"
    assert_back()


def reaches(node: str) -> bool:
    cluster.forget(node)
    with contextlib.suppress(RuntimeError):
        return bool(cluster.host(node).run("true").rc == 0)
    return False


@pytest.mark.parametrize("node", [WORKER, HEAD], ids=["worker", "head"])
def test_a_node_that_is_rebooted(node: str) -> None:
    before = split.parts()
    stream = split.Stream()
    stream.begin()
    boot = run(node, "stat --format=%Y /proc/1")
    cluster.host(node).run("systemctl reboot --force --force")
    assert_goes(stream, tuple(name for name in split.NODES if name != node), before)
    cluster.wait_until("the node is there again", lambda: reaches(node), 60, 1)
    assert run(node, "stat --format=%Y /proc/1") != boot
    assert_back()
