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
from dataclasses import dataclass, field
from pathlib import Path

from gleaner import engine, keeper, status, upstream
from gleaner.states import Tier

POLL_SECONDS = 1.0
ANSWER_SECONDS = 120.0
TOKENS = 8

EXIT_REFUSED = 2
EXIT_UNSEEN = 3
# Not 1, with which Python ends by itself.
EXIT_FAILED = 4

# One may be bad luck; a tier's next job is tried after a pause.
FAILED_JOBS = 2
# How much longer than for an answer a tier may wait for its GPUs, before it is left to wait.
PATIENCE = 2
# What a tier does that has its GPUs, or would have them had its job not failed.
_AT_WORK = (Tier.SERVING.value, Tier.UNROUTED.value, Tier.LOADING.value, Tier.PAUSED.value)


class Wrong(Exception):
    """An answer that is none; `told` in words."""

    def __init__(self, told: str, counts: bool = True) -> None:
        super().__init__(told)
        self.counts = counts
        """Whether the build may be to blame: not for a gateway that is away, nor for a tier that yields just now."""


@dataclass
class Watched:
    """A tier that is to answer with the build, and what was last seen of it."""

    name: str
    port: int
    failure: str | None = None
    """How a job of it had failed when we began to look."""
    told: str = ""
    seconds: float = 0.0
    """How long it was at work with the build."""
    failures: set[str] = field(default_factory=set)

    @property
    def why(self) -> str:
        return "; ".join(sorted(self.failures)) or self.told


@dataclass(frozen=True)
class Verdict:
    """Tiers that failed with the build, and those of which nothing could be seen; each in words."""

    failed: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


def completion(host: str, port: int, model: str, key: str = "") -> None:
    """Ask for a few tokens; Wrong when they do not come. The gateway itself knows the key of llama-server."""
    body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": TOKENS, "temperature": 0})
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        text = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise Wrong(f"no answer: {error}", counts=isinstance(error, TimeoutError)) from None
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        busy = response.status == http.HTTPStatus.SERVICE_UNAVAILABLE
        raise Wrong(f"HTTP {response.status}: {text[:200].decode(errors='replace')}", counts=not busy)
    try:
        tokens = int(json.loads(text)["usage"]["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        raise Wrong(f"the answer is no completion: {text[:200].decode(errors='replace')}") from None
    if tokens <= 0:
        raise Wrong("the answer has no tokens")


def look(watched: Watched, line: dict[str, object], host: str, logs: Path, build: str) -> tuple[str, bool | None]:
    """What a tier is doing; true when it answers with the build, false when it is at work with it and has not yet."""
    runs = ""
    if line["job"]:
        # One that has not come so far says nothing yet.
        with contextlib.suppress(OSError):
            runs = engine.of_job(logs, line["job"])
    failure = line["failure"]
    if failure and failure != watched.failure:
        watched.failures.add(str(failure))
    if line["state"] != Tier.SERVING.value or runs != build:
        more = line["reason"] or line["why"] or (f"with {runs}" if runs and runs != build else "")
        # A tier that makes way for another one is paused, too.
        at_work = line["state"] in _AT_WORK and (runs == build or (not line["job"] and bool(watched.failures)))
        return f"{line['state']}{f' ({more})' if more else ''}", False if at_work else None
    models = line["models"]
    assert isinstance(models, list)
    try:
        completion(host, watched.port, str(models[0]) if models else "")
    except Wrong as wrong:
        return f"answers wrongly: {wrong}", False if wrong.counts else None
    return f"answers with {build}", True


def wait(config: upstream.Config, state: Path, host: str, tiers: list[str], build: str, seconds: float) -> Verdict:
    """Follow the tiers until each has answered with the build, or one has failed.

    A tier has so many seconds for an answer while it is at work: one that waits for GPUs, or that a person holds, is
    not to blame. It is left to wait after PATIENCE times as long.
    """
    ports = {tier.tier: tier.gateway_port for tier in config.tiers}
    lines = _lines(config, state)
    left = [Watched(name, ports[name], str(lines[name]["failure"] or "") or None) for name in tiers]
    logs = config.registry.parent / "logs"
    began = before = time.monotonic()
    while True:
        now = time.monotonic()
        for one in list(left):
            told, good = look(one, lines[one.name], host, logs, build)
            if told != one.told:
                one.told = told
                print(f"{one.name}: {told}", flush=True)
            if good:
                left.remove(one)
            elif good is False:
                one.seconds += now - before
            if one.seconds >= seconds or len(one.failures) >= FAILED_JOBS:
                return Verdict(failed=(f"{one.name} did not answer in {one.seconds:.0f} s: {one.why}",))
        if not left:
            return Verdict()
        held = [one for one in left if one.told.startswith(Tier.HELD.value)]
        if now - began >= PATIENCE * seconds or held == left:
            return Verdict(unseen=tuple(f"{one.name} could not be asked: {one.why}" for one in left))
        before = now
        time.sleep(POLL_SECONDS)
        lines = _lines(config, state)


def _lines(config: upstream.Config, state: Path) -> dict[str, dict[str, object]]:
    return {str(line["tier"]): line for line in status.look(config, keeper.load_state(state))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--build", required=True, help="name of the build's folder")
    parser.add_argument("--host", required=True, help="address of the gateway")
    parser.add_argument(
        "--wait", type=float, default=600.0, metavar="SECONDS", help="for an answer of a tier at work (600)"
    )
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
    verdict = wait(config, state, args.host, args.tiers, args.build, args.wait)
    for text in (*verdict.failed, *verdict.unseen):
        print(f"error: {text}", file=sys.stderr)
    return EXIT_FAILED if verdict.failed else EXIT_UNSEEN if verdict.unseen else 0
