"""The ledger: events and accounting become GPU-hours, waits, returns and shares; each is reckoned by hand here."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gleaner import cli, events, report, slurm
from gleaner.events import Event, Kind
from gleaner.report import Span
from tests.unit.fakes import Home, home

DAY = Span(1_000_000.0, 1_086_400.0)


def event(at: float, kind: Kind, restart: int = 0, job: int = 41, **more: Any) -> Event:
    return Event(DAY.begin + at, "fast", job, restart, kind, more)


def run(job: int, started: int, ended: int | None, user: str = "alice", **more: Any) -> slurm.Run:
    begin = int(DAY.begin)
    fields = {"submitted": begin + started, "nodes": ("vasp-02",), "gpus": 1, "state": "COMPLETED"}
    return slurm.Run(
        job=job,
        user=user,
        started=begin + started,
        ended=None if ended is None else begin + ended,
        **{**fields, **more},
    )


def ours(started: int, ended: int | None, **more: Any) -> slurm.Run:
    return run(41, started, ended, "ai-inference", **more)


# Ready from 10 to 100.25, preempted then, gone at 101; back at 500 when VASP had ended at 498, ready at 510.
TOLD = [
    event(0.5, Kind.STARTED, nodes=["vasp-02"], gpus=1),
    event(10, Kind.SERVING),
    event(100.25, Kind.SIGNALLED, cause="preempted"),
    event(100.25, Kind.WITHDRAWN, why="signal"),
    event(100.9, Kind.DRAINED, whole=True),
    event(101, Kind.LEFT, exit=0),
    event(500, Kind.STARTED, 1, nodes=["vasp-02"], gpus=1),
    event(510, Kind.SERVING, 1),
]
ACCOUNTED = [ours(0, 101, state="PREEMPTED"), ours(499, None, state="RUNNING")]
VASP = run(77, 102, 498, submitted=int(DAY.begin) + 99)


def made(
    told: list[Event] | None = None, accounted: list[slurm.Run] | None = None, others: list[slurm.Run] | None = None
) -> report.Ledger:
    runs = ACCOUNTED if accounted is None else accounted
    all_stays = report.stays(TOLD if told is None else told, runs, DAY.end)
    return report.ledger("fast", all_stays, runs, report.Others([VASP] if others is None else others), DAY)


def test_what_was_gleaned_and_what_it_cost() -> None:
    got = made()
    assert got.runs == 2
    assert got.gpu_hours == pytest.approx((101 + 86400 - 499) / 3600)
    assert got.preemptions == 1
    (wait,) = got.waits
    # It started in the second from 102 to 103.
    assert (wait.job, wait.user, wait.nodes, wait.seconds) == (77, "alice", ("vasp-02",), 2.75)
    (back,) = got.returns
    assert (back.running, back.ready) == (2.0, 12.0)
    assert got.ready_seconds == pytest.approx(100.25 - 10 + 86400 - 510)
    assert got.lent_seconds == pytest.approx(498 - 100.25)
    assert got.differences == ()


@pytest.mark.parametrize(
    ("other", "waited"),
    [
        pytest.param({}, 2.75, id="queued-while-we-held-it"),
        pytest.param({"submitted": 100.5}, 2.5, id="queued-while-we-yielded"),
        pytest.param({"submitted": 200, "started": 200, "ended": 300}, None, id="came-later"),
        pytest.param({"nodes": ("vasp-03",)}, None, id="elsewhere"),
        pytest.param({"started": 50, "ended": 60, "submitted": 20}, None, id="before-us"),
        pytest.param({"started": 700, "ended": 800, "submitted": 20}, None, id="after-we-were-back"),
    ],
)
def test_only_who_was_queued_for_what_we_held_has_waited(other: dict[str, Any], waited: float | None) -> None:
    fields = {"started": 102, "ended": 498, "submitted": 99, **other}
    fields["submitted"] += DAY.begin
    got = made(others=[run(77, fields.pop("started"), fields.pop("ended"), **fields)])
    assert [wait.seconds for wait in got.waits] == ([] if waited is None else [waited])


def test_a_job_that_starts_when_another_has_ended_waited_for_that_one() -> None:
    first = run(77, 102, 200, submitted=int(DAY.begin) + 99)
    second = run(78, 201, 498, submitted=int(DAY.begin) + 99)
    assert [wait.job for wait in made(others=[first, second]).waits] == [77]


def test_two_jobs_that_start_side_by_side_have_both_waited() -> None:
    assert [wait.job for wait in made(others=[VASP, run(78, 104, 300, submitted=int(DAY.begin) + 99)]).waits] == [
        77,
        78,
    ]


def test_jobs_without_gpus_are_nobody_to_whom_gpus_are_lent() -> None:
    small = run(78, 101, 499, submitted=int(DAY.begin) + 99, gpus=0)
    got = made(others=[small, VASP])
    assert [wait.job for wait in got.waits] == [77]
    assert got.returns[0].running == 2.0


def test_accounting_that_does_not_count_gpus_is_completed_by_the_events() -> None:
    got = made(accounted=[ours(0, 101, gpus=0), ours(499, None, gpus=0)], others=[run(77, 102, 498, gpus=0)])
    assert got.gpu_hours == pytest.approx((101 + 86400 - 499) / 3600)


def test_a_job_that_was_requeued_and_waited_twice_counts_twice() -> None:
    told = [
        *TOLD,
        event(600, Kind.SIGNALLED, 1, cause="preempted"),
        event(601, Kind.LEFT, 1, exit=0),
    ]
    again = run(77, 602, 700, submitted=int(DAY.begin) + 599)
    got = made(told=told, accounted=[ACCOUNTED[0], ours(499, 601)], others=[VASP, again])
    assert [(wait.job, wait.seconds) for wait in got.waits] == [(77, 2.75), (77, 3.0)]


def test_a_job_over_several_tiers_nodes_counts_once_from_the_first_signal() -> None:
    wide = run(77, 103, 498, nodes=("vasp-01", "vasp-02", "vasp-03"), submitted=int(DAY.begin) + 99)
    later = [
        event(0.5, Kind.STARTED, job=43, nodes=["vasp-01", "vasp-03"], gpus=2),
        event(101.5, Kind.SIGNALLED, job=43, cause="preempted"),
        event(102, Kind.LEFT, job=43, exit=0),
    ]
    vacated = [*report.stays(later, [], DAY.end), *report.stays(TOLD, ACCOUNTED, DAY.end)]
    (wait,) = report.waits(vacated, report.Others([wide]))
    assert wait.seconds == 3.75


@pytest.mark.parametrize(("cause", "counts"), [("preempted", 1), ("unanswered", 1), ("replaced", 0), ("asked", 0)])
def test_which_causes_are_preemptions(cause: str, counts: int) -> None:
    told = [event(0.5, Kind.STARTED, nodes=["vasp-02"], gpus=1), event(100, Kind.SIGNALLED, cause=cause)]
    got = made(told=told, accounted=[ours(0, 101)])
    assert (got.preemptions, len(got.waits)) == (counts, counts)


def test_the_wait_begins_with_the_first_signal() -> None:
    told = [
        TOLD[0],
        event(99, Kind.SIGNALLED, cause="unanswered"),
        event(100, Kind.SIGNALLED, cause="preempted"),
        event(101, Kind.LEFT, exit=0),
    ]
    vasp = run(77, 102, 498, submitted=int(DAY.begin) + 98)
    assert [wait.seconds for wait in made(told=told, accounted=[ours(0, 101)], others=[vasp]).waits] == [4.0]


def test_a_supervisor_that_was_killed_was_ready_until_its_run_ended() -> None:
    told = [event(0.5, Kind.STARTED, nodes=["vasp-02"], gpus=1), event(10, Kind.SERVING)]
    got = made(told=told, accounted=[ours(0, 60)], others=[])
    assert got.ready_seconds == 50


def test_a_run_without_an_end_ends_with_the_next_one() -> None:
    assert made(accounted=[ours(0, None), ours(499, None)]).gpu_hours == pytest.approx(86400 / 3600)


def test_a_run_that_began_before_the_period_counts_within_it() -> None:
    told = [
        event(-5000, Kind.STARTED, nodes=["vasp-02"], gpus=1),
        event(-4000, Kind.SERVING),
        event(100, Kind.SIGNALLED, cause="preempted"),
        event(100, Kind.WITHDRAWN, why="signal"),
        event(101, Kind.LEFT, exit=0),
    ]
    got = made(told=told, accounted=[ours(-5001, 101)])
    assert (got.preemptions, got.ready_seconds, got.differences) == (1, 100, ())
    assert got.gpu_hours == pytest.approx(101 / 3600)
    assert [wait.seconds for wait in got.waits] == [3.0]


def test_what_one_source_lacks_is_named() -> None:
    (text,) = made(told=TOLD[:6]).differences
    assert "job 41, started" in text
    assert "no supervisor told of it" in text
    (text,) = made(accounted=ACCOUNTED[:1], told=[event(0.2, Kind.STARTED, job=40), *TOLD[:6]]).differences
    assert "job 40 restart 0" in text
    assert "accounting does not know it" in text
    told = [one for one in TOLD if one.kind is not Kind.SIGNALLED]
    (text,) = made(told=told).differences
    assert "accounting says that it was preempted, its supervisor was not told" in text


def test_a_run_too_short_to_tell_is_no_difference() -> None:
    assert made(accounted=[*ACCOUNTED, ours(200, 202)]).differences == ()


def test_two_quick_runs_of_a_job_are_told_apart() -> None:
    told = [event(0.5, Kind.STARTED), event(2.2, Kind.STARTED, 1), event(3, Kind.SERVING, 1)]
    got = made(told=told, accounted=[ours(0, 2), ours(2, 50)], others=[])
    assert got.ready_seconds == 47
    assert got.differences == ()


def test_a_job_number_that_comes_again_is_another_run() -> None:
    again = [event(70000, Kind.STARTED, nodes=["vasp-02"], gpus=1), event(70010, Kind.SERVING)]
    got = made(told=[*TOLD[:6], *again], accounted=[ACCOUNTED[0], ours(70000, None)], others=[])
    assert got.ready_seconds == pytest.approx(100.25 - 10 + 86400 - 70010)


# Accounting


def test_lines_of_sacct() -> None:
    text = (
        "41|ai-inference|PREEMPTED|1000000|1000001|1000101|vasp-02|billing=8,cpu=8,gres/gpu:v100s=1,gres/gpu=1\n"
        "77|alice|RUNNING|1000100|1000102|Unknown|vasp-[01-03]|cpu=3,gres/gpu=3\n"
        "78|alice|PENDING|1000100|Unknown|Unknown|None assigned|\n"
        "79|alice|CANCELLED by 0|1000100|None|1000101|None assigned|\n"
    )
    problems: list[str] = []
    first, second = slurm.parse_runs(text, problems)
    assert (first.job, first.user, first.state, first.gpus) == (41, "ai-inference", "PREEMPTED", 1)
    assert (first.submitted, first.started, first.ended, first.nodes) == (1000000, 1000001, 1000101, ("vasp-02",))
    assert (second.ended, second.nodes, second.gpus) == (None, ("vasp-01", "vasp-02", "vasp-03"), 3)
    assert problems == []
    assert slurm.parse_runs("sacct: error\n" + text, problems) == [first, second]
    assert problems == ["sacct: cannot read the line 'sacct: error'"]


# The command


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    with home() as made_home:
        for name, value in made_home.environment().items():
            monkeypatch.setenv(name, value)
        made_home.set(made_home.root / "gateway.json", json.dumps(made_home.gateway_config()))
        yield made_home


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def test_only_root_sees_what_others_waited(
    place: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert command(place) == 2
    assert "cure: sudo" in capsys.readouterr().err


def command(place: Home, *argv: str) -> int:
    return cli.main(["report", "--config", str(place.root / "gateway.json"), *argv])


def write(place: Home, *lines: bytes) -> None:
    (place.events / "41.jsonl").write_bytes(b"".join(lines))


def test_for_people_and_for_programs(
    place: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = int(time.time())
    shift = now - 700 - DAY.begin
    write(place, *(Event(one.at + shift, "fast", one.job, one.restart, one.kind, one.more).encode() for one in TOLD))
    rows = [
        f"41|ai-inference|PREEMPTED|{now - 701}|{now - 700}|{now - 599}|vasp-02|gres/gpu=1",
        f"77|alice|COMPLETED|{now - 601}|{now - 598}|{now - 202}|vasp-02|gres/gpu=1",
        f"41|ai-inference|RUNNING|{now - 701}|{now - 201}|Unknown|vasp-02|gres/gpu=1",
    ]
    place.set(place.slurm / "accounting", "\n".join(rows) + "\n")
    # The fake tells the same of the names, of which only the second column counts.
    monkeypatch.setattr(slurm, "names_of", lambda *_: {41: "llama-14b"})
    assert command(place, "--since", "12h") == 0
    told = capsys.readouterr().out
    assert "others waited for us, at most: median 2.8 s, worst 2.8 s, of 1" in told
    assert "job 77 of alice on vasp-02: 2.8 s" in told
    assert command(place, "--since", "12h", "--json") == 0
    got = json.loads(capsys.readouterr().out)
    (tier,) = got["tiers"]
    assert (tier["tier"], tier["runs"], tier["preemptions"], tier["differences"]) == ("fast", 2, 1, [])
    assert tier["returned_running"] == {"count": 1, "median": 2.0, "worst": 2.0}
    assert [wait["job"] for wait in got["waits"]] == [77]


def test_names_are_asked_of_the_service_user_alone(place: Home) -> None:
    place.set(place.slurm / "accounting", "41|llama-14b\n42|a|name\n\n")
    assert slurm.names_of("ai-inference", 0, 1) == {41: "llama-14b", 42: "a|name"}
    (asked,) = place.calls_of("sacct")
    assert "--user=ai-inference" in asked


def test_the_period_is_what_accounting_is_asked_for(place: Home) -> None:
    assert command(place, "--since", "@1000000", "--until", "@1086400") == 0
    (asked,) = (call for call in place.calls_of("sacct") if "--allusers" in call)
    begin, end = (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at)) for at in (1000000, 1086400))
    assert f"--starttime={begin} --endtime={end}" in asked


def test_lines_that_are_no_events_are_named(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    write(place, b"{}\n", b"\xff\n", TOLD[0].encode(), b'{"v":1,"at_ms":1')
    place.set(place.events / "notes.txt", "somebody's\n")
    assert command(place) == 0
    assert "41.jsonl: 3 lines are no events" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--since", "2026-11-02", "--until", "2026-11-01"), "--since: got 2026-11-02T00:00:00, want a time before"),
        (("--since", "yesterday"), "got 'yesterday', want a date"),
    ],
)
def test_a_period_that_is_none_is_refused(
    place: Home, argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = command(place, *argv)
    except SystemExit as caught:
        code = int(caught.code or 0)
    assert code == 2
    assert words in capsys.readouterr().err


def test_sources_that_are_not_there_are_named(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "sacct.fails", "sacct: error: Problem talking to the database")
    assert command(place) == 2
    assert "Problem talking to the database" in capsys.readouterr().err
    (place.slurm / "sacct.fails").unlink()
    place.events.rmdir()
    assert command(place) == 2
    assert "events: No such file or directory: run playbooks/tiers.yml" in capsys.readouterr().err


def test_an_event_is_its_line(tmp_path: Path) -> None:
    (tmp_path / "endpoints").mkdir()
    (tmp_path / "events").mkdir()
    log = events.Log(tmp_path / "endpoints", "fast", (41, 2))
    log.add(Kind.SERVING)
    log.add(Kind.SIGNALLED, at=1234.5678, cause="preempted")
    log.close(5)
    second, first = events.read(tmp_path / "events", [])[::-1]
    assert (first.at, first.kind, first.more) == (1234.568, Kind.SIGNALLED, {"cause": "preempted"})
    assert (second.kind, second.run, second.tier) == (Kind.SERVING, (41, 2), "fast")
    assert os.stat(tmp_path / "events" / "41.jsonl").st_mode & 0o777 == 0o644


def test_a_line_that_was_torn_costs_no_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events").mkdir()
    write_whole, torn = os.write, [10]

    def write_part(fd: int, data: bytes) -> int:
        return write_whole(fd, data[: torn.pop()]) if torn else write_whole(fd, data)

    monkeypatch.setattr(os, "write", write_part)
    log = events.Log(tmp_path / "endpoints", "fast", (41, 2))
    log.add(Kind.STARTED, nodes=["vasp-02"], gpus=1)
    log.add(Kind.SERVING)
    log.close(5)
    problems: list[str] = []
    assert [event.kind for event in events.read(tmp_path / "events", problems)] == [Kind.STARTED, Kind.SERVING]
    assert problems == [f"{tmp_path}/events/41.jsonl: 1 lines are no events"]


def test_a_pipe_in_the_place_of_an_event_log_hangs_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "41.jsonl")
    (tmp_path / "42.jsonl").symlink_to("/etc/passwd")
    problems: list[str] = []
    assert events.read(tmp_path, problems) == []
    assert problems == [f"{tmp_path}/42.jsonl: Too many levels of symbolic links"]
