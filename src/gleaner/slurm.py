"""A thin typed wrapper over Slurm's commands.

Formats are explicit, because --json differs between the releases in use. Slurm's own names are kept.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gleaner import digest
from gleaner.states import Cause

_ABSENT = {"", "N/A", "None", "(null)", "Unknown"}
ACCOUNTING_SECONDS = 300.0
# Slurm looks at time limits about once a minute.
_LIMIT_RESOLUTION_SECONDS = 60
# What a step that ends needs to be gone.
STEP_ENDS_SECONDS = 5.0
# Of `scontrol listpids`, by Slurm 22.05 and 24.11.
_STEP_IS_GONE = ("Unable to connect to slurmstepd", "does not exist on")
_NO_STEPS = ("No job steps exist", "There are no steps for job")
# A node in any other state, or with any other mark (`*` does not answer, DRAIN, MAINT, …), starts no job of ours.
_UP_STATES = {"IDLE", "MIXED", "ALLOCATED"}
_UP_FLAGS = {"CLOUD", "COMPLETING", "DYNAMIC_NORM", "PLANNED"}


class SlurmError(Exception):
    """A Slurm command failed or did not answer in time."""


@dataclass(frozen=True)
class Job:
    """One line of squeue."""

    id: int
    name: str
    state: str
    restarts: int
    preempted: bool
    run_seconds: int
    nodes: str
    reason: str
    comment: str = ""


# squeue cuts a field at its size, so sizes are generous.
_COLUMNS = (
    "JobID:16",
    "Name:64",
    "State:24",
    "RestartCnt:12",
    "PreemptTime:24",
    "StartTime:24",
    "TimeUsed:24",
    "NodeList:128",
    "Reason:160",
    # The last one, since a comment may hold the separator.
    "Comment:128",
)


_FOREIGN_PREFIXES = ("SQUEUE_", "SBATCH_", "SACCT_", "SCONTROL_", "SLURM_TIME_FORMAT")
# sbatch hands its environment to the job, where these would be untrue.
_SYSTEMD_VARIABLES = {
    "CACHE_DIRECTORY",
    "CREDENTIALS_DIRECTORY",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LISTEN_PID",
    "LOGS_DIRECTORY",
    "MEMORY_PRESSURE_WATCH",
    "MEMORY_PRESSURE_WRITE",
    "NOTIFY_SOCKET",
    "RUNTIME_DIRECTORY",
    "STATE_DIRECTORY",
    "SYSTEMD_EXEC_PID",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
}


def environment() -> dict[str, str]:
    """Variables for Slurm commands: no translation, no formats or options of the caller's, no systemd's."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN_PREFIXES) and name not in _SYSTEMD_VARIABLES
    }
    return {**kept, "LC_ALL": "C"}


def run(argv: list[str], timeout_seconds: float = 10.0, **variables: str) -> str:
    """A command's stdout; SlurmError with its stderr otherwise. `variables` are added to its environment."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_seconds,
            env={**environment(), **variables},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{argv[0]}: no answer within {timeout_seconds:g} s") from None
    except OSError as error:
        raise SlurmError(f"{argv[0]}: {error.strerror}") from None
    if done.returncode != 0:
        detail = done.stderr.decode(errors="replace").strip().splitlines()
        raise SlurmError(f"{argv[0]}: {detail[-1] if detail else f'exit code {done.returncode}'}")
    return done.stdout.decode(errors="replace")


def jobs_command(user: str, names: list[str]) -> list[str]:
    form = ",".join(column + "|" for column in _COLUMNS)
    return ["squeue", "--noheader", f"--user={user}", f"--name={','.join(names)}", f"--Format={form}"]


def jobs(user: str, names: list[str], timeout_seconds: float = 10.0) -> list[Job]:
    """The user's jobs of these names that are pending, running or completing."""
    return parse_jobs(run(jobs_command(user, names), timeout_seconds))


def parse_jobs(text: str) -> list[Job]:
    found = []
    for line in text.splitlines():
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < len(_COLUMNS) or not cells[0].isdigit():
            raise SlurmError(f"squeue: cannot read the line {line.strip()!r}")
        found.append(
            Job(
                id=int(cells[0]),
                name=cells[1],
                state=_state(cells[2]),
                restarts=int(cells[3]) if cells[3].isdigit() else 0,
                preempted=preempted(cells[4], cells[5]),
                run_seconds=seconds(cells[6]) or 0,
                nodes=cells[7],
                reason=cells[8].strip("()"),
                comment="|".join(cells[9:]).rstrip("| "),
            )
        )
    return found


def job(job_id: int, timeout_seconds: float = 10.0) -> dict[str, str]:
    """The fields of `scontrol show job`."""
    return parse_job(run(["scontrol", "show", "job", "-o", str(job_id)], timeout_seconds))


def parse_job(text: str) -> dict[str, str]:
    """`Key=Value Key=Value …`, where values may hold spaces; the first of two equal keys counts."""
    fields = _fields(" ".join(text.split("\n")))
    if "JobId" not in fields or "JobState" not in fields:
        raise SlurmError(f"scontrol: cannot read {text.strip()[:80]!r}")
    return {**fields, "JobState": _state(fields["JobState"])}


def _state(text: str) -> str:
    """What the job is doing, by its first word.

    While a node has not answered to a signal, Slurm shows that in place of the state: a job that hears why it was
    signalled asks in that very moment.
    """
    word = text.split(",")[0]
    return "RUNNING" if word == "SIGNALING" else word


def _fields(line: str) -> dict[str, str]:
    keys = list(re.finditer(r"(?:^|\s)([A-Z][A-Za-z0-9/:_]*)=", line))
    fields: dict[str, str] = {}
    for here, after in zip(keys, [*keys[1:], None]):
        value = line[here.end() : after.start() if after else len(line)].strip()
        fields.setdefault(here.group(1), value)
    return fields


@dataclass(frozen=True)
class Node:
    """What a node has for jobs, and what jobs of anybody hold of it."""

    name: str
    up: bool
    """Slurm may start jobs there: it answers, and nobody drains, reserves, reboots or switches it off."""
    threads_per_core: int
    gpus: int
    gpus_held: int
    cpus: int
    cpus_held: int
    mem_mib: int
    mem_held_mib: int
    state: str = field(default="", compare=False)
    """Slurm's own words, such as ``IDLE+DRAIN``; with `reason` and `version` for people only."""
    reason: str = field(default="", compare=False)
    version: str = field(default="", compare=False)
    """Of its slurmd; empty while that has not answered."""

    def whole_cores(self, cpus: int) -> int:
        """What Slurm takes for so many processors: it shares no core among jobs."""
        return -(-cpus // self.threads_per_core) * self.threads_per_core


def nodes(names: Sequence[str], timeout_seconds: float = 10.0) -> dict[str, Node]:
    """The nodes of these names, by name; SlurmError when Slurm does not know one of them."""
    return parse_nodes(run(["scontrol", "show", "node", "-o", "-d", ",".join(names)], timeout_seconds))


def parse_nodes(text: str) -> dict[str, Node]:
    """One node a line, of `scontrol show node -o -d`."""
    found: dict[str, Node] = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        fields = _fields(line)
        try:
            base, *flags = fields["State"].split("+")
            node = Node(
                name=fields["NodeName"],
                up=base in _UP_STATES and _UP_FLAGS.issuperset(flags),
                threads_per_core=int(fields.get("ThreadsPerCore", "1")),
                gpus=gpus_in(fields.get("Gres", "")),
                gpus_held=gpus_in(fields.get("GresUsed", "")),
                # Without what the node keeps for the system.
                cpus=int(fields.get("CPUEfctv", fields["CPUTot"])),
                cpus_held=int(fields["CPUAlloc"]),
                mem_mib=int(fields["RealMemory"]) - int(fields.get("MemSpecLimit", "0")),
                mem_held_mib=int(fields["AllocMem"]),
                state=fields["State"],
                reason=_known(fields.get("Reason", "")),
                version=_known(fields.get("Version", "")),
            )
        except (KeyError, ValueError) as error:
            raise SlurmError(f"scontrol: cannot read the node {line.strip()[:80]!r} ({error!r})") from None
        found[node.name] = node
    return found


def _known(text: str) -> str:
    return "" if text in _ABSENT else text


def gpus_in(gres: str) -> int:
    """The GPUs in a ``Gres=`` or ``GresUsed=``, for example 3 in ``gpu:v100s:2(S:0),gpu:1,mps:100``."""
    found = 0
    for one in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = one.split(":")
        if name == "gpu":
            found += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return found


def cause_of_stop(fields: dict[str, str], signal_seconds: int = 0) -> Cause:
    """Why a job that got TERM has to stop; `signal_seconds` is the N of its `--signal=B:TERM@N`."""
    running = fields["JobState"] == "RUNNING"
    if running and preempted(fields.get("PreemptTime", ""), fields.get("StartTime", "")):
        return Cause.PREEMPTED
    if fields.get("Reason") == "TimeLimit" or fields["JobState"].startswith("TIMEOUT"):
        return Cause.TIME_LIMIT
    limit, used = seconds(fields.get("TimeLimit", "")), seconds(fields.get("RunTime", ""))
    if limit and used is not None and used + signal_seconds + _LIMIT_RESOLUTION_SECONDS >= limit:
        return Cause.TIME_LIMIT
    if not running:
        return Cause.CANCELLED
    comment = fields.get("Comment", "")
    if digest.is_replaced(comment):
        return Cause.REPLACED
    return Cause.OUTRANKED if digest.is_outranked(comment) else Cause.ASKED


def preempted(preempt_time: str, start_time: str) -> bool:
    """This run of the job is being preempted; an earlier run's time does not count."""
    return preempt_time not in _ABSENT and (start_time in _ABSENT or preempt_time >= start_time)


def seconds(text: str) -> int | None:
    """Slurm's `[D-]HH:MM:SS`, `MM:SS`; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def canceller(job_id: int) -> int | None:
    """The uid that cancelled the job, from accounting; None when accounting does not know (yet)."""
    text = run(["sacct", "-X", "-n", "-P", "-j", str(job_id), "-o", "State"])
    match = re.search(r"CANCELLED by (\d+)", text)
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class Run:
    """One run of a job, from accounting: a job that was requeued has several. Times are unix seconds."""

    job: int
    user: str
    state: str
    submitted: int
    started: int
    ended: int | None
    """None while it runs."""
    nodes: tuple[str, ...]
    gpus: int


def _sacct(since: float, until: float, timeout_seconds: float, *more: str) -> str:
    return run(
        [
            *("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2"),
            f"--starttime={local_time(since)}",
            f"--endtime={local_time(until)}",
            *more,
        ],
        timeout_seconds,
        SLURM_TIME_FORMAT="%s",
    )


def runs(
    since: float,
    until: float,
    problems: list[str],
    timeout_seconds: float = ACCOUNTING_SECONDS,
    nodes: Sequence[str] = (),
) -> list[Run]:
    """Everybody's runs that were there at some time from `since` to `until`, by their start; on these nodes, if any.

    What cannot be read is left out and named in `problems`.
    """
    fields = "JobIDRaw,User,State,Submit,Start,End,NodeList,AllocTRES"
    there = [f"--nodelist={','.join(nodes)}"] if nodes else []
    return parse_runs(_sacct(since, until, timeout_seconds, "--allusers", f"--format={fields}", *there), problems)


def names_of(user: str, since: float, until: float) -> dict[int, str]:
    """The names of a user's jobs. Others may hold whatever, so theirs are not asked for."""
    rows = _sacct(since, until, ACCOUNTING_SECONDS, f"--user={user}", "--format=JobIDRaw,JobName").split("\n")
    return {int(job): name for job, _, name in (row.partition("|") for row in rows) if job.isdigit()}


def local_time(at: float) -> str:
    """A time as Slurm's commands take it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at))


def parse_runs(text: str, problems: list[str]) -> list[Run]:
    """Lines of sacct; runs that never started are left out."""
    found = []
    for row in filter(None, text.split("\n")):
        cells = row.split("|")
        if len(cells) != 8 or not cells[0].isdigit():
            problems.append(f"sacct: cannot read the line {row[:80]!r}")
            continue
        submitted, started, ended = (int(cell) if cell.isdigit() else None for cell in cells[3:6])
        if started is None:
            continue
        gpus = re.search(r"(?:^|,)gres/gpu=(\d+)", cells[7])
        found.append(
            Run(
                job=int(cells[0]),
                user=cells[1],
                state=cells[2].split(" ")[0],
                submitted=started if submitted is None else submitted,
                started=started,
                ended=ended,
                nodes=tuple(hosts(cells[6])),
                gpus=int(gpus.group(1)) if gpus else 0,
            )
        )
    return sorted(found, key=lambda one: (one.started, one.job))


def submit(script: str) -> int:
    """Submit a job script as it is; the job's id."""
    answer = run(["sbatch", "--parsable", script], 30.0).strip()
    match = re.match(r"(\d+)(;|$)", answer)
    if not match:
        raise SlurmError(f"sbatch: cannot read {answer[:80]!r}")
    return int(match.group(1))


def requeue(job_id: int) -> None:
    run(["scontrol", "requeue", str(job_id)])


def cancel(job_id: int) -> None:
    run(["scancel", str(job_id)])


def terminate(job_id: int) -> None:
    """TERM to the batch step alone: for Slurm the job goes on, so that its supervisor can drain."""
    run(["scancel", "--batch", "--signal=TERM", str(job_id)])


def comment(job_id: int, text: str) -> None:
    """Change the comment of one's own job."""
    run(["scontrol", "update", f"JobId={job_id}", f"Comment={text}"])


def release(job_id: int) -> None:
    """End a hold."""
    run(["scontrol", "release", str(job_id)])


def start_soon(job_id: int, seconds: int) -> None:
    """End the wait that Slurm gives a requeued job, in so many seconds.

    Not at once where it may have just been requeued: a node refuses a job that starts in the very second in which its
    credential of the run before was revoked ("Job credential revoked"), and Slurm counts whole seconds.
    """
    run(["scontrol", "update", f"JobId={job_id}", f"StartTime=now+{seconds}" if seconds else "StartTime=now"])


def job_processes(proc: Path, patience_seconds: float = STEP_ENDS_SECONDS) -> dict[int, list[int]]:
    """The processes of each job on this node, whose processes are seen in `proc`; SlurmError when Slurm does not say.

    `scontrol listpids` fails while one step cannot be asked (24.11 prints nothing of all the others then): a moment
    when it ends, ten minutes when its slurmstepd was killed, since its socket stays for so long. Then each job that has
    a slurmstepd is asked for itself, again until `patience_seconds` have passed.
    """
    try:
        return _listpids()
    except SlurmError as error:
        if not _step_is_gone(error):
            raise
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return {job: pids for one in _jobs_with_slurmstepd(proc) for job, pids in _listpids(str(one)).items()}
        except SlurmError as error:
            if not _step_is_gone(error) or time.monotonic() >= deadline:
                raise
        time.sleep(0.5)


def _listpids(*job: str) -> dict[int, list[int]]:
    """Of one job, or of all on this node."""
    try:
        return parse_listpids(run(["scontrol", "listpids", *job]))
    except SlurmError as error:
        if any(words in str(error) for words in _NO_STEPS):
            return {}
        raise


def _step_is_gone(error: SlurmError) -> bool:
    return any(words in str(error) for words in _STEP_IS_GONE)


def _jobs_with_slurmstepd(proc: Path) -> list[int]:
    """By the titles that slurmstepd gives its processes, such as ``slurmstepd: [14.batch]``."""
    found = set()
    for place in proc.glob("[0-9]*"):
        # It may have ended.
        with contextlib.suppress(OSError):
            if match := re.match(rb"slurmstepd: \[(\d+)\.", (place / "cmdline").read_bytes()):
                found.add(int(match[1]))
    return sorted(found)


def parse_listpids(text: str) -> dict[int, list[int]]:
    """From `scontrol listpids`; SlurmError when it is nothing of the kind."""
    lines = [line.split() for line in text.splitlines()]
    if not lines or lines[0][:2] != ["PID", "JOBID"]:
        raise SlurmError(f"scontrol listpids: got {text[:80]!r}, want a table of PID and JOBID")
    found: dict[int, list[int]] = {}
    for cells in lines[1:]:
        if len(cells) >= 2 and cells[0].isdigit() and cells[1].isdigit():
            found.setdefault(int(cells[1]), []).append(int(cells[0]))
    return found


def hosts(expression: str) -> list[str]:
    """Expand a host list such as `vasp-[01-03,07],gpu1`."""
    names: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)?", expression):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if not match:
            names.append(part)
            continue
        head, ranges, tail = match.groups()
        for item in ranges.split(","):
            first, _, last = item.partition("-")
            names += [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last or first) + 1)]
    return names
