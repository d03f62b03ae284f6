"""The program in the one job step that each node of a tier runs (`gleaner agent`).

It starts what its supervisor tells it, watches it, and kills it when the supervisor is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gleaner import confine, engine, files, gpus, heartbeat, joblog, tensor_cache
from gleaner.journal import say, sign
from gleaner.probe import Probe

TICK_SECONDS = 0.1
HEALTH_SECONDS = {"ready": 1.0, "loading": 0.3, "down": 0.3}
HEALTH_TIMEOUT = 3.0
BUSY_TIMEOUT = 1.0
BUSY_SECONDS = 0.05
REACH_SECONDS = 0.2
# For the last words of what was started; a file system that hangs holds up nobody longer.
LAST_WORDS_SECONDS = 0.5

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Task:
    """What the supervisor wants started; argv is whole but for the NUMA binding."""

    start: int
    argv: list[str]
    environment: dict[str, str]
    numa_node: int | None
    log: str
    address: str
    port: int
    role: str
    cache: dict[str, Any] | None
    confine: dict[str, Any] | None
    engine: dict[str, str]
    """Folder of the build, the sum of its manifest as the supervisor sees it, and the file that remembers what was
    verified here."""
    gpus: dict[str, Any]
    """How many GPUs the program gets (`count`; 0 where none is declared), and whether others use them (`shared`)."""

    @property
    def router(self) -> bool:
        return self.role == "router"

    @property
    def answers_http(self) -> bool:
        """Whether it has a /health; an RPC server has not, and takes a probe for its one client."""
        return self.role != "worker"

    @classmethod
    def from_message(cls, value: dict[str, Any]) -> Task:
        return cls(**{name: value[name] for name in cls.__dataclass_fields__})


def cpulist(text: str) -> set[int]:
    """`0-3,8` of sysfs as a set."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def binding(numa_node: int | None, allowed: set[int], sysfs: Path = Path("/sys/devices/system/node")) -> list[str]:
    """The numactl prefix that binds memory to the node and keeps to the allowed cores of that node.

    ValueError when the inventory names a node that the machine does not have.
    """
    if numa_node is None:
        say("no NUMA binding: gpus[].numa_node is not set for this node")
        return []
    try:
        cores = cpulist((sysfs / f"node{numa_node}" / "cpulist").read_text()) & allowed
    except FileNotFoundError:
        have = sorted(path.name[4:] for path in sysfs.glob("node[0-9]*"))
        raise ValueError(
            f"gpus[].numa_node: got {numa_node}, this machine has {', '.join(have) or 'none'}: correct the inventory"
        ) from None
    if shutil.which("numactl") is None:
        raise ValueError("numactl is not installed: run playbooks/tiers.yml")
    if not cores:
        say(
            f"memory is bound to NUMA node {numa_node}, but Slurm gave no core of it "
            f"(got {sorted(allowed)}): "
            "give gres.conf the Cores= of the GPU"
        )
        return ["numactl", f"--membind={numa_node}", "--"]
    chosen = ",".join(str(core) for core in sorted(cores))
    return ["numactl", f"--membind={numa_node}", f"--physcpubind={chosen}", "--"]


def require_free(task: Task) -> None:
    """ValueError when the task's port is taken: /health of a foreign program there would pass for our server's."""
    variable, choice = ("tiers[].gateway_port", ", or choose another port") if task.answers_http else ("RPC port", "")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        # As the server does it: connections of its predecessor that still close are no obstacle.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((task.address, task.port))
        except OSError as error:
            raise ValueError(
                f"{variable}: {task.address}:{task.port} cannot be listened on ({error.strerror}): "
                f"end the program that has it (`ss -ltnp sport = :{task.port}` on this node){choice}"
            ) from None


def raise_memlock() -> int:
    """Raise the locked-memory limit to the hard limit; MiB, or -1 for unlimited."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    return -1 if hard == resource.RLIM_INFINITY else hard >> 20


def process_state(pid: int) -> str:
    """alive, stopped, zombie, or gone, from /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    letter = stat.rpartition(")")[2].split()[0]
    if letter in "Tt":
        return "stopped"
    return "zombie" if letter in "ZXx" else "alive"


def group_memory(group: int) -> tuple[int, int]:
    """Resident and locked MiB of a process group; a router's models live in its children."""
    resident = locked = 0
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if os.getpgid(int(entry.name)) != group:
                continue
            status = Path(entry.path, "status").read_text()
        except OSError:
            continue
        sizes = dict(re.findall(r"^(VmRSS|VmLck):\s+(\d+) kB", status, re.MULTILINE))
        resident += int(sizes.get("VmRSS", 0))
        locked += int(sizes.get("VmLck", 0))
    return resident >> 10, locked >> 10


def rules_of(task: Task) -> confine.Ruleset | None:
    """What the task's program may do; None for one that is trusted."""
    if task.confine is None:
        return None
    program = Path(task.argv[0])
    numactl = shutil.which("numactl") or ""
    loaders = [path.resolve() for folder in ("/lib", "/lib64") for path in Path(folder).glob("ld-linux*")]
    writable = [Path(folder) for folder in (*task.confine["writable"], "/dev", "/proc")]
    rules = confine.Ruleset([program, *([Path(numactl).resolve()] if numactl else []), *loaders], writable, task.port)
    if rules.lacks:
        say(f"RPC server: this kernel, or a container, does not keep it from {rules.lacks}")
    return rules


def bring_uvm(devices: Path = Path("/dev")) -> None:
    """CUDA makes a device file that is missing by a setuid program, which no confined process can start."""
    if (devices / "nvidiactl").exists() and not (devices / "nvidia-uvm").exists():
        try:
            subprocess.run(["nvidia-modprobe", "-u", "-c=0"], stdin=subprocess.DEVNULL, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            say(f"{devices}/nvidia-uvm is missing, and nvidia-modprobe cannot bring it: {error}")


def _in_child(parent: int, rules: confine.Ruleset | None) -> None:
    """Before exec: be killed when the agent dies, even by SIGKILL, and be confined."""
    if rules is not None:
        rules.enforce()
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(127)


class Errand:
    """Work on disks or drivers beside the loop, whose heartbeats must go on."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=work, name="errand", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()


class Preparation:
    """What is done on a node before its program starts; done when its errand is."""

    def __init__(self, task: Task) -> None:
        self.task = task
        # Why the program cannot be started here; empty when all was found well.
        self.problem = "what a program needs was not looked at to the end: the log above says why"
        # Whether a worker's cache can be used.
        self.cached = False
        self.errand = Errand(self._work)

    def _work(self) -> None:
        task = self.task
        try:
            verify_engine(task.engine)
            if task.gpus["count"]:
                gpus.wait_until_usable("nvidia-smi", heartbeat.node_name(), os.environ, **task.gpus)
            if not task.answers_http:
                bring_uvm()
                self.cached = task.cache is None or tensor_cache.make_sound(
                    Path(task.cache["directory"]), int(task.cache["limit_mib"])
                )
        except (OSError, ValueError, engine.EngineError, gpus.GpuError) as error:
            self.problem = str(error)
        else:
            self.problem = ""


def verify_engine(wanted: dict[str, str]) -> None:
    """EngineError unless this node sees the very build that the supervisor sees, whole."""
    prefix, memory = Path(wanted["prefix"]), Path(wanted["memory"])
    engine.verify(prefix, memory if wanted["memory"] and os.access(memory.parent, os.W_OK) else None)
    if (here := engine.identity(prefix)) != wanted["manifest"]:
        raise engine.EngineError(
            f"{prefix / engine.MANIFEST}: this node sees {here}, its supervisor {wanted['manifest']}: "
            "head and workers of different builds abort in the middle of an answer: run playbooks/engine.yml"
        )


class Reach:
    """Connects once to each of some places, and goes on asking while nobody listens there yet."""

    def __init__(self, start: int, places: list[tuple[str, int]]) -> None:
        self.start = start
        self.missing = list(places)
        self.trying: dict[socket.socket, tuple[str, int]] = {}
        self.again_at = 0.0

    def advance(self) -> bool:
        """Go on; true when every place was reached."""
        for sock in self._writable():
            place = self.trying.pop(sock)
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.missing.append(place)
            sock.close()
        now = time.monotonic()
        if self.missing and now >= self.again_at:
            self.again_at = now + REACH_SECONDS
            for place in self.missing:
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
                sock.connect_ex(place)
                self.trying[sock] = place
            self.missing = []
        return not self.missing and not self.trying

    def _writable(self) -> list[socket.socket]:
        return select.select([], list(self.trying), [], 0)[1] if self.trying else []

    def close(self) -> None:
        for sock in self.trying:
            sock.close()
        self.trying.clear()


@dataclass
class Process:
    """The one program of this agent, with everything that it starts (its process group)."""

    pid: int
    start: int
    exit: int | None = None
    kill_at: float | None = None
    asked_to_stop: bool = False

    @classmethod
    def launch(cls, task: Task, output: int, key: str = "") -> Process:
        """Start it; what it says goes to this descriptor."""
        argv = [*binding(task.numa_node, os.sched_getaffinity(0)), *task.argv]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GLEANER_")}
        environment.update(task.environment)
        # The processes of a router's models inherit it. They listen where every user of the node can connect.
        if key:
            environment["LLAMA_API_KEY"] = key
        # gdb is not wanted on a node at 3 a.m.; llama.cpp starts it on abort otherwise.
        environment["GGML_NO_BACKTRACE"] = "1"
        parent, rules = os.getpid(), rules_of(task)
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                # SIGPIPE stays ignored, as Python has it: an RPC server would die of a client that leaves.
                restore_signals=False,
                preexec_fn=lambda: _in_child(parent, rules),
            )
        finally:
            if rules is not None:
                rules.close()
        # Reaped by `reap` with everybody else's children, not by Popen.
        child.returncode = 0
        say(f"started pid {child.pid}: {' '.join(argv)}")
        return cls(pid=child.pid, start=task.start)

    def signal_main(self, number: int) -> None:
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill_group(self) -> bool:
        """KILL everything that is left of the group; false when nothing is."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def stop(self, kill_after: float) -> None:
        """TERM, and KILL `kill_after` seconds later."""
        self.asked_to_stop = True
        deadline = time.monotonic() + kill_after
        if self.kill_at is None:
            # Only the main process: a router's children end their streams at once on TERM.
            self.signal_main(signal.SIGTERM)
            self.kill_at = deadline
        self.kill_at = min(self.kill_at, deadline)


@dataclass
class BusyCheck:
    """Asks the server whether any request is in flight, without loading or evicting a model.

    A router's `/v1/models` tells which models are loaded, and `/slots` of each tells whether it
    works. A model that loads has a request waiting for it. No answer in time counts as busy: a server
    answers `/slots` only between two batches.
    """

    selector: selectors.BaseSelector
    task: Task
    key: str = ""
    probe: Probe | None = None
    waiting: list[str] = field(default_factory=list)
    listing: bool = False
    answer: bool | None = None

    def begin(self) -> None:
        self.answer = None
        self.listing = self.task.router
        self._get("/v1/models" if self.listing else "/slots")

    def _get(self, path: str) -> None:
        self.probe = Probe(self.selector, self.task.address, self.task.port, path, BUSY_TIMEOUT, self.key)

    def advance(self) -> bool | None:
        """Busy, idle, or None while it is not known yet."""
        if self.probe is None or not self.probe.advance():
            return self.answer
        probe, self.probe = self.probe, None
        if probe.failure == "refused":
            self.answer = False
            return self.answer
        try:
            value = json.loads(probe.body) if probe.status == 200 else None
            busy = self._read(value)
        except (ValueError, KeyError, TypeError):
            busy = True
        if busy:
            self.waiting.clear()
            self.answer = True
        elif self.waiting:
            model = urllib.parse.quote(self.waiting.pop(), safe="")
            self._get(f"/slots?model={model}&autoload=false")
        else:
            self.answer = False
        return self.answer

    def _read(self, value: Any) -> bool:
        if not self.listing:
            return any(slot["is_processing"] for slot in value)
        self.listing = False
        states = {entry["id"]: entry["status"]["value"] for entry in value["data"]}
        self.waiting = [name for name, state in states.items() if state in ("loaded", "sleeping")]
        return "loading" in states.values()

    def close(self) -> None:
        if self.probe is not None:
            self.probe.close()
            self.probe = None


class Agent:
    """One selector loop over the supervisor's connection, signals, probes and a tick."""

    def __init__(self, supervisor: list[tuple[str, int]], token: str, node: str, label: str) -> None:
        self.label = label
        self.selector = selectors.DefaultSelector()
        self.signals = heartbeat.Signals(signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        self.selector.register(self.signals.socket, selectors.EVENT_READ)
        self.memlock_mib = raise_memlock()
        self.lines = []
        for network, place in enumerate(supervisor):
            line = heartbeat.Channel(socket.create_connection(place, heartbeat.SILENCE_SECONDS))
            self.selector.register(line.socket, selectors.EVENT_READ)
            line.send(heartbeat.greeting(token, node, network))
            self.lines.append(line)
        # Orders and answers; the others carry beats alone.
        self.channel = self.lines[0]
        self.key_file = files.server_key_path()
        self.key = ""
        self.task: Task | None = None
        self.process: Process | None = None
        self.health = "down"
        self.health_probe: Probe | None = None
        self.health_at = 0.0
        self.busy_check: BusyCheck | None = None
        self.busy: bool | None = None
        self.idle_answers = 0
        self.watch = 0
        self.busy_at = 0.0
        # What the server says, and where it goes: a file system that hangs must hold up neither it nor us.
        self.output: joblog.Reader | None = None
        self.log: joblog.File | None = None
        self.preparation: Preparation | None = None
        self.beat_at = 0.0
        self.measured_at = 0.0
        self.memory = (0, 0)
        self.sent: dict[str, Any] = {}
        self.reach: Reach | None = None
        self.leaving = False

    def run(self) -> int:
        """Work until the supervisor says quit (0) or is gone (1); nothing is left behind either way."""
        try:
            while not (self.leaving and self.process is None):
                for key, _ in self.selector.select(TICK_SECONDS):
                    if key.fileobj is self.signals.socket:
                        self._signalled(self.signals.receive())
                self._listen()
                self._reap()
                self._watch()
                self._beat()
        except heartbeat.ChannelClosed as error:
            told = f"supervisor is gone ({error}): killing what it started"
            say(told)
            if self.log is not None:
                # Our own lines are passed on by a supervisor.
                self.log.say(told)
            self._kill_all()
            return 1
        finally:
            self._end_log()
        return 0

    def _signalled(self, numbers: set[int]) -> None:
        for number in sorted(numbers & {signal.SIGTERM, signal.SIGINT}):
            # Slurm signals steps too. Why is the supervisor's question to ask, and its decision.
            self.channel.send({"signal": number})

    def _listen(self) -> None:
        try:
            messages, *_ = [line.receive() for line in self.lines]
        except ValueError as error:
            raise heartbeat.ChannelClosed(str(error)) from None
        for message in messages:
            if "start" in message:
                self._start(Task.from_message(message["start"]))
            elif "reach" in message:
                order = message["reach"]
                self._give_up_reaching()
                self.reach = Reach(order["start"], [(str(host), int(port)) for host, port in order["places"]])
            elif "watch_busy" in message:
                self._watch_busy(message["watch_busy"])
            elif "loaded" in message:
                self._loaded()
            elif "stop" in message:
                self._stop(float(message["stop"]))
            elif "quit" in message:
                self.leaving = True
                self._stop(float(message["quit"]))
        for line in self.lines:
            line.mind_silence()

    def _start(self, task: Task) -> None:
        if self.leaving:
            return
        self._kill_all()
        self.task, self.health, self.busy = task, "down", None
        self.health_at, self.idle_answers = 0.0, 0
        self.preparation = Preparation(task)

    def _launch(self, preparation: Preparation) -> None:
        task, self.preparation = preparation.task, None
        if not preparation.cached:
            task.argv = [word for word in task.argv if word != "--cache"]
        try:
            if preparation.problem:
                raise ValueError(preparation.problem)
            require_free(task)
            # An RPC server knows no key: the firewall alone keeps others away from it.
            self.key = files.read_key(self.key_file) if task.answers_http else ""
            self.process = self._start_process(task)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            say(f"cannot start {task.argv[0]}: {error}")
            self.channel.send({"refused": task.start, "why": str(error)})

    def _start_process(self, task: Task) -> Process:
        if self.log is None or self.log.path != Path(task.log):
            self.log = joblog.File(Path(task.log), self.label)
        self.log.say(f"starting {' '.join(task.argv)}")
        output, pipe = os.pipe2(os.O_CLOEXEC)
        try:
            self.output = joblog.Reader(output, self.log.put)
            return Process.launch(task, pipe, self.key)
        finally:
            # The program has it now; when it and all its children are gone, the reader comes to the end.
            os.close(pipe)

    def _end_log(self) -> None:
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        if self.output is not None:
            self.output.join(LAST_WORDS_SECONDS)
        if self.log is not None:
            self.log.close(max(0.0, deadline - time.monotonic()))

    def _loaded(self) -> None:
        """The tier is ready: what this worker was sent is whole in its cache."""
        task = self.task
        if task is not None and task.cache is not None and "--cache" in task.argv:
            directory = Path(task.cache["directory"])
            Errand(lambda: tensor_cache.mark_whole(directory))

    def _give_up_reaching(self) -> None:
        if self.reach is not None:
            self.reach.close()
            self.reach = None

    def _stop(self, kill_after: float) -> None:
        self._end_checks()
        self._give_up_reaching()
        if self.preparation is not None and self.task is not None:
            self.preparation = None
            self.channel.send({"exited": self.task.start, "code": 0})
        if self.process is not None:
            self.process.stop(kill_after)

    def _end_checks(self) -> None:
        if self.health_probe is not None:
            self.health_probe.close()
            self.health_probe = None
        if self.busy_check is not None:
            self.busy_check.close()
            self.busy_check = None
        self.health = "down"

    def _watch_busy(self, watch: int) -> None:
        """Look whether the server is busy, from now on; what was seen before does not count."""
        if self.process is None or self.task is None:
            return
        if self.busy_check is not None:
            self.busy_check.close()
        self.watch, self.busy, self.idle_answers = watch, None, 0
        self.busy_check = BusyCheck(self.selector, self.task, self.key)
        self.busy_check.begin()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if self.process is not None and pid == self.process.pid:
                self.process.exit = os.waitstatus_to_exitcode(status)
                self._end_checks()
        process = self.process
        if process is None:
            return
        if process.kill_at is not None and time.monotonic() >= process.kill_at:
            process.kill_group()
        # The main process is gone: what it left has nobody to serve. Told only when all are gone.
        if process.exit is not None and not process.kill_group():
            say(f"pid {process.pid} ended with {process.exit}")
            self.process = None
            self.channel.send({"exited": process.start, "code": process.exit})

    def _watch(self) -> None:
        now = time.monotonic()
        if self.reach is not None and self.reach.advance():
            self.channel.send({"reached": self.reach.start})
            self.reach = None
        process, task = self.process, self.task
        if self.preparation is not None and self.preparation.errand.done:
            self._launch(self.preparation)
        if process is None or task is None or process.asked_to_stop:
            return
        if task.answers_http and self.health_probe is None and now >= self.health_at:
            self.health_probe = Probe(self.selector, task.address, task.port, "/health", HEALTH_TIMEOUT)
        if self.health_probe is not None and self.health_probe.advance():
            status = self.health_probe.status
            self.health = {200: "ready", 503: "loading"}.get(status or 0, "down")
            self.health_probe = None
            self.health_at = now + HEALTH_SECONDS[self.health]
        if self.busy_check is not None:
            answer = self.busy_check.advance()
            if answer is not None and now >= self.busy_at:
                # A slot is free a moment before its last bytes are with the client: idle is believed twice.
                self.idle_answers = 0 if answer else self.idle_answers + 1
                if answer or self.idle_answers >= 2:
                    self.busy = answer
                self.busy_at = now + BUSY_SECONDS
                self.busy_check.begin()
        if now - self.measured_at >= heartbeat.BEAT_SECONDS:
            self.measured_at = now
            self.memory = group_memory(process.pid)

    def _beat(self) -> None:
        process = self.process
        beat = {
            "start": process.start if process else None,
            "state": process_state(process.pid) if process else "idle",
            "health": self.health,
            "busy": self.busy,
            "watch": self.watch,
        }
        now = time.monotonic()
        for line in self.lines[1:]:
            if now >= self.beat_at:
                line.send({"beat": None})
            line.flush()
        # A change is told at once, sameness once a second.
        if beat != self.sent or now >= self.beat_at:
            self.sent = beat
            self.beat_at = now + heartbeat.BEAT_SECONDS
            resident, locked = self.memory if process else (0, 0)
            extra = {"resident_mib": resident, "locked_mib": locked, "memlock_limit_mib": self.memlock_mib}
            self.channel.send({"beat": beat, **extra})
        else:
            self.channel.flush()

    def _kill_all(self) -> None:
        process, self.process = self.process, None
        self._end_checks()
        self._give_up_reaching()
        if process is None:
            return
        deadline = time.monotonic() + heartbeat.SILENCE_SECONDS
        while process.kill_group() and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.01)


def places(text: str) -> list[tuple[str, int]]:
    """`address:port,address:port` as a list."""
    pairs = (place.rpartition(":") for place in text.split(","))
    return [(address, int(port)) for address, _, port in pairs]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Started by the supervisor, with GLEANER_SUPERVISOR and GLEANER_TOKEN in the environment."


def run(_args: argparse.Namespace) -> int:
    try:
        given, token = os.environ["GLEANER_SUPERVISOR"], os.environ["GLEANER_TOKEN"]
    except KeyError as error:
        say(f"{error.args[0]} is not set: `gleaner agent` is started by `gleaner supervise`, not by hand")
        return 2
    node = heartbeat.node_name()
    # A supervisor of an older version does not say whose agent this is.
    label = f"{os.environ.get('GLEANER_LABEL', 'unknown 0.0')} {node}"
    sign(label)
    # Orphans of the server come to us, so that none outlives the step unseen.
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        agent = Agent(places(given), token, node, label)
    except OSError as error:
        say(f"supervisor at {given} cannot be reached: {error}")
        return 1
    return agent.run()
