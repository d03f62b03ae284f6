"""Which builds were good: the way back, and no second time with one that failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gleaner import engine_history
from gleaner.engine import EngineError
from gleaner.engine_build import EXIT_FAILED, EXIT_TO_DO
from tests.unit.test_engine_build import Site, site  # noqa: F401  # fixture


def test_the_way_back_is_the_last_good_build_that_is_still_there(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / ".builds" / name).mkdir(parents=True)
        (tmp_path / ".builds" / name / "manifest.json").touch()
    assert engine_history.good_before(tmp_path, "c") is None
    engine_history.note(tmp_path, "a")
    engine_history.note(tmp_path, "b", "it did not answer")
    engine_history.note(tmp_path, "c")
    assert engine_history.good_before(tmp_path, "c") == "a"
    assert engine_history.good_before(tmp_path, "a") == "c"
    (tmp_path / ".builds" / "a" / "manifest.json").unlink()
    assert engine_history.good_before(tmp_path, "c") is None


def test_what_is_known_already_is_not_noted_again(tmp_path: Path) -> None:
    assert engine_history.note(tmp_path, "a")
    assert not engine_history.note(tmp_path, "a")
    assert engine_history.note(tmp_path, "a", "it died")
    assert engine_history.note(tmp_path, "a")
    assert [one.good for one in engine_history.load(tmp_path)] == [True, False, True]


def test_it_does_not_grow_without_bound(tmp_path: Path) -> None:
    for number in range(engine_history.ENTRIES + 5):
        engine_history.note(tmp_path, str(number))
    assert len(engine_history.load(tmp_path)) == engine_history.ENTRIES


@pytest.mark.parametrize("text", ["", "{", '{"v": 1}', '{"v": 1, "trials": [{}]}', '{"v": 2}'])
def test_a_history_that_cannot_be_read_is_named_with_the_cure(tmp_path: Path, text: str) -> None:
    (tmp_path / engine_history.FILE).write_text(text)
    with pytest.raises(EngineError, match=r"history\.json.*remove"):
        engine_history.load(tmp_path)


def test_a_build_beside_the_one_in_use_changes_nothing_for_it(site: Site) -> None:  # noqa: F811
    one = site.build("1")
    site.configure("2", put_to_use=False)
    assert site.run("check") == EXIT_TO_DO
    assert site.run("build") == 0
    assert site.run("check") == 0
    assert (site.root / "current").resolve() == one
    two = (site.root / "2-cpu").resolve()
    assert site.run("use", "--root", str(site.root), two.name) == 0
    assert (site.root / "current").resolve() == two


def test_going_back_is_to_what_answered(site: Site, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    root = ("--root", str(site.root))
    one, two = site.build("1"), site.build("2")
    assert site.run("before", *root) == EXIT_FAILED
    assert "nothing to go back to" in capsys.readouterr().err
    assert site.run("note", *root, one.name) == 0
    assert site.run("note", *root, two.name) == 0
    capsys.readouterr()
    assert site.run("before", *root) == 0
    assert json.loads(capsys.readouterr().out) == {"build": one.name, "version": "1", "current": two.name}
    # It stays, however many come after it.
    site.build("3", keep_builds=1)
    assert two in site.there


def test_a_build_with_which_the_tiers_failed_is_not_put_to_use_again(
    site: Site,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = site.build("1"), site.build("2")
    assert site.run("use", "--root", str(site.root), one.name) == 0
    assert site.run("note", "--root", str(site.root), "--failed", "it did not answer", two.name) == 0
    site.configure("2")
    assert site.run("build") == EXIT_FAILED
    assert "with which the tiers failed: it did not answer" in capsys.readouterr().err
    assert (site.root / "current").resolve() == one
    site.configure("2", retry=True)
    assert site.run("build") == 0
    assert (site.root / "current").resolve() == two


def test_a_build_that_is_not_whole_is_not_put_to_use(site: Site) -> None:  # noqa: F811
    one, two = site.build("1"), site.build("2")
    (one / "bin" / "llama-server").write_bytes(b"x")
    assert site.run("use", "--root", str(site.root), one.name) == EXIT_FAILED
    assert (site.root / "current").resolve() == two
