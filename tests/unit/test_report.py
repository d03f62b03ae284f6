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
    fields = {"submitted": begin + started, "nodes": ("vasp-02",), "gpus": 1, "name": "vasp", "state": "COMPLETED"}
    return slurm.Run(
        job=job,
        user=user,
        started=begin + started,
        ended=None if ended is None else begin + ended,
        **{**fields, **more},
    )


def ours(started: int, ended: int | None, **more: Any) -> slurm.Run:
    return run(41, started, ended, "ai-inference", name="llama-14b", **more)


# Served from 10 to 100, preempted at 100.25, gone at 101; back at 500 when VASP had ended at 498, serving at 510.
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
VASP = run(77, 102, 498, submitted=int(DAY.begin) + 100)


def made(
    told: list[Event] | None = None, accounted: list[slurm.Run] | None = None, others: list[slurm.Run] | None = None
) -> report.Ledger:
    return report.ledger(
        "fast",
        TOLD if told is None else told,
        ACCOUNTED if accounted is None else accounted,
        [VASP] if others is None else others,
        DAY,
    )


def test_what_was_gleaned_and_what_it_cost() -> None:
    got = made()
    assert got.runs == 2
    assert got.gpu_hours == pytest.approx((101 + 86400 - 499) / 3600)
    assert got.preemptions == 1
    (wait,) = got.waits
    assert (wait.job, wait.user, wait.nodes, wait.seconds) == (77, "alice", ("vasp-02",), 1.75)
    (back,) = got.returns
    assert (back.running, back.serving) == (2.0, 12.0)
    assert got.served_seconds == pytest.approx(100.25 - 10 + 86400 - 510)
    assert got.lent_seconds == pytest.approx(500 - 100.25)
    assert got.differences == ()


@pytest.mark.parametrize(
    ("other", "waited"),
    [
        pytest.param({}, True, id="queued-while-we-held-it"),
        pytest.param({"submitted": int(DAY.begin) + 200, "started": 200, "ended": 300}, False, id="came-later"),
        pytest.param({"nodes": ("vasp-03",)}, False, id="elsewhere"),
        pytest.param({"started": 50, "ended": 60}, False, id="before-us"),
    ],
)
def test_only_who_was_queued_for_what_we_held_has_waited(other: dict[str, Any], waited: bool) -> None:
    fields = {"started": 102, "ended": 498, "submitted": int(DAY.begin) + 100, **other}
    got = made(others=[run(77, fields.pop("started"), fields.pop("ended"), **fields)])
    assert bool(got.waits) is waited


def test_the_second_job_on_a_node_waited_for_the_first() -> None:
    second = run(78, 498, 499, submitted=int(DAY.begin) + 100)
    assert [wait.job for wait in made(others=[VASP, second]).waits] == [77]


def test_a_job_over_several_nodes_counts_once_from_the_first_signal() -> None:
    wide = run(77, 103, 498, nodes=("vasp-01", "vasp-02", "vasp-03"), submitted=int(DAY.begin) + 100)
    later = [
        event(0.5, Kind.STARTED, job=43, nodes=["vasp-01", "vasp-03"], gpus=2),
        event(101.5, Kind.SIGNALLED, job=43, cause="preempted"),
        event(102, Kind.LEFT, job=43, exit=0),
    ]
    stays = report.stays(sorted([*TOLD, *later], key=lambda one: one.at), ACCOUNTED, DAY.end)
    (wait,) = report.waits(stays, [wide])
    assert wait.seconds == 2.75


def test_other_reasons_to_stop_are_no_preemption() -> None:
    told = [event(0.5, Kind.STARTED, nodes=["vasp-02"], gpus=1), event(100, Kind.SIGNALLED, cause="replaced")]
    got = made(told=told, accounted=[ours(0, 101)])
    assert (got.preemptions, got.waits, got.lent_seconds) == (0, (), 0)


def test_a_supervisor_that_was_killed_served_until_its_run_ended() -> None:
    told = [event(0.5, Kind.STARTED, nodes=["vasp-02"], gpus=1), event(10, Kind.SERVING)]
    got = made(told=told, accounted=[ours(0, 60)], others=[])
    assert got.served_seconds == 50


def test_a_run_that_began_before_the_period_counts_within_it() -> None:
    told = [
        event(-5000, Kind.STARTED, nodes=["vasp-02"], gpus=1),
        event(-4000, Kind.SERVING),
        event(100, Kind.SIGNALLED, cause="preempted"),
        event(100, Kind.WITHDRAWN, why="signal"),
        event(101, Kind.LEFT, exit=0),
    ]
    got = made(told=told, accounted=[ours(-5001, 101)])
    assert (got.preemptions, got.served_seconds, got.differences) == (1, 100, ())
    assert got.gpu_hours == pytest.approx(101 / 3600)
    assert [wait.seconds for wait in got.waits] == [2.0]


def test_what_one_source_lacks_is_named() -> None:
    got = made(told=TOLD[:6])
    (text,) = got.differences
    assert "job 41, started" in text
    assert "no supervisor told of it" in text
    (text,) = made(accounted=ACCOUNTED[:1], told=[event(0.5, Kind.STARTED, job=40), *TOLD[:6]]).differences
    assert "job 40 restart 0" in text
    assert "accounting does not know it" in text


def test_a_run_too_short_to_tell_is_no_difference() -> None:
    assert made(accounted=[*ACCOUNTED, ours(200, 202)]).differences == ()


def test_two_quick_runs_of_a_job_are_told_apart() -> None:
    told = [event(0.5, Kind.STARTED), event(2.2, Kind.STARTED, 1), event(3, Kind.SERVING, 1)]
    got = made(told=told, accounted=[ours(0, 2), ours(2, 50)], others=[])
    assert got.served_seconds == 47
    assert got.differences == ()


# Accounting


def test_lines_of_sacct() -> None:
    text = (
        "41|ai-inference|PREEMPTED|1000000|1000001|1000101|vasp-02|billing=8,cpu=8,gres/gpu:v100s=1,gres/gpu=1|llama-14b\n"
        "77|alice|RUNNING|1000100|1000102|Unknown|vasp-[01-03]|cpu=3,gres/gpu=3|a|name\n"
        "78|alice|PENDING|1000100|Unknown|Unknown|None assigned||waits\n"
        "79|alice|CANCELLED by 0|1000100|None|1000101|None assigned||never ran\n"
    )
    first, second = slurm.parse_runs(text)
    assert (first.job, first.user, first.name, first.gpus) == (41, "ai-inference", "llama-14b", 1)
    assert (first.submitted, first.started, first.ended, first.nodes) == (1000000, 1000001, 1000101, ("vasp-02",))
    assert (second.name, second.ended, second.nodes, second.gpus) == (
        "a|name",
        None,
        ("vasp-01", "vasp-02", "vasp-03"),
        3,
    )
    with pytest.raises(slurm.SlurmError, match="cannot read the line 'sacct: error'"):
        slurm.parse_runs("sacct: error")


# The command


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    with home() as made_home:
        for name, value in made_home.environment().items():
            monkeypatch.setenv(name, value)
        nodes = {"vasp-02": "10.0.0.12"}
        gateway = {
            "v": 1,
            "registry": str(made_home.registry),
            "service_user": "ai-inference",
            "poll_seconds": 1,
            "stale_seconds": 10,
            "flags_dir": str(made_home.root),
            "upstream_dir": str(made_home.root),
            "tiers": [
                {"tier": "fast", "job_name": "llama-14b", "node_port": 8080, "nodes": nodes, "supervisors": nodes}
            ],
        }
        made_home.set(made_home.root / "gateway.json", json.dumps(gateway))
        yield made_home


def command(place: Home, *argv: str) -> int:
    return cli.main(["report", "--config", str(place.root / "gateway.json"), *argv])


def write(place: Home, *lines: bytes) -> None:
    (place.events / "41.jsonl").write_bytes(b"".join(lines))


def test_for_people_and_for_programs(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    now = int(time.time())
    shift = now - 700 - DAY.begin
    write(place, *(Event(one.at + shift, "fast", one.job, one.restart, one.kind, one.more).encode() for one in TOLD))
    rows = [
        f"41|ai-inference|PREEMPTED|{now - 701}|{now - 700}|{now - 599}|vasp-02|gres/gpu=1|llama-14b",
        f"77|alice|COMPLETED|{now - 600}|{now - 598}|{now - 202}|vasp-02|gres/gpu=1|vasp",
        f"41|ai-inference|RUNNING|{now - 701}|{now - 201}|Unknown|vasp-02|gres/gpu=1|llama-14b",
    ]
    place.set(place.slurm / "accounting", "\n".join(rows) + "\n")
    assert command(place, "--since", "12h") == 0
    told = capsys.readouterr().out
    assert "others waited for us   median 1.8 s, worst 1.8 s, of 1" in told
    assert "job 77 of alice on vasp-02: 1.8 s" in told
    assert command(place, "--since", "12h", "--json") == 0
    (got,) = json.loads(capsys.readouterr().out)
    assert (got["tier"], got["runs"], got["preemptions"], got["differences"]) == ("fast", 2, 1, [])
    assert got["returned_running"] == {"count": 1, "median": 2.0, "worst": 2.0}
    (asked,) = place.calls_of("sacct --allusers")[:1]
    assert "--nodelist=vasp-02" in asked


def test_the_period_is_what_accounting_is_asked_for(place: Home) -> None:
    assert command(place, "--since", "@1000000", "--until", "@1086400") == 0
    (asked,) = place.calls_of("sacct --allusers")
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
    second, first = events.read(tmp_path / "events", 0, [])[::-1]
    assert (first.at, first.kind, first.more) == (1234.568, Kind.SIGNALLED, {"cause": "preempted"})
    assert (second.kind, second.run, second.tier) == (Kind.SERVING, (41, 2), "fast")
    assert os.stat(tmp_path / "events" / "41.jsonl").st_mode & 0o777 == 0o644
