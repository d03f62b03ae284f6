"""The keeper: exactly one job per tier, through ends, holds, failures and its own restarts."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gleaner import keeper
from tests.unit.fakes import Home, home, job_text, queue_line, wait_for


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Site:
    def __init__(self, place: Home, clock: Clock) -> None:
        self.place, self.clock = place, clock
        self.config = keeper.Config(
            service_user="ai-inference",
            poll_seconds=0.1,
            state=place.root / "keeper.json",
            tiers=(keeper.TierConfig("fast", "llama-14b", "/cluster/shared/run-14b.slurm"),),
        )
        self.keeper = keeper.Keeper(self.config)

    def queue(self, text: str = "") -> None:
        self.place.set(self.place.slurm / "queue", text)

    def ended(self, **fields: str) -> None:
        """The job has left the queue; this is what scontrol still says of it."""
        self.queue()
        self.place.set(self.place.slurm / "job", job_text(**fields))

    @property
    def submissions(self) -> int:
        return len(self.place.calls_of("sbatch"))

    @property
    def state(self) -> keeper.TierState:
        return keeper.load_state(self.config.state)["fast"]

    def poll(self, times: int = 1) -> None:
        for _ in range(times):
            self.keeper.poll()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with home() as place:
        for name, value in place.environment().items():
            monkeypatch.setenv(name, value)
        clock = Clock()
        monkeypatch.setattr(time, "monotonic", clock.monotonic)
        yield Site(place, clock)


def running(site: Site) -> Site:
    site.poll()
    site.queue(queue_line())
    site.poll()
    return site


def test_submits_once_and_leaves_a_living_job_alone(site: Site) -> None:
    site.poll()
    assert site.place.calls_of("sbatch") == ["sbatch --parsable /cluster/shared/run-14b.slurm"]
    for state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED"):
        site.queue(queue_line(state=state, reason="Resources"))
        site.poll(2)
    assert site.submissions == 1


def test_other_names_do_not_count(site: Site) -> None:
    site.queue(queue_line(name="llama-72b"))
    site.poll()
    assert site.submissions == 1


def test_requeued_job_does_not_wait(site: Site) -> None:
    running(site)
    site.queue(queue_line(state="PENDING", restarts="1", reason="BeginTime", nodes=""))
    site.poll()
    assert site.place.calls_of("scontrol update") == ["scontrol update JobId=41 StartTime=now"]


@pytest.mark.parametrize(
    "fields",
    [
        {"state": "COMPLETED"},
        {"state": "TIMEOUT"},
        {"state": "PREEMPTED"},
        {"state": "COMPLETED", "ran": "00:00:02", "preempted": "2026-11-24T01:10:00"},
    ],
)
def test_clean_end_is_followed_at_once(site: Site, fields: dict[str, str]) -> None:
    running(site).ended(**fields)
    site.poll(2)
    assert site.submissions == 2
    assert site.state.failures == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"state": "FAILED", "ran": "00:00:30", "code": "11:0"},
        {"state": "NODE_FAIL", "ran": "00:00:30"},
        {"state": "OUT_OF_MEMORY", "ran": "00:00:30"},
        {"state": "BOOT_FAIL", "ran": "00:00:30"},
        {"state": "COMPLETED", "ran": "00:00:02"},
    ],
)
def test_failure_is_followed_by_growing_pauses(site: Site, fields: dict[str, str]) -> None:
    running(site)
    for number, pause in enumerate((5, 10, 20, 40, 80, 160, 300, 300), start=1):
        site.ended(**fields)
        site.poll(2)
        assert site.submissions == number, "submitted without a pause"
        site.clock.now += pause - 1
        site.poll()
        assert site.submissions == number, "submitted before the pause was over"
        site.clock.now += 1
        site.poll()
        assert site.submissions == number + 1
    assert site.state.failures == 8


def test_failure_says_what_the_exit_code_means(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    running(site).ended(state="FAILED", code="11:0")
    site.poll()
    assert "FAILED after 600 s, exit code 11: the server died too often" in capfd.readouterr().err


def test_long_run_forgives_earlier_failures(site: Site) -> None:
    running(site).ended(state="FAILED", code="11:0", ran="00:00:30")
    site.poll()
    site.clock.now += 5
    site.poll()
    site.queue(queue_line(ran="4:00"))
    site.poll()
    assert site.state.failures == 1
    site.queue(queue_line(ran="5:00"))
    site.poll()
    assert site.state.failures == 0


def test_pause_survives_the_keepers_restart(site: Site) -> None:
    running(site).ended(state="FAILED", code="11:0")
    site.poll()
    site.keeper = keeper.Keeper(site.config)
    site.clock.now += 4
    site.poll()
    assert site.submissions == 1
    site.clock.now += 5
    site.poll()
    assert site.submissions == 2


def test_keeper_restarted_beside_a_running_job_submits_nothing(site: Site) -> None:
    running(site)
    site.keeper = keeper.Keeper(site.config)
    site.poll(3)
    assert site.submissions == 1


def test_cancelled_by_a_person_is_held(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    running(site).ended(state="CANCELLED")
    site.poll(3)
    assert site.submissions == 1, "submitted before accounting said who cancelled"
    site.place.set(site.place.slurm / "accounting", f"CANCELLED by {os.getuid() + 1}\n")
    site.poll(3)
    assert site.submissions == 1
    assert site.state.held
    told = capfd.readouterr().err
    assert told.count("asking accounting") == 1
    assert f"cancelled by uid {os.getuid() + 1}" in told


def test_cancelled_by_the_service_user_is_submitted_anew(site: Site) -> None:
    site.place.set(site.place.slurm / "accounting", f"CANCELLED by {os.getuid()}\n")
    running(site).ended(state="CANCELLED")
    site.poll(2)
    assert site.submissions == 2


def test_held_tier_is_left_alone_until_it_is_started(site: Site) -> None:
    site.poll()
    site.ended(state="COMPLETED")
    keeper.save_state(site.config.state, {"fast": keeper.TierState(held=True, why="a person")})
    site.poll(3)
    assert site.submissions == 1
    keeper.save_state(site.config.state, {"fast": keeper.TierState()})
    site.poll()
    assert site.submissions == 2


def test_job_submitted_by_hand_ends_the_hold(site: Site) -> None:
    running(site).ended(state="CANCELLED")
    site.place.set(site.place.slurm / "accounting", f"CANCELLED by {os.getuid() + 1}\n")
    site.poll(3)
    assert site.state.held
    site.queue(queue_line(state="PENDING", nodes="", reason="(Resources)"))
    site.poll()
    assert not site.state.held
    assert site.submissions == 1


def test_hold_by_slurm_is_released_after_a_pause(site: Site) -> None:
    running(site)
    line = queue_line(state="PENDING", restarts="1", nodes="", reason="(launch failed requeued held)")
    site.queue(line)
    site.poll(3)
    assert not site.place.calls_of("scontrol release")
    site.clock.now += 5
    site.poll()
    assert site.place.calls_of("scontrol release") == ["scontrol release 41"]
    site.poll()
    site.clock.now += 9
    site.poll()
    assert len(site.place.calls_of("scontrol release")) == 1, "the second pause did not grow"
    site.clock.now += 1
    site.poll()
    assert len(site.place.calls_of("scontrol release")) == 2


def test_hold_by_a_person_is_left_alone(site: Site) -> None:
    running(site)
    site.queue(queue_line(state="PENDING", nodes="", reason="JobHeldUser"))
    site.poll()
    site.clock.now += 1000
    site.poll()
    assert not site.place.calls_of("scontrol release")


def test_refused_submission_pauses_and_says_why(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.place.set(site.place.slurm / "sbatch.fails", "sbatch: error: Invalid account")
    site.poll(5)
    assert site.submissions == 1
    assert "Invalid account" in capfd.readouterr().err
    (site.place.slurm / "sbatch.fails").unlink()
    site.clock.now += 5
    site.poll()
    assert site.submissions == 2


def test_slurm_away_is_said_once_and_nothing_is_done(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    running(site)
    site.place.set(site.place.slurm / "squeue.fails", "Unable to contact slurm controller")
    site.poll(3)
    (site.place.slurm / "squeue.fails").unlink()
    site.poll()
    told = capfd.readouterr().err
    assert told.count("waiting for Slurm") == 1
    assert told.count("Slurm answers again") == 1
    assert site.submissions == 1


def test_forgotten_job_is_submitted_anew_but_silence_is_no_end(site: Site) -> None:
    running(site).queue()
    site.place.set(site.place.slurm / "scontrol.fails", "Unable to contact slurm controller")
    site.poll(2)
    assert site.submissions == 1
    site.place.set(site.place.slurm / "scontrol.fails", "slurm_load_jobs error: Invalid job id specified")
    site.poll(2)
    assert site.submissions == 2


def test_job_of_a_removed_tier_is_ended(site: Site) -> None:
    running(site)
    site.config = dataclasses.replace(site.config, tiers=())
    site.keeper = keeper.Keeper(site.config)
    site.poll()
    assert site.place.calls_of("scancel") == ["scancel 41"]
    site.ended(state="CANCELLED")
    site.poll()
    assert keeper.load_state(site.config.state) == {}
    assert len(site.place.calls_of("scancel")) == 1


def test_renamed_job_is_ended_before_the_new_one_is_submitted(site: Site) -> None:
    running(site)
    tier = keeper.TierConfig("fast", "llama-fast", "/cluster/shared/run-fast.slurm")
    site.config = dataclasses.replace(site.config, tiers=(tier,))
    site.keeper = keeper.Keeper(site.config)
    # squeue is asked by name, and no longer shows it.
    site.queue()
    site.poll()
    assert site.place.calls_of("scancel") == ["scancel 41"]
    assert site.submissions == 1
    site.place.set(site.place.slurm / "accounting", f"CANCELLED by {os.getuid()}\n")
    site.ended(state="CANCELLED")
    site.poll(2)
    assert site.submissions == 2
    assert site.state.failures == 0


def test_living_job_that_squeue_missed_is_waited_for(site: Site) -> None:
    running(site).queue()
    site.poll(2)
    assert not site.place.calls_of("scancel")
    assert (site.submissions, site.state.failures, site.state.job) == (1, 0, 41)


def test_number_that_is_somebody_elses_now_is_not_touched(site: Site) -> None:
    running(site).queue()
    foreign = job_text().replace("UserId=ai-inference(64200)", "UserId=alice(64300)")
    site.place.set(site.place.slurm / "job", foreign)
    site.poll(2)
    assert not site.place.calls_of("scancel")
    assert site.submissions == 2


@pytest.mark.parametrize("text", ["", "{", '{"v":1,"tiers":{"fast":{}}}', '{"v":1,"tiers":[]}'])
def test_broken_state_file_starts_anew(site: Site, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    site.place.set(site.config.state, text)
    site.queue(queue_line())
    site.poll()
    assert site.submissions == 0
    assert "starting anew" in capfd.readouterr().err
    assert site.state.job == 41


def test_program_is_ready_and_stops_on_term(site: Site, tmp_path: Path) -> None:
    config = {
        "v": 1,
        "service_user": "ai-inference",
        "poll_seconds": 0.1,
        "state": str(site.config.state),
        "tiers": [{"tier": "fast", "job_name": "llama-14b", "script": "/x", "plan": "/y"}],
    }
    site.place.set(site.place.root / "config.json", json.dumps(config))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        address = "\0gleaner-test-" + str(os.getpid())
        sock.bind(address)
        sock.settimeout(10)
        child = site.place.start(
            "keep", "--config", str(site.place.root / "config.json"), NOTIFY_SOCKET="@" + address[1:]
        )
        assert sock.recv(100) == b"READY=1"
        assert sock.recv(100) == b"WATCHDOG=1"
        wait_for(lambda: site.submissions == 1)
        site.queue(queue_line())
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 0
    assert "job 41 submitted" in site.place.log("keep")
