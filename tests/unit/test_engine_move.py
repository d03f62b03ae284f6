"""Which build was good, the way from one to another and back, and what an interruption leaves of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gleaner import engine, engine_move
from gleaner.engine import EngineError
from gleaner.engine_build import EXIT_FAILED, EXIT_TO_DO
from gleaner.engine_history import ENTRIES, FILE, History, Move
from gleaner.engine_move import FAILED, GIVEN_UP, GOOD
from tests.unit.test_engine_build import Site, site  # noqa: F401  # fixture


def line(state: str = "serving", job: int | None = 1, tier: str = "fast") -> dict[str, Any]:
    return {"tier": tier, "state": state, "job": job}


class Builds:
    """Builds one, two and three of one file each; one is in use, and job 1 runs it."""

    def __init__(self, root: Path) -> None:
        self.root, self.logs = root / "engine", root / "logs"
        for name in ("one", "two", "three"):
            build = self.root / ".builds" / name
            (build / "bin").mkdir(parents=True)
            (build / "bin" / "x").write_text(name)
            engine.Manifest(name, name, "cpu", {}, "c++", "x86-64-v3", (), engine.sums(build)).write(build)
        engine.switch(self.root / "current", ".builds/one")
        (self.logs / "1").mkdir(parents=True)
        (self.logs / "1" / "engine").symlink_to(self.root / ".builds" / "one")

    def begin(self, target: str, lines: list[dict[str, Any]] | None = None, **wishes: bool) -> tuple[Move, list[str]]:
        return engine_move.begin(self.root, target, lines or [line()], self.logs, **wishes)

    def end(self, target: str, verdict: str = GOOD, why: str = "") -> bool:
        return engine_move.end(self.root, target, verdict, why)

    def move(self, target: str, back: bool = False, retry: bool = False) -> None:
        self.begin(target, back=back, retry=retry)
        self.end(target)

    @property
    def in_use(self) -> str:
        return engine_move.in_use(self.root)

    @property
    def way_back(self) -> str:
        return engine_move.way_back(self.root)

    @property
    def history(self) -> History:
        return History.load(self.root)


@pytest.fixture
def builds(tmp_path: Path) -> Builds:
    return Builds(tmp_path)


def test_the_build_with_which_the_tiers_answered_is_the_one_in_use(builds: Builds) -> None:
    assert builds.begin("two") == (Move("one", "two", False, ("fast",)), ["one", "two"])
    assert builds.in_use == "one"
    assert builds.end("two")
    assert builds.in_use == "two"
    assert builds.history.move is None
    assert builds.way_back == "one"


def test_a_second_run_changes_nothing(builds: Builds) -> None:
    builds.move("two")
    before = (builds.root / FILE).read_bytes()
    move, between = builds.begin("two")
    assert (move.origin, move.target, between) == ("two", "two", ["two"])
    assert not builds.end("two")
    assert (builds.root / FILE).read_bytes() == before


def test_after_an_interruption_the_way_leads_on_and_back(builds: Builds) -> None:
    builds.begin("two")
    # The tiers are at work with the new build, or with none; nobody noted how it went.
    move, _ = builds.begin("two", [line("loading")])
    assert move == Move("one", "two", False, ("fast",))
    assert builds.way_back == "one"
    move, between = builds.begin("one", [line("loading")], back=True)
    assert (move.origin, move.target, move.tiers, between) == ("two", "one", ("fast",), ["one", "two"])
    # A way back that was interrupted leads back, too.
    assert builds.way_back == "one"
    builds.end("one")
    assert builds.way_back == "one"


def test_a_run_that_ended_between_link_and_note_still_knows_the_way_back(builds: Builds) -> None:
    builds.begin("two")
    engine.switch(builds.root / "current", ".builds/two")
    assert builds.way_back == "one"
    move, _ = builds.begin("two")
    assert move.origin == "one"


def test_going_back_twice_does_not_lead_to_what_was_left(builds: Builds) -> None:
    builds.move("two")
    builds.move("one", back=True)
    assert (builds.in_use, builds.way_back) == ("one", "one")
    for _ in range(2):
        builds.move("one", back=True)
        assert (builds.in_use, builds.way_back) == ("one", "one")
    with pytest.raises(EngineError, match=r"^two, from which a person went back; cure: .*llama_cpp_retry=true"):
        builds.begin("two")
    builds.move("two", retry=True)
    assert builds.way_back == "one"


def test_going_back_after_another_build_came_by_the_inventory(builds: Builds) -> None:
    builds.move("two")
    builds.move("one", back=True)
    # site.yml put it to use, which leaves no trial.
    engine.switch(builds.root / "current", ".builds/three")
    assert builds.way_back == "one"


def test_a_certain_build_can_be_wished_for(builds: Builds) -> None:
    assert engine_move.way_back(builds.root, "three") == "three"
    for wish in ("four", "../one", str(builds.root / ".builds/one")):
        with pytest.raises(EngineError, match=r"engine_build: got .*, want one of one, three, two"):
            engine_move.way_back(builds.root, wish)


def test_a_build_without_the_flash_attention_of_the_plans_is_not_begun_with(builds: Builds) -> None:
    build = builds.root / ".builds" / "two"
    engine.Manifest("k", "2", "cuda", {}, "c++", "x", ("-DGGML_CUDA_FA=OFF",), engine.sums(build)).write(build)
    with pytest.raises(EngineError, match="two: built without flash attention"):
        builds.begin("two", flash_attention=True)
    assert builds.begin("two")[0].target == "two"


def test_a_tier_that_a_person_holds_meanwhile_is_not_waited_for(builds: Builds) -> None:
    builds.begin("two", [line(), line("serving", 1, "reasoning")])
    move, _ = builds.begin("two", [line(), line("held", None, "reasoning")])
    assert move.tiers == ("fast",)


def test_the_way_back_is_over_builds_that_answered_and_are_there(builds: Builds) -> None:
    builds.move("two")
    builds.move("three")
    assert builds.way_back == "two"
    (builds.root / ".builds/two/manifest.json").unlink()
    assert builds.way_back == "one"
    (builds.root / ".builds/one/manifest.json").unlink()
    with pytest.raises(EngineError, match="nothing to go back to"):
        _ = builds.way_back


def test_a_build_with_which_the_tiers_failed_is_refused(builds: Builds) -> None:
    builds.begin("two")
    builds.end("two", FAILED, "fast did not answer")
    assert (builds.in_use, builds.history.move) == ("one", None)
    with pytest.raises(EngineError, match="with which the tiers failed: fast did not answer; cure: "):
        builds.begin("two")
    assert builds.begin("two", retry=True)[0].target == "two"


def test_what_was_not_the_builds_fault_leaves_nothing_against_it(builds: Builds) -> None:
    builds.begin("two")
    builds.end("two", GIVEN_UP)
    assert (builds.in_use, builds.history.move) == ("one", None)
    assert builds.begin("two")[0].target == "two"


def test_where_nothing_could_be_seen_nothing_begins(builds: Builds) -> None:
    with pytest.raises(EngineError, match=r"tiers: got fast: queued, want one that serves.*tier_engine_untried=true"):
        builds.begin("two", [line("queued", 2)])
    assert builds.history == History()
    assert builds.begin("two", [line("queued", 2)], untried=True)[0].tiers == ()


def test_a_build_with_which_nothing_serves_can_be_left(builds: Builds) -> None:
    builds.move("two")
    lines = [line("paused", None), line("held", None, "reasoning")]
    assert builds.begin("one", lines, back=True)[0] == Move("two", "one", True, ("fast",))


def test_a_dry_run_notes_nothing(builds: Builds) -> None:
    assert builds.begin("two", dry=True)[0] == Move("one", "two", False, ("fast",))
    assert not (builds.root / FILE).exists()


def test_a_build_that_is_not_whole_is_not_begun_with(builds: Builds) -> None:
    (builds.root / ".builds/two/bin/x").write_text("changed")
    with pytest.raises(EngineError, match="bin/x: sha256: got"):
        builds.begin("two")
    assert not (builds.root / FILE).exists()


def test_only_a_build_that_a_serving_job_runs_is_called_good(builds: Builds) -> None:
    (builds.logs / "1" / "engine").unlink()
    (builds.logs / "1" / "engine").symlink_to(builds.root / ".builds" / "three")
    builds.begin("two")
    assert builds.history.trials == ()


def test_without_a_build_in_use_the_cure_is_named(builds: Builds) -> None:
    (builds.root / "current").unlink()
    with pytest.raises(EngineError, match=r"current: leads to no build: run playbooks/engine\.yml"):
        builds.begin("two")


def test_it_does_not_grow_without_bound() -> None:
    history = History()
    for number in range(ENTRIES + 5):
        history = history.noted(str(number))
    assert len(history.trials) == ENTRIES
    assert history.noted(str(ENTRIES + 4)) is history


def test_of_a_long_reason_the_end_is_kept() -> None:
    (trial,) = History().noted("one", "x" * 1000 + " the end").trials
    assert len(trial.why) == 500
    assert trial.why.endswith("the end")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", '{"v": 1}', '{"v": 1, "move": null, "trials": [{}]}', '{"v": 1, "move": null, "trials": [1]}'),
        *('{"v": 1, "move": {"to": 1}, "trials": []}', '{"v": 2}'),
    ],
)
def test_a_history_that_cannot_be_read_is_named_with_the_cure(builds: Builds, text: str) -> None:
    (builds.root / FILE).write_text(text)
    with pytest.raises(EngineError, match=r"history\.json.*remove"):
        _ = builds.history


# The commands


def test_a_build_beside_the_one_in_use_changes_nothing_for_it(site: Site) -> None:  # noqa: F811
    one = site.build("1")
    site.configure("2", put_to_use=False)
    assert site.run("check") == EXIT_TO_DO
    assert site.run("build") == 0
    assert site.run("check") == 0
    assert (site.root / "current").resolve() == one


def test_another_build_of_the_version_in_use_lies_beside_it(site: Site) -> None:  # noqa: F811
    one = site.build("1")
    site.configure("1", put_to_use=False, cmake_options=["-DX=2"])
    assert site.run("build") == 0
    assert (site.root / "1-cpu").resolve() != one
    assert (site.root / "current").resolve() == one


def test_what_the_inventory_orders_ends_an_interrupted_move(site: Site) -> None:  # noqa: F811
    one, two = site.build("1"), site.build("2")
    History(move=Move(two.name, one.name, False, ("fast",))).write(site.root)
    site.build("1")
    assert (site.root / "current").resolve() == one
    assert History.load(site.root).move is None


def test_what_the_inventory_orders_ends_a_move_away_from_it(site: Site) -> None:  # noqa: F811
    one = site.build("1")
    History(move=Move(one.name, "2-cpu-0", False, ("fast",))).write(site.root)
    assert site.run("check") == EXIT_TO_DO
    assert site.run("build") == 0
    assert History.load(site.root).move is None
    assert site.run("check") == 0


def test_within_one_version_the_build_that_was_gone_back_to_stays(
    site: Site,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No inventory can name it: its version is that of the other one."""
    one, two = site.build("1"), site.build("1", cmake_options=["-DX=2"])
    History(move=Move(two.name, one.name, True, ())).write(site.root)
    assert site.run("end", "--root", str(site.root), "--verdict", "good", one.name) == 0
    capsys.readouterr()
    for action in ("check", "build"):
        assert site.run(action) == 0
        assert (site.root / "current").resolve() == one
    assert f"{two.name}, from which a person went back: {one.name} stays in use" in capsys.readouterr().out
    site.configure("1", cmake_options=["-DX=2"], retry=True)
    assert site.run("build") == 0
    assert (site.root / "current").resolve() == two


def test_a_dry_run_says_what_becomes_of_the_tiers(site: Site, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    site.build("1")
    capsys.readouterr()
    site.configure("1", cmake_options=["-DX=2"])
    assert site.run("check") == EXIT_TO_DO
    assert capsys.readouterr().out == "1-cpu is to be built\nevery tier is to be drained and started with it\n"


def test_the_way_back_stays_however_many_come_after_it(site: Site, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    root = ("--root", str(site.root))
    one, two = site.build("1"), site.build("2")
    assert site.run("before", *root) == EXIT_FAILED
    assert "nothing to go back to" in capsys.readouterr().err
    for build in (one, two):
        assert site.run("end", *root, "--verdict", "good", build.name) == 0
    capsys.readouterr()
    assert site.run("before", *root) == 0
    assert json.loads(capsys.readouterr().out) == {"build": one.name, "version": "1"}
    site.build("3", keep_builds=1)
    assert two in site.there
    assert one not in site.there


def test_both_ends_of_a_move_stay(site: Site) -> None:  # noqa: F811
    one, two = site.build("1", keep_builds=9), site.build("2", keep_builds=9)
    History(move=Move(one.name, two.name, False, ())).write(site.root)
    three = site.build("3", put_to_use=False)
    site.configure("3", keep_builds=1, put_to_use=False)
    assert site.run("prune") == 0
    assert site.there == {one, two, three}


def test_a_build_with_which_the_tiers_failed_is_not_put_to_use_again(
    site: Site,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = site.build("1"), site.build("2")
    site.build("1")
    assert site.run("end", "--root", str(site.root), "--verdict", "failed", "--why", "it is mute", two.name) == 0
    site.configure("2")
    assert site.run("build") == EXIT_FAILED
    assert "llama_cpp_version: got 2, with which the tiers failed: it is mute" in capsys.readouterr().err
    assert (site.root / "current").resolve() == one
    site.configure("2", retry=True)
    assert site.run("build") == 0
    assert (site.root / "current").resolve() == two


def test_what_an_interrupted_run_was_removing_goes_and_is_built_again(site: Site) -> None:  # noqa: F811
    one = site.build("1")
    (one / "manifest.json").unlink()
    assert site.run("build") == 0
    assert (one / "manifest.json").is_file()
    assert site.there == {one}


def test_a_history_of_an_older_version_is_read(builds: Builds) -> None:
    (builds.root / FILE).write_text('{"v": 1, "trials": [{"build": "one", "at": 1, "why": ""}]}')
    assert builds.history.good_before(builds.root, "two") == "one"
