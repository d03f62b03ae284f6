"""What is going on, for people and for programs (`gleaner status`)."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gleaner import keeper, node, survey, upstream
from gleaner.status_words import listed, span

EXIT_REFUSED = 2
EXIT_UNSEEN = 3

WIDTH = 100
NAMED_JOBS = 3
NOT_KNOWN = "-"


def text(document: Mapping[str, Any]) -> str:
    """The document of `survey` as a page of at most WIDTH columns."""
    parts = [("", list(_tiers(document)))]
    if document["nodes"]:
        parts.append(("Nodes", list(_nodes(document["nodes"]))))
    if told := list(_told(document)):
        parts.append(("Nodes, as they say themselves", told))
    if document["memory"]:
        parts.append(("Memory, MiB", list(_memory(document["memory"]))))
    if any(document["versions"][name] for name in ("slurm", "engine")):
        parts.append(("Versions", list(_versions(document))))
    if document["preemptions"]:
        parts.append(("Last preemptions", list(_preemptions(document["preemptions"]))))
    if document["problems"]:
        parts.append(("Problems", [line for problem in document["problems"] for line in _item(problem)]))
    return "\n\n".join("\n".join([title, *body] if title else body) for title, body in parts)


def _wrapped(head: str, words: str) -> Iterator[str]:
    """Words beside a head, in as many lines as they take."""
    yield from textwrap.wrap(
        words, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False,
        break_on_hyphens=False,
    ) or [head.rstrip()]  # fmt: skip


def _item(words: str) -> Iterator[str]:
    return _wrapped("  ", words)


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """Rows in columns, the last of which is wrapped; `right` are the columns of numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        yield from (line.rstrip() for line in _wrapped("  ".join(["", *cells, ""]), row[-1]))


def _tiers(document: Mapping[str, Any]) -> Iterator[str]:
    lines = document["tiers"]
    width = max((len(line["tier"]) for line in lines), default=0)
    for line in lines:
        yield from _wrapped(f"{line['tier']:<{width}}  ", line["words"])
        more = [f"job {line['job']}"] if line["job"] else []
        if line["run_seconds"] is not None:
            more.append(f"runs for {span(line['run_seconds'])}")
        if line["engine"]:
            in_use = document["versions"]["engine"]
            other = " (not the one in use)" if in_use not in (None, line["engine"]) else ""
            more.append(f"build {line['engine']}{other}")
        if line["plan_is_current"] is False:
            more.append("made from another plan than the current one")
        if more:
            yield from _wrapped(" " * (width + 2), ", ".join(more))


def _nodes(seen: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [["node", "state", "GPUs held", "tiers", "others"]]
    for one in seen:
        jobs = [
            f"job {job['job']} of {job['user']}"
            + (f", {span(job['left_seconds'])} left at most" if job["left_seconds"] is not None else "")
            for job in one["jobs"]
        ]
        here = [one["reason"]] if one["reason"] else []
        rows.append(
            [
                one["node"],
                one["words"],
                f"{one['gpus_held']} of {one['gpus']}",
                ", ".join(one["tiers"]) or NOT_KNOWN,
                "; ".join([*here, *([listed(jobs, NAMED_JOBS)] if jobs else [])]) or NOT_KNOWN,
            ]
        )
    yield from _table(rows)


def _told(document: Mapping[str, Any]) -> Iterator[str]:
    """What nodes said of themselves."""
    rows = [["node", "GPU memory taken, MiB", "models verified", "program", "build"]]
    for one in document["nodes"]:
        told = one["told"]
        if told:
            taken = [f"{gpu['used_mib']} of {gpu['memory_mib']}" for gpu in told["gpus"]]
            verified = sum(state == "present" for state in told["models"].values())
            build = told["engine"]["build"] if told["engine"] else NOT_KNOWN
            rows.append(
                [
                    one["node"],
                    ", ".join(taken) or NOT_KNOWN,
                    f"{verified} of {len(told['models'])}" if told["models"] else NOT_KNOWN,
                    "as here" if told["program"] == document["versions"]["gleaner"] else told["program"],
                    "the one in use" if build == document["versions"]["engine"] else build,
                ]
            )
    if len(rows) > 1:
        yield from _table(rows)


def _memory(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    def number(size: int | None) -> str:
        return NOT_KNOWN if size is None else str(size)

    table = [["tier", "node", "of", "planned", "limit", "peak", "now", ""]]
    for row in rows:
        table.append(
            [
                row["tier"],
                row["node"],
                row["device"],
                *(number(row[name]) for name in ("planned_mib", "limit_mib", "peak_mib", "now_mib")),
                "more than planned" if row["over"] else "",
            ]
        )
    yield from _table(table, right=(3, 4, 5, 6))


def _versions(document: Mapping[str, Any]) -> Iterator[str]:
    versions = document["versions"]
    yield from _table(
        [
            ["Slurm", versions["slurm"] or NOT_KNOWN],
            ["llama.cpp", versions["engine"] or NOT_KNOWN],
            ["Gleaner", versions["gleaner"].removeprefix("gleaner-")],
        ]
    )


def _preemptions(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [["when", "tier", "nodes", "for", "streams", "away"]]
    drained = {True: "ended whole", False: "cut", None: NOT_KNOWN}
    for one in found:
        rows.append(
            [
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["at"])),
                one["tier"],
                ", ".join(one["nodes"]),
                f"job {one['job_after']} of {one['user_after']}" if one["job_after"] else "not known",
                drained[one["whole"]],
                "still" if one["away_seconds"] is None else span(one["away_seconds"]),
            ]
        )
    yield from _table(rows)


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"What is going on. Exit code {EXIT_REFUSED}: there is no configuration that can be read; {EXIT_UNSEEN}: Slurm "
        "or, without --tiers, the shared file system does not answer, and what is known without them is told. Other "
        "problems are told with exit code 0."
    )
    parser.add_argument("--config", type=Path, default=Path("/etc/gleaner/gateway.json"))
    parser.add_argument("--keeper", type=Path, default=Path("/etc/gleaner/keeper.json"))
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--tiers", action="store_true", help="only what each tier is doing: sooner")
    parser.add_argument(
        "--answers",
        action="store_true",
        help="stdin has what nodes said of themselves: a JSON list of pairs, a node and Ansible's result of "
        "`gleaner node` there",
    )


def run(args: argparse.Namespace) -> int:
    try:
        config, kept = upstream.Config.load(args.config), keeper.Config.load(args.keeper)
        answers = node.parse_answers(sys.stdin.read()) if args.answers else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    found = survey.survey(config, kept, answers, tiers_only=args.tiers)
    print(json.dumps(found.document, indent=1) if args.json else text(found.document))
    return 0 if found.whole else EXIT_UNSEEN
