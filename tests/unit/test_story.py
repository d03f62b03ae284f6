"""`gleaner log`: one story of many files, whatever these hold."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from gleaner import cli, joblog, story, upstream
from gleaner.events import Event, Kind
from gleaner.journal import stamp
from gleaner.slurm import local_time
from tests.unit.fakes import Home, home

# 2026-11-29T08:40:00Z
BEGIN = 1795941600.0
CONTROLLER = "slurm-ctl.example.org"

JOURNALCTL = """#!/bin/sh
echo "journalctl $*" >> "$FAKE_SLURM/calls"
cat "$FAKE_SLURM/journal"
if [ -e "$FAKE_SLURM/journalctl.fails" ]; then cat "$FAKE_SLURM/journalctl.fails" >&2; exit 1; fi
"""


class Site:
    """A controller and what jobs have left."""

    def __init__(self, place: Home) -> None:
        self.place = place
        self.logs = place.root / "ai" / "logs"
        self.logs.mkdir()
        config = place.gateway_config()
        (fast,) = config["tiers"]
        config["tiers"].append({**fast, "tier": "reasoning", "job_name": "llama-72b"})
        place.set(place.root / "gateway.json", json.dumps(config))
        place.program(place.bin / "journalctl", JOURNALCTL)
        place.set(place.slurm / "journal")

    def write(self, job: int, name: str, *lines: str, end: str = "\n") -> Path:
        path = self.logs / str(job) / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as stream:
            stream.write("".join(line + end for line in lines))
        return path

    def event(self, at: float, kind: Kind, job: int = 41, tier: str = "fast", **more: Any) -> None:
        with (self.place.events / f"{job}.jsonl").open("ab") as stream:
            stream.write(Event(BEGIN + at, tier, job, 0, kind, more).encode())

    def journal(self, at: float, message: Any, unit: str = "gleaner-keeper.service", **more: str) -> None:
        value = {
            "__CURSOR": f"c{at}",
            "__REALTIME_TIMESTAMP": str(int((BEGIN + at) * 1_000_000)),
            "_HOSTNAME": CONTROLLER,
            "_SYSTEMD_UNIT": unit,
            "MESSAGE": message,
            **more,
        }
        with (self.place.slurm / "journal").open("a") as stream:
            stream.write(json.dumps(value) + "\n")

    def log(self, *argv: str, tier: str = "fast", since: str = f"@{BEGIN:.0f}") -> int:
        more = ["--since", since] if since else []
        return cli.main(["log", tier, "--config", str(self.place.root / "gateway.json"), *more, *argv])


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with home() as made:
        for name, value in made.environment().items():
            monkeypatch.setenv(name, value)
        yield Site(made)


def said(at: float, text: str, node: str = "vasp-02", job: int = 41, tier: str = "fast") -> str:
    return f"{stamp(BEGIN + at)} {joblog.Label(tier, job, 0, node)}: {text}"


def told(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Source, node, run and text of each line."""
    return [line.split(maxsplit=4)[1:] for line in capsys.readouterr().out.splitlines()]


def test_all_that_is_known_of_a_tier_is_one_story(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(41, "supervisor.log", said(1, "tier fast: job 41"), said(5, "serving on vasp-02:8080"))
    site.write(41, "rpc-vasp-03.log", said(3, "client connection", "vasp-03"))
    site.write(42, "supervisor.log", said(4, "of another tier", job=42, tier="reasoning"))
    site.event(2, Kind.STARTED, nodes=["vasp-02", "vasp-03"], gpus=2)
    site.event(6, Kind.LEFT, exit=12)
    site.journal(0.5, "fast: job 41 submitted")
    site.journal(0.6, "reasoning: job 42 submitted")
    site.journal(0.7, "reasoning: makes way: fast (priority 20) wants vasp-02")
    site.journal(5.5, "fast: routed to vasp-02, job 41 restart 0", "gleaner-upstream.service")
    site.journal(5.6, "Slurm answers again")
    site.journal(5.7, "Started gleaner-keeper.service.", "init.scope", UNIT="gleaner-keeper.service")
    assert site.log() == 0
    assert told(capsys) == [
        ["keeper", "slurm-ctl", "41", "fast: job 41 submitted"],
        ["keeper", "slurm-ctl", "-", "reasoning: makes way: fast (priority 20) wants vasp-02"],
        ["supervisor", "vasp-02", "41.0", "tier fast: job 41"],
        ["event", "vasp-02", "41.0", "started on vasp-02,vasp-03 with 2 GPUs"],
        ["rpc", "vasp-03", "41.0", "client connection"],
        ["supervisor", "vasp-02", "41.0", "serving on vasp-02:8080"],
        ["updater", "slurm-ctl", "41.0", "fast: routed to vasp-02, job 41 restart 0"],
        ["keeper", "slurm-ctl", "-", "Slurm answers again"],
        ["keeper", "slurm-ctl", "-", "Started gleaner-keeper.service."],
        [
            "event",
            "vasp-02",
            "41.0",
            "left: exit code 12, an agent was silent for too long; the tier was taken down whole",
        ],
    ]


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        (Kind.STARTED, {"nodes": ["a"], "gpus": 1}, "started on a with 1 GPU"),
        (Kind.SERVING, {}, "serving: the endpoint record is published"),
        (Kind.WITHDRAWN, {"why": "signal"}, "withdrawn: signal"),
        (Kind.SIGNALLED, {"cause": "preempted"}, "told to stop: preempted (Slurm shows a preemption time)"),
        (Kind.SIGNALLED, {"cause": "of a newer version"}, "told to stop: of a newer version"),
        (Kind.DRAINED, {"whole": True}, "drained: nothing in flight"),
        (Kind.DRAINED, {"whole": False}, "drained: the budget is used up, streams were cut"),
        (Kind.LEFT, {"exit": 0}, "left: exit code 0, stopped or yielded as asked"),
        (Kind.LEFT, {"exit": []}, "left: exit code []"),
    ],
)
def test_events_in_words(kind: Kind, more: dict[str, Any], words: str) -> None:
    assert story.in_words(Event(BEGIN, "fast", 41, 0, kind, more)) == words


def test_a_shared_file_system_that_hangs_is_named_and_not_waited_for(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.write(41, "supervisor.log", said(1, "one"))
    goes, really = threading.Event(), os.listdir

    def hangs(folder: Path) -> list[str]:
        assert goes.wait(30)
        return really(folder)

    monkeypatch.setattr(story, "SHARED_SECONDS", 0.1)
    monkeypatch.setattr(os, "listdir", hangs)
    try:
        assert site.log() == 3
    finally:
        goes.set()
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"error: {site.logs.parent}: no answer within 0.1 s: see why the shared file system hangs")


def test_a_refused_job_has_a_story(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    child = site.place.start(
        "supervise", "--plan", str(site.place.plans / "fast.json"), SLURM_JOB_ID="41", SLURMD_NODENAME="vasp-02"
    )
    assert child.wait(10) == 10
    site.write(41, "supervisor.log", *site.place.log("supervise").splitlines())
    assert site.log("--job", "41", since="") == 0
    ((source, node, run, text),) = told(capsys)
    assert (source, node, run) == ("supervisor", "vasp-02", "41.0")
    assert text.startswith("refused: ")
    assert "fast.json: cannot be read" in text


def test_a_file_keeps_its_order_where_a_clock_was_put_back(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(41, "supervisor.log", said(1, "one"), said(60, "two"), said(2, "three"), said(61, "four"))
    site.write(41, "head.log", said(1.5, "a"), said(59, "b"), said(60.5, "c"))
    assert site.log() == 0
    texts = [text for *_, text in told(capsys)]
    assert [text for text in texts if len(text) > 1] == ["one", "two", "three", "four"]
    assert [text for text in texts if len(text) == 1] == ["a", "b", "c"]
    assert texts == ["one", "a", "b", "two", "three", "c", "four"]


def test_lines_of_older_versions_are_shown_and_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(41, "supervisor.log", f"{stamp(BEGIN + 1)} tier fast: job 41 restart 0 on vasp-02", "srun: error: x")
    head = site.write(41, "head.log", "load_tensors: 1", "load_tensors: 2")
    os.utime(head, (BEGIN + 3, BEGIN + 3))
    site.write(41, "rpc-vasp-03.log", said(2, "later", "vasp-03"), "raw")
    assert site.log() == 0
    captured = capsys.readouterr()
    assert [line.split()[1:4] + line.split()[4:][-1:] for line in captured.out.splitlines()] == [
        ["supervisor", "-", "41", "vasp-02"],
        ["supervisor", "-", "41", "x"],
        ["rpc", "vasp-03", "41.0", "later"],
        ["rpc", "vasp-03", "41.0", "raw"],
        ["head", "-", "41", "1"],
        ["head", "-", "41", "2"],
    ]
    assert f"warning: {head}: 2 lines do not say when" in captured.err


def test_what_cannot_be_read_is_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(41, "supervisor.log", said(1, "good"))
    os.mkfifo(site.logs / "41" / "head.log")
    (site.logs / "41" / "rpc-a.log").symlink_to("/etc/passwd")
    site.event(2, Kind.SERVING)
    with (site.place.events / "41.jsonl").open("ab") as stream:
        stream.write(b"\xff\x00{]\n")
    site.place.set(site.place.slurm / "journal", "no json\n[]\n-- No entries --\n")
    site.place.set(site.place.slurm / "journalctl.fails", "No journal files were opened\n")
    assert site.log() == 0
    captured = capsys.readouterr()
    assert [line.split()[-1] for line in captured.out.splitlines()] == ["good", "published"]
    assert captured.err.splitlines() == [
        f"warning: {site.logs}/41/head.log: not a regular file",
        f"warning: {site.logs}/41/rpc-a.log: Too many levels of symbolic links",
        "warning: journalctl: No journal files were opened",
        "warning: journalctl: 2 entries cannot be read",
        f"warning: {site.place.events}/41.jsonl: 1 lines are no events",
    ]


def test_nothing_that_a_terminal_obeys_is_printed(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write(41, "supervisor.log", said(1, "\x1b[2Jred\x9b"))
    site.journal(2, list(b"\xff bytes"))
    assert site.log() == 0
    assert [text for *_, text in told(capsys)] == ["?[2Jred?", "\N{REPLACEMENT CHARACTER} bytes"]


def test_older_generations_are_read_first(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(["router.log.3", "router.log.2", "router.log.1", "router.log"]):
        site.write(41, name, said(number, f"line {number}"))
    assert site.log() == 0
    assert [text for *_, text in told(capsys)] == [f"line {number}" for number in range(4)]


def test_the_last_lines_since_a_time_of_one_job(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for job in (41, 43):
        site.write(job, "supervisor.log", *(said(number, f"{job} {number}", job=job) for number in range(100)))
    site.journal(98.5, "fast: job 43 is running on vasp-02")
    site.journal(98.6, "fast: job 41 ended")
    assert site.log("--job", "43", "--lines", "3", since=f"@{BEGIN + 50:.0f}") == 0
    assert [text for *_, text in told(capsys)] == ["43 98", "fast: job 43 is running on vasp-02", "43 99"]
    assert site.log(since=f"@{BEGIN + 99:.0f}") == 0
    assert [text for *_, text in told(capsys)] == ["41 99", "43 99"]


def test_slurms_own_words_are_part_of_it(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    words = "slurmstepd-vasp-02: error: *** JOB 41 ON vasp-02 CANCELLED AT {} DUE TO PREEMPTION ***"
    site.place.set(site.logs / "llama-14b.log", words.format(local_time(BEGIN + 2)) + "\n")
    site.write(41, "supervisor.log", said(1, "before"), said(3, "after"))
    assert site.log() == 0
    first, (source, node, run, text), last = told(capsys)
    assert (first[-1], last[-1]) == ("before", "after")
    assert (source, node, run) == ("slurm", "vasp-02", "41")
    assert text.endswith("DUE TO PREEMPTION ***")


@pytest.mark.parametrize(
    ("argv", "tier", "error"),
    [
        ((), "slow", "error: tier: got 'slow', want one of fast, reasoning"),
        (("--job", "99"), "fast", "error: --job: got 99, want one of fast's that left something: 41"),
        (("--config", "/nonexistent"), "fast", "error: /nonexistent: cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_asked_is_said(
    site: Site, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], tier: str, error: str
) -> None:
    site.write(41, "supervisor.log", said(1, "x"))
    site.write(99, "supervisor.log", said(1, "x", job=99, tier="reasoning"))
    assert site.log(*argv, tier=tier) == 2
    assert capsys.readouterr().err.splitlines() == [error]


@pytest.mark.parametrize("argv", [("--lines", "0"), ("--lines", "x"), ("--job", "0"), ("--since", "2 hours")])
def test_wrong_arguments_are_refused(site: Site, argv: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        site.log(*argv)
    assert caught.value.code == 2
    assert f"{argv[0]}: got {argv[1]!r}, want " in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.logs.rmdir()
    assert site.log() == 0
    told = capsys.readouterr().err.splitlines()
    assert f"warning: {site.logs}: No such file or directory" in told
    assert "warning: nothing was said of fast since 2026-11-29T08:40:00.000Z; cure: an earlier --since" in told


def test_few_files_are_open_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A year of jobs has more files than a process may open."""
    for job in range(100, 300):
        site.write(job, "supervisor.log", said(job, "a", job=job), said(job + 0.5, "b", job=job))
    config = upstream.Config.load(site.place.root / "gateway.json")
    told = story.Story(config, "fast", None, BEGIN, []).entries()
    before, most = len(os.listdir("/proc/self/fd")), 0
    for _ in told:
        most = max(most, len(os.listdir("/proc/self/fd")))
    assert most - before < 10


def test_what_is_said_later_is_followed(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(story, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(story, "LOOK_SECONDS", 0.0)
    log = site.write(41, "router.log", said(1, "one"), said(2, "two"))
    problems: list[str] = []
    one = story.Story(upstream.Config.load(site.place.root / "gateway.json"), "fast", None, BEGIN, problems)
    assert [entry.text for entry in one.entries()] == ["one", "two"]
    new = one.follow()

    def until_told() -> list[str]:
        return [entry.text for entry in iter(lambda: next(new), None) if entry is not None]

    assert until_told() == []
    site.write(41, "router.log", said(3, "three"))
    joblog.rotate(log, log.stat())
    site.write(41, "router.log", said(4, "four"))
    site.write(44, "supervisor.log", said(5, "another job", job=44))
    site.event(6, Kind.SERVING, job=44)
    assert until_told() == ["three", "four", "another job", "serving: the endpoint record is published"]
    assert until_told() == []
    assert problems == []
    calls = site.place.calls_of("journalctl")
    assert all("--unit=gleaner-keeper.service" in call for call in calls)


def test_the_journal_is_followed_behind_what_was_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.journal(1, "reasoning: of another tier")
    journal = story.Journal("fast", ["fast", "reasoning"], None, BEGIN, [])
    assert list(journal.entries()) == []
    assert any(word.startswith("--until=") for word in site.place.calls_of("journalctl")[0].split())
    assert list(journal.entries()) == []
    last = site.place.calls_of("journalctl")[-1].split()
    assert "--after-cursor=c1" in last
    assert not any(word.startswith("--until=") for word in last)


def test_a_pipe_that_is_closed_leaves_no_journalctl(site: Site) -> None:
    site.place.program(site.place.bin / "journalctl", '#!/bin/sh\ncat "$FAKE_SLURM/journal"\nexec sleep 1000\n')
    site.journal(1, "fast: job 41 submitted")
    entries = story.Journal("fast", ["fast"], None, BEGIN, []).entries()
    assert next(entries).job == 41
    assert isinstance(entries, Generator)
    closer = threading.Thread(target=entries.close)
    closer.start()
    closer.join(10)
    assert not closer.is_alive()
