"""lab_neighbours: who would lose what a distclean takes is named, with the command that takes it down."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ansible.module_utils
import pytest

ROOT = Path(__file__).parents[2]
# As Ansible does, when it sends a module to a host.
ansible.module_utils.__path__.append(str(ROOT / "module_utils"))

from ansible.module_utils.lab import Lab, started_at  # noqa: E402  # found by the line above

from library.lab_neighbours import neighbours  # noqa: E402  # imports the same

HERE, CACHE = "/home/me/gleaner", "/var/cache/gleaner"


def lab(labs: Path, id_: str, alive: bool, **owner: str) -> None:
    one = Lab(labs / id_)
    one.claim(owner)
    start = started_at(os.getpid()) if alive else 1
    (labs / id_ / f"packages-{id_}.json").write_text(json.dumps({"pid": os.getpid(), "started_at": start}))


@pytest.mark.parametrize(
    ("id_", "alive", "owner", "named"),
    [
        ("3", True, {"checkout": "/home/you/gleaner", "cache": CACHE}, True),
        ("3", True, {"checkout": "/home/you/gleaner", "cache": f"{CACHE}/../gleaner/"}, True),
        ("3", True, {"checkout": "/home/you/gleaner"}, True),
        ("3", True, {"checkout": HERE, "cache": "/elsewhere"}, True),
        ("3", True, {"checkout": "/home/you/gleaner", "cache": "/elsewhere"}, False),
        ("3", False, {"checkout": "/home/you/gleaner", "cache": CACHE}, False),
        ("0", True, {"checkout": HERE, "cache": CACHE}, False),
    ],
)
def test_who_is_named(tmp_path: Path, id_: str, alive: bool, owner: dict[str, str], named: bool) -> None:
    lab(tmp_path, id_, alive, **owner)
    home = owner["checkout"]
    words = [f"lab {id_} of {home} (make -C {home} down GLEANER_LAB_ID={id_})"]
    assert neighbours(tmp_path, "0", HERE, CACHE) == (words if named else [])


def test_a_machine_without_labs_has_no_neighbours(tmp_path: Path) -> None:
    assert neighbours(tmp_path / "labs", "0", HERE, CACHE) == []
