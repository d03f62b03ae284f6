"""lab_owner: a living lab is not touched by others, and a dead one is not taken for what it is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ansible.module_utils
import pytest

ROOT = Path(__file__).parents[2]
# As Ansible does, when it sends a module to a host.
ansible.module_utils.__path__.append(str(ROOT / "module_utils"))

from ansible.module_utils.lab import Lab, started_at  # noqa: E402  # found by the line above

from library.lab_owner import outdated, refusal, wanted_owner  # noqa: E402  # imports the same


@pytest.fixture
def params(tmp_path: Path) -> dict[str, Any]:
    """What this checkout wants: an image and a login key are there."""
    (tmp_path / "base/trixie").mkdir(parents=True)
    (tmp_path / "id_ed25519.pub").write_text("ssh-ed25519 AAAA gleaner-lab\n")
    return {
        "checkout": "/home/me/gleaner",
        "suite": "trixie",
        "image": str(tmp_path / "base/trixie"),
        "login_key": str(tmp_path / "id_ed25519.pub"),
        "cache": str(tmp_path),
    }


@pytest.fixture
def lab(tmp_path: Path, params: dict[str, Any]) -> Any:
    """A lab of this checkout with one host."""
    found = Lab(tmp_path / "lab")
    found.claim(wanted_owner(params))
    (found.directory / "hosts/vasp-01").mkdir(parents=True)
    return found


def test_a_lab_of_this_checkout_is_of_use(lab: Any, params: dict[str, Any]) -> None:
    assert outdated(lab, wanted_owner(params)) == []
    assert refusal("0", lab.owner(), wanted_owner(params)) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkout": "/home/you/gleaner"}, "it belonged to the checkout /home/me/gleaner"),
        ({"suite": "bookworm"}, "its hosts have GLEANER_LAB_SUITE=trixie, wanted bookworm"),
        ({"image": "/nonexistent"}, "the base image below its hosts' disks is gone or was made anew"),
        ({"login_key": "/nonexistent"}, "the login key that its hosts admit is gone or was made anew"),
    ],
)
def test_a_lab_of_something_else_is_outdated(
    lab: Any, params: dict[str, Any], change: dict[str, str], words: str
) -> None:
    assert outdated(lab, wanted_owner({**params, **change})) == [words]


def test_an_image_that_was_made_again_is_another_one(lab: Any, params: dict[str, Any]) -> None:
    os.utime(params["image"], ns=(0, 1))
    assert len(outdated(lab, wanted_owner(params))) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_lab_whose_record_is_broken_is_outdated_once_it_has_hosts(
    lab: Any, params: dict[str, Any], text: str, tmp_path: Path
) -> None:
    (lab.directory / "owner.json").write_text(text)
    assert outdated(lab, wanted_owner(params)) == ["nothing says whose it is"]
    assert outdated(Lab(tmp_path / "virgin"), wanted_owner(params)) == []


def test_what_an_older_record_does_not_say_is_taken_to_be_right(lab: Any, params: dict[str, Any]) -> None:
    lab.claim({"checkout": params["checkout"]})
    assert outdated(lab, wanted_owner(params)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"checkout": "/home/you/gleaner"},
            "Lab 3 runs for the checkout /home/me/gleaner, not for /home/you/gleaner. "
            "Take it down there (make -C /home/me/gleaner down GLEANER_LAB_ID=3)",
        ),
        (
            {"suite": "bookworm"},
            "Lab 3 runs with GLEANER_LAB_SUITE=trixie, wanted bookworm. Take it down (make down GLEANER_LAB_ID=3)",
        ),
    ],
)
def test_a_living_lab_is_refused_with_the_cure(
    lab: Any, params: dict[str, Any], change: dict[str, str], words: str
) -> None:
    said = refusal("3", lab.owner(), wanted_owner({**params, **change}))
    assert said.startswith(words)
    assert "GLEANER_LAB_ID=<0..9 but 3>" in said


def test_a_lab_whose_suite_nobody_asks_about_can_be_taken_down(lab: Any, params: dict[str, Any]) -> None:
    assert refusal("3", lab.owner(), {"checkout": params["checkout"]}) == ""


@pytest.mark.parametrize("record", ["hosts/vasp-01/process.json", "packages-0.json"])
def test_a_lab_lives_while_a_process_of_it_does(lab: Any, record: str) -> None:
    assert not lab.alive()
    known = {"pid": os.getpid(), "started_at": started_at(os.getpid())}
    (lab.directory / record).write_text(json.dumps(known))
    assert lab.alive()
    # The same process id after a restart of the machine.
    (lab.directory / record).write_text(json.dumps({**known, "started_at": 1}))
    assert not lab.alive()
