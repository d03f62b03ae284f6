"""The lab's layer-split tier, for tests: its processes, its streams, its networks."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import openai

from tests.lab import cluster, processes
from tests.lab.ansible import LAB_ID
from tests.lab.cluster import CONTROLLER, HEAD, SPLIT_PORT, THINKING, WORKERS

NODES = (HEAD, *WORKERS)
# "Within 10 s nothing is routed", and a stream ends within a second of that.
GONE_SECONDS = 10.0
STREAM_SECONDS = 1.0
# The packets of a cut network, and a container that starts from nothing.
BACK_SECONDS = 120.0


def head_pid() -> int:
    (pid,) = cluster.pids(HEAD, f"llama-server .*--alias {THINKING}[ ,]")
    return pid


def worker_pid(node: str = WORKERS[0]) -> int:
    (pid,) = cluster.pids(node, "ggml-rpc-server --host")
    return pid


def parts() -> dict[str, list[int]]:
    """What the tier has running on its nodes."""
    return {node: parts_of(node) for node in NODES}


def parts_of(node: str) -> list[int]:
    return cluster.pids(node, "ggml-rpc-server --host|llama-server .*--rpc ")


def wait_served() -> None:
    cluster.wait_served(BACK_SECONDS, SPLIT_PORT)


def client() -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://{cluster.address(CONTROLLER)}:{SPLIT_PORT}/v1", api_key="none", max_retries=0, timeout=60
    )


@dataclass
class Stream:
    """A long answer that is read in the background, as the official client sees it."""

    pieces: int = 0
    ended_at: float = 0.0
    error: BaseException | None = None
    done: bool = False
    """The stream said itself that it was whole."""
    thread: threading.Thread | None = field(default=None, repr=False)

    def begin(self) -> None:
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        cluster.wait_until("the stream flows", lambda: self.pieces > 5, 30, 0.05)

    def _read(self) -> None:
        try:
            answer = client().completions.create(
                model=THINKING, prompt="Once", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in answer:
                self.pieces += 1
            self.done = True
        except Exception as error:  # whatever the client makes of a broken answer
            self.error = error
        self.ended_at = time.monotonic()

    def join(self, seconds: float) -> None:
        assert self.thread is not None
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"the stream hangs after {self.pieces} pieces"


def traffic(node: str) -> tuple[int, int]:
    """Bytes that have come to a node over the RPC network, and that it has sent."""
    (link,) = json.loads(cluster.run(node, "ip -json -statistics link show dev rpc0"))
    return int(link["stats64"]["rx"]["bytes"]), int(link["stats64"]["tx"]["bytes"])


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def cut(node: str, *networks: str) -> Iterator[None]:
    """The node's cables to these networks (`m`: ssh, Slurm, HTTP; `r`: RPC) are pulled until the end of the block."""
    cables = [f"gl{LAB_ID}{network}{cluster.OCTETS[node]}" for network in networks]
    try:
        for cable in cables:
            ip("link", "set", cable, "down")
        yield
    finally:
        for cable in cables:
            ip("link", "set", cable, "up")


def assert_goes(stream: Stream | None, reachable: tuple[str, ...], before: dict[str, list[int]]) -> None:
    """Since now: soon not routed, the stream over by then, and nothing left of what was there on reachable nodes."""
    begin = time.monotonic()
    answers = cluster.watch(lambda seen: seen[-1].status == 503, GONE_SECONDS, port=SPLIT_PORT)
    cluster.assert_away(answers[-1])
    gone = time.monotonic()
    assert gone - begin < GONE_SECONDS
    if stream is not None:
        stream.join(GONE_SECONDS + STREAM_SECONDS - (gone - begin))
        assert stream.error is not None, "the stream ended as if it were whole"
        assert not stream.done
    for node in reachable:
        left = GONE_SECONDS - (time.monotonic() - begin)
        cluster.wait_until(f"nothing is left on {node}", functools.partial(is_clear, node, before), max(left, 0.1))


def is_clear(node: str, before: dict[str, list[int]]) -> bool:
    return not set(before[node]) & set(parts_of(node))


def says() -> str:
    """What the tier answers with, always the same: weights that are not whole say something else."""
    wish = {"model": THINKING, "prompt": "One, two, three,", "max_tokens": 12, "temperature": 0}
    answer = cluster.ask("/v1/completions", wish, port=SPLIT_PORT)
    assert answer.status == 200, answer
    return str(answer.json["choices"][0]["text"])


def settled() -> tuple[dict[str, list[int]], str]:
    """The tier's processes and what it says, once it serves."""
    wait_served()
    return parts(), says()


def assert_back(said: str) -> None:
    wait_served()
    assert says() == said


def reaches(node: str) -> bool:
    cluster.forget(node)
    with contextlib.suppress(RuntimeError):
        return bool(cluster.host(node).run("true").rc == 0)
    return False


def processes_of(node: str) -> set[int]:
    """The tier's processes on a node, by the machine's own numbers: also while nobody reaches the node."""
    machine = json.loads((processes.LABS / LAB_ID / f"hosts/{node}/process.json").read_text())["pid"]
    names = {pid: " ".join(processes.command(pid)) for pid in processes.with_descendants({int(machine)})}
    # numactl, agents and shells name the programs, too, but not as what they are.
    ours = re.compile(r"\S*/bin/(ggml-rpc-server|llama-server) .*--(rpc|cache)")
    return {pid for pid, words in names.items() if ours.match(words)}


def streaming() -> Stream:
    stream = Stream()
    stream.begin()
    return stream


def lose_process(node: str, signal: str, *, busy: bool) -> None:
    """The tier goes whole, and comes back, when its process on a node gets this signal."""
    before, said = settled()
    stream = streaming() if busy else None
    (pid,) = before[node]
    cluster.run(node, f"kill -{signal} {pid}")
    assert_goes(stream, NODES, before)
    assert_back(said)


def lose_network(node: str, networks: str) -> None:
    """The same when a node is cut off from these networks; and the node itself ends what it has."""
    before, said = settled()
    stream = streaming()
    reachable = tuple(name for name in NODES if name != node or "m" not in networks)
    assert processes_of(node), "they are not seen from below"
    with cut(node, *networks):
        assert_goes(stream, reachable, before)
        # The agent there hears nobody, and ends what it started; seen from the machine below.
        cluster.wait_until("the node has ended its own part", lambda: not processes_of(node), GONE_SECONDS)
    cluster.wait_until("the node is reached again", lambda: reaches(node), 30)
    assert_back(said)


def lose_power(node: str) -> None:
    """The same when a node loses its power for a moment."""
    before, said = settled()
    stream = streaming()
    boot = cluster.run(node, "stat --format=%Y /proc/1")
    cluster.cut_power(node)
    assert_goes(stream, tuple(name for name in NODES if name != node), before)
    cluster.wait_until("the node is there again", lambda: reaches(node), 60, 1)
    assert cluster.run(node, "stat --format=%Y /proc/1") != boot
    assert_back(said)
