"""The daemon on the controller that keeps exactly one job queued or running for every tier (`gleaner keep`).

It runs as the service user and needs no Slurm administrator's rights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import selectors
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from gleaner import files, heartbeat, slurm
from gleaner.journal import OnChange, notify, say
from gleaner.states import Exit

PAUSES_SECONDS = (5, 10, 20, 40, 80, 160, 300)
# A job that ran this long was no failure of ours, however it ended, and wipes out earlier ones.
GOOD_RUN_SECONDS = 300
# A job that ends cleanly sooner than this, unpreempted, did not do its work.
SHORT_RUN_SECONDS = 10
COMMAND_SECONDS = 10.0
LIVING_STATES = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING"}


@dataclass(frozen=True)
class TierConfig:
    tier: str
    job_name: str
    script: str


@dataclass(frozen=True)
class Config:
    service_user: str
    poll_seconds: float
    state: Path
    tiers: tuple[TierConfig, ...]

    @classmethod
    def load(cls, path: Path) -> Config:
        value = files.load_config(path)
        try:
            return cls(
                service_user=str(value["service_user"]),
                poll_seconds=float(value["poll_seconds"]),
                state=Path(value["state"]),
                tiers=tuple(
                    TierConfig(str(tier["tier"]), str(tier["job_name"]), str(tier["script"])) for tier in value["tiers"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a keeper configuration ({error!r}): run playbooks/tiers.yml") from None


@dataclass
class TierState:
    """What the keeper remembers of a tier over its own restarts."""

    job: int = 0
    failures: int = 0
    held: bool = False
    why: str = ""


def load_state(path: Path) -> dict[str, TierState]:
    """The state file's tiers; a file that cannot be understood is said and starts anew."""
    try:
        value = files.load_config(path)
        return {
            str(tier): TierState(
                job=int(kept["job"]),
                failures=int(kept["failures"]),
                held=bool(kept["held"]),
                why=str(kept["why"]),
            )
            for tier, kept in value["tiers"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if path.exists():
            say(f"state: {path} cannot be used, starting anew: {error}")
        return {}


def save_state(path: Path, tiers: dict[str, TierState]) -> None:
    value = {"v": 1, "tiers": {tier: dataclasses.asdict(state) for tier, state in sorted(tiers.items())}}
    files.write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def pause_seconds(failures: int) -> int:
    """How long to wait after that many failures in a row."""
    return 0 if failures <= 0 else PAUSES_SECONDS[min(failures, len(PAUSES_SECONDS)) - 1]


def held_by_slurm(job: slurm.Job) -> bool:
    """Slurm itself holds the job after a launch failure; a person's hold reads JobHeldUser/JobHeldAdmin."""
    words = job.reason.replace("_", " ").lower()
    return job.state == "PENDING" and "requeued" in words and "held" in words


@dataclass(frozen=True)
class End:
    """How a job ended: what is known of it, put in words."""

    failed: bool
    cancelled: bool
    good_run: bool
    words: str


def how_it_ended(fields: dict[str, str]) -> End:
    """Read the end of a job from its `scontrol show job` fields."""
    state = fields["JobState"].split(",")[0]
    ran = slurm.seconds(fields.get("RunTime", "")) or 0
    code = fields.get("ExitCode", "0:0").split(":")[0]
    preempted = slurm.preempted(fields.get("PreemptTime", ""), fields.get("StartTime", ""))
    words = f"{state} after {ran} s"
    if code.isdigit() and int(code):
        meaning = Exit(int(code)).meaning if int(code) in set(Exit) else "unknown to gleaner"
        words += f", exit code {code}: {meaning}"
    cancelled = state == "CANCELLED"
    if state in ("COMPLETED", "TIMEOUT", "PREEMPTED", "CANCELLED"):
        failed = state == "COMPLETED" and ran < SHORT_RUN_SECONDS and not preempted
    else:
        failed = True
    return End(failed, cancelled, ran >= GOOD_RUN_SECONDS, words)


class Keeper:
    """One poll is one look at Slurm and at most one act per tier."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.state: dict[str, TierState] = {}
        self.not_before: dict[str, float] = {}
        self.changes = OnChange()

    def poll(self) -> None:
        names = [tier.job_name for tier in self.config.tiers]
        try:
            jobs = slurm.jobs(self.config.service_user, names, COMMAND_SECONDS)
        except slurm.SlurmError as error:
            self.changes.say("slurm", f"waiting for Slurm: {error}")
            return
        if self.changes.clear("slurm"):
            say("Slurm answers again")
        # The operator's handle writes this file too, so it is read each time.
        self.state = load_state(self.config.state)
        before = json.dumps({name: dataclasses.asdict(state) for name, state in self.state.items()}, sort_keys=True)
        for tier in self.config.tiers:
            state = self.state.setdefault(tier.tier, TierState())
            try:
                self._keep(tier, state, [job for job in jobs if job.name == tier.job_name])
            except slurm.SlurmError as error:
                self.changes.say(tier.tier, f"{tier.tier}: {error}")
        for name in sorted(set(self.state) - {tier.tier for tier in self.config.tiers}):
            try:
                self._let_go(name, self.state[name])
            except slurm.SlurmError as error:
                self.changes.say(name, f"{name}: {error}")
        after = json.dumps({name: dataclasses.asdict(state) for name, state in self.state.items()}, sort_keys=True)
        if after != before:
            save_state(self.config.state, self.state)

    def _keep(self, tier: TierConfig, state: TierState, jobs: list[slurm.Job]) -> None:
        living = [job for job in jobs if job.state != "COMPLETING"]
        if living:
            job = max(living, key=lambda one: (one.state == "RUNNING", -one.id))
            self._look_after(tier, state, job)
        elif state.held:
            self.changes.say(tier.tier, f"{tier.tier}: held ({state.why}), left alone")
        elif jobs:
            self.changes.say(tier.tier, f"{tier.tier}: job {jobs[0].id} is completing")
        elif state.job:
            self._account(tier, state)
        elif self._waited(tier, state):
            self._submit(tier, state)

    def _look_after(self, tier: TierConfig, state: TierState, job: slurm.Job) -> None:
        state.job = job.id
        if state.held:
            # Who held the tier took it back: as the service user, or there would be no job.
            say(f"{tier.tier}: no longer held, job {job.id} was submitted by hand")
            state.held, state.why = False, ""
        where = f" on {job.nodes}" if job.state == "RUNNING" else ""
        reason = f" ({job.reason})" if job.state == "PENDING" and job.reason not in ("", "None") else ""
        self.changes.say(tier.tier, f"{tier.tier}: job {job.id} is {job.state.lower()}{where}{reason}")
        if job.state == "RUNNING":
            if job.run_seconds >= GOOD_RUN_SECONDS:
                state.failures = 0
            return
        if job.state != "PENDING":
            return
        if job.reason == "BeginTime":
            slurm.start_now(job.id)
            say(f"{tier.tier}: job {job.id} was requeued, its wait is ended")
        elif held_by_slurm(job):
            key = f"{tier.tier}/{job.id}/{job.restarts}"
            if self.changes.say(key, f"{tier.tier}: Slurm holds job {job.id}: {job.reason}"):
                self._failed(tier, state)
            elif self._waited(tier, state):
                slurm.release(job.id)
                say(f"{tier.tier}: job {job.id} released")
                self.changes.clear(key)

    def _account(self, tier: TierConfig, state: TierState) -> None:
        """The job that we knew is gone: find out how it ended before another is submitted."""
        job_id = state.job
        fields = self._fields(job_id)
        if fields and self._end_stray(tier.tier, job_id, fields):
            return
        end = how_it_ended(fields) if fields else End(False, False, False, "forgotten by Slurm")
        if end.cancelled:
            uid = slurm.canceller(job_id)
            if uid is None:
                self.changes.say(tier.tier, f"{tier.tier}: job {job_id} was cancelled; asking accounting by whom")
                return
            if uid != os.getuid():
                state.held, state.why = True, f"job {job_id} was cancelled by uid {uid}"
        say(f"{tier.tier}: job {job_id} ended: {end.words}")
        state.job = 0
        if end.good_run:
            state.failures = 0
        if end.failed:
            self._failed(tier, state)

    def _let_go(self, name: str, state: TierState) -> None:
        """A tier that the configuration no longer has: end its job, then forget it."""
        fields = self._fields(state.job) if state.job else None
        if not (fields and self._end_stray(name, state.job, fields)):
            say(f"{name}: no longer a tier, forgotten")
            del self.state[name]

    def _fields(self, job_id: int) -> dict[str, str] | None:
        """What Slurm knows of our job; None when it has forgotten it, or gave its number to somebody else's."""
        try:
            fields = slurm.job(job_id, COMMAND_SECONDS)
        except slurm.SlurmError as error:
            if "Invalid job id" not in str(error):
                raise
            return None
        return fields if fields.get("UserId", "").startswith(f"{self.config.service_user}(") else None

    def _end_stray(self, name: str, job_id: int, fields: dict[str, str]) -> bool:
        """True while a job lives that belongs to no tier under this name any more; it must not keep its GPU."""
        state = fields["JobState"].split(",")[0]
        if state not in LIVING_STATES:
            return False
        if any(fields.get("JobName") == tier.job_name for tier in self.config.tiers if tier.tier == name):
            # squeue just missed it.
            return True
        self.changes.say(name, f"{name}: ending job {job_id} ({fields.get('JobName')}), which the inventory gave up")
        if state != "COMPLETING":
            slurm.cancel(job_id)
        return True

    def _failed(self, tier: TierConfig, state: TierState) -> None:
        state.failures += 1
        pause = pause_seconds(state.failures)
        self.not_before[tier.tier] = time.monotonic() + pause
        say(f"{tier.tier}: failure {state.failures} in a row, next try in {pause} s")

    def _waited(self, tier: TierConfig, state: TierState) -> bool:
        """The pause after the last failure is over; a restarted keeper waits it in full."""
        if state.failures <= 0:
            return True
        now = time.monotonic()
        return now >= self.not_before.setdefault(tier.tier, now + pause_seconds(state.failures))

    def _submit(self, tier: TierConfig, state: TierState) -> None:
        try:
            state.job = slurm.submit(tier.script)
        except slurm.SlurmError as error:
            say(f"{tier.tier}: cannot submit {tier.script}: {error}")
            self._failed(tier, state)
            return
        say(f"{tier.tier}: job {state.job} submitted")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("/etc/gleaner/keeper.json"))


def run(args: argparse.Namespace) -> int:
    try:
        config = Config.load(args.config)
    except ValueError as error:
        say(str(error))
        return Exit.REFUSED
    keeper = Keeper(config)
    signals = heartbeat.Signals(signal.SIGTERM, signal.SIGINT)
    selector = selectors.DefaultSelector()
    selector.register(signals.socket, selectors.EVENT_READ)
    say(f"keeping {', '.join(tier.tier for tier in config.tiers) or 'no tier'}")
    notify("READY=1")
    while True:
        keeper.poll()
        notify("WATCHDOG=1")
        if selector.select(config.poll_seconds) and signals.receive():
            say("told to stop; jobs stay as they are")
            return 0
