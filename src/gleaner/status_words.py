"""Sentences of `gleaner status`: what a tier or a node is doing, as a person would say it."""

from __future__ import annotations

import pwd
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gleaner import slurm
from gleaner.occupancy import Obstacles, Stay, state_in_words
from gleaner.states import Tier

NAMED_MODELS = 2
NAMED_JOBS = 3
NAMED_NODES = 4
_UID = re.compile(r"\buid (\d+)\b")


def span(seconds: float) -> str:
    """A duration in its two largest units."""
    left = round(seconds)
    if left < 60:
        return f"{left} s"
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def listed(words: Sequence[str], most: int) -> str:
    """The first of them, and how many there are more."""
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most} more"
    return ", ".join(words)


def user_of(uid: int) -> str:
    """The name of a user; `uid 1000` where this host has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return f"uid {uid}"


def with_names(text: str) -> str:
    """The keeper's words, with the name of a user in place of `uid 1000`."""
    return _UID.sub(lambda match: user_of(int(match[1])), text)


def held_by(line: Mapping[str, Any]) -> str | None:
    """Who holds a tier; None when nobody does, or nobody knows who.

    A job that is held in Slurm is not held by the keeper: it says so in the job's reason alone.
    """
    if line["held"]:
        why = str(line["why"] or "")
        if match := re.fullmatch(r"held by (.+)", why):
            return match[1]
        match = re.search(r"cancelled by uid (\d+)", why)
        return user_of(int(match[1])) if match else None
    reason = str(line["reason"] or "")
    if reason == "JobHeldUser":
        return "the job's own user"
    return "an administrator" if reason.startswith("JobHeld") else None


def job_in_words(stay: Stay, tiers: Mapping[int, str]) -> str:
    """`tiers` are the jobs of tiers, which compete with each other, too."""
    where = listed(stay.nodes, NAMED_NODES)
    if stay.job in tiers:
        return f"tier {tiers[stay.job]} (job {stay.job}) on {where}"
    left = "" if stay.left_seconds is None else f" ({span(stay.left_seconds)} left at most)"
    return f"job {stay.job} of {stay.user} on {where}{left}"


def node_in_words(name: str, node: slurm.Node | None) -> str:
    if node is None:
        return f"{name} (Slurm does not know it)"
    return f"{name} ({state_in_words(node.state)}{f': {node.reason}' if node.reason else ''})"


def tier_in_words(
    line: Mapping[str, Any],
    obstacles: Obstacles | None,
    nodes: Mapping[str, slurm.Node],
    tiers: Mapping[int, str],
    stuck: Sequence[str] = (),
) -> str:
    """What a tier is doing, by its line of `status.look`. Without `obstacles` nodes were not looked at.

    `stuck` are nodes which its job has, and which start none.
    """
    state, why = Tier(line["state"]), with_names(str(line["why"] or ""))
    where = ", ".join(slurm.hosts(line["node"])) if line["node"] else ""
    if state is Tier.SERVING:
        return f"serving on {where}: {listed(line['models'], NAMED_MODELS)}"
    if state is Tier.LOADING:
        return f"loading on {where} for {span(line['run_seconds'] or 0)}"
    if state is Tier.YIELDING:
        waits = [node_in_words(name, nodes.get(name)) for name in stuck]
        return f"yielding: {_why_it_yields(line, where, why)}" + (
            f"; not gone yet from {', '.join(waits)}" if waits else ""
        )
    if state is Tier.UNROUTED:
        return f"unrouted: it runs on {where}; `journalctl -u gleaner-upstream` says why nobody is sent there"
    if state is Tier.QUEUED:
        return _why_it_waits(line, obstacles, nodes, tiers)
    if state is Tier.HELD:
        return _who_holds_it(line, why)
    if state is Tier.PAUSED:
        failures = f" (failure {line['failures']} in a row)" if line["failures"] else ""
        return f"paused: {why or 'the last job failed'}{failures}"
    return f"{state.value}: {state.meaning}"


def _why_it_yields(line: Mapping[str, Any], where: str, why: str) -> str:
    if line["preempted"]:
        return f"a paying job gets {where or 'its nodes'}"
    if line["ending"] and why:
        return why
    return f"job {line['job']} ends" + (f" on {where}" if where else "")


def _who_holds_it(line: Mapping[str, Any], why: str) -> str:
    name, job = line["tier"], line["job"]
    if line["held"]:
        held = why if why.startswith("held") else f"held: {why or 'nobody knows by whom'}"
        return f"{held}; `gleaner tier {name} started` ends it"
    # `scontrol hold`: the keeper leaves a job alone that somebody held in Slurm itself.
    by = (
        "for its user (`scontrol uhold`)"
        if line["reason"] == "JobHeldUser"
        else "by an administrator (`scontrol hold`)"
    )
    return f"held: job {job} is held in Slurm {by}; `scontrol release {job}` ends it"


def _why_it_waits(
    line: Mapping[str, Any],
    obstacles: Obstacles | None,
    nodes: Mapping[str, slurm.Node],
    tiers: Mapping[int, str],
) -> str:
    reason, job = str(line["reason"] or "").replace("_", " "), line["job"]
    if reason.startswith("Dependency"):
        return f"queued: job {job} waits for the tier's job before it to end"
    if "requeued" in reason.lower() and "held" in reason.lower():
        return f"queued: Slurm holds job {job} after a launch that failed; the keeper releases it"
    behind = [job_in_words(stay, tiers) for stay in obstacles.jobs if stay.job != job] if obstacles else []
    shut = [node_in_words(name, nodes.get(name)) for name in obstacles.nodes] if obstacles else []
    whom = [f"behind {listed(behind, NAMED_JOBS)}"] * bool(behind) + [f"for {', '.join(shut)}"] * bool(shut)
    if whom:
        return f"queued: waiting {'for GPUs ' if behind else ''}{', and '.join(whom)}"
    if reason.startswith("BeginTime"):
        return f"queued: Slurm keeps job {job} back for a moment, since it was requeued"
    because = f" ({reason})" if reason not in ("", "None", "Resources", "Priority") else ""
    return f"queued: waiting for {'Slurm to start' if obstacles else 'GPUs for'} job {job}{because}"
