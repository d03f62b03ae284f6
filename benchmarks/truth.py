"""Whether the planner is right about a build of the engine, wherever that is; asked before tiers are moved to it.

    python -m benchmarks.truth prepare FOLDER ENGINE   cases for the build in the folder ENGINE, for its host
    python -m benchmarks.truth judge FOLDER RESULTS    what its programs said there, against the plan

The cases are those of `benchmarks.sizing` that need no model of the lab and no GPU: layers on the device that the log
names, and memory as `llama-fit-params` tells it. The second command exits with 1 when a plan would be too small, or
wrong; one that is too cautious for the build wastes memory, which is told.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import sizing
from benchmarks.sizing import Case, Result

SHOWN = 10


@functools.cache
def wanted(folder: Path, quick: bool) -> tuple[Case, ...]:
    """The same cases each time, with the files that they need in the folder."""
    splits, told, _ = sizing.cases(folder, quick=quick, models=())
    return (*splits, *told)


facts_of = functools.cache(sizing.facts_of)


def prepare(folder: Path, engine: str, quick: bool) -> None:
    """Leave in the folder what is to be brought to the host, as `sizing.FOLDER`; prints what names these cases."""
    folder.mkdir(parents=True, exist_ok=True)
    task, program = sizing.task_of(engine, wanted(folder, quick)), Path(__file__).with_name("sizing_host.py")
    (folder / "task.json").write_bytes(task)
    shutil.copy(program, folder)
    shapes = json.dumps([facts_of(folder, case.model) for case in wanted(folder, quick)])
    print(hashlib.sha256(task + program.read_bytes() + shapes.encode()).hexdigest()[:12])


def judge(folder: Path, lines: Sequence[str], quick: bool) -> Result:
    """Compare what was said with the plan. ValueError when not every case was run."""
    cases, result = wanted(folder, quick), Result()
    answers = {found["id"]: found for found in map(json.loads, lines)}
    if sorted(answers) != list(range(len(cases))):
        raise ValueError(f"{len(answers)} of {len(cases)} cases were run; the build's log on its host says why")
    known = {name: facts_of(folder, name) for name in {case.model for case in cases}}
    for index, case in enumerate(cases):
        sizing.compare(case, known[case.model], answers[index], result)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short version")
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("prepare")
    action.add_argument("folder", type=Path)
    action.add_argument("engine")
    action = actions.add_parser("judge")
    action.add_argument("folder", type=Path)
    action.add_argument("results", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "prepare":
        prepare(arguments.folder, arguments.engine, arguments.quick)
        return 0
    try:
        result = judge(arguments.folder, arguments.results.read_text().splitlines(), arguments.quick)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    dangerous = [line for kind, lines in result.wrong.items() if kind != "cautious" for line in lines]
    for line in dangerous[:SHOWN]:
        print(line, file=sys.stderr)
    print(f"{result.splits} splits and {result.kv} contexts compared, {len(dangerous)} plans wrong or too small")
    if cautious := result.wrong["cautious"]:
        most = max(result.compute)
        print(f"{len(cautious)} compute buffers planned too large, those of a MiB and more by up to {most:.2f} times")
    return int(bool(dangerous))


if __name__ == "__main__":
    sys.exit(main())
