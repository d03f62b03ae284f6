"""The lab's layer-split tier, for tests: its processes, its streams, its networks."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import openai

from tests.lab import cluster
from tests.lab.ansible import LAB_ID
from tests.lab.cluster import CONTROLLER, HEAD, SPLIT_JOB, SPLIT_PORT, THINKING, WORKERS

NODES = (HEAD, *WORKERS)
# "Within 10 s nothing is routed", and a stream ends within a second of that.
GONE_SECONDS = 10.0
STREAM_SECONDS = 1.0
# The packets of a cut network, and a container that starts from nothing.
BACK_SECONDS = 120.0


def head_pid() -> int:
    (pid,) = cluster.pids(HEAD, f"llama-server .*--alias {THINKING} ")
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


def job_is_back(before: cluster.Job) -> bool:
    job = cluster.tier_job(SPLIT_JOB)
    return job is not None and (job.id, job.restarts) != (before.id, before.restarts)
