"""The updater on the controller: endpoint records and Slurm's state become nginx routing (`gleaner route`).

Nothing of a record's text reaches nginx: the address comes from our own configuration, by node name, and
the port must be the configured one. Routing goes off by removing a flag file, which needs no reload.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gleaner import files, heartbeat, record, slurm
from gleaner.journal import OnChange, notify, say
from gleaner.line import Line
from gleaner.probe import Probe
from gleaner.record import Reading, Record, Unreadable, Withdrawn
from gleaner.states import Exit

HEALTH_TIMEOUT = 3.0
HEALTH_FAILURES = 2
SQUEUE_SECONDS = 5.0
RELOAD_SECONDS = 10.0
RETRY_SECONDS = 5.0
TICK_SECONDS = 0.2
# A first packet that is lost is sent again after a second.
CONNECT_TIMEOUT = 2.0
SEVER_SECONDS = 5.0
LINE_SECONDS = 10.0
FIRST_SIGHT = "record was not seen to change yet"


@dataclass(frozen=True)
class TierConfig:
    tier: str
    job_name: str
    node_port: int
    nodes: dict[str, str]
    supervisors: dict[str, str]
    """Where its supervisor may be: a layer-split tier's is not always with the head."""
    gateway_port: int = 0
    """Where clients ask; the updater has no need of it."""


@dataclass(frozen=True)
class Config:
    service_user: str
    registry: Path
    poll_seconds: float
    stale_seconds: float
    flags_dir: Path
    upstream_dir: Path
    tiers: tuple[TierConfig, ...]

    @classmethod
    def load(cls, path: Path) -> Config:
        value = files.load_config(path)
        try:
            return cls(
                service_user=str(value["service_user"]),
                registry=Path(value["registry"]),
                poll_seconds=float(value["poll_seconds"]),
                stale_seconds=float(value["stale_seconds"]),
                flags_dir=Path(value["flags_dir"]),
                upstream_dir=Path(value["upstream_dir"]),
                tiers=tuple(
                    TierConfig(
                        tier=str(tier["tier"]),
                        job_name=str(tier["job_name"]),
                        node_port=int(tier["node_port"]),
                        nodes={str(node): str(address) for node, address in tier["nodes"].items()},
                        supervisors={str(node): str(address) for node, address in tier["supervisors"].items()},
                        gateway_port=int(tier.get("gateway_port", tier["node_port"])),
                    )
                    for tier in value["tiers"]
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not a gateway configuration ({error!r}): run playbooks/gateway.yml") from None


def upstream_text(tier: str, address: str | None, port: int) -> str:
    """The whole of upstream-<tier>.conf; without an address, a placeholder that nginx accepts.

    keepalive_timeout stays below the 5 s after which llama-server closes an idle connection: a POST that
    meets a closing connection is not retried.
    """
    server = f"server {address}:{port} max_fails=0;" if address else "server 127.0.0.1:9 down;"
    return f"upstream gleaner_{tier} {{ {server} keepalive 32; keepalive_timeout 4s; }}\n"


def flag_of(config: Config, tier: str) -> Path:
    return config.flags_dir / f"{tier}.up"


# Deciding


@dataclass
class Memory:
    """What the updater remembers of one tier between two looks."""

    good: Record | None = None
    """The last record that was routed."""
    run: tuple[int, int] | None = None
    seq: int = -1
    moved_at: float = 0.0
    health_failures: int = 0
    healthy: bool = False
    reached: bool = True
    """The host took the last connection, or refused it."""
    void: tuple[tuple[int, int], int] | None = None
    """The run whose supervisor has withdrawn it, and the last `seq` that is void."""

    def is_void(self, record: Record) -> bool:
        return self.void is not None and record.run == self.void[0] and record.seq <= self.void[1]


@dataclass(frozen=True)
class Verdict:
    """Route to this record's host, or to nothing; `why` is empty when all is plainly good."""

    target: Record | None
    why: str


def freshness(memory: Memory, reading: Record, now: float) -> float:
    """Seconds since the record was seen to change, by our own clock; infinite at first sight."""
    if memory.run != reading.run:
        memory.run, memory.seq, memory.moved_at = reading.run, reading.seq, float("-inf")
    elif memory.seq != reading.seq:
        memory.seq, memory.moved_at = reading.seq, now
    return now - memory.moved_at


def decide(
    tier: TierConfig,
    memory: Memory,
    reading: Reading,
    jobs: list[slurm.Job] | None,
    now: float,
    stale_seconds: float,
) -> Verdict:
    """Which record to route by. Health is looked at separately, since it needs the answer to this.

    `jobs` are the service user's jobs of this tier's name, None while Slurm does not answer. Only a
    missing record withdraws; one that cannot be believed leaves the last good one in place, which Slurm
    and /health can still end.
    """
    if isinstance(reading, Withdrawn):
        return Verdict(None, "no record")
    if isinstance(reading, Record) and memory.is_void(reading):
        return Verdict(None, "its supervisor has withdrawn it")
    good = None if memory.good is not None and memory.is_void(memory.good) else memory.good
    doubt = reading.why if isinstance(reading, Unreadable) else _doubt(tier, reading)
    fresh = False
    if isinstance(reading, Record) and not doubt:
        age = freshness(memory, reading, now)
        fresh = age <= stale_seconds
        if not fresh:
            doubt = "record is stale" if age < float("inf") else FIRST_SIGHT
        if jobs is not None:
            refusal = _refusal(reading, jobs)
            if not refusal and fresh:
                return Verdict(reading, "")
            if refusal and (good is None or good.run == reading.run):
                return Verdict(None, refusal)
            doubt = refusal or doubt
    if good is None:
        return Verdict(None, doubt or "Slurm does not answer")
    if jobs is None:
        if isinstance(reading, Record) and good.run == reading.run and fresh:
            return Verdict(reading, "Slurm does not answer; the record is fresh")
        return Verdict(None, f"Slurm does not answer, and {doubt or 'the record is not the one routed'}")
    refusal = _refusal(good, jobs)
    if refusal:
        return Verdict(None, f"{doubt}; of the last good record: {refusal}")
    return Verdict(good, f"{doubt}; the last good record stays, its job {good.job} is running")


def _doubt(tier: TierConfig, reading: Record) -> str:
    if reading.host not in tier.nodes:
        return f"record: host: got {reading.host}, want one of {','.join(sorted(tier.nodes))}"
    if reading.port != tier.node_port:
        return f"record: port: got {reading.port}, want {tier.node_port}"
    return ""


def _refusal(reading: Record, jobs: list[slurm.Job]) -> str:
    """Why Slurm's view forbids routing by this record."""
    job = next((one for one in jobs if one.id == reading.job), None)
    if job is None:
        have = ",".join(str(one.id) for one in jobs) or "none"
        return f"record: job: got {reading.job}, the tier's jobs are {have}"
    if job.preempted:
        return f"job {job.id} is being preempted"
    if job.state != "RUNNING":
        return f"job {job.id} is {job.state}"
    if job.restarts != reading.restart:
        return f"record: restart: got {reading.restart}, job {job.id} has restarted {job.restarts} times"
    if reading.host not in slurm.hosts(job.nodes):
        return f"record: host: got {reading.host}, job {job.id} runs on {job.nodes}"
    return ""


def _job_of(record: Record | None) -> str:
    """Which job a line is about, in the words by which `gleaner log` finds it; empty where none is known."""
    return f" (job {record.job} restart {record.restart})" if record else ""


# nginx


class Nginx(Protocol):
    def test(self) -> str:
        """Empty, or what `nginx -t` has against its configuration."""

    def reload(self) -> str:
        """Empty once new workers serve, or why they do not."""


def _call(argv: list[str], seconds: float) -> tuple[bool, str]:
    """Whether a command succeeded in time, and what it complained of; a failure is never without words."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False, f"{argv[0]}: no answer within {seconds:g} s"
    except OSError as error:
        return False, f"{argv[0]}: {error.strerror}"
    text = done.stderr.decode(errors="replace").strip()
    return (True, text) if done.returncode == 0 else (False, text or f"{argv[0]}: exit code {done.returncode}")


def _fault(argv: list[str], seconds: float) -> str:
    """Empty when a command succeeded, whatever it warned of."""
    succeeded, text = _call(argv, seconds)
    return "" if succeeded else text


class SystemNginx:
    """nginx.service of this host."""

    def __init__(self, pid_file: Path = Path("/run/nginx.pid"), proc: Path = Path("/proc")) -> None:
        self._pid_file, self._proc = pid_file, proc

    def test(self) -> str:
        return _fault(["nginx", "-t", "-q"], RELOAD_SECONDS)

    def reload(self) -> str:
        before = self._workers()
        if not before:
            # It reads its files when it starts.
            return "nginx is not running"
        failure = _fault(["systemctl", "reload", "nginx.service"], RELOAD_SECONDS)
        if failure:
            return failure
        deadline = time.monotonic() + RELOAD_SECONDS
        while time.monotonic() < deadline:
            now = self._workers()
            old = {pid for pid in before if now.get(pid) is True}
            if not old and any(now[pid] for pid in set(now) - set(before)):
                return ""
            time.sleep(0.02)
        return f"nginx's old workers still accept connections {RELOAD_SECONDS:g} s after the reload"

    def _workers(self) -> dict[int, bool]:
        """nginx's workers: pid to whether it takes new connections."""
        try:
            master = int(self._pid_file.read_text())
        except (OSError, ValueError):
            return {}
        found: dict[int, bool] = {}
        for entry in os.scandir(self._proc):
            if not entry.name.isdigit():
                continue
            try:
                parent = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1]
                title = Path(entry.path, "cmdline").read_bytes()
            except (OSError, IndexError):
                continue
            if int(parent) == master and title.startswith(b"nginx: worker process"):
                found[int(entry.name)] = b"shutting down" not in title
        return found


class Router:
    """One tier's files: upstream, flag, and the note of what nginx has loaded."""

    def __init__(self, config: Config, tier: TierConfig, nginx: Nginx) -> None:
        self._tier, self._nginx = tier, nginx
        self._upstream = config.upstream_dir / f"upstream-{tier.tier}.conf"
        self._flag = flag_of(config, tier.tier)
        # Survives our restart, not the machine's: then nginx itself has read the file.
        self._loaded = config.flags_dir / f"{tier.tier}.loaded"
        self._not_before = 0.0
        self.changes = OnChange()

    def prepare(self) -> None:
        """nginx's include must exist before any tier has run."""
        if not self._upstream.exists():
            files.write_atomic(self._upstream, upstream_text(self._tier.tier, None, 0).encode())

    @property
    def up(self) -> bool:
        return self._flag.exists()

    def leads_to(self, address: str, port: int) -> bool:
        """nginx serves with this address now."""
        text = upstream_text(self._tier.tier, address, port)
        return self._text(self._upstream) == text and self._text(self._loaded) == text

    @staticmethod
    def _text(path: Path) -> str:
        try:
            return path.read_text()
        except OSError:
            return ""

    def down(self) -> bool:
        """Stop routing; true when it was routed."""
        try:
            self._flag.unlink()
        except FileNotFoundError:
            return False
        return True

    def routed(self) -> Record | None:
        """The record by which a former updater routed, from the flag."""
        try:
            return record.parse(files.read_bounded(self._flag, record.SIZE_LIMIT))
        except (OSError, ValueError):
            return None

    def route(self, by: Record, address: str, port: int) -> bool:
        """Route to this address, reloading nginx only when it serves with another; true when routed."""
        if not self.leads_to(address, port):
            self.down()
            if time.monotonic() < self._not_before or not self._load(address, port):
                return False
        if not self.up:
            files.write_atomic(self._flag, by.encode())
        return True

    def _load(self, address: str, port: int) -> bool:
        text = upstream_text(self._tier.tier, address, port)
        before = self._text(self._upstream)
        if before != text:
            files.write_atomic(self._upstream, text.encode())
        failure = self._nginx.test()
        if failure:
            files.write_atomic(self._upstream, (before or upstream_text(self._tier.tier, None, 0)).encode())
            self._retry(f"nginx -t refuses, the old {self._upstream.name} is back: {failure}")
            return False
        with contextlib.suppress(FileNotFoundError):
            self._loaded.unlink()
        failure = self._nginx.reload()
        if failure:
            self._retry(f"cannot reload nginx: {failure}")
            return False
        files.write_atomic(self._loaded, text.encode())
        self._not_before = 0.0
        self.changes.clear("nginx")
        say(f"{self._tier.tier}: nginx reloaded for {address}:{port}")
        return True

    def _retry(self, why: str) -> None:
        self._not_before = time.monotonic() + RETRY_SECONDS
        self.changes.say("nginx", f"{self._tier.tier}: not routed: {why}")


# Looking


class RegistryReader:
    """Reads the records in a thread of its own: a shared file system can hang, routing must not.

    While a read hangs, every record is said to be unreadable, and the updater goes on: started anew it would hang
    in the same place. A thread that has ended is a fault that only a new start mends.
    """

    def __init__(self, registry: Path, tiers: list[str], poll_seconds: float) -> None:
        self._registry, self._tiers, self._poll_seconds = registry, tiers, poll_seconds
        self._lock = threading.Lock()
        self._readings: dict[str, Reading] = {}
        self._stop = threading.Event()
        self._read_at = time.monotonic()
        self._changes = OnChange()
        self._thread = threading.Thread(target=self._work, name="registry", daemon=True)
        self._thread.start()

    def _read(self, tier: str) -> Reading:
        try:
            reading = record.read(self._registry, tier)
        except Exception as error:
            # One record that we cannot deal with is no reason to lose sight of the others, or of Slurm.
            self._changes.say(tier, f"{tier}: a fault of gleaner, please report it: {traceback.format_exc()}")
            return Unreadable(f"{record.path_of(self._registry, tier)}: {error!r}")
        self._changes.clear(tier)
        return reading

    def _work(self) -> None:
        while not self._stop.is_set():
            readings = {tier: self._read(tier) for tier in self._tiers}
            with self._lock:
                self._readings, self._read_at = readings, time.monotonic()
            self._stop.wait(self._poll_seconds / 2)

    def stop(self) -> None:
        self._stop.set()

    def readings(self, stale_seconds: float) -> dict[str, Reading] | None:
        """What was read last; None before the first answer. RuntimeError when there will be none any more."""
        if not self._thread.is_alive():
            raise RuntimeError(f"the thread that reads {self._registry} has ended")
        with self._lock:
            if time.monotonic() - self._read_at > stale_seconds:
                why = f"{self._registry}: no answer for {stale_seconds:g} s"
                return {tier: Unreadable(why) for tier in self._tiers}
            return self._readings or None


class SqueueQuery:
    """One squeue for all tiers, in the background of a selector loop."""

    def __init__(self, user: str, names: list[str]) -> None:
        self._argv = slurm.jobs_command(user, names)
        self._child: subprocess.Popen[bytes] | None = None
        self._output = bytearray()
        self._deadline = 0.0

    def begin(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._output = bytearray()
        self._deadline = time.monotonic() + SQUEUE_SECONDS
        self._child = subprocess.Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=slurm.environment(),
        )
        assert self._child.stdout is not None
        os.set_blocking(self._child.stdout.fileno(), False)
        selector.register(self._child.stdout, selectors.EVENT_READ)

    @property
    def running(self) -> bool:
        return self._child is not None

    def advance(self) -> list[slurm.Job] | None:
        """The jobs once they are known, else None; SlurmError when there will be no answer."""
        child = self._child
        if child is None or child.stdout is None:
            return None
        with contextlib.suppress(BlockingIOError):
            while data := os.read(child.stdout.fileno(), 65536):
                self._output += data
        code = child.poll()
        if code is None:
            if time.monotonic() < self._deadline:
                return None
            self.end()
            raise slurm.SlurmError(f"squeue: no answer within {SQUEUE_SECONDS:g} s")
        with contextlib.suppress(BlockingIOError):
            while data := os.read(child.stdout.fileno(), 65536):
                self._output += data
        self.end()
        text = self._output.decode(errors="replace")
        if code != 0:
            raise slurm.SlurmError(f"squeue: {text.strip()[-200:] or f'exit code {code}'}")
        # Both streams come through one pipe: what is no row is a warning, and squeue has succeeded.
        return slurm.parse_jobs("\n".join(line for line in text.splitlines() if "|" in line))

    def end(self) -> None:
        child, self._child = self._child, None
        if child is None or child.stdout is None:
            return
        self._selector.unregister(child.stdout)
        child.stdout.close()
        if child.poll() is None:
            child.kill()
            child.wait()


@dataclass
class Watched:
    """One tier under watch."""

    config: TierConfig
    router: Router
    memory: Memory = field(default_factory=Memory)
    verdict: Verdict = field(default_factory=lambda: Verdict(None, "not looked at yet"))
    probe: Probe | None = None
    probe_at: float = 0.0
    target: Record | None = None
    """What `probe` looks at, and what the tier is routed to while it is."""
    parting: Probe | None = None
    """A look at the server that was routed to before, at `parted`, while there is one."""
    parted: str = ""
    part_at: float = 0.0
    line: Line | None = None
    """To the supervisor of what was routed to last."""
    line_at: float = 0.0


def sever(address: str, port: int) -> str:
    """Close this host's connections to a server there; empty when done, or why it cannot be.

    nginx would wait for a host that is gone for as long as for a model that thinks.
    """
    # It succeeds also when the kernel refuses, and says so.
    _, text = _call(
        ["ss", "--kill", "--no-header", "--tcp", "--numeric", "dst", address, "dport", "=", f":{port}"], SEVER_SECONDS
    )
    return text


class Updater:
    """One selector loop: squeue, one health probe per tier, and a tick."""

    def __init__(self, config: Config, nginx: Nginx, sever: Callable[[str, int], str] = sever) -> None:
        self.config = config
        self.sever = sever
        self.selector = selectors.DefaultSelector()
        self.query = SqueueQuery(config.service_user, [tier.job_name for tier in config.tiers])
        self.query_at = 0.0
        self.asked = False
        self.jobs: list[slurm.Job] | None = None
        self.reader = RegistryReader(config.registry, [tier.tier for tier in config.tiers], config.poll_seconds)
        self.watched = [Watched(tier, Router(config, tier, nginx)) for tier in config.tiers]
        self.changes = OnChange()
        self.key_file = files.server_key_path()
        for watched in self.watched:
            watched.router.prepare()
        self._forget_strangers()

    def _forget_strangers(self) -> None:
        """A tier that left the inventory leaves no flag that would route it, unseen, when it comes back."""
        known = {tier.tier for tier in self.config.tiers}
        for path in (*self.config.flags_dir.glob("*.up"), *self.config.flags_dir.glob("*.loaded")):
            if path.stem not in known:
                path.unlink(missing_ok=True)
                say(f"{path}: removed, there is no such tier any more")

    def close(self) -> None:
        self.reader.stop()
        self.query.end()
        for watched in self.watched:
            self._forget_health(watched)
            self._forget_parting(watched)
            if watched.line is not None:
                watched.line.close()
        self.selector.close()

    def turn(self) -> None:
        """One turn of the loop; never blocks for longer than a reload of nginx takes."""
        self._ask_slurm()
        readings = self.reader.readings(self.config.stale_seconds)
        if readings is None or not self.asked:
            return
        now = time.monotonic()
        for watched in self.watched:
            # Before all else: another tier may have nginx reloaded, which takes a while.
            self._hear(watched)
        for watched in self.watched:
            self._look(watched, readings[watched.config.tier], now)
            self._part(watched, now)
            self._hold_line(watched, now)

    def _ask_slurm(self) -> None:
        now = time.monotonic()
        if not self.query.running and now >= self.query_at:
            self.query_at = now + self.config.poll_seconds
            try:
                self.query.begin(self.selector)
            except OSError as error:
                self._no_answer(f"squeue: {error.strerror}")
        try:
            jobs = self.query.advance()
        except slurm.SlurmError as error:
            self._no_answer(str(error))
            return
        if jobs is not None:
            self.jobs, self.asked = jobs, True
            if self.changes.clear("slurm"):
                say("Slurm answers again")

    def _no_answer(self, why: str) -> None:
        self.jobs, self.asked = None, True
        self.changes.say("slurm", why)

    @staticmethod
    def _hear(watched: Watched) -> None:
        """What the supervisor says of its record: it knows before the file system or Slurm tells."""
        if watched.line is None:
            return
        watched.line.advance()
        if watched.line.withdrawn is None:
            return
        memory = watched.memory
        memory.void = watched.line.run, watched.line.withdrawn
        if memory.good is not None and memory.is_void(memory.good):
            watched.router.down()
        watched.line.answer()

    def _hold_line(self, watched: Watched, now: float) -> None:
        """Have a line to the supervisor of what is routed."""
        line, good = watched.line, watched.memory.good
        if not watched.router.up or good is None or good.supervisor not in watched.config.supervisors:
            return
        if line is not None and line.run == good.run:
            if not line.done:
                if now >= watched.line_at:
                    self.changes.clear(f"{watched.config.tier}/line")
                return
            self._no_line(watched, line.failure)
        if now < watched.line_at:
            return
        if line is not None:
            line.close()
        watched.line_at = now + LINE_SECONDS
        try:
            key = files.read_key(self.key_file)
        except ValueError as error:
            self._no_line(watched, str(error))
            return
        watched.line = Line(self.selector, good.run, watched.config.supervisors[good.supervisor], good.line, key)

    def _no_line(self, watched: Watched, why: str) -> None:
        tier = watched.config.tier
        about = _job_of(watched.memory.good)
        self.changes.say(
            f"{tier}/line", f"{tier}: no line to its supervisor{about}, its withdrawal may be seen later: {why}"
        )

    def _look(self, watched: Watched, reading: Reading, now: float) -> None:
        tier, memory, router = watched.config, watched.memory, watched.router
        jobs = None if self.jobs is None else [job for job in self.jobs if job.name == tier.job_name]
        if memory.good is None and router.up:
            self._adopt(watched, now)
        verdict = decide(tier, memory, reading, jobs, now, self.config.stale_seconds)
        about = _job_of(reading if isinstance(reading, Record) else memory.good)
        target = verdict.target
        if target is None or (watched.target is not None and watched.target.run != target.run):
            was_up = router.down()
            if was_up:
                self._leave(watched)
            self._forget_health(watched)
            if was_up and target is not None:
                say(f"{tier.tier}: routing off: job {target.job} restart {target.restart} is to be routed to")
        watched.verdict, watched.target = verdict, target
        if target is None:
            if was_up or memory.good is not None:
                say(f"{tier.tier}: routing off{about}: {verdict.why}")
                self.changes.clear(tier.tier)
            elif not isinstance(reading, Withdrawn) and verdict.why != FIRST_SIGHT:
                self.changes.say(tier.tier, f"{tier.tier}: not routed{about}: {verdict.why}")
            memory.good = None
            return
        if verdict.why:
            self.changes.say(tier.tier, f"{tier.tier}: routed on{about}: {verdict.why}")
        else:
            self.changes.clear(tier.tier)
        self._probe(watched, tier.nodes[target.host], now)
        if not memory.healthy:
            if router.down():
                say(f"{tier.tier}: routing off{about}: /health of {target.host} is not good")
                self._leave(watched)
            return
        was_up = router.up
        if router.route(target, tier.nodes[target.host], tier.node_port):
            memory.good = target
            if watched.parted == tier.nodes[target.host]:
                self._forget_parting(watched)
            if not was_up:
                say(f"{tier.tier}: routed to {target.host}, job {target.job} restart {target.restart}")

    def _leave(self, watched: Watched) -> None:
        """Streams of the server that was routed to go on, unless its host is gone: then they would hang."""
        if watched.target is None:
            return
        self._forget_parting(watched)
        address = watched.config.nodes[watched.target.host]
        if not watched.memory.reached:
            self._sever(watched, address)
            return
        watched.parted = address
        if watched.probe is not None and not watched.probe.connected:
            # It knows sooner than one that is begun now.
            watched.parting, watched.probe = watched.probe, None
        else:
            watched.parting = self._health_probe(watched, address)

    def _part(self, watched: Watched, now: float) -> None:
        """Look at the server that was left for as long as there is one: its host may be lost while it drains."""
        if watched.parting is None and watched.parted and now >= watched.part_at:
            watched.parting = self._health_probe(watched, watched.parted)
        probe = watched.parting
        if probe is None or not (probe.advance() or probe.connected):
            return
        place = watched.parted
        self._forget_parting(watched)
        if probe.connected:
            watched.parted, watched.part_at = place, now + self.config.poll_seconds
        elif probe.failure != "refused":
            self._sever(watched, place)

    def _sever(self, watched: Watched, address: str) -> None:
        failure = self.sever(address, watched.config.node_port)
        say(f"{watched.config.tier}: {address} does not answer: {failure or 'connections to it are closed'}")

    @staticmethod
    def _forget_parting(watched: Watched) -> None:
        watched.parted = ""
        if watched.parting is not None:
            watched.parting.close()
            watched.parting = None

    def _adopt(self, watched: Watched, now: float) -> None:
        """After our own restart: what is routed stays routed until something speaks against it."""
        tier, memory, routed = watched.config, watched.memory, watched.router.routed()
        if routed is None or _doubt(tier, routed):
            return
        if watched.router.leads_to(tier.nodes[routed.host], tier.node_port):
            memory.good, memory.healthy = routed, True
            memory.run, memory.seq, memory.moved_at = routed.run, routed.seq, now
            watched.target = routed
            say(f"{tier.tier}: found routed to {routed.host}, job {routed.job} restart {routed.restart}")

    def _probe(self, watched: Watched, address: str, now: float) -> None:
        memory = watched.memory
        if watched.probe is None and now >= watched.probe_at:
            watched.probe_at = now + self.config.poll_seconds
            watched.probe = self._health_probe(watched, address)
        if watched.probe is None or not watched.probe.advance():
            return
        probe, watched.probe = watched.probe, None
        memory.reached = probe.connected or probe.failure == "refused"
        if probe.status == 200:
            memory.health_failures, memory.healthy = 0, True
            return
        memory.health_failures += 1
        # A busy server may be late once; one whose port is closed is gone.
        if probe.failure == "refused" or memory.health_failures >= HEALTH_FAILURES:
            memory.healthy = False

    def _health_probe(self, watched: Watched, address: str) -> Probe:
        port = watched.config.node_port
        return Probe(self.selector, address, port, "/health", timeout=HEALTH_TIMEOUT, connect_timeout=CONNECT_TIMEOUT)

    @staticmethod
    def _forget_health(watched: Watched) -> None:
        watched.memory.healthy, watched.memory.health_failures, watched.memory.reached = False, 0, True
        watched.probe_at = 0.0
        if watched.probe is not None:
            watched.probe.close()
            watched.probe = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("/etc/gleaner/gateway.json"))


def run(args: argparse.Namespace) -> int:
    try:
        config = Config.load(args.config)
        updater = Updater(config, SystemNginx())
    except (ValueError, OSError) as error:
        say(str(error))
        return Exit.REFUSED
    signals = heartbeat.Signals(signal.SIGTERM, signal.SIGINT)
    updater.selector.register(signals.socket, selectors.EVENT_READ)
    say(f"watching {', '.join(tier.tier for tier in config.tiers) or 'no tier'}")
    notify("READY=1")
    watchdog_at = 0.0
    while True:
        for key, _ in updater.selector.select(TICK_SECONDS):
            if key.fileobj is signals.socket and signals.receive():
                say("told to stop; routing stays as it is")
                return 0
        updater.turn()
        if time.monotonic() >= watchdog_at:
            watchdog_at = time.monotonic() + 1.0
            notify("WATCHDOG=1")
