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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from gleaner import claims, digest, files, heartbeat, life, slurm, wishes
from gleaner.journal import OnChange, notify, say
from gleaner.states import Exit
from gleaner.wishes import Wish

# A run of a job, its number and its restart, and the number of its last sign of life.
Moment = tuple[tuple[int, int], Optional[int]]
PAUSES_SECONDS = (5, 10, 20, 40, 80, 160, 300)
# A job that ran this long was no failure of ours, however it ended, and wipes out earlier ones.
GOOD_RUN_SECONDS = 300
# A node or a network that failed counts no further than this: Slurm starts the next job when its nodes are there.
LOST_FAILURES = 3
# A job that ends cleanly sooner than this, unpreempted, did not do its work.
SHORT_RUN_SECONDS = 10
COMMAND_SECONDS = 10.0
SCRIPT_LIMIT = 1 << 16
WAITING_STATES = {"PENDING", "CONFIGURING"}
# Jobs that have nodes. One that completes will give them back, but has not yet.
HOLDING_STATES = {"CONFIGURING", "RUNNING", "COMPLETING"}
# What Slurm says of a job that waits for nodes. It may be old: whether there are any is asked of the nodes.
WAITING_REASONS = ("None", "Priority", "Resources", "ReqNodeNotAvail", "Nodes required for job")
# After each claim that did not lead to a good run, the next one needs twice the wait; so often at most.
CLAIM_DOUBLINGS = 6
REQUEUED_SECONDS = 2
# Slurm has so much longer than claim_after_seconds to start a job whose nodes are free.
START_SECONDS = 60.0
LIVING_STATES = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING"}


@dataclass(frozen=True)
class TierConfig:
    tier: str
    job_name: str
    script: str
    digest: str
    need: claims.Need


@dataclass(frozen=True)
class Config:
    service_user: str
    poll_seconds: float
    yield_seconds: float
    """How long a job that was told to yield may take, before it is cancelled."""
    accounting_seconds: float
    """How long accounting is asked who cancelled a job."""
    claim_after_seconds: float
    """How long a tier waits for what lower tiers hold, before they have to yield."""
    lost_seconds: float
    """How long a running job may give no sign of life, before it is taken for lost with its node."""
    registry: Path
    state: Path
    tiers: tuple[TierConfig, ...]

    @classmethod
    def load(cls, path: Path) -> Config:
        value = files.load_config(path)
        try:
            return cls(
                service_user=str(value["service_user"]),
                poll_seconds=float(value["poll_seconds"]),
                yield_seconds=float(value["yield_seconds"]),
                accounting_seconds=float(value["accounting_seconds"]),
                claim_after_seconds=float(value["claim_after_seconds"]),
                lost_seconds=float(value["lost_seconds"]),
                registry=Path(value["registry"]),
                state=Path(value["state"]),
                tiers=tuple(
                    TierConfig(
                        tier=str(tier["tier"]),
                        job_name=str(tier["job_name"]),
                        script=str(tier["script"]),
                        digest=str(tier["digest"]),
                        need=claims.Need.load(tier["need"]),
                    )
                    for tier in value["tiers"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a keeper configuration ({error!r}): run playbooks/tiers.yml") from None


@dataclass
class TierState:
    """What the keeper remembers of a tier over its own restarts."""

    job: int = 0
    digest: str = ""
    """What that job, or the last one, was made from."""
    ending: bool = False
    """The keeper itself is ending the job."""
    failures: int = 0
    failure: str = ""
    """How the last job failed by itself; empty when none of this plan has since one ran well."""
    held: bool = False
    why: str = ""
    """Of a tier that is held, whose job is being ended or not accounted for yet, or that makes way for another."""
    claims: int = 0
    """How often lower tiers had to yield to this one since it last ran well."""
    claimed: list[str] = field(default_factory=list)
    """The nodes that lower tiers are kept from now, so that this one can start."""
    lost: str = ""
    """Job and restart that were last taken for lost."""
    mute: bool = False
    """That run had never given a sign of life, nor has one since."""

    def forgive(self) -> None:
        """What went wrong before does not count any more."""
        self.failures = self.claims = 0
        self.failure = ""


def load_state(path: Path) -> dict[str, TierState]:
    """The state file's tiers; a file that cannot be understood is said and starts anew."""
    try:
        value = files.load_config(path)
        return {
            str(tier): TierState(
                job=int(kept["job"]),
                # Not in what an older version wrote.
                digest=str(kept.get("digest", "")),
                ending=bool(kept.get("ending", False)),
                failures=int(kept["failures"]),
                failure=str(kept.get("failure", "")),
                held=bool(kept["held"]),
                why=str(kept["why"]),
                claims=int(kept.get("claims", 0)),
                claimed=[str(name) for name in kept.get("claimed", [])],
                lost=str(kept.get("lost", "")),
                mute=bool(kept.get("mute", False)),
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


def held_by_person(job: slurm.Job) -> bool:
    return job.state == "PENDING" and job.reason.startswith("JobHeld")


def held_by_slurm(job: slurm.Job) -> bool:
    """Slurm itself holds the job after a launch failure; a person's hold reads JobHeldUser/JobHeldAdmin."""
    words = job.reason.replace("_", " ").lower()
    return job.state == "PENDING" and "requeued" in words and "held" in words


def digest_of(job: slurm.Job, state: TierState) -> str:
    """What the job was made from: by its comment, or, where a site's Slurm changes comments, by our memory."""
    return digest.read(job.comment) or (state.digest if job.id == state.job else "")


def script_digest(script: str) -> str:
    """The digest that the job script carries; empty when it has none or cannot be read."""
    try:
        return digest.read(files.read_bounded(Path(script), SCRIPT_LIMIT).decode(errors="replace"))
    except (OSError, ValueError):
        return ""


@dataclass(frozen=True)
class End:
    """How a job ended: what is known of it, put in words."""

    failed: bool
    cancelled: bool
    good_run: bool
    lost: bool
    """A node was, not the tier's programs to blame."""
    words: str


def how_it_ended(fields: dict[str, str]) -> End:
    """Read the end of a job from its `scontrol show job` fields."""
    state = fields["JobState"]
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
    lost = state == "NODE_FAIL" or code == str(int(Exit.AGENT_LOST))
    return End(failed, cancelled, ran >= GOOD_RUN_SECONDS, lost, words)


def waits_for_nodes(job: slurm.Job) -> bool:
    """Nothing but nodes is missing: nobody holds the job, no time, dependency or limit does."""
    return job.state == "PENDING" and (job.reason.replace("_", " ") or "None").startswith(WAITING_REASONS)


@dataclass(frozen=True)
class Departure:
    """Why a job has to go."""

    words: str
    comment: str
    """What its supervisor reads when it asks Slurm why; empty when that is told already."""


class Keeper:
    """One poll is one look at Slurm and at most one act per tier."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.state: dict[str, TierState] = {}
        self.not_before: dict[str, float] = {}
        self.told: dict[int, float] = {}
        self.ask_until: dict[int, float] = {}
        self.changes = OnChange()
        self.look = life.Look(config.registry)
        self.signs: dict[str, life.Sign | None] = {}
        # Of a tier whose job runs: the run and the sign that was seen last, and since when it is that one.
        self.moved: dict[str, tuple[Moment, float]] = {}
        # Of a tier that could claim nodes: since when; of one that has: until when; how often they were seen lost.
        self.wanting_since: dict[str, float] = {}
        self.claim_until: dict[str, float] = {}
        self.lost_sight: dict[str, int] = {}
        # Which file the configuration was read from: its inode, size and time.
        self.read: tuple[int, int, int] | None = None
        # Tiers that may not start now, and jobs that have to yield: for whom, in words.
        self.outranked: dict[str, str] = {}
        self.yielding: dict[int, str] = {}

    def follow(self, path: Path) -> None:
        """Take over the configuration when another was written: a play that was cut off told nobody of it."""
        try:
            about = path.stat()
            mark = (about.st_ino, about.st_size, about.st_mtime_ns)
            if mark == self.read:
                return
            config = Config.load(path)
        except (OSError, ValueError) as error:
            self.changes.say("config", f"{error}: going on as before")
            return
        self.read = mark
        self.changes.clear("config")
        if config != self.config:
            say(f"another configuration: keeping {', '.join(tier.tier for tier in config.tiers) or 'no tier'}")
            self.config, self.look = config, life.Look(config.registry)

    def poll(self) -> None:
        names = [tier.job_name for tier in self.config.tiers]
        try:
            jobs = slurm.jobs(self.config.service_user, names, COMMAND_SECONDS)
        except slurm.SlurmError as error:
            self.changes.say("slurm", f"waiting for Slurm: {error}")
            # What is not looked at is not judged.
            self.moved = {}
            return
        if self.changes.clear("slurm"):
            say("Slurm answers again")
        # A person may have put it right.
        self.state = load_state(self.config.state)
        before = json.dumps({name: dataclasses.asdict(state) for name, state in self.state.items()}, sort_keys=True)
        for tier in self.config.tiers:
            self.state.setdefault(tier.tier, TierState())
        taken = self._take_wishes(jobs)
        self._compete(jobs)
        running = {job.name for job in jobs if job.state == "RUNNING"}
        looked_for = [tier.tier for tier in self.config.tiers if tier.job_name in running]
        self.signs = self.look.signs(looked_for) if looked_for else {}
        self.moved = {tier: moved for tier, moved in self.moved.items() if tier in self.signs}
        for tier in self.config.tiers:
            state = self.state[tier.tier]
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
        for name in taken:
            wishes.done(self.config.state, name)

    def _keep(self, tier: TierConfig, state: TierState, jobs: list[slurm.Job]) -> None:
        living = [job for job in jobs if job.state != "COMPLETING"]
        leaving = [(job, why) for job in living if (why := self._why_to_go(tier, state, job))]
        if leaving:
            # First the one that waits: it would start where the running one ends.
            self._see_off(tier, state, *min(leaving, key=lambda one: one[0].state not in WAITING_STATES))
        elif living:
            self._look_after(tier, state, max(living, key=lambda one: (one.state == "RUNNING", -one.id)))
        elif state.held and not state.ending:
            self.changes.say(tier.tier, f"{tier.tier}: held ({state.why}), left alone")
        elif jobs:
            self.changes.say(tier.tier, f"{tier.tier}: job {jobs[0].id} is completing")
        elif state.job:
            self._account(tier, state)
        else:
            state.why = self.outranked.get(tier.tier, "")
            if state.failures and self._outdated(tier, state.digest):
                say(f"{tier.tier}: its plan has changed, the failures of the old one do not count")
                state.failures, state.failure = 0, ""
            if state.why:
                self.changes.say(tier.tier, f"{tier.tier}: makes way: {state.why}")
            elif self._waited(tier, state):
                self._submit(tier, state)

    def _take_wishes(self, jobs: list[slurm.Job]) -> list[str]:
        """Note down what administrators wish; the tiers whose wishes are done with when the state is saved."""
        taken = []
        known = {tier.tier for tier in self.config.tiers}
        try:
            for name in wishes.forget_others(self.config.state, known):
                say(f"{name}: there is no such tier, what was wished of it is taken away")
            for tier in self.config.tiers:
                try:
                    said = wishes.take(self.config.state, tier.tier)
                except ValueError as error:
                    say(f"{tier.tier}: {error}; it is taken away")
                    taken.append(tier.tier)
                    continue
                if said is not None:
                    self._grant(tier, said, jobs)
                    taken.append(tier.tier)
        except OSError as error:
            self.changes.say("wishes", f"wishes cannot be read, and stay: {error.filename}: {error.strerror}")
        else:
            self.changes.clear("wishes")
        return taken

    def _grant(self, tier: TierConfig, said: wishes.Said, jobs: list[slurm.Job]) -> None:
        state, name = self.state[tier.tier], tier.tier
        words = f"{said.wish.value} by {said.by}"
        say(f"{name}: {words}")
        mine = [job for job in jobs if job.name == tier.job_name]
        living = [job for job in mine if job.state != "COMPLETING"]
        running = [job for job in living if job.state not in WAITING_STATES]
        being_held = state.held and state.ending
        state.held = said.wish is Wish.HELD
        state.forgive()
        self.not_before.pop(name, None)
        if state.held:
            # Also of a job that completes: it may be one that comes back, since it was preempted.
            state.job = next((job.id for job in (*running, *living, *mine)), state.job)
            state.ending, state.why = state.job != 0, words
            return
        if not living:
            # Whoever ended the last job, this wish came after it.
            self.ask_until.pop(state.job, None)
            state.job, state.ending, state.why = 0, False, ""
        elif said.wish is Wish.RESTARTED and running:
            state.job, state.ending, state.why = running[0].id, True, words
        elif being_held:
            # What was told to yield does so; what still waits need not.
            state.ending, state.why = bool(running), words if running else ""
        for job in living:
            if held_by_person(job):
                try:
                    slurm.release(job.id)
                except slurm.SlurmError as error:
                    say(f"{name}: job {job.id} cannot be released: {error}")

    # A living job

    def _take(self, tier: TierConfig, state: TierState, job: slurm.Job) -> None:
        """This is the tier's job now."""
        state.digest = digest_of(job, state)
        # All of its jobs go, not only the first.
        being_held = state.held and state.ending
        if state.job != job.id:
            state.job, state.ending = job.id, being_held
        if state.held and not being_held:
            # Who held the tier took it back: as the service user, or there would be no job.
            say(f"{tier.tier}: no longer held, job {job.id} was submitted by hand")
            state.held = False
        if not state.ending:
            state.why = ""

    def _look_after(self, tier: TierConfig, state: TierState, job: slurm.Job) -> None:
        self._take(tier, state, job)
        where = f" on {job.nodes}" if job.state == "RUNNING" else ""
        reason = f" ({job.reason})" if job.state == "PENDING" and job.reason not in ("", "None") else ""
        self.changes.say(tier.tier, f"{tier.tier}: job {job.id} is {job.state.lower()}{where}{reason}")
        if job.state == "RUNNING":
            if job.run_seconds >= GOOD_RUN_SECONDS:
                state.forgive()
            self._look_for_life(tier, state, job)
            return
        if job.state != "PENDING":
            return
        if job.reason == "BeginTime":
            # At the first look it may have been requeued in this very second.
            first = self.changes.say(
                f"{tier.tier}/wait", f"{tier.tier}: job {job.id} restart {job.restarts}: its wait is ended"
            )
            slurm.start_soon(job.id, REQUEUED_SECONDS if first else 0)
        elif held_by_slurm(job):
            key = f"{tier.tier}/{job.id}/{job.restarts}"
            if self.changes.say(key, f"{tier.tier}: Slurm holds job {job.id}: {job.reason}"):
                self._failed(tier, state)
            elif self._waited(tier, state):
                slurm.release(job.id)
                say(f"{tier.tier}: job {job.id} released")
                self.changes.clear(key)

    def _look_for_life(self, tier: TierConfig, state: TierState, job: slurm.Job) -> None:
        """Requeue a job that runs for Slurm only: its node went down, and its supervisor with it."""
        if tier.tier not in self.signs:
            return
        sign, run, now = self.signs[tier.tier], (job.id, job.restarts), time.monotonic()
        seq = sign.seq if sign is not None and sign.run == run else None
        if seq is not None:
            state.mute = False
        seen, since = self.moved.get(tier.tier, ((run, seq), now))
        if seen != (run, seq):
            since = now
        self.moved[tier.tier] = (run, seq), since
        # The first sign may be there before a client of NFS sees it.
        patience = self.config.lost_seconds * (2 if seq is None else 1)
        lost = f"{job.id}/{job.restarts}"
        if now - since < patience or job.run_seconds < self.config.lost_seconds or state.lost == lost:
            return
        if seq is None and state.mute:
            why = "as the one before: has its node an older version of gleaner? Run playbooks/tiers.yml"
            self.changes.say(f"{tier.tier}/mute", f"{tier.tier}: job {job.id} gives no sign of life, {why}")
            return
        say(
            f"{tier.tier}: job {job.id} runs on {job.nodes} for Slurm, but gave no sign of life for {now - since:.0f} s"
        )
        try:
            slurm.requeue(job.id)
            say(f"{tier.tier}: job {job.id} requeued")
        except slurm.SlurmError as error:
            slurm.cancel(job.id)
            state.ending, state.why = True, f"job {job.id} is lost with its node and cancelled: {error}"
            say(f"{tier.tier}: {state.why}")
        state.lost, state.mute = lost, seq is None

    def _why_to_go(self, tier: TierConfig, state: TierState, job: slurm.Job) -> Departure | None:
        # What a person holds must not come back under another number.
        if held_by_person(job) and not (state.held and state.ending):
            return None
        made_from = digest_of(job, state)
        # A job that was told to yield does so, even if its plan is the current one again.
        if digest.is_replaced(job.comment) or self._outdated(tier, made_from, job):
            words = f"job {job.id} is being replaced: its plan is not the current one"
            return Departure(words, digest.replaced(made_from))
        if state.ending and (state.held or state.job == job.id):
            return Departure(state.why, "")
        claim = self.yielding.get(job.id) or (self.outranked.get(tier.tier) if job.state == "PENDING" else None)
        if claim or digest.is_outranked(job.comment):
            words = claim or "a tier of higher priority wanted its nodes"
            return Departure(f"job {job.id} yields: {words}", digest.outranked(made_from))
        return None

    def _outdated(self, tier: TierConfig, made_from: str, job: slurm.Job | None = None) -> bool:
        """A job made from this is not the one that would be submitted now.

        One that runs need not end for what has changed of nodes that it does not use. Between the writing of a job
        script and that of our configuration nobody can tell, so none is ended.
        """
        hosts = slurm.hosts(job.nodes) if job is not None and job.state not in WAITING_STATES else []
        if digest.may_run_on(made_from, tier.digest, tier.need.nodes, hosts):
            return False
        script = script_digest(tier.script)
        key = f"{tier.tier}/script"
        if script == tier.digest:
            self.changes.clear(key)
            return True
        self.changes.say(
            key,
            f"{tier.tier}: {tier.script}: digest: got {script or 'none'}, want {tier.digest}: "
            "its jobs stay as they are until playbooks/tiers.yml has run to its end",
        )
        return False

    def _see_off(self, tier: TierConfig, state: TierState, job: slurm.Job, why: Departure) -> None:
        """End a job that has to go; when it is gone, the next one is submitted as ever."""
        self._take(tier, state, job)
        state.ending = True
        if not state.held:
            state.why = why.words
        self.changes.say(tier.tier, f"{tier.tier}: {state.why}")
        self._end(tier.tier, job.id, job.state, why.comment)

    def _end(self, name: str, job_id: int, job_state: str, comment: str) -> None:
        """Cancel a job that serves nobody; have one that runs yield, and cancel it when it does not."""
        now = time.monotonic()
        told = self.told.get(job_id)
        if job_state in WAITING_STATES:
            slurm.cancel(job_id)
            self.told.pop(job_id, None)
            say(f"{name}: job {job_id} cancelled")
        elif told is None:
            try:
                if comment:
                    slurm.comment(job_id, comment)
            except slurm.SlurmError as error:
                say(f"{name}: job {job_id} cannot be told why it has to yield: {error}")
            slurm.terminate(job_id)
            self.told[job_id] = now
            say(f"{name}: job {job_id} told to yield")
        elif now - told >= self.config.yield_seconds:
            slurm.cancel(job_id)
            self.told[job_id] = now
            say(f"{name}: job {job_id} did not yield within {self.config.yield_seconds:g} s and is cancelled")

    # Tiers that compete

    def _compete(self, jobs: list[slurm.Job]) -> None:
        """Find who has to make way for whom: what a waiting tier has claimed is kept from the lower ones."""
        self.outranked, self.yielding = {}, {}
        for tier in sorted(self.config.tiers, key=lambda one: -one.need.priority):
            state = self.state[tier.tier]
            lower = [other for other in self.config.tiers if tier.need.outranks(other.need)]
            if not lower or not self._waits(tier, state, jobs):
                self.wanting_since.pop(tier.tier, None)
                self._give_up_claim(tier, state, "it does not wait for nodes any more")
                continue
            if state.claimed and time.monotonic() >= self._claim_ends(tier):
                self._give_up_claim(tier, state, "it did not start in time")
            try:
                self._claim(tier, state, lower, jobs)
            except slurm.SlurmError as error:
                self.changes.say(f"{tier.tier}/claim", f"{tier.tier}: cannot see which nodes it could have: {error}")
            for other in lower:
                if not set(state.claimed).isdisjoint(other.need.nodes):
                    self.outranked.setdefault(other.tier, self._claim_in_words(tier, state))

    def _waits(self, tier: TierConfig, state: TierState, jobs: list[slurm.Job]) -> bool:
        living = [job for job in jobs if job.name == tier.job_name and job.state != "COMPLETING"]
        # A second one in the queue waits for the first, by its dependency.
        return all(job.state == "PENDING" for job in living) and any(
            waits_for_nodes(job) and self._why_to_go(tier, state, job) is None for job in living
        )

    def _claim(self, tier: TierConfig, state: TierState, lower: list[TierConfig], jobs: list[slurm.Job]) -> None:
        """Claim nodes for a tier that waits, when it could have them for long enough; or see to a claim that it has."""
        holders = [
            claims.Holder(job.id, other.need, frozenset(slurm.hosts(job.nodes)))
            for other in lower
            for job in jobs
            # What a preempted job holds goes to the one that preempts it.
            if job.name == other.job_name and job.state in HOLDING_STATES and not job.preempted
        ]
        holders = [holder for holder in holders if not holder.nodes.isdisjoint(tier.need.nodes)]
        if not holders and not state.claimed:
            self.wanting_since.pop(tier.tier, None)
            return
        nodes = slurm.nodes(state.claimed or tier.need.nodes, COMMAND_SECONDS)
        self.changes.clear(f"{tier.tier}/claim")
        now = time.monotonic()
        if not state.claimed:
            way = claims.best_way(tier.need, nodes, holders)
            if way is None or not way.yields:
                self.wanting_since.pop(tier.tier, None)
                return
            wait = self.config.claim_after_seconds * 2 ** min(state.claims, CLAIM_DOUBLINGS)
            if now - self.wanting_since.setdefault(tier.tier, now) < wait:
                return
            del self.wanting_since[tier.tier]
            state.claimed, state.claims = sorted(way.nodes), state.claims + 1
            say(f"{tier.tier}: claims {','.join(state.claimed)}, which lower tiers held for {wait:g} s while it waited")
        else:
            way = claims.best_way(dataclasses.replace(tier.need, nodes=tuple(state.claimed)), nodes, holders)
        self._see_to_claim(tier, state, way)

    def _see_to_claim(self, tier: TierConfig, state: TierState, way: claims.Way | None) -> None:
        if way is None:
            # Queue and nodes are not of one moment: the tier itself may just have got them.
            self.lost_sight[tier.tier] = self.lost_sight.get(tier.tier, 0) + 1
            if self.lost_sight[tier.tier] > 1:
                self._give_up_claim(tier, state, "others have its nodes, or Slurm does not give them out")
            return
        self.lost_sight.pop(tier.tier, None)
        if not way.yields:
            self.claim_until[tier.tier] = min(self._claim_ends(tier), time.monotonic() + self._start_seconds)
        words = self._claim_in_words(tier, state)
        self.yielding.update({holder.job: words for holder in way.yields})

    @property
    def _start_seconds(self) -> float:
        """How long Slurm may take to start a job whose nodes are free."""
        return self.config.claim_after_seconds + START_SECONDS

    def _claim_ends(self, tier: TierConfig) -> float:
        """When a claim is over whatever happens. A keeper that was started anew gives it its whole time again."""
        whole = 2 * self.config.yield_seconds + self._start_seconds
        return self.claim_until.setdefault(tier.tier, time.monotonic() + whole)

    def _give_up_claim(self, tier: TierConfig, state: TierState, why: str) -> None:
        self.claim_until.pop(tier.tier, None)
        self.lost_sight.pop(tier.tier, None)
        if state.claimed:
            say(f"{tier.tier}: its claim on {','.join(state.claimed)} is over: {why}")
            state.claimed = []

    @staticmethod
    def _claim_in_words(tier: TierConfig, state: TierState) -> str:
        return f"{tier.tier} (priority {tier.need.priority}) wants {','.join(state.claimed)}"

    # A job that is gone

    def _account(self, tier: TierConfig, state: TierState) -> None:
        """The job that we knew is gone: find out how it ended before another is submitted."""
        job_id = state.job
        fields = self._fields(job_id)
        if fields and self._end_stray(tier.tier, state, fields):
            return
        end = how_it_ended(fields) if fields else End(False, False, False, False, "forgotten by Slurm")
        if end.cancelled and not state.held:
            why = self._why_cancelled(state)
            if why is None:
                self.changes.say(tier.tier, f"{tier.tier}: {state.why}")
                return
            state.held, state.why = bool(why), why
        # A job that had to end, or of another plan, tells nothing of the next one.
        outdated = self._outdated(tier, state.digest)
        done = state.ending or outdated
        say(f"{tier.tier}: job {job_id} ended: {end.words}")
        state.job, state.ending = 0, False
        state.why = state.why if state.held else ""
        self.told.pop(job_id, None)
        if end.good_run or outdated:
            state.forgive()
        if end.failed and not done:
            if not end.lost:
                state.failure = f"job {job_id} ended: {end.words}"
            self._failed(tier, state, end.lost)

    def _why_cancelled(self, state: TierState) -> str | None:
        """Why the tier is held now that its job was cancelled; empty when we did it, None while nobody knows."""
        doubt = ""
        try:
            uid = slurm.canceller(state.job)
        except slurm.SlurmError as error:
            uid, doubt = None, f" ({error})"
        now, seconds = time.monotonic(), self.config.accounting_seconds
        if uid is None and now < self.ask_until.setdefault(state.job, now + seconds):
            state.why = f"job {state.job} was cancelled; asking accounting by whom{doubt}"
            return None
        self.ask_until.pop(state.job, None)
        if uid is None:
            unknown = f"job {state.job} was cancelled, and accounting did not say by whom within {seconds:g} s{doubt}"
            return "" if state.ending else unknown
        return "" if uid == os.getuid() else f"job {state.job} was cancelled by uid {uid}"

    def _let_go(self, name: str, state: TierState) -> None:
        """A tier that the configuration no longer has: end its job, then forget it."""
        fields = self._fields(state.job) if state.job else None
        if not (fields and self._end_stray(name, state, fields)):
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

    def _end_stray(self, name: str, state: TierState, fields: dict[str, str]) -> bool:
        """True while a job lives that belongs to no tier under this name any more; it must not keep its GPU."""
        job_state = fields["JobState"]
        if job_state not in LIVING_STATES:
            return False
        if any(fields.get("JobName") == tier.job_name for tier in self.config.tiers if tier.tier == name):
            # squeue just missed it.
            return True
        state.ending = True
        state.why = f"job {state.job} ({fields.get('JobName')}) is being ended: the inventory gave it up"
        self.changes.say(name, f"{name}: {state.why}")
        if job_state != "COMPLETING":
            self._end(name, state.job, job_state, digest.replaced(state.digest))
        return True

    def _failed(self, tier: TierConfig, state: TierState, lost: bool = False) -> None:
        if not lost or state.failures < LOST_FAILURES:
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
        state.digest = script_digest(tier.script)
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
        # Beside the state, in the folder that systemd makes for us.
        wishes.folder_of(config.state).mkdir(exist_ok=True)
    except (ValueError, OSError) as error:
        say(str(error))
        return Exit.REFUSED
    keeper = Keeper(config)
    signals = heartbeat.Signals(signal.SIGTERM, signal.SIGINT)
    selector = selectors.DefaultSelector()
    selector.register(signals.socket, selectors.EVENT_READ)
    say(f"keeping {', '.join(tier.tier for tier in config.tiers) or 'no tier'}")
    notify("READY=1")
    while True:
        keeper.follow(args.config)
        keeper.poll()
        notify("WATCHDOG=1")
        if selector.select(keeper.config.poll_seconds) and signals.receive():
            say("told to stop; jobs stay as they are")
            return 0
