"""What the gateway costs: time to the first token with and without it, and many streams through it at once.

Run against a lab that serves: `python -m benchmarks.gateway`. Writes docs/benchmarks.md; exits with 1 when a bar
is missed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import lab, report

ADDED_BAR_MS = 1.0
STREAMS = 200
TOKENS = 20
# The fast tier of inventories/lab.
TIER_HOST = "vasp-02"
PORT = 8080
MODEL = "smollm2-135m-instruct-q4_1"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Stream:
    """What one stream through the gateway gave, and what is wrong with it, if anything."""

    seconds: float
    tokens: int
    done: bool
    error: str = ""

    @property
    def complete(self) -> bool:
        return self.done and self.tokens == TOKENS and not self.error


def request(tokens: int, **more: object) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": MESSAGES,
        "stream": True,
        "max_tokens": tokens,
        "temperature": 0,
        **more,
    }


def first_tokens(ssh: list[str], servers: dict[str, str], pairs: int, keep_alive: bool) -> dict[str, list[float]]:
    """Milliseconds to the first token, asked from the controller: only it may reach llama-server."""
    order = {
        "servers": servers,
        "request": request(2),
        "pairs": pairs,
        "keep_alive": keep_alive,
        "key_file": "/etc/gleaner/server.key",
    }
    with (Path(__file__).with_name("first_token.py")).open() as program:
        run = subprocess.run(
            [*ssh, shlex.join(["python3", "-", json.dumps(order)])],
            stdin=program,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    return {name: [1000 * one for one in seconds] for name, seconds in json.loads(run.stdout).items()}


def stream(place: str) -> Stream:
    """One stream, counted by llama-server's own usage figures."""
    began = time.monotonic()
    tokens, done = 0, False
    body = json.dumps(request(TOKENS, ignore_eos=True, stream_options={"include_usage": True}))
    connection = http.client.HTTPConnection(place, timeout=600)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return Stream(time.monotonic() - began, 0, False, f"status {response.status}")
        for line in response:
            if line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: "):
                tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", tokens)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Stream(time.monotonic() - began, tokens, done, repr(error))
    finally:
        connection.close()
    return Stream(time.monotonic() - began, tokens, done)


def streams_at_once(place: str) -> list[Stream]:
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as threads:
        return list(threads.map(stream, [place] * STREAMS))


def median_added(figures: dict[str, list[float]]) -> float:
    """What the gateway adds to the median, in milliseconds."""
    return statistics.median(figures["gateway"]) - statistics.median(figures["direct"])


def verdict(figures: dict[str, list[float]]) -> str:
    """Whether the bar is met; a run in which one way differs from itself by more than the bar tells neither."""
    noise = abs(statistics.median(figures["direct again"]) - statistics.median(figures["direct"]))
    if noise > ADDED_BAR_MS:
        return f"untold: the noise is {noise:.1f} ms"
    return "met" if median_added(figures) <= ADDED_BAR_MS else "missed"


def first_token_report(measured: dict[str, dict[str, list[float]]]) -> str:
    rows = [
        (
            way,
            *(f"{statistics.median(figures[name]):.2f}" for name in ("direct", "direct again", "gateway")),
            f"{median_added(figures):+.2f}",
            f"{statistics.median(g - d for d, g in zip(figures['direct'], figures['gateway'])):+.2f}",
            verdict(figures),
        )
        for way, figures in measured.items()
    ]
    head = ("connections", "direct", "direct again", "gateway", "added to the median", "median of the differences", "")
    raw = report.raw(
        "Raw figures, in ms",
        {f"{way}, {name}": one for way, figures in measured.items() for name, one in figures.items()},
        2,
    )
    return f"{report.table(head, rows)}\n\n{raw}"


def streams_report(streams: list[Stream], seconds: float) -> str:
    complete = sum(one.complete for one in streams)
    wrong = sorted({one.error or f"{one.tokens} tokens, [DONE]: {one.done}" for one in streams if not one.complete})
    times = [one.seconds for one in streams]
    text = (
        f"{complete} of {len(streams)} streams complete ({TOKENS} tokens and `[DONE]`), all in {seconds:.1f} s, "
        f"{sum(one.tokens for one in streams) / seconds:.0f} tokens/s; the median stream waited and ran for "
        f"{statistics.median(times):.1f} s, the longest {max(times):.1f} s. Bar: all complete, "
        f"{'met' if complete == len(streams) else 'missed: ' + '; '.join(wrong)}."
    )
    return f"{text}\n\n{report.raw('Raw figures, in s', {'each stream': times}, 1)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100, help="at least 40")
    parser.add_argument("--no-report", action="store_true", help="leave docs/benchmarks.md alone")
    arguments = parser.parse_args()
    if arguments.pairs < 40:
        parser.error(f"--pairs {arguments.pairs}: wanted 40 or more")

    here = lab.lab_from_environment()
    controller = here.variable("slurm-ctl", "cluster_address")
    gateway, direct = f"{controller}:{PORT}", f"{here.variable(TIER_HOST, 'cluster_address')}:{PORT}"
    ssh = here.ssh("slurm-ctl")
    about = {
        **lab.machine(),
        "versions": f"nginx {lab.output(ssh, '/usr/sbin/nginx', '-v').partition('/')[2]}, "
        f"Slurm {lab.output(ssh, 'sinfo', '--version').split()[-1]}, "
        f"llama.cpp {here.variable('slurm-ctl', 'llama_cpp_version')}",
        "model": f"{MODEL}, loaded before",
    }
    servers = {"direct": direct, "gateway": gateway, "direct again": direct}
    measured = {
        way: first_tokens(ssh, servers, arguments.pairs, keep_alive)
        for way, keep_alive in (("kept alive", True), ("one for each request", False))
    }
    began = time.monotonic()
    streams = streams_at_once(gateway)
    seconds = time.monotonic() - began

    text = "\n\n".join(
        [
            report.facts(about),
            "### Time to the first token\n\n"
            f"Milliseconds, medians over {arguments.pairs} rounds; each round asks every way once, and each is first "
            f"in its turn. Bar: the gateway adds at most {ADDED_BAR_MS:g} ms to the median.",
            first_token_report(measured),
            f"### {STREAMS} streams at once",
            streams_report(streams, seconds),
        ]
    )
    print(text)
    if not arguments.no_report:
        report.write("gateway", text)
    met = all(verdict(figures) == "met" for figures in measured.values())
    return 0 if met and all(one.complete for one in streams) else 1


if __name__ == "__main__":
    sys.exit(main())
