"""A tier's story (`gleaner log TIER`): what was said of it on all hosts, in order of time.

Its jobs' events and logs are on the shared file system, the words of keeper and updater in the controller's journal.
The lines of each file stay in their order, also where a host's clock was wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import functools
import heapq
import io
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gleaner import bounded, events, joblog, report, upstream
from gleaner.events import Event, Kind
from gleaner.journal import stamp
from gleaner.states import Cause, Exit

UNITS = {"gleaner-keeper.service": "keeper", "gleaner-upstream.service": "updater"}
DAY_SECONDS = 86400.0
# A job may have been queued so long before its first line.
QUEUED_SECONDS = 30 * DAY_SECONDS
# Between the clock of the host that wrote a line and that of the file system.
CLOCKS_SECONDS = 3600.0
HEAD_LIMIT = 64 << 10
# Of a foreign line; what is longer is shown as several.
READ_LIMIT = 16 << 10
ENTRY_LIMIT = 1 << 20
LINES_LIMIT = 100_000
POLL_SECONDS = 1.0
# For the shared file system to show its folders.
SHARED_SECONDS = 5.0
EXIT_REFUSED = 2
EXIT_UNSEEN = 3
LOOK_SECONDS = 2.0

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_JOB = re.compile(r"\bjob (\d{1,10})(?: restart (\d{1,10}))?\b")
_STARTED = re.compile(rb"(?m)^\S+Z tier ([a-z0-9][a-z0-9_-]{0,39}): job ")
# slurmstepd-vasp-02: error: *** JOB 7 ON vasp-02 CANCELLED AT 2026-11-29T08:40:39 DUE TO PREEMPTION ***
_SLURM_RUN = re.compile(r"(?i)\b(?:job|step|StepId=)[ =]?(\d{1,10})\b")
_SLURM_NODE = re.compile(r"\bON (\S+)|^slurmstepd-([^:\s]+):")
_SLURM_TIME = re.compile(r"\bAT (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\b")


@dataclass(frozen=True)
class Entry:
    """One line of the story. `at` is unix seconds by the clock of the host that said it."""

    at: float
    source: str
    node: str
    job: int | None
    restart: int | None
    text: str

    def __str__(self) -> str:
        run = "-" if self.job is None else str(self.job) if self.restart is None else f"{self.job}.{self.restart}"
        text = _UNPRINTABLE.sub("?", self.text)
        return f"{stamp(self.at)} {self.source:<10} {self.node or '-':<10} {run:>7}  {text}"


def in_words(event: Event) -> str:
    """An event as a person reads it. What an event lacks is not said."""
    more = event.more
    if event.kind is Kind.STARTED:
        gpus = more.get("gpus", 0)
        return f"started on {','.join(more.get('nodes', [])) or '?'} with {gpus} GPU{'' if gpus == 1 else 's'}"
    if event.kind is Kind.SERVING:
        return "serving: the endpoint record is published"
    if event.kind is Kind.WITHDRAWN:
        return f"withdrawn: {more.get('why', '')}"
    if event.kind is Kind.SIGNALLED:
        cause = str(more.get("cause", ""))
        meaning = next((f" ({one.meaning})" for one in Cause if one.value == cause), "")
        return f"told to stop: {cause}{meaning}"
    if event.kind is Kind.DRAINED:
        return "drained: nothing in flight" if more.get("whole") else "drained: the budget is used up, streams were cut"
    code = more.get("exit")
    return f"left: exit code {code}" + (
        f", {Exit(code).meaning}" if isinstance(code, int) and code in set(Exit) else ""
    )


def open_file(path: Path) -> BinaryIO:
    """OSError for what is no regular file: folder and files are the service user's, the reader is root."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    stream = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return stream


def told(path: Path, error: OSError) -> str:
    return f"{path}: {error.strerror}"


def require_answer(registry: Path) -> None:
    """TimeoutError when the shared file system hangs, which nothing ends that reads from it.

    What it has else to say, also that something is missing, is for whoever reads it.
    """

    def look() -> None:
        # Opened, since names may be remembered.
        for folder in (registry.parent / "logs", events.folder_of(registry)):
            with contextlib.suppress(OSError):
                os.listdir(folder)

    bounded.ask(str(registry.parent), look, SHARED_SECONDS)


class Source:
    """The lines of a file and of its older generations, the oldest first. Asked again, it goes on where it stopped."""

    generations = joblog.GENERATIONS

    def __init__(self, path: Path, since: float, problems: list[str]) -> None:
        self.path, self._since, self._problems = path, since, problems
        self._read = (0, 0)
        # When the last line was said that tells it, and whether there was one.
        self._at, self._dated = 0.0, False
        self._silent = 0

    def begin(self) -> float | None:
        """When its first line was said; None when there is nothing to read."""
        unread = list(self._unread())
        if not unread:
            return None
        path, _ = unread[0]
        try:
            with open_file(path) as stream:
                head = stream.read(HEAD_LIMIT).splitlines()
                self._at = os.fstat(stream.fileno()).st_mtime
        except OSError as error:
            self._problems.append(told(path, error))
            return None
        self._dated = False
        for line in head:
            self._entry(line)
            if self._dated:
                break
        self._silent = 0
        return self._at

    def entries(self) -> Iterator[Entry]:
        """What was not read yet."""
        for line in self._lines():
            line = line.rstrip(b"\r\n")
            entry = self._entry(line) if line.strip() else None
            if entry is not None:
                yield entry
        if self._silent:
            self._problems.append(f"{self.path}: {self._silent} {self._without_time}")
            self._silent = 0

    _without_time = "lines do not say when, as those of older versions; each is shown behind the line before it"

    def _unread(self) -> Iterator[tuple[Path, int]]:
        """Files and where to go on in each."""
        found = []
        for number in range(self.generations + 1):
            path = joblog.generation(self.path, number)
            with contextlib.suppress(FileNotFoundError):
                about = os.lstat(path)
                if about.st_ino == self._read[0]:
                    if about.st_size > self._read[1]:
                        found.append((path, self._read[1]))
                    break
                if about.st_mtime >= self._since - CLOCKS_SECONDS:
                    found.append((path, 0))
        return reversed(found)

    def _lines(self) -> Iterator[bytes]:
        for path, offset in self._unread():
            try:
                with open_file(path) as stream:
                    stream.seek(offset)
                    yield from iter(lambda: stream.readline(READ_LIMIT), b"")
                    self._read = (os.fstat(stream.fileno()).st_ino, stream.tell())
            except OSError as error:
                self._problems.append(told(path, error))

    def _entry(self, line: bytes) -> Entry | None:
        raise NotImplementedError


class Said(Source):
    """One log of a job: supervisor, head, router, or rpc of a node."""

    def __init__(self, path: Path, job: int, since: float, problems: list[str]) -> None:
        super().__init__(path, since, problems)
        self._job = job
        self._source, _, self._node = path.stem.partition("-")
        self._restart: int | None = None

    def _entry(self, line: bytes) -> Entry | None:
        read = joblog.parse(line)
        text = line if read is None else read.text
        node = self._node
        if read is None:
            self._silent += 1
        else:
            self._at, self._dated = read.at, True
            if read.label is not None:
                self._restart, node = read.label.restart, read.label.node
        return Entry(self._at, self._source, node, self._job, self._restart, text.decode(errors="replace"))


class Told(Source):
    """The event log of a job."""

    generations = 0
    _without_time = "lines are no events"

    def __init__(self, path: Path, tier: str, since: float, problems: list[str]) -> None:
        super().__init__(path, since, problems)
        self._tier, self._node = tier, ""

    def _entry(self, line: bytes) -> Entry | None:
        try:
            event = events.parse(line)
        except ValueError:
            self._silent += 1
            return None
        if event.tier != self._tier:
            return None
        self._at, self._dated = event.at, True
        # The batch step is on the first of them.
        self._node = next(iter(event.more.get("nodes", [])), self._node)
        return Entry(event.at, "event", self._node, event.job, event.restart, in_words(event))


class Slurms(Source):
    """Slurm's own log of a tier's jobs, in which few lines say when, and some of which job."""

    generations = 1

    def __init__(self, path: Path, job: int | None, since: float, problems: list[str]) -> None:
        super().__init__(path, since, problems)
        self._job = job

    def _entry(self, line: bytes) -> Entry | None:
        text = line.decode(errors="replace")
        found = _SLURM_TIME.search(text)
        if found:
            with contextlib.suppress(ValueError, OverflowError):
                self._at, self._dated = time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S")), True
        run, node = _SLURM_RUN.search(text), _SLURM_NODE.search(text)
        job = int(run[1]) if run else None
        if self._job not in (None, job):
            return None
        return Entry(self._at, "slurm", (node[1] or node[2]) if node else "", job, None, text)


class Journal:
    """What keeper and updater have said of a tier."""

    def __init__(self, tier: str, others: Iterable[str], job: int | None, since: float, problems: list[str]) -> None:
        self._job, self._since, self._problems = job, since, problems
        self._others = tuple(f"{name}: " for name in others if name != tier)
        # Not a part of another tier's name.
        self._named = re.compile(rf"(?<![\w-]){re.escape(tier)}(?![\w-])")
        self._cursor = ""
        self._broken = 0
        # A long story takes its time: what is said meanwhile would stand there without what others said of it.
        self._until = [f"--until=@{int(time.time()) + 1}"]

    def begin(self) -> float:
        return self._since

    def command(self) -> list[str]:
        where = f"--after-cursor={self._cursor}" if self._cursor else f"--since=@{int(self._since)}"
        units = [f"--unit={unit}" for unit in UNITS]
        return ["journalctl", "--output=json", "--no-pager", "--all", where, *self._until, *units]

    def entries(self) -> Iterator[Entry]:
        """What was not read yet."""
        with tempfile.TemporaryFile() as errors:
            try:
                child = subprocess.Popen(
                    self.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
                )
            except OSError as error:
                self._problems.append(f"journalctl: {error.strerror}: keeper and updater are left out")
                return
            with child:
                try:
                    output = child.stdout
                    assert output is not None
                    for line in iter(functools.partial(output.readline, ENTRY_LIMIT), b""):
                        # As "-- No entries --".
                        entry = None if line.startswith(b"-- ") else self._entry(line)
                        if entry is not None:
                            yield entry
                except GeneratorExit:
                    child.terminate()
                    raise
            self._until = []
            errors.seek(0)
            words = " ".join(errors.read(READ_LIMIT).decode(errors="replace").split())
            if words or child.returncode:
                self._problems.append(f"journalctl: {words or f'exit code {child.returncode}'}")
        if self._broken:
            self._problems.append(f"journalctl: {self._broken} entries cannot be read")
            self._broken = 0

    def _entry(self, line: bytes) -> Entry | None:
        try:
            value = json.loads(line)
            self._cursor = str(value["__CURSOR"])
            message = value.get("MESSAGE") or ""
            # What is no UTF-8 comes as a list of bytes.
            text = bytes(message).decode(errors="replace") if isinstance(message, list) else str(message)
            source = UNITS.get(str(value.get("UNIT") or value.get("_SYSTEMD_UNIT")), "journal")
            at = int(value["__REALTIME_TIMESTAMP"]) / 1_000_000
            node = str(value.get("_HOSTNAME", "")).partition(".")[0]
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            self._broken += 1
            return None
        if text.startswith(self._others) and not self._named.search(text):
            return None
        run = _JOB.search(text)
        job = int(run[1]) if run else None
        if self._job not in (None, job):
            return None
        return Entry(at, source, node, job, int(run[2]) if run and run[2] else None, text)


class Story:
    """All sources of one tier."""

    def __init__(self, config: upstream.Config, tier: str, job: int | None, since: float, problems: list[str]) -> None:
        self._tier, self._job, self._since, self._problems = tier, job, since, problems
        self._logs, self._events = config.registry.parent / "logs", events.folder_of(config.registry)
        (job_name,) = (one.job_name for one in config.tiers if one.tier == tier)
        self._sources: dict[Path, Source] = {}
        self._tier_of: dict[int, str] = {}
        self._slurms = self._logs / f"{job_name}.log"
        self.look()
        heard_since = since
        if job is not None:
            started = [begin for source in self._sources.values() if (begin := source.begin()) is not None]
            heard_since = max(0.0, min(started, default=time.time()) - QUEUED_SECONDS)
        others = [one.tier for one in config.tiers]
        self._journal = Journal(tier, others, job, heard_since, problems)

    def look(self) -> None:
        """See which files there are."""
        # Of those that were seen before only the last ones can have another log by now.
        seen = set(self._tier_of) - set(self.known_jobs[-3:])
        for number in sorted(self._jobs() - seen):
            if self._job in (None, number) and self._is_ours(number):
                self._add(self._events / f"{number}.jsonl", number)
                for path in self._logs_of(number):
                    self._add(path, number)
        if self._slurms not in self._sources:
            self._sources[self._slurms] = Slurms(self._slurms, self._job, self._since, self._problems)

    def _add(self, path: Path, number: int) -> None:
        if path in self._sources:
            return
        if path.suffix == ".jsonl":
            self._sources[path] = Told(path, self._tier, self._since, self._problems)
        else:
            self._sources[path] = Said(path, number, self._since, self._problems)

    def _jobs(self) -> set[int]:
        found: set[int] = set()
        for folder, pattern in ((self._logs, r"(\d{1,10})"), (self._events, r"(\d{1,10})\.jsonl")):
            try:
                names = os.listdir(folder)
            except OSError as error:
                self._problems.append(told(folder, error))
                continue
            found.update(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))
        return found

    def _logs_of(self, number: int) -> list[Path]:
        """Of a job that said something in the time that is asked for; the supervisor's first."""
        folder = self._logs / str(number)
        found: set[Path] = set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = re.sub(r"\.\d$", "", entry.name)
                    recent = entry.stat(follow_symlinks=False).st_mtime >= self._since - CLOCKS_SECONDS
                    if name.endswith(".log") and recent:
                        found.add(folder / name)
        except FileNotFoundError:
            # A job of which only the events are left; or its file was just renamed, and is found at the next look.
            pass
        except OSError as error:
            self._problems.append(told(folder, error))
        return sorted(found, key=lambda path: (path.name != "supervisor.log", path.name))

    def _is_ours(self, number: int) -> bool:
        if number not in self._tier_of:
            tier = self._named_in_events(number) or self._named_in_logs(number)
            if tier is None:
                return False
            self._tier_of[number] = tier
        return self._tier_of[number] == self._tier

    def _named_in_events(self, number: int) -> str | None:
        # One that was refused before it was anything has none.
        with contextlib.suppress(OSError, ValueError), open_file(self._events / f"{number}.jsonl") as stream:
            return events.parse(stream.readline(READ_LIMIT)).tier
        return None

    def _named_in_logs(self, number: int) -> str | None:
        for path in self._logs_of(number):
            # What cannot be read is named when it is to be shown.
            with contextlib.suppress(OSError), open_file(path) as stream:
                head = stream.read(HEAD_LIMIT)
                labels = (read.label for line in head.splitlines() if (read := joblog.parse(line)) and read.label)
                for label in labels:
                    return label.tier
                if old := _STARTED.search(head):
                    return old[1].decode()
        return None

    @property
    def known_jobs(self) -> list[int]:
        """Those of this tier."""
        return sorted(number for number, tier in self._tier_of.items() if tier == self._tier)

    def entries(self) -> Iterator[Entry]:
        """All of it, in order of time. Few files are open at once: each from its first line to its last."""
        sources: list[tuple[float, Source | Journal]] = [(self._journal.begin(), self._journal)]
        sources += [(begin, source) for source in self._sources.values() if (begin := source.begin()) is not None]
        waiting = collections.deque(sorted(sources, key=lambda one: one[0]))
        heap: list[tuple[float, int, Entry, Iterator[Entry]]] = []

        def push(number: int, rest: Iterator[Entry]) -> None:
            entry = next(rest, None)
            if entry is not None:
                heapq.heappush(heap, (entry.at, number, entry, rest))

        opened = 0
        while waiting or heap:
            while waiting and (not heap or waiting[0][0] <= heap[0][0]):
                push(opened, waiting.popleft()[1].entries())
                opened += 1
            if heap:
                _, number, entry, rest = heapq.heappop(heap)
                if entry.at >= self._since:
                    yield entry
                push(number, rest)

    def follow(self) -> Iterator[Entry | None]:
        """What is said from now on; None when all that is known was told, for now."""
        look_at = 0.0
        while True:
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_SECONDS
                self.look()
            sources: list[Source | Journal] = [self._journal, *self._sources.values()]
            new = [list(source.entries()) for source in sources]
            yield from heapq.merge(*new, key=lambda entry: entry.at)
            yield None
            time.sleep(POLL_SECONDS)


def _lines(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= LINES_LIMIT:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number from 1 to {LINES_LIMIT}")
    return int(text)


def _job(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,9}", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, want the number of a job")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"Exit code {EXIT_REFUSED}: no such tier or job; {EXIT_UNSEEN}: the shared file system hangs."
    parser.add_argument("tier", help="the tier's name in the inventory")
    parser.add_argument(
        "--since",
        type=report.moment,
        help="a local date or time, 7d, 12h, 30m, or @ and unix seconds (default: 1d; with --job all of it)",
    )
    parser.add_argument("--job", type=_job, metavar="N", help="this job alone")
    parser.add_argument("--lines", type=_lines, metavar="N", help="the last ones alone")
    parser.add_argument("--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("--config", type=Path, default=Path("/etc/gleaner/gateway.json"))


class Problems(list[str]):
    """What could not be read, each thing said once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def tell(self) -> None:
        for problem in self:
            if problem not in self._said:
                self._said.add(problem)
                print(f"warning: {problem}", file=sys.stderr)
        self.clear()


def run(args: argparse.Namespace) -> int:
    problems = Problems()
    since = args.since if args.since is not None else 0.0 if args.job is not None else time.time() - DAY_SECONDS
    try:
        config = upstream.Config.load(args.config)
        known = [tier.tier for tier in config.tiers]
        if args.tier not in known:
            raise ValueError(f"tier: got {args.tier!r}, want one of {', '.join(known)}")
        require_answer(config.registry)
        story = Story(config, args.tier, args.job, since, problems)
        if args.job is not None and args.job not in story.known_jobs:
            jobs = ", ".join(map(str, Story(config, args.tier, None, 0.0, problems).known_jobs[-10:]))
            raise ValueError(
                f"--job: got {args.job}, want one of {args.tier}'s that left something: {jobs or 'none did'}"
            )
    except TimeoutError as error:
        cure = (
            f"see why the shared file system hangs; meanwhile `journalctl --unit={' --unit='.join(UNITS)}` tells more"
        )
        print(f"error: {error}: {cure}", file=sys.stderr)
        return EXIT_UNSEEN
    except ValueError as error:
        problems.tell()
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character is no reason to stop.
        sys.stdout.reconfigure(errors="replace")
    entries = story.entries()
    silent = True
    for entry in collections.deque(entries, args.lines) if args.lines else entries:
        silent = False
        print(entry)
    if silent:
        problems.append(f"nothing was said of {args.tier} since {stamp(since)}; cure: an earlier --since")
    problems.tell()
    for new in story.follow() if args.follow else ():
        if new is None:
            sys.stdout.flush()
            problems.tell()
        else:
            print(new)
    return 0
