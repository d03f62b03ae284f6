"""files_absent: what was named goes, what it led to and what others put there stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.files_absent import doomed, remove, remove_empty

MODULE = Path(__file__).parents[2] / "library" / "files_absent.py"


def absent(**arguments: Any) -> dict[str, Any]:
    text = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}, default=str)
    done = subprocess.run([sys.executable, str(MODULE)], input=text, capture_output=True, text=True, check=False)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture
def ai(tmp_path: Path) -> Path:
    """A folder of ours with a folder of plans, and a link to what is the site's."""
    folder = tmp_path / "shared/ai"
    (folder / "plans").mkdir(parents=True)
    (folder / "plans/fast.json").write_text("{}")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/file").touch()
    (folder / "link").symlink_to(tmp_path / "site")
    return folder


def test_files_folders_and_links_go_but_not_what_links_lead_to(ai: Path) -> None:
    result = absent(paths=[ai / "plans", ai / "link"], patterns=[ai / "*.part"], folders=[ai], _ansible_diff=True)
    assert result["changed"] is True
    assert result["diff"]["before"].splitlines() == [str(ai / "link"), f"{ai}/plans/", f"{ai}/"]
    assert not ai.exists()
    assert (ai.parent.parent / "site/file").exists()
    assert ai.parent.exists()


def test_a_second_time_nothing_changes(ai: Path) -> None:
    arguments = {"paths": [ai / "plans", ai / "link"], "folders": [ai]}
    absent(**arguments)
    result = absent(**arguments)
    assert (result["changed"], result["paths"]) == (False, [])


def test_a_folder_with_something_of_others_stays(ai: Path) -> None:
    (ai / "mine").touch()
    result = absent(paths=[ai / "plans", ai / "link"], folders=[ai, ai.parent])
    assert f"{ai}/" not in result["paths"]
    assert [path.name for path in ai.iterdir()] == ["mine"]


def test_folders_go_one_after_the_other(ai: Path) -> None:
    result = absent(patterns=[ai / "plans/*.json", ai / "li*"], folders=[ai / "plans", ai, ai.parent])
    assert result["paths"][-3:] == [f"{ai}/plans/", f"{ai}/", f"{ai.parent}/"]
    assert not ai.parent.exists()


def test_a_dry_run_names_the_same_and_leaves_all(ai: Path) -> None:
    arguments = {"paths": [ai / "plans", ai / "link"], "folders": [ai]}
    dry = absent(**arguments, _ansible_check_mode=True)
    assert (ai / "plans/fast.json").exists()
    assert absent(**arguments)["paths"] == dry["paths"]


@pytest.mark.parametrize("path", ["/", "/etc", "plans", "/cluster/../etc/passwd", "//scripts"])
def test_a_path_that_an_empty_variable_makes_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="want an absolute path"):
        doomed([path], [])
    with pytest.raises(ValueError, match="want an absolute path"):
        doomed([], [path])


def test_a_folder_into_which_something_came_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    remove_empty(tmp_path)
    assert (tmp_path / "mine").exists()
    remove_empty(tmp_path / "gone")
    with pytest.raises(NotADirectoryError):
        remove_empty(tmp_path / "mine")


@pytest.mark.parametrize("late", [1, 2])
def test_last_words_that_come_meanwhile_go_too_and_who_goes_on_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    writes = iter(range(late))
    rmdir = os.rmdir

    def written_meanwhile(path: Path, **where: Any) -> None:
        if next(writes, None) is not None:
            (folder / "router.log").touch()
        rmdir(path, **where)

    monkeypatch.setattr(os, "rmdir", written_meanwhile)
    if late == 1:
        remove(folder)
        assert not folder.exists()
    else:
        with pytest.raises(OSError, match="not empty"):
            remove(folder)
