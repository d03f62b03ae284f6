"""Whether a node that comes back computes (`gleaner trial`).

`gleaner trial node`, on the node and as the service user, while Slurm starts nothing there: what each tier would start
on it is started on the loopback address, asked for a completion, and ended. `gleaner trial tiers`, on the controller,
once Slurm may use the node again: whether a tier answers over it, asked through the gateway as a client asks.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gleaner import agent, files, keeper, model_files, slurm, smoke, status, upstream
from gleaner.states import Tier
from gleaner.supervisor import Plan

POLL_SECONDS = 0.2
LOOK_SECONDS = 1.0
HEALTH_SECONDS = 2.0
END_SECONDS = 10.0
LIST_SECONDS = 120.0
LOG_LINES = 15
# From the resumption of the node to the start of a tier's job there, also when the keeper pauses after a lost one.
PATIENCE_SECONDS = 120.0
CONTEXT_TOKENS = 256

EXIT_REFUSED = 2
# No tier had a chance to.
EXIT_UNSEEN = 3
# Not 1, with which Python ends by itself.
EXIT_FAILED = 4

# What decides how the node computes, and not how much of it: options with a value, and without.
_KEPT_WITH_VALUE = {"--flash-attn", "--cache-type-k", "--cache-type-v", "--threads", "--fit", "--gpu-layers"}
_KEPT = {"--no-repack", "--offline", "--no-ui"}
# A head's model is too large for its GPU alone: one layer shows that it computes, the processor does the others.
HEAD_LAYERS = "1"


class TrialError(Exception):
    """The node does not do what a tier needs of it; the text says why."""


def role_of(plan: Plan, node: str) -> str:
    """What the node is in the tier: router, head or worker."""
    if plan.worker is None:
        return "router"
    return "head" if plan.head == node else "worker"


def value_of(arguments: tuple[str, ...], option: str) -> str:
    """An option's value; TrialError when the plan has none."""
    for word, after in zip(arguments, arguments[1:]):
        if word == option:
            return after
    raise TrialError(f"the plan has no {option}: run playbooks/tiers.yml")


def smallest_model(plan: Plan) -> Path:
    """The model of a router tier that is here and loads soonest."""
    folder = Path(value_of(plan.arguments, "--models-dir"))
    found: list[tuple[int, Path]] = []
    for name in plan.models:
        parts = sorted((folder / name).glob("*.gguf")) or [folder / model_files.first_file(name, 1)]
        with contextlib.suppress(FileNotFoundError):
            found.append((sum(part.stat().st_size for part in parts), parts[0]))
    if not found:
        raise TrialError(f"{folder}: no model of {', '.join(plan.models)} is here: run playbooks/tiers.yml")
    return min(found)[1]


def server_arguments(plan: Plan, role: str) -> list[str]:
    """A llama-server with one model, a small context, and the plan's way of computing."""
    model = smallest_model(plan) if role == "router" else Path(value_of(plan.arguments, "--model"))
    kept: list[str] = []
    words = iter(plan.arguments)
    for word in words:
        if word in _KEPT_WITH_VALUE:
            value = next(words)
            kept += [word, HEAD_LAYERS if role == "head" and word == "--gpu-layers" else value]
        elif word in _KEPT:
            kept.append(word)
    return ["--model", str(model), "--ctx-size", str(CONTEXT_TOKENS), "--parallel", "1", *kept]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def task_of(plan: Plan, node: str, log: Path) -> agent.Task:
    """What an agent would be told to start, on the loopback address and another port."""
    role, port = role_of(plan, node), free_port()
    confine: dict[str, Any] | None = None
    if role == "worker":
        assert plan.worker is not None
        program, environment = "ggml-rpc-server", plan.worker.environment
        # Nothing is sent to it that would be worth keeping.
        arguments = [word for word in plan.worker.arguments if word != "--cache"]
        confine = {"writable": []} if plan.worker.confined else None
    else:
        program, environment, arguments = "llama-server", plan.environment, server_arguments(plan, role)
    return agent.Task(
        start=1,
        argv=[str(plan.engine / "bin" / program), *arguments, "--host", "127.0.0.1", "--port", str(port)],
        environment=environment,
        numa_node=plan.numa_node_of[node],
        log=str(log),
        address="127.0.0.1",
        port=port,
        role=role,
        cache=None,
        confine=confine,
        engine={"prefix": str(plan.engine), "manifest": plan.engine_manifest, "memory": plan.engine_memory},
        gpus=plan.gpus_of[node],
    )


def prepare(task: agent.Task, deadline: float) -> None:
    """The build is whole here and the GPUs can be used; TrialError otherwise."""
    preparation = agent.Preparation(task)
    while not preparation.errand.done:
        if time.monotonic() >= deadline:
            raise TrialError("driver, disk or shared file system did not answer in time")
        time.sleep(POLL_SECONDS)
    if preparation.problem:
        raise TrialError(preparation.problem)


@contextlib.contextmanager
def started(task: agent.Task, key: str) -> Iterator[subprocess.Popen[bytes]]:
    """The program, for as long as the block runs; nothing of it is left, however this program ends."""
    argv = [*agent.binding(task.numa_node, os.sched_getaffinity(0)), *task.argv]
    environment = {**os.environ, **task.environment, "GGML_NO_BACKTRACE": "1"}
    # It listens where every user of the node can connect.
    environment["LLAMA_API_KEY"] = key
    parent, rules = os.getpid(), agent.rules_of(task)
    try:
        with open(task.log, "ab") as log:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: agent._in_child(parent, rules),
            )
    finally:
        if rules is not None:
            rules.close()
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        # What it has started is of its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HEALTH_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def listens(port: int) -> bool:
    """An RPC server takes each connection for its one client, and lets it go again."""
    with socket.socket() as probe:
        probe.settimeout(HEALTH_SECONDS)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def devices(plan: Plan, port: int) -> list[str]:
    """The devices behind an RPC server, as the engine itself lists them."""
    argv = [str(plan.engine / "bin" / "llama-server"), "--rpc", f"127.0.0.1:{port}", "--list-devices"]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise TrialError(f"{argv[0]} --list-devices: no answer within {LIST_SECONDS:g} s") from None
    if done.returncode != 0:
        raise TrialError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip()[-200:]}")
    return [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("RPC")]


def try_tier(plan: Plan, node: str, log: Path, seconds: float) -> str:
    """What was seen to work, in words; TrialError with the end of the program's log when it does not."""
    deadline = time.monotonic() + seconds
    task = task_of(plan, node, log)
    prepare(task, deadline)
    key = secrets.token_hex(32)
    try:
        with started(task, key) as child:
            ready = healthy if task.answers_http else listens
            while not ready(task.port):
                if child.poll() is not None:
                    raise TrialError(f"{Path(task.argv[0]).name} ended with {child.returncode}")
                if time.monotonic() >= deadline:
                    raise TrialError(f"{Path(task.argv[0]).name} was not ready within {seconds:g} s")
                time.sleep(POLL_SECONDS)
            if not task.answers_http:
                found = devices(plan, task.port)
                if len(found) < max(1, plan.gpus_of[node]["count"]):
                    raise TrialError(f"the RPC server offers {', '.join(found) or 'no device'}")
                return f"the RPC server offers {'; '.join(found)}"
            model = Path(value_of(tuple(task.argv), "--model")).stem
            smoke.completion("127.0.0.1", task.port, model, key)
            return f"a completion of {smoke.TOKENS} tokens by {model}"
    except (TrialError, smoke.Wrong, OSError, ValueError) as error:
        raise TrialError(f"{error}{tail(log)}") from None


def tail(log: Path) -> str:
    """The last lines of the program, which say more than its exit code."""
    try:
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return ""
    return "".join(f"\n  {line}" for line in lines)


def try_node(plans: Path, node: str, seconds: float) -> int:
    """Each tier that names the node, one after the other."""
    if os.geteuid() == 0:
        raise ValueError("uid: got 0, want the service user, as in the tiers' jobs")
    tried = 0
    for path in sorted(plans.glob("*.json")):
        if node not in files.load_config(path).get("nodes", {}):
            continue
        plan = Plan.load(path)
        with tempfile.TemporaryDirectory(prefix="gleaner-trial-") as folder:
            try:
                told = try_tier(plan, node, Path(folder, "log"), seconds or plan.load_timeout_seconds)
            except TrialError as error:
                print(f"error: {plan.tier}: {error}", file=sys.stderr)
                return EXIT_FAILED
        print(f"{plan.tier}: {role_of(plan, node)}: {told}", flush=True)
        tried += 1
    if not tried:
        print(f"no tier names {node}: there was nothing to try")
    return 0


@dataclass
class Seen:
    """A tier that may answer over the node, and what was last seen of it."""

    failure: str | None
    """How a job of it had failed when we began to look."""
    told: str = ""
    here: bool = False
    """Its last job ran on the node."""
    at_work: bool = False
    failures: list[str] = field(default_factory=list)


def look(seen: Seen, line: dict[str, Any], port: int, node: str, host: str) -> bool:
    """Whether the tier answers over the node now; what it does is told in `seen`."""
    if line["failure"] and line["failure"] != seen.failure:
        seen.failure = str(line["failure"])
        # One that ran elsewhere says nothing of this node.
        seen.failures += [seen.failure] if seen.here else []
    more = line["reason"] or line["why"]
    told = f"{line['state']}{f' ({more})' if more else ''}"
    where = slurm.hosts(line["node"] or "")
    if where:
        told += f" on {line['node']}"
        seen.here = node in where
    seen.at_work = (bool(where) and seen.here) or bool(seen.failures)
    answers = False
    if line["state"] == Tier.SERVING.value and node in where:
        try:
            smoke.completion(host, port, str(line["models"][0]) if line["models"] else "")
            told, answers = f"answers over {node}", True
        except smoke.Wrong as wrong:
            told += f": {wrong}"
    seen.told = told
    return answers


def watch_tiers(config: upstream.Config, state: Path, node: str, host: str, tiers: list[str], seconds: float) -> int:
    """Follow the tiers until one answers over the node, one has failed twice, or the time is over.

    It is over sooner when none is at work there: GPUs that others have may be theirs for days.
    """
    ports = {tier.tier: tier.gateway_port for tier in config.tiers}
    deadline = time.monotonic() + seconds
    patience = time.monotonic() + min(seconds, PATIENCE_SECONDS)
    seen: dict[str, Seen] = {}
    while True:
        lines = {line["tier"]: line for line in status.look(config, keeper.load_state(state))}
        for name in tiers:
            one = seen.setdefault(name, Seen(lines[name]["failure"]))
            before = one.told
            answers = look(one, lines[name], ports[name], node, host)
            if one.told != before:
                print(f"{name}: {one.told}", flush=True)
            if answers:
                return 0
            if len(one.failures) >= smoke.FAILED_JOBS:
                print(f"error: {name} failed with the node: {'; '.join(one.failures)}", file=sys.stderr)
                return EXIT_FAILED
        now = time.monotonic()
        if any(one.at_work for one in seen.values()):
            patience = now + min(seconds, PATIENCE_SECONDS)
        held = all(one.told.startswith(Tier.HELD.value) for one in seen.values())
        if now >= min(deadline, patience) or held:
            break
        time.sleep(LOOK_SECONDS)
    for name, one in seen.items():
        print(f"no answer of {name} over {node}: {one.told}", file=sys.stderr)
    return EXIT_UNSEEN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    summary = "start on this node what its tiers would start, and ask it for a completion"
    node = actions.add_parser("node", help=summary, description=summary)
    node.add_argument("--plans", type=Path, required=True, help="folder of the plans")
    node.add_argument("--node", default=os.uname().nodename, help="this node's name in the plans")
    node.add_argument("--seconds", type=float, default=0.0, help="for each tier (its load_timeout_seconds)")
    summary = "wait until a tier answers over a node"
    over = actions.add_parser("tiers", help=summary, description=summary)
    over.add_argument("--node", required=True)
    over.add_argument("--host", required=True, help="address of the gateway")
    over.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="for an answer (600)")
    over.add_argument("--keeper", type=Path, default=Path("/etc/gleaner/keeper.json"))
    over.add_argument("--config", type=Path, default=Path("/etc/gleaner/gateway.json"))
    over.add_argument("tiers", nargs="+", metavar="TIER")


def run(args: argparse.Namespace) -> int:
    try:
        if args.action == "node":
            # Whoever ends it by a signal has the programs ended, too.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            return try_node(args.plans, args.node, args.seconds)
        config = upstream.Config.load(args.config)
        known = {tier.tier for tier in config.tiers}
        if unknown := sorted(set(args.tiers) - known):
            raise ValueError(
                f"tiers: got {', '.join(unknown)}, want of {', '.join(sorted(known))} ({args.config}); "
                "cure: run playbooks/gateway.yml, which tells it of tiers that are new"
            )
        state = keeper.Config.load(args.keeper).state
        return watch_tiers(config, state, args.node, args.host, args.tiers, args.wait)
    except (ValueError, TrialError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
