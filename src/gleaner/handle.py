"""The operator's handle (`gleaner tier NAME held|started|restarted`): says a wish and tells how it comes true."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gleaner import keeper, slurm, status, upstream, wishes
from gleaner.states import Tier
from gleaner.wishes import Wish

POLL_SECONDS = 0.5
# A keeper that runs has looked at its wishes several times by then.
TAKEN_SECONDS = 30.0


def is_fulfilled(wish: Wish, line: dict[str, object]) -> bool:
    """Whether a tier, as `status` tells of it, is as wished; a restart is over when its old job is gone."""
    if line["state"] == Tier.UNKNOWN.value:
        return False
    if wish is Wish.HELD:
        return bool(line["held"]) and line["job"] is None
    # One that makes way for another tier has none, and says why.
    has_one = line["job"] is not None or bool(line["why"])
    return line["state"] != Tier.HELD.value and not line["held"] and not line["ending"] and has_one


def _told(line: dict[str, object]) -> str:
    more = line["reason"] or line["why"]
    return f"{line['tier']}: {line['state']}" + (f" ({more})" if more else "")


def _wait(args: argparse.Namespace, config: keeper.Config, gateway: upstream.Config, wish: Wish) -> int:
    """Tell of the tier's states until it is as wished."""
    start, last = time.monotonic(), ""
    while True:
        waited = time.monotonic() - start
        if not wishes.waits(config.state, args.tier):
            (line,) = (one for one in status.look(gateway, keeper.load_state(config.state)) if one["tier"] == args.tier)
            if _told(line) != last:
                last = _told(line)
                print(last, flush=True)
            if is_fulfilled(wish, line):
                return 0
        elif waited >= TAKEN_SECONDS:
            print(
                f"error: the keeper has not taken the wish within {TAKEN_SECONDS:g} s and will do so when it runs and "
                "Slurm answers: systemctl status gleaner-keeper",
                file=sys.stderr,
            )
            return 1
        if waited >= args.wait:
            print(
                f"error: {args.tier} is not {wish.value} after {args.wait:g} s; the wish stands: "
                f"{last or 'the keeper has not taken it yet'}",
                file=sys.stderr,
            )
            return 1
        time.sleep(POLL_SECONDS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tier", help="the tier's name in the inventory")
    parser.add_argument(
        "wish",
        metavar="held|started|restarted",
        choices=[wish.value for wish in Wish],
        help="held: away until it is started, its streams are drained first; started: no hold, no pause; "
        "restarted: drained, then a new job",
    )
    parser.add_argument("--wait", type=float, default=120.0, metavar="SECONDS", help="for the tier to be so (120)")
    parser.add_argument("--keeper", type=Path, default=Path("/etc/gleaner/keeper.json"))
    parser.add_argument("--config", type=Path, default=Path("/etc/gleaner/gateway.json"))


def run(args: argparse.Namespace) -> int:
    wish = Wish(args.wish)
    try:
        config, gateway = keeper.Config.load(args.keeper), upstream.Config.load(args.config)
        known = [tier.tier for tier in config.tiers]
        if args.tier not in known:
            raise ValueError(f"tier: got {args.tier!r}, want one of {', '.join(known)}")
        if args.tier not in [tier.tier for tier in gateway.tiers]:
            raise ValueError(f"{args.config}: has no tier {args.tier!r} yet: run playbooks/gateway.yml")
        wishes.write(config.state, args.tier, wishes.Said(wish, wishes.caller()))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {wishes.folder_of(config.state)}: {error.strerror}: run this as root on the controller, "
            "after playbooks/tiers.yml",
            file=sys.stderr,
        )
        return 2
    try:
        return _wait(args, config, gateway, wish)
    except slurm.SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
