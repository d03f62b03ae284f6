"""How the tiers did with each build, and the move that has not ended: `history.json` beside the builds."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gleaner import files
from gleaner.engine import EngineError, folder_of, is_there

FILE = "history.json"
# Enough to go back over, little enough to read.
ENTRIES = 50
WORDS = 500


@dataclass(frozen=True)
class Trial:
    """What is known of the tiers with a build."""

    build: str
    """Name of its folder."""
    at: int
    """Unix seconds; for the reader."""
    why: str = ""
    """What went wrong; empty when the tiers answered with it."""
    left: bool = False
    """A person went back from it."""

    @property
    def good(self) -> bool:
        return not self.why and not self.left


@dataclass(frozen=True)
class Move:
    """The tiers are on their way from one build to another; both are names of folders."""

    origin: str
    target: str
    back: bool
    """It is a rollback."""
    tiers: tuple[str, ...]
    """Those that served when it began, and so have to answer."""


@dataclass(frozen=True)
class History:
    """One trial per build, in the order of their ends."""

    trials: tuple[Trial, ...] = ()
    move: Move | None = None

    @classmethod
    def load(cls, root: Path) -> History:
        """EngineError when the file is there and cannot be read."""
        try:
            value = files.load_config(root / FILE)
            # An older version wrote neither what was left nor a move.
            trials = [Trial(one["build"], one["at"], one["why"], one.get("left", False)) for one in value["trials"]]
            wrong = [one for one in trials if list(map(type, asdict(one).values())) != [str, int, str, bool]]
            move = value.get("move") and Move(**{**value["move"], "tiers": tuple(map(str, value["move"]["tiers"]))})
        except ValueError as error:
            if not (root / FILE).exists():
                return cls()
            raise EngineError(f"{error}: remove the file, and which build was good before is forgotten") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineError(_unreadable(root, error)) from None
        if wrong:
            raise EngineError(_unreadable(root, wrong[0]))
        return cls(tuple(trials), move)

    def write(self, root: Path) -> None:
        move = self.move and asdict(self.move)
        value = {"v": 1, "trials": [asdict(one) for one in self.trials], "move": move}
        files.write_atomic(root / FILE, (json.dumps(value, indent=1) + "\n").encode())

    def noted(self, build: str, why: str = "", left: bool = False) -> History:
        """With how the tiers did with a build; the same when that was the last of its kind already."""
        new = Trial(build, int(time.time()), " ".join(why.split())[-WORDS:], left)
        last = next((one for one in reversed(self.trials) if one.good == new.good), None)
        if last and replace(last, at=new.at) == new:
            return self
        kept = [one for one in self.trials if one.build != build]
        return replace(self, trials=tuple([*kept, new][-ENTRIES:]))

    def complaint(self, build: str) -> str:
        """Why this build is not tried again; empty when nothing is known against it."""
        trial = next((one for one in self.trials if one.build == build and not one.good), None)
        if trial is None:
            return ""
        return "from which a person went back" if trial.left else f"with which the tiers failed: {trial.why}"

    def good_before(self, root: Path, build: str) -> str | None:
        """The build that was good most recently, other than this one, and is still there."""
        good = (one.build for one in reversed(self.trials) if one.good and one.build != build)
        return next((name for name in good if is_there(folder_of(root, name))), None)


def _unreadable(root: Path, what: Any) -> str:
    return f"{root / FILE}: not a history of builds ({what!r}): remove it, and which build was good is forgotten"
