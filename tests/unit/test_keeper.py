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
from typing import Any

import pytest

from gleaner import claims, keeper, life
from gleaner.states import Exit
from tests.unit.fakes import DIGEST, Home, home, job_text, queue_line, wait_for

OTHER = "fedcba9876543210"
REPLACED = f"gleaner:{DIGEST} replaced"
YIELD_SECONDS = 30
ACCOUNTING_SECONDS = 120
LOST_SECONDS = 60
NEED = claims.Need(10, ("vasp-02",), 1, 1, 8, 65536)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Site:
    def __init__(self, place: Home, clock: Clock) -> None:
        self.place, self.clock = place, clock
        self.script = place.root / "run-14b.slurm"
        self.config = keeper.Config(
            service_user="ai-inference",
            poll_seconds=0.1,
            yield_seconds=YIELD_SECONDS,
            accounting_seconds=ACCOUNTING_SECONDS,
            claim_after_seconds=60,
            lost_seconds=LOST_SECONDS,
            registry=place.registry,
            state=place.root / "keeper.json",
            tiers=(keeper.TierConfig("fast", "llama-14b", str(self.script), DIGEST, NEED),),
        )
        self.keeper = keeper.Keeper(self.config)
        self.write_script(DIGEST)

    def write_script(self, digest: str) -> None:
        self.place.set(self.script, f"#!/bin/sh\n#SBATCH --comment=gleaner:{digest}\n")

    def restart_keeper(self, **tier: Any) -> None:
        """As after playbooks/tiers.yml: another configuration of the tier, if any, and a keeper that reads it."""
        (before,) = self.config.tiers
        self.config = dataclasses.replace(self.config, tiers=(dataclasses.replace(before, **tier),))
        self.keeper = keeper.Keeper(self.config)

    def change_plan(self, digest: str = OTHER) -> None:
        self.write_script(digest)
        self.restart_keeper(digest=digest)

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
    def told_to_yield(self) -> int:
        return self.place.calls.count("scancel --batch --signal=TERM 41")

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
    assert site.place.calls_of("sbatch") == [f"sbatch --parsable {site.script}"]
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
    assert site.place.calls_of("scontrol update") == ["scontrol update JobId=41 StartTime=now+2"]
    site.poll()
    assert site.place.calls_of("scontrol update")[1:] == ["scontrol update JobId=41 StartTime=now"]
    site.queue(queue_line(state="PENDING", restarts="2", reason="BeginTime", nodes=""))
    site.poll()
    assert site.place.calls_of("scontrol update")[2:] == ["scontrol update JobId=41 StartTime=now+2"]


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


@pytest.mark.parametrize("fields", [{"state": "FAILED", "code": "12:0"}, {"state": "NODE_FAIL"}])
def test_a_node_that_fails_again_and_again_is_never_waited_for_longer_than_20_s(
    site: Site, fields: dict[str, str]
) -> None:
    running(site)
    for number, pause in enumerate((5, 10, 20, 20, 20), start=1):
        site.ended(**fields)
        site.poll(2)
        assert site.submissions == number
        site.clock.now += pause
        site.poll()
        assert site.submissions == number + 1


def test_failure_says_what_the_exit_code_means(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    running(site).ended(state="FAILED", code="11:0")
    site.poll()
    assert "FAILED after 600 s, exit code 11: the server died too often" in capfd.readouterr().err


def test_how_the_last_job_failed_is_remembered_until_one_runs_well(site: Site) -> None:
    running(site).ended(state="FAILED", code="11:0", ran="00:00:30")
    site.poll()
    assert site.state.failure == f"job 41 ended: FAILED after 30 s, exit code 11: {Exit.SERVER_FAILED.meaning}"
    site.clock.now += 5
    site.poll()
    site.queue(queue_line(ran="4:00"))
    site.poll()
    assert site.state.failure
    site.queue(queue_line(ran="5:00"))
    site.poll()
    assert site.state.failure == ""


def test_a_lost_node_is_no_failure_of_the_build(site: Site) -> None:
    running(site).ended(state="NODE_FAIL")
    site.poll()
    assert (site.state.failures, site.state.failure) == (1, "")


def test_another_configuration_is_read_without_a_restart(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """A play that was cut off after it had written it tells nobody."""
    path = site.place.root / "keeper-config.json"

    def write(**changes: Any) -> None:
        (tier,) = site.config.tiers
        value = dataclasses.asdict(dataclasses.replace(site.config, tiers=(dataclasses.replace(tier, **changes),)))
        need = value["tiers"][0]["need"]
        need.update(gpus_per_node=need.pop("gpus"), cpus_per_node=need.pop("cpus"))
        site.place.set(path, json.dumps({"v": 1, **value}, default=str))

    write()
    site.keeper.follow(path)
    assert site.keeper.config == site.config
    assert capfd.readouterr().err == ""
    write(digest=OTHER)
    site.keeper.follow(path)
    assert site.keeper.config.tiers[0].digest == OTHER
    assert "another configuration: keeping fast" in capfd.readouterr().err
    path.write_text("{")
    site.keeper.follow(path)
    site.keeper.follow(path)
    assert site.keeper.config.tiers[0].digest == OTHER
    assert capfd.readouterr().err.count("going on as before") == 1


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
    site.restart_keeper()
    site.clock.now += 4
    site.poll()
    assert site.submissions == 1
    site.clock.now += 5
    site.poll()
    assert site.submissions == 2


def test_keeper_restarted_beside_a_running_job_submits_nothing(site: Site) -> None:
    running(site)
    site.restart_keeper()
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


@pytest.mark.parametrize("sacct", ["", "sacct: error: Connection refused"])
def test_cancelled_by_nobody_knows_whom_is_held_in_the_end(
    site: Site, sacct: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if sacct:
        site.place.set(site.place.slurm / "sacct.fails", sacct)
    running(site).ended(state="CANCELLED")
    site.poll()
    assert site.state.why.startswith("job 41 was cancelled; asking accounting by whom")
    site.clock.now += ACCOUNTING_SECONDS - 1
    site.poll(2)
    assert not site.state.held
    site.clock.now += 1
    site.poll(2)
    assert (site.state.held, site.state.job, site.submissions) == (True, 0, 1)
    assert site.state.why.startswith("job 41 was cancelled, and accounting did not say by whom within 120 s")
    assert sacct.rpartition(": ")[2] in site.state.why
    assert "left alone" in capfd.readouterr().err


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


# A job whose node is gone


def alive(site: Site, seq: int, job: int = 41, restart: int = 0) -> None:
    life.write(site.place.registry, "fast", life.Sign(job, restart, seq))


def pass_time(site: Site, seconds: int) -> None:
    for _ in range(seconds // 10):
        site.clock.now += 10
        site.poll()


def requeued(site: Site) -> int:
    return site.place.calls.count("scontrol requeue 41")


def test_job_that_gives_signs_of_life_goes_on(site: Site) -> None:
    running(site)
    for seq in range(20):
        alive(site, seq)
        pass_time(site, LOST_SECONDS - 10)
    assert requeued(site) == 0


def test_job_that_gives_none_any_more_is_requeued_once(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    alive(site, 7)
    running(site)
    pass_time(site, LOST_SECONDS - 10)
    assert requeued(site) == 0
    pass_time(site, 10)
    assert requeued(site) == 1
    pass_time(site, 300)
    site.restart_keeper()
    pass_time(site, 300)
    assert (requeued(site), site.submissions) == (1, 1)
    assert "job 41 runs on vasp-02 for Slurm, but gave no sign of life for 60 s" in capfd.readouterr().err
    site.queue(queue_line(state="PENDING", restarts="1", reason="BeginTime", nodes=""))
    site.poll()
    assert (site.state.failures, site.state.held) == (0, False)
    # The sign of the run before counts for nothing; this one's does, and it may be lost as well.
    site.queue(queue_line(restarts="1"))
    alive(site, 1, restart=1)
    pass_time(site, LOST_SECONDS)
    assert requeued(site) == 1
    pass_time(site, 10)
    assert requeued(site) == 2


@pytest.mark.parametrize("before", [None, (40, 0), (41, 1)])
def test_job_lost_before_its_first_sign_has_twice_the_time(site: Site, before: tuple[int, int] | None) -> None:
    if before:
        alive(site, 7, *before)
    running(site)
    pass_time(site, 2 * LOST_SECONDS - 10)
    assert requeued(site) == 0
    pass_time(site, 10)
    assert requeued(site) == 1


def test_older_version_that_gives_no_signs_is_requeued_once_at_most(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    running(site)
    pass_time(site, 2 * LOST_SECONDS)
    for restart in (1, 2):
        site.queue(queue_line(restarts=str(restart)))
        pass_time(site, 10 * LOST_SECONDS)
        site.restart_keeper()
    assert requeued(site) == 1
    assert "has its node an older version of gleaner?" in capfd.readouterr().err
    alive(site, 1, restart=2)
    pass_time(site, LOST_SECONDS + 10)
    assert requeued(site) == 2, "a run that gave signs is judged by them"


def test_job_of_another_plan_yields_and_is_not_judged(site: Site) -> None:
    running(site)
    site.queue(queue_line(comment=f"gleaner:{OTHER}"))
    site.poll()
    pass_time(site, 4 * LOST_SECONDS)
    assert (requeued(site), site.told_to_yield) == (0, 1)


@pytest.mark.parametrize("fault", ["away", "garbage", "hangs"])
def test_registry_that_says_nothing_condemns_nobody(site: Site, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive(site, 7)
    running(site)
    pass_time(site, LOST_SECONDS - 10)
    path = life.path_of(site.place.registry, "fast")
    with monkeypatch.context() as patch:
        if fault == "away":
            site.place.registry.rename(site.place.registry.with_name("away"))
        elif fault == "garbage":
            path.write_text("{")
        else:
            patch.setattr(life.Look, "signs", lambda *_: {})
        pass_time(site, 4 * LOST_SECONDS)
        if fault == "away":
            site.place.registry.with_name("away").rename(site.place.registry)
        alive(site, 7)
    pass_time(site, LOST_SECONDS)
    assert requeued(site) == 0, "the time in which nothing was known was counted"
    pass_time(site, 10)
    assert requeued(site) == 1


@pytest.mark.parametrize("gap", ["suspended", "slurm is silent", "keeper restarted"])
def test_time_in_which_nobody_looked_does_not_count(site: Site, gap: str) -> None:
    alive(site, 7)
    running(site)
    pass_time(site, LOST_SECONDS - 10)
    if gap == "suspended":
        site.queue(queue_line(state="SUSPENDED"))
    elif gap == "slurm is silent":
        site.place.set(site.place.slurm / "squeue.fails", "no answer")
    else:
        site.restart_keeper()
    pass_time(site, 10)
    (site.place.slurm / "squeue.fails").unlink(missing_ok=True)
    site.queue(queue_line())
    pass_time(site, LOST_SECONDS - 10)
    assert requeued(site) == 0
    pass_time(site, 20)
    assert requeued(site) == 1


def test_young_job_is_not_judged(site: Site) -> None:
    running(site)
    site.queue(queue_line(ran="0:59"))
    pass_time(site, 4 * LOST_SECONDS)
    assert requeued(site) == 0


def test_lost_job_that_cannot_be_requeued_is_cancelled(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    alive(site, 7)
    running(site)
    site.place.set(site.place.slurm / "scontrol.fails", "Requested operation is presently disabled")
    pass_time(site, LOST_SECONDS)
    assert (requeued(site), site.place.calls_of("scancel")) == (1, ["scancel 41"])
    assert site.state.why.endswith("Requested operation is presently disabled")
    assert "job 41 is lost with its node and cancelled" in capfd.readouterr().err
    (site.place.slurm / "scontrol.fails").unlink()
    site.ended(state="CANCELLED")
    site.poll()
    site.clock.now += ACCOUNTING_SECONDS
    site.poll(2)
    assert (site.submissions, site.state.held, site.state.failures) == (2, False, 0)


def test_slurm_that_does_neither_is_asked_again(site: Site) -> None:
    alive(site, 7)
    running(site)
    for command in ("scontrol", "scancel"):
        site.place.set(site.place.slurm / f"{command}.fails", "Unable to contact slurm controller")
    pass_time(site, LOST_SECONDS + 20)
    assert (requeued(site), site.state.lost) == (3, "")
    for command in ("scontrol", "scancel"):
        (site.place.slurm / f"{command}.fails").unlink()
    pass_time(site, 100)
    assert (requeued(site), site.state.lost) == (4, "41/0")


def test_state_of_an_older_version_is_read(site: Site) -> None:
    older = {"job": 41, "digest": DIGEST, "ending": False, "failures": 2, "held": False, "why": ""}
    site.place.set(site.config.state, json.dumps({"v": 1, "tiers": {"fast": older}}))
    assert site.state == keeper.TierState(job=41, digest=DIGEST, failures=2)


# A plan that has changed


def test_running_job_of_another_plan_yields_before_the_next_is_submitted(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    running(site)
    site.change_plan()
    site.poll(3)
    assert site.told_to_yield == 1
    assert site.place.calls_of("scontrol update") == [f"scontrol update JobId=41 Comment={REPLACED}"]
    assert (site.submissions, site.state.ending) == (1, True)
    assert "its plan is not the current one" in site.state.why
    site.ended(state="COMPLETED", ran="00:00:03")
    site.poll(2)
    assert site.submissions == 2
    assert (site.state.failures, site.state.held, site.state.ending, site.state.digest) == (0, False, False, OTHER)
    site.queue(queue_line(job="41", comment=f"gleaner:{OTHER}"))
    site.poll(3)
    assert (site.told_to_yield, site.submissions) == (1, 2)
    assert "job 41 ended: COMPLETED after 3 s" in capfd.readouterr().err


def test_waiting_job_of_another_plan_is_replaced_at_once(site: Site) -> None:
    site.poll()
    site.queue(queue_line(state="PENDING", nodes="", reason="Resources"))
    site.change_plan()
    site.poll()
    assert site.place.calls_of("scancel") == ["scancel 41"]
    site.place.set(site.place.slurm / "accounting", f"CANCELLED by {os.getuid()}\n")
    site.ended(state="CANCELLED", ran="00:00:00")
    site.poll(2)
    assert site.submissions == 2
    assert (site.state.held, site.state.failures) == (False, 0)


# A router may have another node: the first part of its digest is the same, and so is what it says of the node in use.
ON_ONE = f"{DIGEST}-{1:08x}{2:08x}"
ON_TWO = f"{DIGEST}-{3:08x}{2:08x}{4:08x}"


def another_node_comes(site: Site, *nodes: str) -> None:
    site.write_script(ON_TWO)
    site.restart_keeper(digest=ON_TWO, need=dataclasses.replace(NEED, nodes=nodes))


def test_running_job_stays_when_its_tier_may_have_another_node(site: Site) -> None:
    site.write_script(ON_ONE)
    site.restart_keeper(digest=ON_ONE)
    site.poll()
    site.queue(queue_line(comment=f"gleaner:{ON_ONE}"))
    site.poll()
    another_node_comes(site, "vasp-02", "vasp-04")
    site.poll(3)
    assert (site.told_to_yield, site.submissions, site.state.ending) == (0, 1, False)
    # Preempted, it waits, and would not start on the new node.
    site.queue(queue_line(state="PENDING", restarts="1", nodes="", reason="BeginTime", comment=f"gleaner:{ON_ONE}"))
    site.poll()
    assert site.place.calls_of("scancel") == ["scancel 41"]


def test_running_job_yields_on_a_node_that_its_tier_may_have_no_more(site: Site) -> None:
    site.write_script(ON_ONE)
    site.restart_keeper(digest=ON_ONE)
    site.poll()
    site.queue(queue_line(comment=f"gleaner:{ON_ONE}"))
    site.poll()
    another_node_comes(site, "vasp-03", "vasp-04")
    site.poll(3)
    assert site.told_to_yield == 1
    assert site.place.calls_of("scontrol update") == [f"scontrol update JobId=41 Comment=gleaner:{ON_ONE} replaced"]


def test_waiting_job_is_replaced_even_where_accounting_never_says_who_cancelled_it(site: Site) -> None:
    site.poll()
    site.queue(queue_line(state="PENDING", nodes="", reason="Resources"))
    site.change_plan()
    site.poll()
    site.ended(state="CANCELLED", ran="00:00:00")
    site.poll(2)
    assert site.submissions == 1
    site.clock.now += ACCOUNTING_SECONDS
    site.poll(2)
    assert (site.submissions, site.state.held) == (2, False)


def test_person_who_cancels_a_yielding_job_holds_the_tier(site: Site) -> None:
    running(site)
    site.change_plan()
    site.poll()
    site.place.set(site.place.slurm / "accounting", f"CANCELLED by {os.getuid() + 1}\n")
    site.ended(state="CANCELLED")
    site.poll(3)
    assert (site.submissions, site.state.held) == (1, True)


@pytest.mark.parametrize("comment", ["(null)", "somebody's note"])
def test_job_without_a_digest_is_an_older_version_s(site: Site, comment: str) -> None:
    site.queue(queue_line(comment=comment))
    site.poll(2)
    assert site.told_to_yield == 1


def test_comment_that_the_sites_slurm_took_away_is_remembered(site: Site) -> None:
    site.poll()
    site.queue(queue_line(comment="(null)"))
    site.poll(3)
    site.restart_keeper()
    site.poll(3)
    assert (site.told_to_yield, site.submissions) == (0, 1)
    site.change_plan()
    site.poll()
    assert site.told_to_yield == 1


def test_job_that_does_not_yield_is_cancelled(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    running(site)
    site.change_plan()
    site.poll()
    site.clock.now += YIELD_SECONDS - 1
    site.poll()
    assert "scancel 41" not in site.place.calls
    site.clock.now += 1
    site.poll(2)
    assert site.place.calls.count("scancel 41") == 1
    assert "job 41 did not yield within 30 s" in capfd.readouterr().err
    site.ended(state="CANCELLED")
    site.place.set(site.place.slurm / "accounting", f"CANCELLED by {os.getuid()}\n")
    site.poll(2)
    assert (site.submissions, site.state.held, site.state.failures) == (2, False, 0)


def test_job_whose_comment_may_not_be_changed_yields_all_the_same(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    running(site)
    site.change_plan()
    site.place.set(site.place.slurm / "scontrol.fails", "slurm_update error: Access/permission denied")
    site.poll(2)
    assert site.told_to_yield == 1
    assert "cannot be told why it has to yield" in capfd.readouterr().err


def test_keeper_restarted_while_the_job_yields_tells_it_again_and_no_more(site: Site) -> None:
    running(site)
    site.change_plan()
    site.poll(2)
    site.queue(queue_line(comment=REPLACED))
    site.restart_keeper()
    site.poll(2)
    assert (site.told_to_yield, site.submissions) == (2, 1)
    site.ended(state="COMPLETED", ran="00:00:03")
    site.restart_keeper()
    site.poll(2)
    assert (site.submissions, site.state.failures) == (2, 0)


def test_change_that_is_taken_back_while_the_job_yields(site: Site) -> None:
    running(site)
    site.change_plan()
    site.poll()
    site.queue(queue_line(comment=REPLACED))
    site.change_plan(DIGEST)
    site.poll(2)
    assert site.submissions == 1
    site.ended(state="COMPLETED", ran="00:00:03")
    site.poll(2)
    assert (site.submissions, site.state.failures, site.state.digest) == (2, 0, DIGEST)
    site.queue(queue_line())
    site.poll(3)
    assert site.submissions == 2


def test_preempted_while_it_yields_is_not_started_again(site: Site) -> None:
    running(site)
    site.change_plan()
    site.poll()
    site.queue(queue_line(state="PENDING", restarts="1", nodes="", reason="BeginTime", comment=REPLACED))
    site.poll()
    assert site.place.calls.count("scancel 41") == 1
    assert not [call for call in site.place.calls if "StartTime=now" in call]


def test_submitted_by_hand_from_the_current_script_is_left_alone(site: Site) -> None:
    site.change_plan()
    site.queue(queue_line(job="77", comment=f"gleaner:{OTHER}"))
    site.poll(3)
    assert (site.told_to_yield, site.submissions, site.state.job) == (0, 0, 77)


def test_older_copy_that_waits_behind_the_running_job_goes_first(site: Site) -> None:
    site.queue(
        queue_line(job="41", comment=f"gleaner:{OTHER}")
        + queue_line(job="42", state="PENDING", nodes="", reason="Dependency", comment=f"gleaner:{OTHER}")
    )
    site.poll()
    assert site.place.calls_of("scancel") == ["scancel 42"]
    site.queue(
        queue_line(job="41", comment=f"gleaner:{OTHER}")
        + queue_line(job="43", state="PENDING", nodes="", reason="Dependency")
    )
    site.poll()
    assert site.place.calls_of("scancel") == ["scancel 42", "scancel --batch --signal=TERM 41"]
    site.queue(queue_line(job="43"))
    site.poll(2)
    assert (site.submissions, site.state.job, site.state.ending) == (0, 43, False)


def test_job_that_a_person_holds_keeps_its_number_until_it_is_released(site: Site) -> None:
    running(site)
    site.change_plan()
    site.queue(queue_line(state="PENDING", nodes="", reason="JobHeldUser"))
    site.poll(3)
    assert not site.place.calls_of("scancel")
    site.queue(queue_line(state="PENDING", nodes="", reason="Resources"))
    site.poll()
    assert site.place.calls_of("scancel") == ["scancel 41"]


def test_held_tier_stays_held_when_its_plan_changes(site: Site) -> None:
    running(site).ended(state="CANCELLED")
    site.place.set(site.place.slurm / "accounting", f"CANCELLED by {os.getuid() + 1}\n")
    site.poll(2)
    site.change_plan()
    site.poll(3)
    assert (site.submissions, site.state.held) == (1, True)


@pytest.mark.parametrize("first", ["script", "configuration"])
def test_half_a_change_ends_no_job(site: Site, first: str, capfd: pytest.CaptureFixture[str]) -> None:
    running(site)
    if first == "script":
        site.write_script(OTHER)
    else:
        site.restart_keeper(digest=OTHER)
    # A person submits what lies there now.
    site.queue(queue_line(comment=f"gleaner:{OTHER if first == 'script' else DIGEST}"))
    site.poll(3)
    assert (site.told_to_yield, site.submissions) == (0, 1)
    assert capfd.readouterr().err.count("until playbooks/tiers.yml has run to its end") == 1
    site.change_plan()
    site.poll()
    assert site.told_to_yield == (first == "configuration")


def test_failures_of_an_older_plan_do_not_delay_the_next(site: Site) -> None:
    running(site)
    for _ in range(3):
        site.ended(state="FAILED", code="11:0", ran="00:00:30")
        site.poll()
        site.clock.now += 300
        site.poll()
    site.ended(state="FAILED", code="11:0", ran="00:00:30")
    site.poll()
    assert (site.submissions, site.state.failures) == (4, 4)
    site.change_plan()
    site.poll()
    assert (site.submissions, site.state.failures) == (5, 0)
    site.ended(state="FAILED", code="11:0", ran="00:00:30")
    site.poll(3)
    assert (site.submissions, site.state.failures) == (5, 1), "the new plan's own failure does not count"


def test_one_tiers_change_leaves_the_other_alone(site: Site) -> None:
    (fast,) = site.config.tiers
    slow = keeper.TierConfig("slow", "llama-72b", str(site.place.root / "run-72b.slurm"), OTHER, NEED)
    site.place.set(site.place.root / "run-72b.slurm", f"#SBATCH --comment=gleaner:{OTHER}\n")
    site.config = dataclasses.replace(site.config, tiers=(fast, slow))
    site.keeper = keeper.Keeper(site.config)
    other = queue_line(job="42", name="llama-72b", nodes="vasp-03", comment=f"gleaner:{OTHER}")
    site.queue(queue_line() + other)
    site.poll()
    site.write_script(OTHER)
    site.config = dataclasses.replace(site.config, tiers=(dataclasses.replace(fast, digest=OTHER), slow))
    site.keeper = keeper.Keeper(site.config)
    site.poll(2)
    assert site.place.calls_of("scancel") == ["scancel --batch --signal=TERM 41"]
    site.queue(other)
    site.place.set(site.place.slurm / "job", job_text(state="COMPLETED"))
    site.poll(2)
    kept = keeper.load_state(site.config.state)
    assert (site.submissions, kept["slow"].job, kept["slow"].ending) == (1, 42, False)


def test_hold_that_an_older_version_wrote_is_kept(site: Site) -> None:
    tiers = {"fast": {"job": 0, "failures": 0, "held": True, "why": "job 40 was cancelled by uid 1000"}}
    site.place.set(site.config.state, json.dumps({"v": 1, "tiers": tiers}))
    site.poll(2)
    assert site.submissions == 0


def test_job_of_a_removed_tier_yields_and_is_forgotten(site: Site) -> None:
    running(site)
    site.config = dataclasses.replace(site.config, tiers=())
    site.keeper = keeper.Keeper(site.config)
    site.poll(2)
    assert site.told_to_yield == 1
    site.clock.now += YIELD_SECONDS
    site.poll(2)
    assert site.place.calls.count("scancel 41") == 1
    site.ended(state="CANCELLED")
    site.poll()
    assert keeper.load_state(site.config.state) == {}
    assert site.place.calls.count("scancel 41") == 1


def test_waiting_job_of_a_removed_tier_is_cancelled(site: Site) -> None:
    running(site)
    site.config = dataclasses.replace(site.config, tiers=())
    site.keeper = keeper.Keeper(site.config)
    site.place.set(site.place.slurm / "job", job_text(state="PENDING"))
    site.poll()
    assert site.place.calls_of("scancel") == ["scancel 41"]


def test_renamed_job_yields_before_the_new_one_is_submitted(site: Site) -> None:
    running(site)
    site.write_script(OTHER)
    site.restart_keeper(job_name="llama-fast", digest=OTHER)
    # squeue is asked by name, and no longer shows it.
    site.queue()
    site.poll(2)
    assert (site.told_to_yield, site.submissions) == (1, 1)
    site.ended(state="COMPLETED", ran="00:00:03")
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
    site.place.set(site.place.root / "config.json", json.dumps(site.place.keeper_config(site.script)))
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
