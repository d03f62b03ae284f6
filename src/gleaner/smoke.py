"""Whether the tiers answer with a certain build of the engine (`gleaner smoke`).

Asked through the gateway, as a client asks: a completion of a few tokens from each tier that is to answer.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gleaner import engine, keeper, status, upstream
from gleaner.states import Tier

POLL_SECONDS = 1.0
ANSWER_SECONDS = 120.0
TOKENS = 8

EXIT_FAILED = 1
EXIT_REFUSED = 2


@dataclass
class Watched:
    """A tier that is to answer with the build, and what was last told of it."""

    name: str
    port: int
    told: str = ""


def completion(host: str, port: int, model: str) -> str:
    """Ask for a few tokens; what is wrong with the answer, or nothing."""
    body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": TOKENS, "temperature": 0})
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {error}"
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        return f"HTTP {response.status}: {text[:200].decode(errors='replace')}"
    try:
        value = json.loads(text)
        tokens = int(value["usage"]["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        return f"the answer is no completion: {text[:200].decode(errors='replace')}"
    return "" if tokens > 0 else "the answer has no tokens"


def look(watched: Watched, line: dict[str, object], host: str, logs: Path, build: str) -> tuple[str, bool]:
    """What a tier is doing, and whether that is its answer with the build; an answer that is wrong is told as one."""
    runs = ""
    if line["job"]:
        # One that has not come so far says nothing yet.
        with contextlib.suppress(OSError):
            runs = engine.of_job(logs, line["job"])
    if line["state"] != Tier.SERVING.value or runs != build:
        more = line["reason"] or line["why"] or (f"with {runs}" if runs and runs != build else "")
        return f"{line['state']}{f' ({more})' if more else ''}", False
    models = line["models"]
    assert isinstance(models, list)
    wrong = completion(host, watched.port, str(models[0]) if models else "")
    return (f"answers wrongly: {wrong}", False) if wrong else (f"answers with {build}", True)


def wait(config: upstream.Config, state: Path, host: str, tiers: list[str], build: str, seconds: float) -> list[str]:
    """Follow the tiers until each has answered; what is still wrong with those that have not after so many seconds."""
    ports = {tier.tier: tier.gateway_port for tier in config.tiers}
    left = [Watched(name, ports[name]) for name in tiers]
    logs = config.registry.parent / "logs"
    deadline = time.monotonic() + seconds
    while True:
        lines = {str(line["tier"]): line for line in status.look(config, keeper.load_state(state))}
        for one in list(left):
            told, good = look(one, lines[one.name], host, logs, build)
            if told != one.told:
                one.told = told
                print(f"{one.name}: {told}", flush=True)
            if good:
                left.remove(one)
        if not left:
            return []
        if time.monotonic() >= deadline:
            return [f"{one.name} did not answer within {seconds:g} s: {one.told}" for one in left]
        time.sleep(POLL_SECONDS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--build", required=True, help="name of the build's folder")
    parser.add_argument("--host", required=True, help="address of the gateway")
    parser.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="for all of them (600)")
    parser.add_argument("--keeper", type=Path, default=Path("/etc/gleaner/keeper.json"))
    parser.add_argument("--config", type=Path, default=Path("/etc/gleaner/gateway.json"))
    parser.add_argument("tiers", nargs="+", metavar="TIER")


def run(args: argparse.Namespace) -> int:
    try:
        config = upstream.Config.load(args.config)
        state = keeper.Config.load(args.keeper).state
        known = {tier.tier for tier in config.tiers}
        if unknown := sorted(set(args.tiers) - known):
            raise ValueError(f"tiers: got {', '.join(unknown)}, want of {', '.join(sorted(known))}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    wrong = wait(config, state, args.host, args.tiers, args.build, args.wait)
    for text in wrong:
        print(f"error: {text}", file=sys.stderr)
    return EXIT_FAILED if wrong else 0
