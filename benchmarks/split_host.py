"""Runs llama-server on the head's node for `benchmarks.split`: alone, over RPC to itself, and over other nodes.

Reads one JSON object from the file that it is given: ``bin``, the folder of the programs; ``arguments`` for each way,
where ``RPC-HERE`` and ``RPC`` stand for endpoints; ``endpoints`` and ``address``, the workers' and this node's on the
network between them; ``environment``, ``threads``, ``prompt_tokens``, ``answer_tokens`` and ``rounds``. Writes one line
of JSON for each measurement, or one that says what failed. Standard library only: it runs where the engine is, under
the node's own Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import sizing_host

WORKER_SECONDS = 60
ANSWER_SECONDS = 900
WARM_UP_TOKENS = 16
# Where /proc/net/dev has them.
COUNTERS = {"rx_bytes": 0, "rx_packets": 1, "tx_bytes": 8, "tx_packets": 9}


def interface_of(address: str, shown: str) -> str:
    """The interface that has an address, by what `ip -oneline address` shows."""
    found = re.search(rf"^\d+: +(\S+) +inet +{re.escape(address)}/", shown, re.MULTILINE)
    if found is None:
        raise ValueError(f"{address}: no interface of this node has it; wanted the node's rpc_address")
    return found[1]


def counters(interface: str) -> dict[str, int]:
    """Bytes and packets in both directions, since the interface came up."""
    # Not from /sys, which may be that of another network namespace.
    lines = Path("/proc/net/dev").read_text().splitlines()
    (values,) = (line.partition(":")[2].split() for line in lines if line.partition(":")[0].strip() == interface)
    return {name: int(values[at]) for name, at in COUNTERS.items()}


def turns(ways: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Every way once in each round, and each of them first in its turn."""
    for number in range(rounds):
        first = number % len(ways)
        yield from ((number, way) for way in (*ways[first:], *ways[:first]))


def endpoints_of(ways: Mapping[str, Sequence[str]], here: Sequence[int], there: Sequence[str]) -> dict[str, list[str]]:
    """The arguments of each way with its endpoints in them: servers on this node, or those of the workers."""
    words = {"RPC-HERE": ",".join(f"127.0.0.1:{port}" for port in here), "RPC": ",".join(there)}
    return {way: [words.get(word, word) for word in arguments] for way, arguments in ways.items()}


def ask(port: int, prompt_tokens: int, answer_tokens: int) -> dict[str, Any]:
    """llama-server's own timings of one request; the prompt is of any words, and never in its cache."""
    prompt = [100 + number * 7919 % 20000 for number in range(prompt_tokens)]
    body = {
        "prompt": prompt,
        "n_predict": answer_tokens,
        "ignore_eos": True,
        "cache_prompt": False,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        timings: dict[str, Any] = json.load(answer)["timings"]
    return timings


def measure(port: int, interface: str, prompt_tokens: int, answer_tokens: int) -> dict[str, dict[str, float]]:
    """Reading a prompt and writing an answer, each in a request of its own, with what crossed the network meanwhile."""
    ask(port, WARM_UP_TOKENS, 2)
    found: dict[str, dict[str, float]] = {}
    for phase, kind, tokens in (("prompt", "prompt", (prompt_tokens, 1)), ("answer", "predicted", (1, answer_tokens))):
        before = counters(interface)
        timings = ask(port, *tokens)
        after = counters(interface)
        found[phase] = {
            "tokens": timings[f"{kind}_n"],
            "tokens_per_second": timings[f"{kind}_per_second"],
            "bytes": sum(after[name] - before[name] for name in ("rx_bytes", "tx_bytes")),
            "packets": sum(after[name] - before[name] for name in ("rx_packets", "tx_packets")),
        }
    return found


@contextlib.contextmanager
def server(program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[int]:
    """A llama-server that is ready, at a port of this node."""
    (port,) = sizing_host.free_ports(1)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [program, *arguments, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            env=os.environ | environment,
        )
        try:
            if failed := sizing_host.wait_for(port, process):
                log.seek(0)
                raise RuntimeError(f"{failed}\n{log.read()[-2000:]}")
            yield port
        finally:
            process.kill()
            process.wait()


def wait_for_workers(endpoints: Sequence[str]) -> None:
    """Connect to each worker once. No head is connected yet: later this would tell nothing."""
    deadline = time.monotonic() + WORKER_SECONDS
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        while True:
            try:
                socket.create_connection((host, int(port)), 1).close()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no RPC server at {endpoint} within {WORKER_SECONDS} s: {error}") from error
                time.sleep(0.2)


def run(task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure every way of every round with a server of its own."""
    shown = subprocess.run(["ip", "-oneline", "address"], check=True, capture_output=True, text=True).stdout
    interface = interface_of(task["address"], shown)
    wait_for_workers(task["endpoints"])
    program = f"{task['bin']}/ggml-rpc-server"
    with sizing_host.rpc_servers(program, len(task["endpoints"]), task["threads"]) as (ports, _):
        ways = endpoints_of(task["arguments"], ports, task["endpoints"])
        for number, way in turns(list(ways), task["rounds"]):
            with server(f"{task['bin']}/llama-server", ways[way], task["environment"]) as port:
                figures = measure(port, interface, task["prompt_tokens"], task["answer_tokens"])
            yield {"round": number, "way": way, "interface": interface, **figures}


def main() -> int:
    task = json.loads(Path(sys.argv[1]).read_text())
    try:
        for line in run(task):
            print(json.dumps(line), flush=True)
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(json.dumps({"failed": str(error)}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
