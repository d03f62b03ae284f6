"""The batch step of a tier's job (`gleaner supervise --plan PATH`).

It starts one agent per node, has them start the tier's programs, publishes the endpoint record while
the server is ready, and decides what happens when something dies or Slurm wants the GPUs back.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import os
import secrets
import selectors
import signal
import socket
import subprocess
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gleaner import bounded, engine, events, files, heartbeat, joblog, life, line, record, slurm
from gleaner.events import Kind
from gleaner.journal import OnChange, divert, say
from gleaner.states import Cause, Exit

TICK_SECONDS = 0.1
AGENTS_SECONDS = 120.0
GREETING_SECONDS = 5.0
# A server without streams in flight gets this long to stop, then it is killed.
STOP_SECONDS = 1.0
LEAVE_SECONDS = 3.0
WITHDRAW_SECONDS = 1.0
# For the last words of all kinds together, when the withdrawal has waited in vain.
LAST_WORDS_SECONDS = 0.5
# A gateway without a line to us learns of a withdrawal within this time, from the record or from Slurm. Until then it
# may hand over one more request, also on a connection that a stopping server still holds, and no idleness is believed.
ROUTED_SECONDS = 1.5
# With its answer on the line: a request that it has just handed over is in no slot while its prompt is read.
SETTLE_SECONDS = 0.15
GATEWAYS_LIMIT = 4
STRANGERS_LIMIT = 16
ASK_SECONDS = 3.0
REQUEUE_SECONDS = 5.0
# A server that was ready, is stopped by a signal or does not answer /health for this long, is restarted.
FROZEN_SECONDS = 3.0
UNHEALTHY_SECONDS = 15.0
# A process that KILL does not end hangs in the kernel: driver, disk or file system.
UNKILLABLE_SECONDS = 30.0
RESTART_PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0)
RESTART_WINDOW_SECONDS = 600.0


class PlanError(ValueError):
    """The plan, or what surrounds the supervisor, is not as it must be."""


@dataclass(frozen=True)
class Worker:
    """What a plan says of the RPC servers of a layer-split tier."""

    port: int
    arguments: tuple[str, ...]
    environment: dict[str, str]
    cache_directory: str
    cache_limit_mib: int
    confined: bool


@dataclass(frozen=True)
class Plan:
    """What the supervisor needs of plan v1."""

    tier: str
    engine: Path
    engine_manifest: str
    """Sum of the build's manifest, which has that of each of its files."""
    engine_memory: str
    """Where a node remembers which files of the build it has read."""
    address_of: dict[str, str]
    rpc_address_of: dict[str, str]
    numa_node_of: dict[str, int | None]
    gpus_of: dict[str, dict[str, Any]]
    """How many GPUs the job has on each node (`count`), and whether others may use them (`shared`)."""
    head: str | None
    worker: Worker | None
    port: int
    arguments: tuple[str, ...]
    environment: dict[str, str]
    models: tuple[str, ...]
    cpus: int
    gpus: int
    signal_seconds: int
    drain_seconds: float
    load_timeout_seconds: float

    @classmethod
    def load(cls, path: Path) -> Plan:
        try:
            value = files.load_config(path)
            if value["kind"] not in ("router", "layer_split"):
                raise PlanError(f"{path}: kind: got {value['kind']!r}, want 'router' or 'layer_split'")
            return cls._from(value)
        except PlanError:
            raise
        except (ValueError, engine.EngineError) as error:
            raise PlanError(str(error)) from None
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path}: not a plan of this version ({error!r}): run playbooks/tiers.yml") from None

    @classmethod
    def _from(cls, value: dict[str, Any]) -> Plan:
        server, worker = value["server"], None
        build = Path(value["engine"]["prefix"]).resolve()
        manifest = engine.Manifest.load(build)
        # Not in a plan of an older version.
        if value["engine"].get("flash_attention") and not manifest.flash_attention:
            raise PlanError(
                f"{build}: built without flash attention, with which the tier {value['tier']} is planned: its first "
                "answer would abort: run playbooks/engine.yml, or set llama_cpp_flash_attention: false"
            )
        head = next((name for name, node in value["nodes"].items() if node.get("role") == "head"), None)
        if value["kind"] == "layer_split":
            given = value["worker"]
            worker = Worker(
                port=int(given["port"]),
                arguments=tuple(str(argument) for argument in given["args"]),
                environment={name: str(text) for name, text in given["environment"].items()},
                cache_directory=str(given["cache"]["directory"]),
                cache_limit_mib=int(given["cache"]["limit_mib"]),
                confined=bool(given["confined"]),
            )
            if head is None:
                raise KeyError("a node with the role head")
        return cls(
            tier=str(value["tier"]),
            engine=build,
            engine_manifest=engine.identity(build),
            engine_memory=str(value["engine"].get("memory", "")),
            address_of={name: str(node["address"]) for name, node in value["nodes"].items()},
            rpc_address_of={name: str(node["rpc_address"]) for name, node in value["nodes"].items()},
            numa_node_of={name: node["numa_node"] for name, node in value["nodes"].items()},
            gpus_of={name: node.get("gpus", {"count": 0, "shared": False}) for name, node in value["nodes"].items()},
            head=head,
            worker=worker,
            port=int(server["node_port"]),
            arguments=tuple(str(argument) for argument in server["args"]),
            environment={name: str(text) for name, text in server["environment"].items()},
            models=tuple(str(name) for name in value["models"]),
            cpus=int(value["slurm"]["cpus_per_node"]),
            gpus=int(value["slurm"]["gpus_per_node"]),
            signal_seconds=int(value["slurm"]["signal_seconds"]),
            drain_seconds=float(value["drain_seconds"]),
            load_timeout_seconds=float(value["load_timeout_seconds"]),
        )


@dataclass(frozen=True)
class JobEnvironment:
    """Where Slurm put us."""

    job: int
    restart: int
    node: str
    nodes: tuple[str, ...]

    @classmethod
    def read(cls, plan: Plan) -> JobEnvironment:
        if os.geteuid() == 0:
            raise PlanError("uid: got 0, want the service user: the keeper submits this job, not root")
        try:
            job = int(os.environ["SLURM_JOB_ID"])
            nodes = tuple(slurm.hosts(os.environ["SLURM_JOB_NODELIST"]))
            restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        except (KeyError, ValueError) as error:
            raise PlanError(
                f"not inside a Slurm job ({error}): submit the tier's script with sbatch as the service user"
            ) from None
        foreign = [name for name in nodes if name not in plan.address_of]
        if foreign:
            raise PlanError(
                f"SLURM_JOB_NODELIST: got {','.join(foreign)}, the plan has {','.join(plan.address_of)}: "
                "submit the tier's own script, or run playbooks/tiers.yml"
            )
        missing = sorted(set(plan.address_of) - set(nodes)) if plan.worker is not None else []
        if missing:
            raise PlanError(
                f"SLURM_JOB_NODELIST: got {','.join(nodes)}, the plan has {','.join(plan.address_of)} and needs all: "
                "submit the tier's own script, or run playbooks/tiers.yml"
            )
        return cls(job=job, restart=restart, node=heartbeat.node_name(), nodes=nodes)


class Phase(enum.Enum):
    """Where the supervisor is on its one way from start to exit."""

    GATHERING = "waiting for agents"
    WORKERS = "starting workers"
    LOADING = "loading"
    SERVING = "serving"
    PAUSING = "waiting before a restart"
    DRAINING = "draining"
    STOPPING = "stopping"
    LEAVING = "leaving"


class Supervisor:
    """One selector loop over agents, signals, the job step and a tick."""

    def __init__(
        self,
        plan: Plan,
        where: JobEnvironment,
        registry: Path,
        logs: Path,
        log: joblog.File,
        patience: bounded.Patience,
    ) -> None:
        self.plan, self.where, self.logs = plan, where, logs
        # With the shared file system.
        self.patience = patience
        # What we say ourselves; the agents' words and srun's come through us, too.
        self.log = log
        self.said: joblog.Reader | None = None
        # Where llama-server runs: the plan's head, or the one node of a router tier.
        self.home = plan.head or where.nodes[0]
        self.publisher = record.Publisher(registry)
        self.events = events.Log(registry, plan.tier, (where.job, where.restart))
        self.pulse = life.Pulse(registry, plan.tier, (where.job, where.restart))
        self.selector = selectors.DefaultSelector()
        self.signals = heartbeat.Signals(signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        self.selector.register(self.signals.socket, selectors.EVENT_READ)
        # A layer-split tier needs both networks: weights and activations take the one, Slurm and clients the other. A
        # cut of either has to be noticed, so its agents have a line over each.
        networks = {"cluster": plan.address_of}
        if plan.worker is not None:
            networks = {"RPC": plan.rpc_address_of, **networks}
        self.networks = list(networks)
        self.here = where.node if where.node in plan.address_of else self.home
        self.listeners = [heartbeat.listen(addresses[self.here]) for addresses in networks.values()]
        for listener in self.listeners:
            self.selector.register(listener, selectors.EVENT_READ)
        self.token = secrets.token_hex(32)
        self.strangers: list[heartbeat.Channel] = []
        self.agents: dict[str, heartbeat.Channel] = {}
        # The lines that carry beats alone, by node and network.
        self.pulses: dict[tuple[str, int], heartbeat.Channel] = {}
        self.gateways: list[heartbeat.Channel] = []
        # Those that have not answered a withdrawal yet.
        self.routing: set[heartbeat.Channel] = set()
        self.changes = OnChange()
        self.key = server_key()
        # What was published is void up to this one.
        self.retracted = 0
        self.step: subprocess.Popen[bytes] | None = None
        self.phase = Phase.GATHERING
        self.deadline = time.monotonic() + AGENTS_SECONDS
        self.start = 0
        self.deaths: list[float] = []
        # Nodes whose process of the last start is not known to be gone: their ports and GPUs are not free.
        self.ending: set[str] = set()
        self.good_at = 0.0
        self.moving_at: dict[str, float] = {}
        self.beat_at = 0.0
        self.idle = False
        # Counts the orders to look: only what was seen after the last one tells.
        self.watch = 0
        self.routed_until = 0.0
        self.cause: Cause | None = None
        self.exit = Exit.STOPPED

    # The loop

    def run(self) -> Exit:
        """Live the job's life; the exit code says how it ended."""
        self.pulse.start()
        gpus = self.plan.gpus * len(self.where.nodes)
        self.events.add(Kind.STARTED, nodes=list(self.where.nodes), gpus=gpus)
        # A signal that came before this program could hear it is lost: the job script lets it pass.
        if self._ask_why() in (Cause.PREEMPTED, Cause.CANCELLED):
            self._told_to_stop("seen at the start")
        if self.phase is Phase.GATHERING:
            self._start_step()
        while self.phase is not Phase.LEAVING:
            self.pulse.turn()
            for key, _ in self.selector.select(TICK_SECONDS):
                if key.fileobj is self.signals.socket:
                    if self.signals.receive() & {signal.SIGTERM, signal.SIGINT}:
                        self._told_to_stop("signal")
                elif key.fileobj in self.listeners:
                    self._accept(key.fileobj)
            self._hear_strangers()
            self._hear_agents()
            self._hear_gateways()
            self._tick()
        self._leave()
        if self.said is not None:
            # Somebody may still hold the pipe; what was said has to be written all the same.
            self.patience.spend(self.said.join, self.patience.left / 2)
        self.signals.deafen()
        return self.exit

    def _tick(self) -> None:
        now = time.monotonic()
        if now >= self.beat_at:
            self._beat_all()
        if self.step is not None and self.step.poll() is not None:
            code, self.step = self.step.returncode, None
            self._fail(Exit.START_FAILED if not self.agents else Exit.AGENT_LOST, f"job step ended with {code}")
        elif self.phase is Phase.GATHERING and now >= self.deadline:
            missing = sorted({node for node, _ in self._awaited()})
            self._fail(Exit.START_FAILED, f"no agent from {','.join(missing)} within {AGENTS_SECONDS:g} s")
        elif self.phase in (Phase.WORKERS, Phase.LOADING) and now >= self.deadline:
            what = "no worker could be reached" if self.phase is Phase.WORKERS else "/health was not good"
            self._fail(
                Exit.LOAD_TIMEOUT,
                f"{what} within load_timeout_seconds={self.plan.load_timeout_seconds:g}: see {self._log_of(self.home)}",
            )
        elif self.phase in (Phase.WORKERS, Phase.LOADING, Phase.SERVING):
            self._look_for_the_stuck(now)
        elif self.phase is Phase.PAUSING and now >= self.deadline and not self.ending:
            self._start_tier()
        elif self.phase is Phase.PAUSING and now >= self.deadline + UNKILLABLE_SECONDS:
            stuck = ",".join(sorted(self.ending))
            self._fail(Exit.SERVER_FAILED, f"process on {stuck} is not gone {UNKILLABLE_SECONDS:g} s after KILL")
        elif self.phase is Phase.DRAINING and self.idle and now >= self.routed_until:
            say("drain: nothing in flight")
            self.events.add(Kind.DRAINED, whole=True)
            self._stop()
        elif self.phase is Phase.DRAINING and now >= self.deadline:
            say(f"drain: {self.plan.drain_seconds:g} s are over, ending what is in flight")
            self.events.add(Kind.DRAINED, whole=False)
            # llama-server with a stream in flight does not end on TERM.
            self._stop(0.0)
        elif self.phase is Phase.STOPPING and now >= self.deadline:
            self.phase = Phase.LEAVING

    def _look_for_the_stuck(self, now: float) -> None:
        """A process that is stopped, or a server that was ready and is not for long: all of the tier is taken down."""
        for node in sorted(self.ending):
            frozen = now - self.moving_at.get(node, now)
            if frozen > FROZEN_SECONDS:
                self._take_down(f"{self._role(node)} on {node} was not seen to run for {frozen:.0f} s")
                return
        unhealthy = now - self.good_at
        if self.phase is Phase.SERVING and unhealthy > UNHEALTHY_SECONDS:
            self._take_down(f"server is sick for {unhealthy:.0f} s")

    # Agents

    def _beat_all(self) -> None:
        """One beat for every agent. A lost one is noticed when it is heard, not here."""
        self.beat_at = time.monotonic() + heartbeat.BEAT_SECONDS
        for channel in [*self.agents.values(), *self.pulses.values()]:
            with contextlib.suppress(heartbeat.ChannelClosed):
                channel.send({"beat": 1})

    def _start_step(self) -> None:
        count = len(self.where.nodes)
        command = [
            "srun",
            f"--nodes={count}",
            f"--ntasks={count}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={self.plan.cpus}",
            "--mem=0",
            "--propagate=NONE",
            "--export=ALL",
            "--mpi=none",
            "--input=none",
            "--wait=0",
            "--kill-on-bad-exit=1",
            "--job-name=agent",
            # A node that was provisioned alone may have another version. Whether the two understand each other, the
            # greeting tells.
            *("/bin/sh", "-c", f'if [ -e "$0" ]; then exec "$@"; fi; exec "$(readlink -f {files.PROGRAM})" agent'),
            files.own_file(),
            *files.own_command(),
            "agent",
        ]
        environment = {
            **os.environ,
            "GLEANER_SUPERVISOR": ",".join("{}:{}".format(*listener.getsockname()) for listener in self.listeners),
            "GLEANER_TOKEN": self.token,
            "GLEANER_LABEL": f"{self.plan.tier} {self.where.job}.{self.where.restart}",
        }
        said, pipe = os.pipe2(os.O_CLOEXEC)
        self.said = joblog.Reader(said, self.log.pass_on)
        # Its own session: a TERM for the whole batch step must not make srun end the agents before
        # the supervisor has asked Slurm why.
        try:
            self.step = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
            )
        except OSError as error:
            self._fail(Exit.START_FAILED, f"srun: {error.strerror}")
            return
        finally:
            os.close(pipe)
        say(f"tier {self.plan.tier}: job {self.where.job} restart {self.where.restart} on {','.join(self.where.nodes)}")

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for _ in range(STRANGERS_LIMIT):
                connection, _ = listener.accept()
                if len(self.strangers) >= STRANGERS_LIMIT:
                    # Who greets does so at once: the oldest one has had its time.
                    self._drop(self.strangers.pop(0))
                channel = heartbeat.Channel(connection, heartbeat.GREETING_LIMIT)
                self.selector.register(connection, selectors.EVENT_READ)
                self.strangers.append(channel)

    def _drop(self, channel: heartbeat.Channel) -> None:
        heartbeat.let_go(self.selector, channel.socket)

    def _hear_strangers(self) -> None:
        for channel in list(self.strangers):
            try:
                messages = channel.receive()
                if not messages:
                    if channel.silent_seconds <= GREETING_SECONDS:
                        continue
                    raise ValueError("no greeting in time")
                if line.is_greeting(messages[0]):
                    self._take_gateway(channel, messages[0])
                    continue
                node, network = heartbeat.greeted_by(messages[0], self.token)
                if (node, network) not in self._awaited():
                    raise ValueError(f"greeting from {node!r}, which is not awaited")
            except (ValueError, heartbeat.ChannelClosed) as error:
                self.changes.say("refused", f"connection refused: {error}")
                self.strangers.remove(channel)
                self._drop(channel)
                continue
            self.strangers.remove(channel)
            channel.limit = heartbeat.LINE_LIMIT
            if network:
                self.pulses[node, network] = channel
            else:
                self.agents[node] = channel
                for message in messages[1:]:
                    self._heard(node, message)
            if self.phase is Phase.GATHERING and not self._awaited():
                self._start_tier()

    def _awaited(self) -> set[tuple[str, int]]:
        """The lines that are still to come, by node and network."""
        every = {(node, network) for node in self.where.nodes for network in range(len(self.listeners))}
        return every - {(node, 0) for node in self.agents} - set(self.pulses)

    def _hear_agents(self) -> None:
        for (node, network), channel in list(self.pulses.items()):
            try:
                channel.flush()
                channel.receive()
                channel.mind_silence()
            except (ValueError, heartbeat.ChannelClosed) as error:
                self._lost(node, f"{error} on the {self.networks[network]} network")
        for node, channel in list(self.agents.items()):
            try:
                channel.flush()
                for message in channel.receive():
                    self._heard(node, message)
                channel.mind_silence()
            except (ValueError, heartbeat.ChannelClosed) as error:
                self._lost(node, f"{error} on the {self.networks[0]} network")

    def _take_gateway(self, channel: heartbeat.Channel, greeting: heartbeat.Message) -> None:
        line.check_greeting(greeting, self.key, (self.where.job, self.where.restart))
        if len(self.gateways) >= GATEWAYS_LIMIT:
            oldest = self.gateways.pop(0)
            self.routing.discard(oldest)
            self._drop(oldest)
        line.keep_alive(channel.socket)
        self.strangers.remove(channel)
        self.gateways.append(channel)
        say("the gateway has a line to us")
        if self.retracted:
            self._tell_gateway(channel)

    def _tell_gateway(self, channel: heartbeat.Channel) -> None:
        self.routing.add(channel)
        with contextlib.suppress(heartbeat.ChannelClosed):
            channel.send(line.withdrawn(self.retracted))

    def _hear_gateways(self) -> None:
        for channel in list(self.gateways):
            try:
                channel.flush()
                answers = [message.get("away") for message in channel.receive()]
            except (ValueError, heartbeat.ChannelClosed):
                # What it may still hand over, nobody tells: ROUTED_SECONDS then.
                self.gateways.remove(channel)
                self._drop(channel)
                continue
            if self.retracted and self.retracted in answers:
                self.routing.discard(channel)
                if self.phase is Phase.DRAINING and not self.routing:
                    say("drain: the gateway takes no request any more")
                    self.routed_until = min(self.routed_until, time.monotonic() + SETTLE_SECONDS)
                    # Whether it is idle is asked anew: what came until now counts.
                    self._watch_busy()

    def _lost(self, node: str, why: str) -> None:
        channel = self.agents.pop(node, None)
        for key in [key for key in self.pulses if key[0] == node]:
            self._drop(self.pulses.pop(key))
        if channel is None:
            return
        self._drop(channel)
        if self.phase is Phase.STOPPING:
            if not self.agents:
                self.phase = Phase.LEAVING
        elif self.phase is not Phase.LEAVING:
            self._fail(Exit.AGENT_LOST, f"agent on {node}: {why}")

    def _tell(self, node: str, message: heartbeat.Message) -> None:
        channel = self.agents.get(node)
        if channel is None:
            return
        try:
            channel.send(message)
        except heartbeat.ChannelClosed as error:
            self._lost(node, str(error))

    def _tell_all(self, message: heartbeat.Message) -> None:
        for node in list(self.agents):
            self._tell(node, message)

    def _heard(self, node: str, message: heartbeat.Message) -> None:
        if "beat" in message:
            self._beat(node, message["beat"])
        elif message.get("exited") == self.start:
            self._exited(node, int(message["code"]))
        elif message.get("reached") == self.start:
            if self.phase is Phase.WORKERS:
                self._start_server()
        elif "refused" in message:
            self._fail(Exit.START_FAILED, f"agent on {node}: {message['why']}")
        elif "signal" in message:
            self._told_to_stop(f"signal to the agent on {node}")

    def _beat(self, node: str, beat: dict[str, Any]) -> None:
        if beat.get("start") != self.start:
            return
        now = time.monotonic()
        if beat["state"] != "stopped":
            self.moving_at[node] = now
        if node != self.home:
            return
        if beat["health"] == "ready":
            self.good_at = now
            if self.phase is Phase.LOADING:
                self._ready()
        elif beat["health"] == "loading" and self.phase is Phase.SERVING:
            self.good_at = now
        self.idle = beat["busy"] is False and beat["watch"] == self.watch

    # The life of what the agents start

    def _role(self, node: str) -> str:
        return "server" if node == self.home else "worker"

    def _log_of(self, node: str) -> Path:
        if self.plan.worker is None:
            return self.logs / "router.log"
        return self.logs / ("head.log" if node == self.home else f"rpc-{node}.log")

    def _start_tier(self) -> None:
        """Start everything anew: the workers of a layer-split tier first, since its head leaves without them."""
        self.start += 1
        self.moving_at.clear()
        self.deadline = time.monotonic() + self.plan.load_timeout_seconds
        if self.plan.worker is None:
            self._start_server()
            return
        self.phase = Phase.WORKERS
        workers = [node for node in self.where.nodes if node != self.home]
        for node in workers:
            self._start_worker(node, self.plan.worker)
            if self.phase is not Phase.WORKERS:
                # Its agent was just lost, and all the others were told to leave.
                return
        # A worker serves one client at a time, and a probe is one: the only look at its port is before the head comes.
        places = [[self.plan.rpc_address_of[node], self.plan.worker.port] for node in workers]
        self._tell(self.home, {"reach": {"start": self.start, "places": places}})

    def _start_worker(self, node: str, worker: Worker) -> None:
        address = self.plan.rpc_address_of[node]
        program = self.plan.engine / "bin" / "ggml-rpc-server"
        self._start_on(
            node,
            role="worker",
            argv=[str(program), "--host", address, "--port", str(worker.port), *worker.arguments],
            environment={**worker.environment, "LLAMA_CACHE": worker.cache_directory},
            address=address,
            port=worker.port,
            cache={"directory": worker.cache_directory, "limit_mib": worker.cache_limit_mib},
            confine={"writable": [worker.cache_directory]} if worker.confined else None,
        )

    def _start_server(self) -> None:
        self.phase = Phase.LOADING
        address = self.plan.address_of[self.home]
        program = self.plan.engine / "bin" / "llama-server"
        self._start_on(
            self.home,
            role="router" if self.plan.worker is None else "head",
            argv=[str(program), *self.plan.arguments, "--host", address, "--port", str(self.plan.port)],
            environment=self.plan.environment,
            address=address,
            port=self.plan.port,
            cache=None,
            confine=None,
        )

    def _start_on(self, node: str, **task: Any) -> None:
        self.ending.add(node)
        plan = self.plan
        build = {"prefix": str(plan.engine), "manifest": plan.engine_manifest, "memory": plan.engine_memory}
        more = {
            "start": self.start,
            "numa_node": plan.numa_node_of[node],
            "log": str(self._log_of(node)),
            "engine": build,
            "gpus": plan.gpus_of[node],
        }
        self._tell(node, {"start": {**task, **more}})

    def _ready(self) -> None:
        self.phase = Phase.SERVING
        self.patience.renew()
        self._tell_all({"loaded": self.start})
        say(f"serving on {self.home}:{self.plan.port}")
        self.events.add(Kind.SERVING)
        self.publisher.publish(
            record.Record(
                tier=self.plan.tier,
                job=self.where.job,
                restart=self.where.restart,
                host=self.home,
                port=self.plan.port,
                models=self.plan.models[: record.MODELS_LIMIT],
                started=int(time.time()),
                seq=0,
                supervisor=self.here if self.key else "",
                line=self.listeners[-1].getsockname()[1] if self.key else 0,
            )
        )

    def _exited(self, node: str, code: int) -> None:
        self.ending.discard(node)
        if self.phase in (Phase.WORKERS, Phase.LOADING, Phase.SERVING):
            self._take_down(f"{self._role(node)} on {node} ended with {code}")
        elif self.phase is Phase.DRAINING:
            say(f"drain: {self._role(node)} on {node} ended with {code}")
            self._stop()

    def _take_down(self, why: str) -> None:
        """Half a tier is never served: withdraw, kill what is left of it on every node, and start it anew later."""
        self._withdraw(why)
        self._pause(why)
        if self.phase is Phase.PAUSING:
            self._tell_all({"stop": 0})

    def _pause(self, why: str) -> None:
        """Wait, longer each time, before the tier is started again; fail when it dies too often."""
        now = time.monotonic()
        self.deaths = [at for at in self.deaths if now - at < RESTART_WINDOW_SECONDS] + [now]
        if len(self.deaths) > len(RESTART_PAUSES):
            self._fail(
                Exit.SERVER_FAILED,
                f"{why}; {len(self.deaths)} times in {RESTART_WINDOW_SECONDS:g} s: see {self._log_of(self.home)}",
            )
            return
        pause = RESTART_PAUSES[len(self.deaths) - 1]
        say(f"{why}; starting it again in {pause:g} s")
        self.phase, self.deadline = Phase.PAUSING, now + pause

    def _withdraw(self, why: str) -> None:
        if self.phase is Phase.SERVING:
            self.events.add(Kind.WITHDRAWN, why=why[: events.WORDS_LIMIT])
        self.retracted = self.publisher.retract()
        self.routing.clear()
        if self.retracted:
            for channel in self.gateways:
                self._tell_gateway(channel)
        if self.patience.spend(self.publisher.withdraw, self.patience.left - LAST_WORDS_SECONDS):
            self.patience.renew()
        else:
            say("record: not removed in time, still trying")

    # Stopping

    def _told_to_stop(self, how: str) -> None:
        """TERM: withdraw first, then ask Slurm why, then do what the cause asks for."""
        if self.phase is Phase.LEAVING or self.cause is Cause.FAILED:
            return
        asked_at, asked = time.monotonic(), time.time()
        self._withdraw(how)
        if self.phase is Phase.SERVING:
            self.routed_until = time.monotonic() + ROUTED_SECONDS
        # Slurm may take ASK_SECONDS, and signals of agents make us ask again before the next tick.
        self._beat_all()
        cause = self._ask_why()
        first, self.cause = self.cause is None, self._stronger(cause)
        if first or self.cause is cause:
            self.events.add(Kind.SIGNALLED, at=asked, cause=self.cause.value)
        if first:
            say(f"told to stop ({how}): {self.cause.value}")
        elif self.cause is cause:
            say(f"told to stop again ({how}): {cause.value}")
        if self.phase is Phase.STOPPING:
            return
        if self.phase not in (Phase.SERVING, Phase.DRAINING) or not self.cause.drains:
            self._stop()
        elif self.phase is Phase.SERVING:
            self.phase, self.deadline = Phase.DRAINING, asked_at + self.plan.drain_seconds
            self._watch_busy()

    def _watch_busy(self) -> None:
        self.watch, self.idle = self.watch + 1, False
        self._tell(self.home, {"watch_busy": self.watch})

    def _ask_why(self) -> Cause:
        try:
            return slurm.cause_of_stop(slurm.job(self.where.job, ASK_SECONDS), self.plan.signal_seconds)
        except slurm.SlurmError as error:
            say(f"cannot ask Slurm why: {error}")
            return Cause.UNANSWERED

    def _stronger(self, cause: Cause) -> Cause:
        """A second signal can only make the end harder: cancelled wins over all before."""
        if self.cause is None or cause is Cause.CANCELLED or self.cause is Cause.UNANSWERED:
            return cause
        return self.cause

    def _stop(self, kill_after: float = STOP_SECONDS) -> None:
        """Have every agent end what it started, and leave when they are gone."""
        self.phase = Phase.STOPPING
        self.deadline = time.monotonic() + kill_after + LEAVE_SECONDS
        self._tell_all({"quit": kill_after})
        if not self.agents:
            self.phase = Phase.LEAVING

    def _fail(self, code: Exit, why: str) -> None:
        if self.phase in (Phase.STOPPING, Phase.LEAVING):
            return
        say(f"failed: {why}")
        self._withdraw(why)
        if self.cause is None:
            self.cause, self.exit = Cause.FAILED, code
        self._stop()

    def _leave(self) -> None:
        for channel in [*self.agents.values(), *self.pulses.values(), *self.strangers, *self.gateways]:
            self._drop(channel)
        for listener in self.listeners:
            listener.close()
        self.selector.close()
        if self.step is not None:
            try:
                self.step.wait(1.0)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.step.pid, signal.SIGKILL)
        # Slurm ends us when we requeue the job.
        self.events.add(Kind.LEFT, exit=int(self.exit))
        self.patience.spend(self.events.close)
        self.patience.spend(self.pulse.stop)
        if self.cause is not None and self.cause.requeues and self._ask_why().requeues:
            self._requeue()

    def _requeue(self) -> None:
        try:
            slurm.run(["scontrol", "requeue", str(self.where.job)], REQUEUE_SECONDS)
        except slurm.SlurmError as error:
            say(f"cannot requeue job {self.where.job}, the keeper will submit anew: {error}")
            return
        say(f"requeued job {self.where.job}")


def server_key() -> str:
    """What the gateway shows that it has; empty when this node has none: then there is no line to it."""
    try:
        return files.read_key(files.server_key_path())
    except ValueError as error:
        say(f"the gateway will hear of a withdrawal later: {error}")
        return ""


def name_build(engine: Path, logs: Path) -> None:
    """Leave a link to the build that this job runs beside its logs: whoever removes old builds spares this one."""
    link = logs / "engine"
    link.unlink(missing_ok=True)
    link.symlink_to(engine)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, required=True, help="plan v1 of the tier")
    parser.add_argument("--registry", type=Path, help="endpoint records (default: endpoints beside the plan's folder)")
    parser.add_argument("--logs", type=Path, help="parent of the job's log folder (default: logs beside it)")


def label_of(tier: str) -> str:
    """What our lines begin with, whatever is wrong with plan and job."""
    job, restart = (os.environ.get(name) or "0" for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return f"{tier} {job}.{restart} {heartbeat.node_name()}"


def run(args: argparse.Namespace) -> int:
    log = joblog.own(label_of(args.plan.stem))
    divert(log.say)
    patience = bounded.Patience(WITHDRAW_SECONDS + LAST_WORDS_SECONDS)
    try:
        return supervise(args, log, patience)
    except Exception:
        say(f"a fault of gleaner, please report it: {traceback.format_exc()}")
        return 1
    finally:
        patience.spend(log.close)


def supervise(args: argparse.Namespace, log: joblog.File, patience: bounded.Patience) -> int:
    shared = args.plan.resolve().parent.parent
    registry = args.registry or shared / "endpoints"
    try:
        plan = Plan.load(args.plan)
        where = JobEnvironment.read(plan)
        logs = (args.logs or shared / "logs") / str(where.job)
        logs.mkdir(parents=True, exist_ok=True)
        name_build(plan.engine, logs)
        if not os.access(registry, os.W_OK):
            raise PlanError(f"{registry}: not a folder that uid {os.geteuid()} can write: run playbooks/tiers.yml")
        supervisor = Supervisor(plan, where, registry, logs, log, patience)
    except (PlanError, OSError) as error:
        say(f"refused: {error}")
        return Exit.REFUSED
    if name := os.environ.get("SLURM_JOB_NAME"):
        # Where the job script has Slurm write; beside the loop, since the file system can hang.
        slurms = logs.parent / f"{name}.log"
        threading.Thread(target=joblog.keep_small, args=(slurms,), name="slurm's log", daemon=True).start()
    return supervisor.run()
