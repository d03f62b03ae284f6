"""The tiers are moved from one build of the engine to another, or back (`gleaner engine begin`, `end`, `before`).

Between begin and end the tiers are planned with the other build, and asked whether they answer (`gleaner smoke`). The
link `current` leads to the build with which that was seen, or that was put to use by the inventory; so an interrupted
move is gone on with, or left, from where it began.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from gleaner import engine, keeper, status, upstream
from gleaner.engine import EngineError, Manifest, folder_of, is_there
from gleaner.engine_history import History, Move
from gleaner.states import Tier

GOOD, FAILED, GIVEN_UP = "good", "failed", "given-up"
# In a dry run the build may not be there yet.
EXIT_NOT_THERE = 3


def in_use(root: Path) -> str:
    """Name of the build in use. EngineError when there is none."""
    build = (root / "current").resolve()
    if build.parent != (root / engine.BUILDS).resolve():
        raise EngineError(f"{root / 'current'}: leads to no build: {engine.CURE}")
    return build.name


def begin(
    root: Path, target: str, lines: list[dict[str, Any]], logs: Path, *,
    flash_attention: bool = False, back: bool = False, retry: bool = False, untried: bool = False, dry: bool = False,
) -> tuple[Move, list[str]]:  # fmt: skip
    """Note that the tiers are about to move to a build; `lines` are those of `gleaner status`.

    Also the builds that they may be planned with now. EngineError when the build is not whole here, when something is
    known against it, when it lacks the flash attention that the tiers are planned with, or when no tier could show
    whether it answers.
    """
    history = History.load(root)
    build = folder_of(root, target)
    engine.verify(build)
    if flash_attention and not Manifest.load(build).flash_attention:
        raise EngineError(
            f"{target}: built without flash attention, with which the tiers are planned: "
            "set llama_cpp_flash_attention: false, run site.yml, and then this again"
        )
    if (complaint := history.complaint(target)) and not retry:
        raise EngineError(f"{target}, {complaint}; cure: name another one, or -e llama_cpp_retry=true")
    unended = history.move
    if unended and unended.target == target:
        origin = unended.origin
    else:
        origin = unended.target if unended and back else in_use(root)
    serving = [line for line in lines if line["state"] == Tier.SERVING.value]
    waited_for = unended.tiers if unended else ()
    # A person who holds a tier does not want an answer of it.
    free = [line for line in lines if line["state"] != Tier.HELD.value]
    tiers = tuple(line["tier"] for line in free if line in serving or line["tier"] in waited_for)
    if not tiers and back:
        # Nobody is kept from leaving a build with which nothing serves.
        tiers = tuple(line["tier"] for line in free)
    if not tiers and not untried:
        states = ", ".join(f"{line['tier']}: {line['state']}" for line in lines)
        raise EngineError(
            f"tiers: got {states or 'none'}, want one that serves, so that it can be asked whether it answers with "
            f"{target}: wait until one does, or -e tier_engine_untried=true"
        )
    # A job that left no link says nothing of what it runs.
    with contextlib.suppress(OSError):
        if origin in {engine.of_job(logs, line["job"]) for line in serving}:
            history = history.noted(origin)
    move = Move(origin, target, back, tiers)
    if not dry:
        replace(history, move=move if origin != target else None).write(root)
    between = {origin, target, *((unended.origin, unended.target) if unended else ())}
    return move, sorted(between)


def end(root: Path, target: str, verdict: str, why: str = "") -> bool:
    """Note how the move to a build ended; false when nothing of that is new."""
    before = History.load(root)
    history = replace(before, move=None)
    known = verdict == GOOD and in_use(root) == target
    if verdict == GOOD:
        engine.switch(root / "current", f"{engine.BUILDS}/{target}")
        history = history.noted(target)
        if before.move and before.move.back:
            history = history.noted(before.move.origin, left=True)
    elif verdict == FAILED:
        history = history.noted(target, why or "unknown")
    if history == before and known:
        return False
    history.write(root)
    return True


def way_back(root: Path, wish: str = "") -> str:
    """The build to which the tiers go back: a certain one, or the last good one. EngineError when there is none.

    From a move that has not ended, where it began; after a way back that has, the one that they are back with.
    """
    if wish:
        there = sorted(path.parent.name for path in (root / engine.BUILDS).glob(f"[!.]*/{engine.MANIFEST}"))
        if wish not in there:
            raise EngineError(f"engine_build: got {wish}, want one of {', '.join(there) or 'none that is there'}")
        return wish
    history, current = History.load(root), in_use(root)
    if history.move:
        return history.move.target if history.move.back else history.move.origin
    good = [one.build for one in history.trials if one.good]
    if history.trials and history.trials[-1].left and good[-1:] == [current]:
        return current
    name = history.good_before(root, current)
    if name is None:
        raise EngineError(
            f"{root}: no other build is there with which the tiers were seen to answer: there is nothing to go back to"
        )
    return name


def add_arguments(actions: Any) -> None:
    """The three commands, among those of `gleaner engine`."""
    for name, summary in (
        ("begin", "note that the tiers are about to move to a build; prints the move as JSON"),
        ("end", "note how that ended"),
        ("before", "print the build to which a rollback goes, as JSON"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        action.add_argument("--root", type=Path, required=True, help="folder of all builds")
        if name == "begin":
            action.add_argument("--back", action="store_true", help="it is a rollback")
            action.add_argument("--retry", action="store_true", help="whatever is known against the build")
            action.add_argument("--untried", action="store_true", help="also when no tier serves")
            action.add_argument("--dry-run", action="store_true", help="only say what it would be")
            action.add_argument("--flash-attention", action="store_true", help="the tiers are planned with it")
            action.add_argument("--keeper", type=Path, default=Path("/etc/gleaner/keeper.json"))
            action.add_argument("--gateway", type=Path, default=Path("/etc/gleaner/gateway.json"))
        if name == "end":
            action.add_argument("--verdict", choices=(GOOD, FAILED, GIVEN_UP), required=True)
            action.add_argument("--why", default="", help="what went wrong")
        if name == "before":
            action.add_argument("--build", default="", help="a certain one")
        else:
            action.add_argument("build", help="name of its folder")


def run(args: argparse.Namespace) -> int:
    """EngineError, OSError or ValueError when it cannot be done."""
    if args.action == "before":
        name = way_back(args.root, args.build)
        print(json.dumps({"build": name, "version": Manifest.load(folder_of(args.root, name)).version}))
    elif args.action == "end":
        print("noted" if end(args.root, args.build, args.verdict, args.why) else "known")
    elif args.dry_run and not is_there(folder_of(args.root, args.build)):
        print(f"{args.build} is not there yet", file=sys.stderr)
        return EXIT_NOT_THERE
    else:
        config = upstream.Config.load(args.gateway)
        lines = status.look(config, keeper.load_state(keeper.Config.load(args.keeper).state))
        move, between = begin(
            args.root, args.build, lines, config.registry.parent / "logs",
            flash_attention=args.flash_attention, back=args.back, retry=args.retry, untried=args.untried,
            dry=args.dry_run,
        )  # fmt: skip
        told = {"from": move.origin, "to": move.target, "between": between, "tiers": move.tiers}
        print(json.dumps(told))
    return 0
