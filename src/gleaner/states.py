"""The words for a tier's life: states, causes of stop, exit codes.

Supervisor, keeper, updater, CLI and documentation all take them from here; `gleaner states` prints the
tables of docs/states.md.
"""

from __future__ import annotations

import argparse
import enum


class Tier(enum.Enum):
    """What a tier is doing, in the word that `gleaner status` shows."""

    SERVING = "serving"
    LOADING = "loading"
    YIELDING = "yielding"
    QUEUED = "queued"
    UNROUTED = "unrouted"
    PAUSED = "paused"
    HELD = "held"
    ABSENT = "absent"
    UNKNOWN = "unknown"

    @property
    def meaning(self) -> str:
        return _TIER_MEANING[self]


_TIER_MEANING = {
    Tier.SERVING: "the job runs, the record is fresh, `/health` is good and requests are routed to it",
    Tier.LOADING: "the job runs; its server is starting, or is being started again after it died",
    Tier.YIELDING: "the job gives its GPUs back: withdrawn, draining, stopping",
    Tier.QUEUED: "the job waits for free GPUs",
    Tier.UNROUTED: "the job runs and has a record, but the updater does not route it; its journal says why",
    Tier.PAUSED: (
        "the keeper waits before the next job: the last one failed, nobody knows yet who cancelled it, "
        "or a tier of higher priority is about to start on its nodes"
    ),
    Tier.HELD: "a person stopped the tier, or may have; the keeper leaves it alone until a person starts it",
    Tier.ABSENT: "no job, and the keeper has not submitted one: is gleaner-keeper.service running?",
    Tier.UNKNOWN: "Slurm does not answer",
}


class Exit(enum.IntEnum):
    """Exit codes of the supervisor, which Slurm keeps as the job's."""

    STOPPED = 0
    REFUSED = 10
    SERVER_FAILED = 11
    AGENT_LOST = 12
    LOAD_TIMEOUT = 13
    START_FAILED = 14

    @property
    def meaning(self) -> str:
        return _EXIT_MEANING[self]


_EXIT_MEANING = {
    Exit.STOPPED: "stopped or yielded as asked",
    Exit.REFUSED: "plan or surroundings are wrong; the log names the variable and the cure",
    Exit.SERVER_FAILED: "the server died too often in a short time",
    Exit.AGENT_LOST: "an agent was silent for too long; the tier was taken down whole",
    Exit.LOAD_TIMEOUT: "`/health` was not good within load_timeout_seconds",
    Exit.START_FAILED: "the job step or its programs could not be started",
}


class Cause(enum.Enum):
    """Why a tier's job stops, as the supervisor finds out when it is signalled."""

    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    TIME_LIMIT = "time limit"
    REPLACED = "replaced"
    OUTRANKED = "outranked"
    ASKED = "asked"
    UNANSWERED = "unanswered"
    FAILED = "failed"

    @property
    def meaning(self) -> str:
        return _CAUSE[self][0]

    @property
    def drains(self) -> bool:
        """Streams in flight get the drain budget."""
        return _CAUSE[self][1]

    @property
    def requeues(self) -> bool:
        """The supervisor requeues its own job before it leaves."""
        return _CAUSE[self][2]

    @property
    def afterwards(self) -> str:
        return _CAUSE[self][3]


# meaning, drains, requeues, what the keeper does then
_CAUSE: dict[Cause, tuple[str, bool, bool, str]] = {
    Cause.PREEMPTED: ("Slurm shows a preemption time", True, True, "ends the requeued job's wait"),
    Cause.CANCELLED: (
        "the job is no longer running for Slurm",
        False,
        False,
        "holds the tier if a person did it",
    ),
    Cause.TIME_LIMIT: ("the job has reached its time limit", True, False, "submits anew"),
    Cause.REPLACED: (
        "the keeper marked the job: its plan is not the current one",
        True,
        False,
        "submits the current job script",
    ),
    Cause.OUTRANKED: (
        "the keeper marked the job: a tier of higher priority wants its GPUs",
        True,
        False,
        "submits anew when the higher tier runs, or cannot",
    ),
    Cause.ASKED: ("TERM without any of the above, for example by a person", True, False, "submits anew"),
    Cause.UNANSWERED: ("Slurm did not answer: yield as if preempted", True, True, "sorts it out"),
    Cause.FAILED: ("server, agent or step failed", False, False, "submits anew after a growing pause"),
}


def tables() -> str:
    """The document docs/states.md."""
    lines = [
        "# States, causes of stop, exit codes",
        "",
        "<!-- Made by `python -m gleaner states`; a test fails when this file differs. -->",
        "",
        "## What a tier is doing",
        "",
        "| state | meaning |",
        "|---|---|",
        *(f"| {state.value} | {state.meaning} |" for state in Tier),
        "",
        "## Why a tier's job stops",
        "",
        "| cause | how it is known | drains | requeues itself | the keeper then |",
        "|---|---|---|---|---|",
        *(f"| {c.value} | {c.meaning} | {_yes(c.drains)} | {_yes(c.requeues)} | {c.afterwards} |" for c in Cause),
        "",
        "## Exit codes of the supervisor",
        "",
        "| code | name | meaning |",
        "|---|---|---|",
        *(f"| {e.value} | {e.name} | {e.meaning} |" for e in Exit),
        "",
    ]
    return "\n".join(lines)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """`gleaner states` takes none."""


def run(_args: argparse.Namespace) -> int:
    print(tables(), end="")
    return 0
