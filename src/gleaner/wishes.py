"""What an administrator wishes of a tier: how `gleaner tier` tells the keeper.

A wish is a file of its own beside the keeper's state, which nobody but the keeper writes. It takes a wish away when it
has noted it down.
"""

from __future__ import annotations

import enum
import json
import os
import pwd
import re
from dataclasses import dataclass
from pathlib import Path

from gleaner import files

SIZE_LIMIT = 4096
_BY = re.compile(r"[^\x20-\x7e]")


class Wish(enum.Enum):
    """A tier is wanted away until somebody starts it, back, or anew."""

    HELD = "held"
    STARTED = "started"
    RESTARTED = "restarted"


@dataclass(frozen=True)
class Said:
    """A wish, and by whom."""

    wish: Wish
    by: str


def folder_of(state: Path) -> Path:
    """Where wishes are, by the path of the keeper's state file."""
    return state.parent / "wishes"


def path_of(state: Path, tier: str) -> Path:
    return folder_of(state) / f"{tier}.json"


def write(state: Path, tier: str, said: Said) -> None:
    """OSError when the keeper's folder is not there, or not the caller's to write."""
    value = {"v": 1, "wish": said.wish.value, "by": said.by}
    files.write_atomic(path_of(state, tier), (json.dumps(value) + "\n").encode())


def _taken_path(state: Path, tier: str) -> Path:
    return folder_of(state) / f"{tier}.taken"


def take(state: Path, tier: str) -> Said | None:
    """The wish of this tier, which is the caller's until `done`; None when there is none.

    Another wish may come meanwhile and waits. One that was taken by a keeper that died is given again. OSError when it
    cannot be read now, ValueError for what is no wish.
    """
    path = _taken_path(state, tier)
    try:
        if not path.exists():
            os.replace(path_of(state, tier), path)
        value = json.loads(files.read_bounded(path, SIZE_LIMIT))
        return Said(Wish(value["wish"]), _BY.sub("?", str(value["by"]))[:64])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a wish ({error!r})") from None


def done(state: Path, tier: str) -> None:
    """What was taken is noted down."""
    _taken_path(state, tier).unlink(missing_ok=True)


def waits(state: Path, tier: str) -> bool:
    """A wish was not noted down yet."""
    return path_of(state, tier).exists() or _taken_path(state, tier).exists()


def forget_others(state: Path, tiers: set[str]) -> list[str]:
    """Take away wishes for tiers that are not among these, and give their names."""
    others = [path for path in folder_of(state).glob("*.*") if path.stem not in tiers and not path.name.startswith(".")]
    for path in others:
        path.unlink(missing_ok=True)
    return [path.stem for path in others]


def caller() -> str:
    """Who runs this, in the name that sudo was called by."""
    name = os.environ.get("SUDO_USER", "")
    try:
        return name or pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"
