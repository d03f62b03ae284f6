"""Which builds were tried and how they did: `history.json` beside them, for rollback and against repeated mistakes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from gleaner import files
from gleaner.engine import EngineError

FILE = "history.json"
# Enough to go back over, little enough to read.
ENTRIES = 50
WORDS = 500


@dataclass(frozen=True)
class Trial:
    """One time that tiers were moved to a build."""

    build: str
    """Name of its folder."""
    at: int
    """Unix seconds."""
    why: str = ""
    """What went wrong; empty when the tiers answered with it."""

    @property
    def good(self) -> bool:
        return not self.why


def load(root: Path) -> list[Trial]:
    """The trials, oldest first. EngineError when the file is there and cannot be read."""
    try:
        value = files.load_config(root / FILE)
        return [Trial(str(one["build"]), int(one["at"]), str(one["why"])) for one in value["trials"]]
    except ValueError as error:
        if not (root / FILE).exists():
            return []
        raise EngineError(f"{error}: remove the file, and which build was good before is forgotten") from None
    except (KeyError, TypeError) as error:
        raise EngineError(
            f"{root / FILE}: not a history of builds ({error!r}): remove it, and which build was good is forgotten"
        ) from None


def note(root: Path, build: str, why: str = "") -> bool:
    """Remember how the tiers did with a build; false when that is what was known last."""
    trials, why = load(root), " ".join(why.split())[:WORDS]
    if trials and (trials[-1].build, trials[-1].why) == (build, why):
        return False
    trials = [*trials, Trial(build, int(time.time()), why)][-ENTRIES:]
    text = json.dumps({"v": 1, "trials": [asdict(one) for one in trials]}, indent=1) + "\n"
    files.write_atomic(root / FILE, text.encode())
    return True


def failure_of(root: Path, build: str) -> Trial | None:
    """The last trial of the build, if it failed."""
    last = next((one for one in reversed(load(root)) if one.build == build), None)
    return last if last and not last.good else None


def good_before(root: Path, build: str) -> str | None:
    """The build that was good most recently, other than this one, and is still there."""
    good = (one.build for one in reversed(load(root)) if one.good and one.build != build)
    return next((name for name in good if (root / ".builds" / name / "manifest.json").is_file()), None)
