"""Runs llama.cpp's programs on a lab host for `benchmarks.sizing`, and says what they say of memory.

Reads one JSON object from standard input: ``bin``, the folder of the programs, and ``runs``, each with an ``id``, a
``program``, how many RPC servers are its ``devices``, and its ``arguments``, where ``RPC`` stands for their endpoints.
Writes one line of JSON for each run, which also tells how far it is. Standard library only: it runs where the engine
is, under the host's own Python.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

READY_SECONDS = 120
ANSWER_SECONDS = 900
TRIES = 30
BUFFER = re.compile(r"(\S+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB")
LAYER = re.compile(r"load_tensors: layer +\d+ assigned to device (\w+),")
CACHE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")
BREAKDOWN = re.compile(r"^(\S+) (\d+) (\d+) (\d+) *$", re.MULTILINE)


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, all held until the last one is known: one that is let go may be given out again."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


def said(text: str, ports: list[int]) -> dict[str, Any]:
    """What a program's log says of layers and buffers; RPC devices by the order of their endpoints."""
    buffers: dict[str, dict[str, float]] = {"model": {}, "KV": {}, "compute": {}, "output": {}}
    for name, kind, size in BUFFER.findall(text):
        endpoint = re.search(r":(\d+)\]$", name)
        device = f"rpc{ports.index(int(endpoint[1]))}" if endpoint else "cpu"
        # A sliding window has a second cache, and a file mapped in parts several buffers.
        buffers[kind][device] = buffers[kind].get(device, 0.0) + float(size)
    return {
        "layers": [int(name[3:]) if name.startswith("RPC") else -1 for name in LAYER.findall(text)],
        "buffers": buffers,
        "kv_mib": sum(map(float, CACHE.findall(text))),
        "breakdown": [list(map(int, row[1:])) for row in BREAKDOWN.findall(text)],
    }


def peak_mib(process: subprocess.Popen[Any]) -> float:
    """The largest resident set that a process ever had."""
    with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


def fit_params(program: str, arguments: list[str], ports: list[int]) -> dict[str, Any]:
    for _ in range(TRIES):
        done = subprocess.run([program, *arguments, "-lv", "5"], check=False, capture_output=True, text=True)
        found = said(done.stdout + done.stderr, ports)
        # It may end before its log is written whole.
        if "cpu" in found["buffers"]["compute"] and len(found["breakdown"]) == len(ports) + 1:
            break
    if done.returncode:
        found["failed"] = (done.stdout + done.stderr)[-2000:]
    return found


def serve(
    program: str, arguments: list[str], ports: list[int], prompt_words: int, servers: list[subprocess.Popen[Any]]
) -> dict[str, Any]:
    """Load a model for real, answer one long prompt if any, and say what each process took at most."""
    (port,) = free_ports(1)
    with tempfile.TemporaryFile("w+") as log:
        command = [program, *arguments, "--host", "127.0.0.1", "--port", str(port), "-lv", "5"]
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                failed = wait_for(port, process) or (ask(port, prompt_words) if prompt_words else "")
                peaks = {"server": peak_mib(process)} if process.poll() is None else {}
                peaks.update({f"rpc{index}": peak_mib(server) for index, server in enumerate(servers)})
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
        log.seek(0)
        text = log.read()
    found = {**said(text, ports), "peak_mib": peaks}
    return {**found, "failed": f"{failed}\n{text[-2000:]}"} if failed else found


def wait_for(port: int, process: subprocess.Popen[Any]) -> str:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"llama-server ended with {process.returncode}"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return ""
        time.sleep(0.1)
    return f"llama-server was not ready within {READY_SECONDS} s"


def ask(port: int, words: int) -> str:
    """A prompt of about so many tokens; one token of answer is enough."""
    prompt = " ".join(f"word{number % 97}" for number in range(words))
    body = json.dumps({"prompt": prompt, "max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        return f"{error}: {error.read().decode(errors='replace')[:500]}"
    except OSError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def rpc_servers(program: str, count: int, threads: int = 2) -> Iterator[tuple[list[int], list[subprocess.Popen[Any]]]]:
    ports = free_ports(count)
    servers: list[subprocess.Popen[Any]] = []
    try:
        for port in ports:
            servers.append(
                subprocess.Popen(
                    [program, "-H", "127.0.0.1", "-p", str(port), "-t", str(threads)],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        deadline = time.monotonic() + 20
        for port in ports:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
        yield ports, servers
    finally:
        for server in servers:
            server.kill()
            server.wait()


def main() -> None:
    task = json.load(sys.stdin)
    folder = task["bin"]
    if shutil.which(f"{folder}/llama-fit-params") is None:
        sys.exit(f"{folder}: no llama-fit-params; wanted the lab's engine; cure: run playbooks/engine.yml")
    total = len(task["runs"])
    for number, run in enumerate(task["runs"], 1):
        with contextlib.ExitStack() as stack:
            # Real loads get servers of their own, so that their peaks are theirs.
            devices = run["devices"]
            ports, servers = stack.enter_context(rpc_servers(f"{folder}/ggml-rpc-server", devices))
            endpoints = ",".join(f"127.0.0.1:{port}" for port in ports)
            arguments = [endpoints if word == "RPC" else word for word in run["arguments"]]
            program = f"{folder}/{run['program']}"
            if run["program"] == "llama-fit-params":
                found = fit_params(program, arguments, ports)
            else:
                found = serve(program, arguments, ports, run["prompt_words"], servers)
        print(json.dumps({"done": number, "total": total, "id": run["id"], **found}), flush=True)


if __name__ == "__main__":
    main()
