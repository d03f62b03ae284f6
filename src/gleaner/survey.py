"""The whole of `gleaner status`, as one JSON-ready document: what is asked, of whom, and what becomes of no answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gleaner import (
    bounded,
    engine,
    events,
    files,
    keeper,
    measured,
    node,
    occupancy,
    preempted,
    slurm,
    status,
    upstream,
)
from gleaner import status_words as words
from gleaner.events import Event
from gleaner.states import Tier

VERSION = 1
SHARED_SECONDS = 5.0
COMMAND_SECONDS = 10.0
DAY_SECONDS = 86400.0

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """The document, and whether Slurm and the shared file system have answered."""

    document: dict[str, Any]
    whole: bool


@dataclass
class Shared:
    """What lies on the shared file system."""

    rows: list[measured.Row] = field(default_factory=list)
    builds: dict[str, str] = field(default_factory=dict)
    """The build that each tier's job runs, as far as it has come to say so."""
    build: str = ""
    told: list[Event] = field(default_factory=list)


@dataclass
class Cluster:
    """What Slurm says; empty while it is away."""

    nodes: dict[str, slurm.Node] = field(default_factory=dict)
    stays: list[occupancy.Stay] = field(default_factory=list)
    version: str = ""
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of each tier whose job runs, its memory by node."""


# Asking


def ask_shared(config: upstream.Config, lines: Lines, now: float, problems: list[str]) -> Shared | None:
    """None when the shared file system does not answer; single files that are wrong are problems."""
    said: list[str] = []

    def read() -> Shared:
        found = Shared()
        home = config.registry.parent
        with contextlib.suppress(OSError):
            found.build = (home / "llama.cpp" / "current").resolve(strict=True).name
        if not found.build:
            said.append(f"{home / 'llama.cpp/current'}: leads to no build: run playbooks/engine.yml")
        for line in lines:
            try:
                found.rows += measured.planned(config.registry, line["tier"])
            except ValueError as error:
                said.append(str(error))
            # A job that has not come so far has left no link.
            with contextlib.suppress(OSError):
                if line["node"]:
                    found.builds[line["tier"]] = engine.of_job(home / "logs", line["job"])
        try:
            found.told = events.read(events.folder_of(config.registry), said, now - preempted.DAYS * DAY_SECONDS)
        except OSError as error:
            said.append(f"{error.filename}: {error.strerror}: run playbooks/tiers.yml")
        return found

    try:
        found = bounded.ask(str(config.registry.parent), read, SHARED_SECONDS)
    except (TimeoutError, OSError, RuntimeError) as error:
        problems.append(str(error))
        return None
    problems += said
    return found


def ask_slurm(config: upstream.Config, lines: Lines, problems: list[str]) -> Cluster:
    """What it does not answer is a problem; once it is away it is asked nothing more."""
    found = Cluster()
    names = sorted({name for tier in config.tiers for name in tier.supervisors})
    try:
        found.nodes = occupancy.known_nodes(names, problems)
        found.version = slurm.run(["scontrol", "--version"], COMMAND_SECONDS).rpartition(" ")[2].strip()
        if found.nodes:
            found.stays = occupancy.stays(list(found.nodes))
    except slurm.SlurmError as error:
        problems.append(str(error))
        return found
    for line in lines:
        if line["node"]:
            try:
                found.peaks[line["tier"]] = measured.peaks(line["job"])
            except slurm.SlurmError as error:
                problems.append(f"{line['tier']}: its memory cannot be measured: {error}")
    return found


def ask_preemptions(
    config: upstream.Config, told: Sequence[Event], names: Sequence[str], now: float, problems: list[str]
) -> list[preempted.Preemption]:
    """The last preemptions; for whom is asked of accounting, which may be away."""
    found = preempted.last(told, [tier.tier for tier in config.tiers], now)
    if not found:
        return found
    said: list[str] = []
    try:
        runs = slurm.runs(found[-1].at - 1.0, now, said, COMMAND_SECONDS, names)
    except slurm.SlurmError as error:
        problems.append(f"for whom tiers were preempted is not known: {error}")
        return found
    return preempted.with_jobs(found, runs, config.service_user)


# Putting together


def survey(config: upstream.Config, kept: keeper.Config, answers: node.Answers | None, tiers_only: bool) -> Found:
    """Ask everything there is to ask; in bounded time, whoever is away."""
    problems: list[str] = []
    now = time.time()
    state, why = keeper_state(kept)
    problems += why
    lines = status.look(config, state, problems)
    slurm_answers = all(line["state"] != Tier.UNKNOWN.value for line in lines)
    cluster, shared = Cluster(), None
    facts = answers.facts if answers else {}
    if not tiers_only:
        shared = ask_shared(config, lines, now, problems)
        cluster = ask_slurm(config, lines, problems) if slurm_answers else cluster
        problems += answers.problems if answers else ()
    tell_tiers(lines, kept, cluster, shared)
    document: dict[str, Any] = {
        "v": VERSION,
        "at": round(now, 3),
        "tiers": lines,
        "nodes": tell_nodes(config, lines, cluster, facts),
        "versions": {
            "slurm": cluster.version or None,
            "engine": shared.build or None if shared else None,
            "gleaner": node.installed(),
        },
        "memory": [row.as_json() for row in memory(lines, cluster, shared, facts)],
        "preemptions": [],
        "problems": problems,
    }
    if shared and slurm_answers:
        found = ask_preemptions(config, shared.told, list(cluster.nodes), now, problems)
        document["preemptions"] = [one.as_json() for one in found]
    elif shared:
        names = [tier.tier for tier in config.tiers]
        document["preemptions"] = [one.as_json() for one in preempted.last(shared.told, names, now)]
    problems += disagreements(document["versions"], facts, cluster)
    document["problems"] = list(dict.fromkeys(problems))
    return Found(document, slurm_answers and (tiers_only or shared is not None))


def keeper_state(config: keeper.Config) -> tuple[dict[str, keeper.TierState], list[str]]:
    """What the keeper remembers; nothing, and why, when its file is not there or cannot be understood."""
    try:
        wanted = files.load_config(config.state).get("tiers")
    except ValueError as error:
        # Before its first look the keeper has written none.
        return {}, [str(error)] if config.state.exists() else []
    state = keeper.load_state(config.state)
    return state, [] if state or wanted == {} else [f"{config.state}: not what the keeper writes: it starts anew"]


def tell_tiers(lines: Lines, kept: keeper.Config, cluster: Cluster, shared: Shared | None) -> None:
    """Add to each line the sentence for people, and what it is made of."""
    tiers = {line["job"]: line["tier"] for line in lines if line["job"]}
    known = {tier.tier: tier for tier in kept.tiers}
    for line in lines:
        mine = known.get(line["tier"])
        waits = line["state"] == Tier.QUEUED.value
        way = occupancy.obstacles(mine.need, cluster.nodes, cluster.stays) if waits and mine and cluster.nodes else None
        here = [name for stay in cluster.stays if stay.job == line["job"] for name in stay.nodes]
        stuck = [name for name in here if name in cluster.nodes and not cluster.nodes[name].up]
        line["words"] = words.tier_in_words(line, way, cluster.nodes, tiers, stuck)
        line["held_by"] = words.held_by(line)
        line["behind"] = [] if way is None else [stay.job for stay in way.jobs if stay.job != line["job"]]
        line["engine"] = shared.builds.get(line["tier"]) if shared else None
        line["plan_is_current"] = mine.digest == line["digest"] if mine and line["digest"] else None


def tell_nodes(
    config: upstream.Config, lines: Lines, cluster: Cluster, facts: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    tiers = {line["job"]: line["tier"] for line in lines if line["job"]}
    found = []
    for name, seen in cluster.nodes.items():
        here = [stay for stay in cluster.stays if name in stay.nodes]
        found.append(
            {
                "node": name,
                "state": seen.state,
                "words": occupancy.state_in_words(seen.state),
                "usable": seen.up,
                "reason": seen.reason or None,
                "gpus": seen.gpus,
                "gpus_held": seen.gpus_held,
                "slurm": seen.version or None,
                "for": [tier.tier for tier in config.tiers if name in tier.supervisors],
                "tiers": [tiers[stay.job] for stay in here if stay.job in tiers],
                "jobs": [
                    {"job": stay.job, "user": stay.user, "left_seconds": stay.left_seconds, "has_gpus": stay.has_gpus}
                    for stay in here
                    if stay.job not in tiers
                ],
                "told": facts.get(name),
            }
        )
    return found


def memory(
    lines: Lines, cluster: Cluster, shared: Shared | None, facts: Mapping[str, Mapping[str, Any]]
) -> list[measured.Row]:
    """Planned and measured; a job that was made from another plan is not held against this one."""
    found: list[measured.Row] = []
    for line in lines if shared else ():
        rows = [row for row in shared.rows if row.tier == line["tier"]] if shared else []
        if line["node"] and line["plan_is_current"] is not False:
            rows = measured.of_nodes(rows, slurm.hosts(line["node"]))
            rows = measured.with_measures(rows, line["job"], cluster.peaks.get(line["tier"], {}), facts)
        found += rows
    return found


def disagreements(versions: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]], cluster: Cluster) -> list[str]:
    """Where a node has another version of something than the controller; each with its cure."""
    found = []
    for name, told in sorted(facts.items()):
        if told["program"] != versions["gleaner"]:
            found.append(f"{name}: program: got {told['program']}, want {versions['gleaner']}: run site.yml")
        sees = told["engine"] or {}
        if sees and versions["engine"] and sees["build"] != versions["engine"]:
            found.append(f"{name}: engine: sees {sees['build']}, want {versions['engine']}: run playbooks/engine.yml")
        found += [
            f"{name}: model {model} is {state}: run playbooks/tiers.yml"
            for model, state in sorted(told["models"].items())
            if state != "present"
        ]
    if len({told["engine"]["manifest"] for told in facts.values() if told["engine"]}) > 1:
        found.append("engine: nodes see different manifests of one build: run playbooks/engine.yml")
    found += [
        f"{name}: slurmd: got {seen.version}, the controller has {cluster.version}: install the same release"
        for name, seen in sorted(cluster.nodes.items())
        if seen.version and cluster.version and seen.version.split(".")[:2] != cluster.version.split(".")[:2]
    ]
    return found
