"""The operator's handle: what is wished of a tier, what the keeper makes of it, and what the command tells."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gleaner import cli, handle, keeper, wishes
from gleaner.wishes import Said, Wish
from tests.unit.fakes import Home, home, job_text, queue_line, wait_for
from tests.unit.test_keeper import Clock, Site, running

WAITING = {"state": "PENDING", "nodes": "", "reason": "(Resources)"}


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    with home() as place:
        for name, value in place.environment().items():
            monkeypatch.setenv(name, value)
        made = Site(place, clock)
        place.set(place.slurm / "queue", "")
        place.set(place.slurm / "job", job_text())
        place.set(place.slurm / "submitted", "41\n")
        wishes.folder_of(made.config.state).mkdir()
        yield made


def wish(site: Site, what: Wish) -> None:
    wishes.write(site.config.state, "fast", Said(what, "root"))


def test_a_running_tier_that_is_held_yields_and_stays_away(site: Site) -> None:
    running(site)
    wish(site, Wish.HELD)
    site.poll()
    assert site.told_to_yield == 1
    assert not site.place.calls_of("scontrol update"), "it is told no other reason"
    assert not wishes.path_of(site.config.state, "fast").exists()
    assert (site.state.held, site.state.why) == (True, "held by root")
    site.poll(2)
    site.ended(state="COMPLETED")
    site.poll(3)
    assert (site.state.held, site.state.why, site.state.job) == (True, "held by root", 0)
    assert site.submissions == 1


def test_a_preemption_does_not_bring_a_held_tier_back(site: Site) -> None:
    running(site)
    wish(site, Wish.HELD)
    site.poll()
    site.queue(queue_line(restarts="1", **WAITING))
    site.poll()
    assert site.place.calls_of("scancel") == ["scancel --batch --signal=TERM 41", "scancel 41"]
    site.ended(state="CANCELLED")
    site.place.set(site.place.slurm / "accounting", f"CANCELLED by {os.getuid()}\n")
    site.poll(2)
    assert site.state.held
    assert site.submissions == 1


def test_every_job_of_a_held_tier_goes(site: Site) -> None:
    running(site)
    site.queue(queue_line() + queue_line(job="42", **WAITING))
    wish(site, Wish.HELD)
    site.poll(2)
    assert site.place.calls_of("scancel") == ["scancel 42", "scancel 42"]
    site.queue(queue_line())
    site.poll()
    assert site.told_to_yield == 1
    assert site.state.held


@pytest.mark.parametrize("seen", [queue_line(state="COMPLETING"), ""], ids=["completing", "missed-by-squeue"])
def test_a_preempted_job_that_is_on_its_way_back_is_held(site: Site, seen: str) -> None:
    running(site)
    site.queue(seen)
    site.place.set(site.place.slurm / "job", job_text(state="RUNNING" if not seen else "COMPLETING"))
    wish(site, Wish.HELD)
    site.poll()
    site.queue(queue_line(restarts="1", **WAITING))
    site.poll()
    assert site.place.calls_of("scancel 41") == ["scancel 41"]
    assert (site.state.held, site.state.why) == (True, "held by root")


def test_a_job_that_a_person_holds_goes_when_the_tier_is_held(site: Site) -> None:
    running(site)
    site.queue(queue_line(state="PENDING", nodes="", reason="(JobHeldAdmin)"))
    wish(site, Wish.HELD)
    site.poll()
    assert site.place.calls_of("scancel") == ["scancel 41"]


def test_a_start_outranks_an_older_cancel(site: Site) -> None:
    running(site).ended(state="CANCELLED")
    site.place.set(site.place.slurm / "accounting", "")
    site.poll(2)
    assert "asking accounting by whom" in site.state.why
    wish(site, Wish.STARTED)
    site.poll()
    assert (site.submissions, site.state.held) == (2, False)


def test_a_start_in_the_middle_of_a_hold(site: Site) -> None:
    running(site)
    wish(site, Wish.HELD)
    site.poll()
    wish(site, Wish.STARTED)
    site.poll()
    assert not site.state.held
    site.ended(state="COMPLETED")
    site.poll(2)
    assert site.submissions == 2


def test_wishes_for_a_tier_that_is_gone_are_taken_away(site: Site) -> None:
    wishes.write(site.config.state, "slow", Said(Wish.HELD, "root"))
    site.poll()
    assert not wishes.waits(site.config.state, "slow")


def test_a_wish_that_cannot_be_read_stays(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    wish(site, Wish.HELD)
    path = wishes.path_of(site.config.state, "fast")
    text = path.read_text()
    path.unlink()
    path.symlink_to("/nonexistent")
    site.poll(2)
    assert capfd.readouterr().err.count("wishes cannot be read, and stay") == 1
    path.unlink(missing_ok=True)
    wishes.done(site.config.state, "fast")
    path.write_text(text)
    site.poll()
    assert site.state.held


def test_a_tier_without_a_job_is_held_at_once(site: Site) -> None:
    wish(site, Wish.HELD)
    site.poll(2)
    assert site.state.held
    assert site.submissions == 0


def test_a_hold_survives_the_keeper(site: Site) -> None:
    running(site)
    wish(site, Wish.HELD)
    site.poll()
    site.restart_keeper()
    site.poll()
    site.ended(state="COMPLETED")
    site.poll(2)
    assert site.state.held
    assert site.submissions == 1


def test_a_held_tier_that_is_started_has_a_job_again(site: Site) -> None:
    wish(site, Wish.HELD)
    site.poll()
    wish(site, Wish.STARTED)
    site.poll()
    assert (site.state.held, site.state.why) == (False, "")
    assert site.submissions == 1


def test_a_start_ends_the_pause_after_failures(site: Site) -> None:
    running(site).ended(state="FAILED")
    site.poll(2)
    assert (site.submissions, site.state.failures) == (1, 1)
    wish(site, Wish.STARTED)
    site.poll()
    assert (site.submissions, site.state.failures) == (2, 0)


def test_a_start_leaves_a_living_job_alone_and_releases_one_that_a_person_holds(site: Site) -> None:
    running(site)
    wish(site, Wish.STARTED)
    site.poll()
    assert not site.place.calls_of("scancel")
    site.queue(queue_line(state="PENDING", nodes="", reason="(JobHeldUser)"))
    wish(site, Wish.STARTED)
    site.poll()
    assert site.place.calls_of("scontrol release") == ["scontrol release 41"]


def test_a_restart_drains_the_job_and_submits_another(site: Site) -> None:
    running(site)
    wish(site, Wish.RESTARTED)
    site.poll(2)
    assert site.told_to_yield == 1
    assert (site.state.held, site.state.why) == (False, "restarted by root")
    site.ended(state="COMPLETED")
    site.poll(2)
    assert site.submissions == 2
    assert (site.state.failures, site.state.why) == (0, "")


def test_a_restart_leaves_a_job_that_waits_where_it_is(site: Site) -> None:
    site.poll()
    site.queue(queue_line(**WAITING))
    wish(site, Wish.RESTARTED)
    site.poll()
    assert not site.place.calls_of("scancel")


def test_a_wish_waits_for_slurm(site: Site) -> None:
    wish(site, Wish.HELD)
    site.place.set(site.place.slurm / "squeue.fails", "Unable to contact slurm controller")
    site.poll()
    assert wishes.path_of(site.config.state, "fast").exists()
    (site.place.slurm / "squeue.fails").unlink()
    site.poll()
    assert site.state.held


@pytest.mark.parametrize("text", ["", "[]", '{"v":1,"wish":"gone","by":"x"}', '{"v":1}', "[" * 4000])
def test_what_is_no_wish_is_said_and_taken_away(site: Site, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    running(site)
    path = wishes.path_of(site.config.state, "fast")
    path.write_text(text)
    site.poll()
    assert not path.exists()
    assert not site.state.held
    assert "not a wish" in capfd.readouterr().err


# The command


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    with home() as made:
        for name, value in made.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(handle, "POLL_SECONDS", 0.1)
        made.set(made.root / "gateway.json", json.dumps(made.gateway_config()))
        made.set(made.root / "keeper.json", json.dumps(made.keeper_config(made.root / "run.slurm")))
        made.set(made.root / "run.slurm", "#!/bin/sh\n#SBATCH --comment=gleaner:0123456789abcdef\n")
        made.set(made.slurm / "queue", "")
        made.set(made.slurm / "submitted", "41\n")
        yield made


def command(place: Home, *argv: str) -> int:
    root = place.root
    return cli.main(["tier", *argv, "--config", f"{root}/gateway.json", "--keeper", f"{root}/keeper.json"])


def keep(place: Home) -> subprocess.Popen[str]:
    child = place.start("keep", "--config", str(place.root / "keeper.json"))
    wait_for(lambda: (place.root / "wishes").is_dir())
    return child


def test_a_tier_is_held_and_started_by_name(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    keep(place)
    assert command(place, "fast", "held") == 0
    assert "fast: held (held by " in capsys.readouterr().out
    assert command(place, "fast", "started", "--wait", "1") == 1, "it has no job yet"
    place.set(place.slurm / "queue", queue_line(**WAITING))
    assert command(place, "fast", "started") == 0
    assert keeper.load_state(place.root / "keeper-state.json")["fast"].held is False


def test_it_waits_for_the_drain(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "queue", queue_line())
    keep(place)
    assert command(place, "fast", "held", "--wait", "5") == 1
    told = capsys.readouterr()
    assert "fast: yielding (held by " in told.out
    assert "error: fast is not held after 5 s; the wish stands: fast: yielding" in told.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("slow", "held"), "tier: got 'slow', want one of fast"),
        (("fast", "held"), "wishes: No such file or directory: run this as root on the controller"),
    ],
)
def test_what_cannot_be_wished_is_refused(
    place: Home, argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(place, *argv) == 2
    assert words in capsys.readouterr().err


def test_a_keeper_that_does_not_run_is_named(
    place: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "TAKEN_SECONDS", 0.3)
    (place.root / "wishes").mkdir()
    assert command(place, "fast", "held") == 1
    assert "systemctl status gleaner-keeper" in capsys.readouterr().err


def test_who_wishes_is_who_called_sudo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    assert wishes.caller() == "alice"
    monkeypatch.delenv("SUDO_USER")
    assert wishes.caller()
    (tmp_path / "wishes").mkdir()
    before = os.umask(0o077)
    try:
        wishes.write(tmp_path / "keeper.json", "fast", Said(Wish.HELD, "al\nice"))
    finally:
        os.umask(before)
    assert wishes.path_of(tmp_path / "keeper.json", "fast").stat().st_mode & 0o777 == 0o644
    assert wishes.take(tmp_path / "keeper.json", "fast") == Said(Wish.HELD, "al?ice")


def test_a_wish_that_comes_meanwhile_waits(tmp_path: Path) -> None:
    state = tmp_path / "keeper.json"
    (tmp_path / "wishes").mkdir()
    wishes.write(state, "fast", Said(Wish.HELD, "root"))
    assert wishes.take(state, "fast") == Said(Wish.HELD, "root")
    wishes.write(state, "fast", Said(Wish.STARTED, "root"))
    # Of a keeper that died in between.
    assert wishes.take(state, "fast") == Said(Wish.HELD, "root")
    wishes.done(state, "fast")
    assert wishes.waits(state, "fast")
    assert wishes.take(state, "fast") == Said(Wish.STARTED, "root")
    wishes.done(state, "fast")
    assert not wishes.waits(state, "fast")


@pytest.mark.parametrize(
    ("what", "line", "so"),
    [
        (Wish.HELD, {"held": True}, True),
        (Wish.HELD, {"held": True, "job": 41}, False),
        (Wish.HELD, {"held": True, "state": "unknown"}, False),
        (Wish.STARTED, {"job": 41}, True),
        (Wish.STARTED, {"job": 41, "state": "unknown"}, False),
        (Wish.STARTED, {"state": "paused"}, False),
        (Wish.STARTED, {"state": "paused", "why": "reasoning wants vasp-02"}, True),
        (Wish.STARTED, {"job": 41, "state": "held"}, False),
        (Wish.RESTARTED, {"job": 41, "ending": True}, False),
    ],
)
def test_when_a_wish_has_come_true(what: Wish, line: dict[str, object], so: bool) -> None:
    told = {"state": "held" if line.get("held") else "queued", "held": False, "ending": False, "job": None, "why": None}
    assert handle.is_fulfilled(what, {**told, **line}) is so
