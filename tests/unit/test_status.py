"""`gleaner status`: what Slurm and the shared file system say becomes words; what does not answer is a problem."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gleaner import bounded, claims, cli, keeper, measured, node, occupancy, preempted, record, slurm, survey
from gleaner import status_words as words
from gleaner.events import Event, Kind
from gleaner.occupancy import Obstacles, Stay
from tests.unit.fakes import DIGEST, Home, home, node_line, queue_line

RECORD = record.Record("fast", 41, 0, "vasp-02", 8080, ("one",), 0, 1)
NODE = slurm.Node("vasp-02", True, 1, 1, 0, 40, 0, 384000, 0)
FULL = dataclasses.replace(NODE, gpus_held=1)
BUILD = "1-cpu-abc"
WIDTH = 100


def stay_line(**fields: str) -> str:
    """One line of the jobs on nodes."""
    defaults = {
        "job": "7",
        "user": "alice",
        "left": "1:20:00",
        "nodes": "vasp-02",
        "alloc": "cpu=1,mem=100M,node=1,gres/gpu=1",
        "per_node": "gres:gpu:1",
        "per_job": "N/A",
        "per_socket": "N/A",
        "per_task": "N/A",
    }
    return "".join(f"{value:<24}|" for value in {**defaults, **fields}.values()) + "\n"


def plan(**changes: Any) -> dict[str, Any]:
    rows = [
        {"device": "vasp-02 gpu0", "total": 900, "limit": 32768},
        {"device": "vasp-02 host", "total": 1377, "limit": 384000},
        {"device": "vasp-03 cpu", "total": 300, "limit": 384000},
    ]
    return {"v": 1, "slurm": {"mem_mib": 1400}, "memory": rows, **changes}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A tier that serves, on a node that Slurm knows, with all that belongs to it."""
    with home() as made:
        for name, value in made.environment().items():
            monkeypatch.setenv(name, value)
        made.set(made.root / "gateway.json", json.dumps(made.gateway_config()))
        made.set(made.root / "keeper.json", json.dumps(made.keeper_config(made.root / "run.slurm")))
        made.set(made.slurm / "nodes", node_line(FULL, "MIXED"))
        made.set(made.slurm / "queue", queue_line())
        made.set(made.slurm / "stays", stay_line(job="41", user="ai-inference", left="UNLIMITED"))
        made.set(made.slurm / "memory", "41.batch|16384K|vasp-02\n41.0|640M|vasp-02\n")
        made.set(made.plans / "fast.json", json.dumps(plan()))
        made.set(made.root / "fast.up")
        record.write(made.registry, RECORD)
        (made.root / "ai/llama.cpp/.builds" / BUILD).mkdir(parents=True)
        (made.root / "ai/llama.cpp/current").symlink_to(f".builds/{BUILD}")
        (made.root / "ai/logs/41").mkdir(parents=True)
        (made.root / "ai/logs/41/engine").symlink_to(f"/elsewhere/{BUILD}")
        yield made


def arguments(place: Home, *more: str) -> list[str]:
    return ["status", "--config", f"{place.root}/gateway.json", "--keeper", f"{place.root}/keeper.json", *more]


class Page:
    """What the command said, for people and for programs, and how it ended."""

    def __init__(self, place: Home, capsys: pytest.CaptureFixture[str], *more: str) -> None:
        self.code = cli.main(arguments(place, *more))
        self.text = capsys.readouterr().out
        assert cli.main(arguments(place, "--json", *more)) == self.code
        told = capsys.readouterr()
        assert told.err == ""
        self.document: dict[str, Any] = json.loads(told.out)
        assert all(len(line) <= WIDTH for line in self.text.splitlines()), self.text

    @property
    def tier(self) -> dict[str, Any]:
        (line,) = self.document["tiers"]
        assert isinstance(line, dict)
        return line

    @property
    def problems(self) -> list[str]:
        return list(self.document["problems"])


def waiting(place: Home, reason: str = "Resources", **fields: str) -> None:
    """The tier's job is in the queue."""
    place.set(place.slurm / "queue", queue_line(state="PENDING", nodes="", reason=reason, ran="0:00", **fields))
    place.set(place.slurm / "stays", stay_line())
    (place.root / "fast.up").unlink(missing_ok=True)
    record.path_of(place.registry, "fast").unlink(missing_ok=True)


# The page


def test_a_tier_that_serves(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    page = Page(place, capsys)
    assert (page.code, page.problems) == (0, [])
    assert page.text.splitlines()[0] == "fast  serving on vasp-02: one"
    assert page.text.splitlines()[1] == f"      job 41, runs for 10 min, build {BUILD}"
    assert (page.tier["state"], page.tier["job"], page.tier["node"], page.tier["models"]) == (
        "serving", 41, "vasp-02", ["one"],
    )  # fmt: skip
    assert page.document["v"] == 1
    assert page.document["versions"]["slurm"] == "24.11.5"
    assert page.document["versions"]["engine"] == BUILD
    (node,) = page.document["nodes"]
    assert (node["words"], node["gpus"], node["gpus_held"], node["tiers"], node["jobs"]) == (
        "mixed", 1, 1, ["fast"], [],
    )  # fmt: skip
    assert [(row["device"], row["planned_mib"], row["peak_mib"], row["over"]) for row in page.document["memory"]] == [
        ("gpu0", 900, None, False),
        ("host", 1377, 656, False),
    ]


def test_more_than_planned_is_said(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "memory", "41.0|1395M|vasp-02\n")
    assert "1395    -  more than planned" in Page(place, capsys).text


def test_a_job_of_another_plan_is_not_held_against_this_one(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "queue", queue_line(comment="gleaner:" + "f" * 16))
    page = Page(place, capsys)
    assert "made from another plan" in page.text
    assert [row["peak_mib"] for row in page.document["memory"]] == [None, None]


def test_only_tiers_is_soon(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    page = Page(place, capsys, "--tiers")
    assert page.text == "fast  serving on vasp-02: one\n      job 41, runs for 10 min\n"
    assert [call.split()[0] for call in place.calls] == ["squeue", "squeue"]


# Words


def test_behind_whom_a_tier_waits(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    waiting(place)
    page = Page(place, capsys)
    behind = "job 7 of alice on vasp-02 (1 h 20 min left at most)"
    assert page.text.startswith(f"fast  queued: waiting for GPUs behind {behind}\n")
    assert page.tier["behind"] == [7]
    assert "vasp-02  mixed  1 of 1     -      job 7 of alice, 1 h 20 min left at most" in page.text


def test_a_job_without_gpus_is_in_nobodys_way(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    waiting(place)
    place.set(place.slurm / "stays", stay_line() + stay_line(job="8", alloc="cpu=1", per_node="N/A"))
    assert Page(place, capsys).tier["behind"] == [7]


def test_where_accounting_does_not_track_gpus_all_jobs_may_have_them(
    place: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting(place)
    place.set(place.slurm / "stays", stay_line(alloc="cpu=1,mem=1G,node=1", per_node="N/A"))
    assert Page(place, capsys).tier["behind"] == [7]


@pytest.mark.parametrize("nodes", ["vasp-[01-03,0", "vasp-[01-03],vasp-[", "a" * occupancy.NODES_LIMIT])
def test_a_list_of_nodes_that_squeue_cut_is_not_read_as_other_nodes(nodes: str) -> None:
    with pytest.raises(slurm.SlurmError, match="squeue: job 7: cannot read its list of nodes"):
        occupancy.parse_stays(stay_line(nodes=nodes))


def test_a_list_of_nodes_is_read_to_its_end() -> None:
    (stay,) = occupancy.parse_stays(stay_line(nodes="gpu1,vasp-[01,03],r[1-2]n"))
    assert stay.nodes == ("gpu1", "vasp-01", "vasp-03", "r1n", "r2n")


def test_a_dead_node_is_named_beside_the_jobs_of_others(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    waiting(place, reason="ReqNodeNotAvail, UnavailableNodes:vasp-03")
    config, kept = place.gateway_config(), place.keeper_config(place.root / "run.slurm")
    config["tiers"][0]["supervisors"] = {"vasp-02": "10.0.0.12", "vasp-03": "10.0.0.13"}
    kept["tiers"][0]["need"].update(nodes=["vasp-02", "vasp-03"], node_count=2)
    place.set(place.root / "gateway.json", json.dumps(config))
    place.set(place.root / "keeper.json", json.dumps(kept))
    dead = node_line(dataclasses.replace(NODE, name="vasp-03"), "DOWN*").replace(
        "\n", " Reason=fan [root@2026-11-29T08:00:00]\n"
    )
    place.set(place.slurm / "nodes", node_line(FULL, "ALLOCATED") + dead)
    page = Page(place, capsys)
    assert page.tier["words"] == (
        "queued: waiting for GPUs behind job 7 of alice on vasp-02 (1 h 20 min left at most), and for "
        "vasp-03 (down, does not answer: fan [root@2026-11-29T08:00:00])"
    )
    assert "vasp-03  down, does not answer" in page.text


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("BeginTime", "queued: Slurm keeps job 41 back for a moment, since it was requeued"),
        ("Dependency", "queued: job 41 waits for the tier's job before it to end"),
        (
            "launch failed requeued held",
            "queued: Slurm holds job 41 after a launch that failed; the keeper releases it",
        ),
        ("None", "queued: waiting for Slurm to start job 41"),
        ("QOSMaxJobsPerUserLimit", "queued: waiting for Slurm to start job 41 (QOSMaxJobsPerUserLimit)"),
        (
            "JobHeldUser",
            "held: job 41 is held in Slurm for its user (`scontrol uhold`); `scontrol release 41` ends it",
        ),
        (
            "JobHeldAdmin",
            "held: job 41 is held in Slurm by an administrator (`scontrol hold`); `scontrol release 41` ends it",
        ),
    ],
)
def test_why_a_job_waits_that_nobody_is_before(
    place: Home, capsys: pytest.CaptureFixture[str], reason: str, said: str
) -> None:
    waiting(place, reason)
    place.set(place.slurm / "nodes", node_line(NODE, "IDLE"))
    place.set(place.slurm / "stays", "")
    assert Page(place, capsys).tier["words"] == said


@pytest.mark.parametrize(
    ("kept", "said", "by"),
    [
        ({"held": True, "why": "held by alice"}, "held by alice; `gleaner tier fast started` ends it", "alice"),
        (
            {"held": True, "why": "job 41 was cancelled by uid 0"},
            "held: job 41 was cancelled by root; `gleaner tier fast started` ends it",
            "root",
        ),
        (
            {"held": True, "why": "job 41 was cancelled by uid 64333"},
            "held: job 41 was cancelled by uid 64333; `gleaner tier fast started` ends it",
            "uid 64333",
        ),
        (
            {"held": True, "why": "job 41 was cancelled, and accounting did not say by whom within 120 s"},
            "held: job 41 was cancelled, and accounting did not say by whom within 120 s; "
            "`gleaner tier fast started` ends it",
            None,
        ),
        ({"why": "reasoning (priority 20) wants vasp-02"}, "paused: reasoning (priority 20) wants vasp-02", None),
        (
            {"failures": 2, "failure": "job 41 ended: FAILED after 1 s"},
            "paused: job 41 ended: FAILED after 1 s (failure 2 in a row)",
            None,
        ),
        ({}, "absent: no job, and the keeper has not submitted one: is gleaner-keeper.service running?", None),
    ],
)
def test_a_tier_without_a_job(
    place: Home, capsys: pytest.CaptureFixture[str], kept: dict[str, Any], said: str, by: str | None
) -> None:
    place.set(place.slurm / "queue", "")
    keeper.save_state(place.root / "keeper-state.json", {"fast": keeper.TierState(**kept)})
    page = Page(place, capsys)
    assert (page.tier["words"], page.tier["held_by"]) == (said, by)


@pytest.mark.parametrize(
    ("kept", "fields", "said"),
    [
        ({}, {"preempted": "2026-11-24T01:10:00"}, "yielding: a paying job gets vasp-02"),
        (
            {"job": 41, "ending": True, "why": "job 41 is being replaced: its plan is not the current one"},
            {},
            "yielding: job 41 is being replaced: its plan is not the current one",
        ),
        ({"job": 41, "ending": True, "held": True, "why": "held by root"}, {}, "yielding: held by root"),
        ({}, {"state": "COMPLETING"}, "yielding: job 41 ends"),
    ],
)
def test_why_a_tier_yields(
    place: Home, capsys: pytest.CaptureFixture[str], kept: dict[str, Any], fields: dict[str, str], said: str
) -> None:
    place.set(place.slurm / "queue", queue_line(**fields))
    keeper.save_state(place.root / "keeper-state.json", {"fast": keeper.TierState(**kept)})
    assert Page(place, capsys).tier["words"] == said


def test_a_job_that_a_dead_node_keeps(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "queue", queue_line(state="COMPLETING"))
    place.set(place.slurm / "nodes", node_line(NODE, "IDLE+COMPLETING+NOT_RESPONDING"))
    said = "yielding: job 41 ends; not gone yet from vasp-02 (does not answer)"
    assert Page(place, capsys).tier["words"] == said


def test_a_tier_that_loads_and_one_that_is_not_routed(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    (place.root / "fast.up").unlink()
    assert Page(place, capsys).tier["words"].startswith("unrouted: it runs on vasp-02; `journalctl")
    record.path_of(place.registry, "fast").unlink()
    assert Page(place, capsys).tier["words"] == "loading on vasp-02 for 10 min"


def test_a_tier_behind_a_tier_is_told_by_its_name() -> None:
    stay = Stay(9, "ai-inference", ("vasp-02",), None, True)
    assert words.job_in_words(stay, {9: "fast"}) == "tier fast (job 9) on vasp-02"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3661, "1 h 1 min"), (7200, "2 h"), (90061, "1 d 1 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert words.span(seconds) == said


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("IDLE", "idle"),
        ("IDLE+DRAIN", "drained"),
        ("MIXED+DRAIN", "draining"),
        ("ALLOCATED+COMPLETING", "allocated"),
        ("DOWN*", "down, does not answer"),
        ("DOWN+NOT_RESPONDING", "down, does not answer"),
        ("IDLE*+DRAIN", "drained, does not answer"),
        ("DOWN*+DRAIN", "drained, down, does not answer"),
        ("IDLE+MAINT+RESERVED", "in maintenance, reserved"),
        ("IDLE+INVALID_REG", "has less than Slurm was told"),
    ],
)
def test_slurms_states_in_words(state: str, said: str) -> None:
    assert occupancy.state_in_words(state) == said


# Who is in the way


def need(nodes: tuple[str, ...], count: int) -> claims.Need:
    return claims.Need(10, nodes, count, 1, 8, 1000)


HELD = {"vasp-01": dataclasses.replace(FULL, name="vasp-01"), "vasp-02": NODE}
STAY = Stay(7, "alice", ("vasp-01",), 60, True)


def test_one_free_node_is_enough_for_a_router() -> None:
    assert occupancy.obstacles(need(("vasp-01", "vasp-02"), 1), HELD, [STAY]) == Obstacles((), ())


def test_a_tier_over_nodes_needs_them_all() -> None:
    assert occupancy.obstacles(need(("vasp-01", "vasp-02"), 2), HELD, [STAY]) == Obstacles((STAY,), ())


def test_memory_may_be_what_lacks() -> None:
    full = {"vasp-01": dataclasses.replace(NODE, name="vasp-01", mem_held_mib=384000)}
    assert occupancy.obstacles(need(("vasp-01",), 1), full, [STAY]).jobs == (STAY,)


def test_a_node_that_slurm_does_not_know_is_shut() -> None:
    assert occupancy.obstacles(need(("vasp-09",), 1), HELD, [STAY]) == Obstacles((), ("vasp-09",))


def test_a_line_that_is_none_of_squeues_is_refused() -> None:
    with pytest.raises(slurm.SlurmError, match="cannot read the line 'what'"):
        occupancy.parse_stays("what\n")


# What does not answer


def test_without_slurm(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "squeue.fails", "Unable to contact slurm controller")
    page = Page(place, capsys)
    assert page.code == 3
    assert page.text.startswith("fast  unknown: Slurm does not answer\n")
    assert page.problems == ["Slurm does not answer: squeue: Unable to contact slurm controller"]
    assert not place.calls_of("scontrol"), "it is asked nothing more"


def test_without_memory_of_jobs(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "sstat.fails", "sstat: error: slurmd does not answer")
    page = Page(place, capsys)
    assert page.code == 0
    assert page.problems == ["fast: its memory cannot be measured: sstat: sstat: error: slurmd does not answer"]


def test_a_node_that_slurm_does_not_know_is_a_problem(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "scontrol.fails", "Node vasp-02 not found")
    page = Page(place, capsys)
    assert "vasp-02: Slurm does not know this node" in page.problems[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"v": 1}', '{"v": 1, "slurm": {}, "memory": [{"device": 1}]}'])
def test_a_broken_plan_is_a_problem(place: Home, capsys: pytest.CaptureFixture[str], text: str) -> None:
    place.set(place.plans / "fast.json", text)
    page = Page(place, capsys)
    (problem,) = page.problems
    assert problem.startswith(f"{place.plans}/fast.json")
    assert problem.endswith("run playbooks/tiers.yml")
    assert page.code == 0


def test_a_broken_event_is_a_problem(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.events / "41.jsonl", "what\n")
    assert Page(place, capsys).problems == [f"{place.events}/41.jsonl: 1 lines are no events"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("what", "not a JSON document"), ('{"v": 1, "tiers": {"fast": 3}}', "not what the keeper writes")],
)
def test_a_broken_state_of_the_keeper_is_a_problem(
    place: Home, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    place.set(place.root / "keeper-state.json", text)
    cli.main(arguments(place, "--json"))
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert f"keeper-state.json: {said}" in problem


def test_no_shared_file_system(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    (place.root / "ai").rename(place.root / "away")
    page = Page(place, capsys)
    assert any("is the shared file system mounted?" in problem for problem in page.problems)
    assert page.tier["job"] == 41


def test_a_shared_file_system_that_hangs_is_waited_for_no_longer_than_said(
    place: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "SHARED_SECONDS", 0.1)
    monkeypatch.setattr(measured, "planned", lambda *_: time.sleep(30))
    page = Page(place, capsys)
    assert page.code == 3
    assert page.problems == [f"{place.root}/ai: no answer within 0.1 s"]
    assert page.tier["state"] == "serving"


def test_a_question_hands_on_what_it_raises() -> None:
    def fails() -> None:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        bounded.ask("it", fails, 5.0)
    assert bounded.ask("it", lambda: 3, 5.0) == 3


def test_without_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--config", "/nonexistent"]) == 2
    assert "/nonexistent: cannot be read: No such file" in capsys.readouterr().err


# Memory


def test_of_a_step_over_nodes_only_the_greediest_is_known() -> None:
    text = "2.batch|16726K|vasp-01|\n2.0|159006K|vasp-03|\n2.extern||\nwhat\n"
    assert measured.parse_peaks(text) == {"vasp-03": 155}
    assert measured.parse_peaks("2.batch|16M|vasp-01\n2.0|1.5G|vasp-01\n") == {"vasp-01": 16 + 1536}


def test_a_router_shows_the_node_that_it_has_and_all_while_it_has_none() -> None:
    rows = [measured.Row("fast", name, "host", 1, 2) for name in ("vasp-01", "vasp-02")]
    assert [row.node for row in measured.of_nodes(rows, ["vasp-02"])] == ["vasp-02"]
    assert measured.of_nodes(rows, []) == rows


# Preemptions

BEGIN = 1_000_000.0


def event(at: float, kind: Kind, restart: int = 0, **more: Any) -> Event:
    return Event(BEGIN + at, "fast", 41, restart, kind, more)


TOLD = [
    event(0, Kind.STARTED, nodes=["vasp-02"], gpus=1),
    event(10, Kind.SERVING),
    event(100, Kind.SIGNALLED, cause="preempted"),
    event(100, Kind.WITHDRAWN, why="signal"),
    event(100.9, Kind.DRAINED, whole=True),
    event(101, Kind.LEFT, exit=0),
]
BACK = [event(150, Kind.STARTED, 1, nodes=["vasp-02"], gpus=1), event(162.5, Kind.SERVING, 1)]


def test_a_preemption() -> None:
    (one,) = preempted.last([*TOLD, *BACK], ["fast"], BEGIN + 200)
    assert (one.at, one.nodes, one.whole, one.away_seconds) == (BEGIN + 100, ("vasp-02",), True, 62.5)
    assert preempted.last([*TOLD, *BACK], ["reasoning"], BEGIN + 200) == []


def test_a_run_that_is_signalled_twice_is_preempted_once() -> None:
    again = [*TOLD[:4], event(100.5, Kind.SIGNALLED, cause="preempted"), *TOLD[4:]]
    (one,) = preempted.last(again, ["fast"], BEGIN + 200)
    assert (one.at, one.away_seconds) == (BEGIN + 100, None)


def test_streams_that_were_cut() -> None:
    cut = [*TOLD[:4], event(105, Kind.DRAINED, whole=False), event(106, Kind.LEFT, exit=0)]
    assert preempted.last(cut, ["fast"], BEGIN + 200)[0].whole is False


def test_another_end_is_no_preemption() -> None:
    ended = [*TOLD[:2], event(100, Kind.SIGNALLED, cause="replaced"), event(101, Kind.LEFT, exit=0)]
    assert preempted.last(ended, ["fast"], BEGIN + 200) == []


def accounted(job: int, started: float, user: str = "alice") -> slurm.Run:
    return slurm.Run(job, user, "COMPLETED", int(BEGIN), int(BEGIN + started), None, ("vasp-02",), 1)


def test_for_whom_a_tier_was_preempted() -> None:
    found = preempted.last([*TOLD, *BACK], ["fast"], BEGIN + 200)
    runs = [accounted(5, 50), accounted(41, 150, "ai-inference"), accounted(8, 120), accounted(7, 102)]
    (one,) = preempted.with_jobs(found, runs, "ai-inference")
    assert (one.job_after, one.user_after) == (7, "alice")
    (nobody,) = preempted.with_jobs(found, [accounted(9, 190)], "ai-inference")
    assert nobody.job_after is None


def test_the_last_preemptions_on_the_page(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    told = [dataclasses.replace(one, at=one.at - BEGIN + now - 200) for one in [*TOLD, *BACK]]
    place.set(place.events / "41.jsonl", "".join(one.encode().decode() for one in told))
    started = int(now - 98)
    row = f"7|alice|RUNNING|{started}|{started}|Unknown|vasp-02|cpu=1,gres/gpu=1\n"
    place.set(place.slurm / "accounting", row)
    page = Page(place, capsys)
    assert "fast  vasp-02  job 7 of alice  ended whole  1 min" in page.text
    place.set(place.slurm / "sacct.fails", "Problem talking to the database")
    page = Page(place, capsys)
    assert (page.code, page.document["preemptions"][0]["job_after"]) == (0, None)
    assert "Problem talking to the database" in page.problems[0]


def test_what_happened_long_ago_is_the_ledgers(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    path = place.events / "41.jsonl"
    place.set(path, "".join(one.encode().decode() for one in TOLD))
    os.utime(path, (time.time() - 8 * 86400,) * 2)
    assert Page(place, capsys).document["preemptions"] == []


# What nodes say of themselves


def told_by_node(place: Home, monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, dict[str, Any]]) -> None:
    class Stdin:
        def read(self) -> str:
            return json.dumps(pairs)

    monkeypatch.setattr("sys.stdin", Stdin())


def answer(**changes: Any) -> dict[str, Any]:
    facts = {
        "v": 1, "program": node.installed(), "engine": {"build": BUILD, "manifest": "aa"},
        "models": {"one": "present"}, "gpus": [{"index": 0, "memory_mib": 32768, "used_mib": 800}],
        "jobs": [{"job": 41, "host_mib": 700, "gpus_mib": [790]}], "problems": [], **changes,
    }  # fmt: skip
    return {"rc": 0, "stdout": json.dumps(facts)}


def test_a_node_tells_what_it_has(
    place: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told_by_node(place, monkeypatch, ("vasp-02", answer()))
    page = Page(place, capsys, "--answers")
    assert page.problems == []
    assert "vasp-02  800 of 32768           1 of 1           as here  the one in use" in page.text
    assert [(row["device"], row["now_mib"]) for row in page.document["memory"]] == [("gpu0", 790), ("host", 700)]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"unreachable": True, "msg": "Failed to connect\nmore"}, "vasp-02: cannot be reached: Failed to connect"),
        ({"rc": 2, "stderr": "", "msg": "[Errno 2] No such file"}, "`gleaner node` failed there: [Errno 2] No such"),
        ({"failed": True, "msg": "Timed out after 90 s"}, "failed there: Timed out after 90 s"),
        ({"rc": 124, "stderr": "", "msg": "non-zero return code"}, "vasp-02: `gleaner node` did not end there in time"),
        ({"rc": 137, "stderr": "Killed"}, "vasp-02: `gleaner node` did not end there in time"),
        ({"rc": 0, "stdout": "{}"}, "vasp-02: `gleaner node` there is of another version: run site.yml"),
        ({"rc": 0, "stdout": "what"}, "vasp-02: `gleaner node` there is of another version: run site.yml"),
        (answer(v=2), "vasp-02: `gleaner node` there is of another version: run site.yml"),
        ({}, "vasp-02: was not asked: run playbooks/status.yml without --limit"),
        (answer(problems=["gpus: nvidia-smi is not there"]), "vasp-02: gpus: nvidia-smi is not there"),
        (answer(program="gleaner-old"), "vasp-02: program: got gleaner-old, want "),
        (answer(engine={"build": "other", "manifest": "aa"}), f"vasp-02: engine: sees other, want {BUILD}"),
        (answer(models={"one": "changed"}), "vasp-02: model one is changed: run playbooks/tiers.yml"),
    ],
)
def test_what_is_wrong_with_a_node_is_a_problem(
    place: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, result: dict[str, Any], said: str
) -> None:
    told_by_node(place, monkeypatch, ("vasp-02", result))
    page = Page(place, capsys, "--answers")
    assert said in "\n".join(page.problems)
    assert page.code == 0


def test_another_release_of_slurm_is_a_problem(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(place.slurm / "nodes", node_line(FULL, "MIXED").replace("Version=24.11.5", "Version=22.05.8"))
    assert Page(place, capsys).problems == [
        "vasp-02: slurmd: got 22.05.8, the controller has 24.11.5: install the same release"
    ]


@pytest.mark.parametrize("text", ["", "{", "3", '[["vasp-02"]]'])
def test_answers_that_are_none_are_refused(
    place: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert cli.main(arguments(place, "--answers")) == 2
    assert "--answers: got no list" in capsys.readouterr().err


NVIDIA_SMI = """#!/bin/sh
case "$1" in
*memory.used*) echo "0, 00000000:3B:00.0, 32768, 800" ;;
*) echo "00000000:3B:00.0, $PPID, 790"; echo "00000000:3B:00.0, 1, [N/A]" ;;
esac
"""


def test_a_node_looks_at_itself(
    place: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = place.root / "ai/llama.cpp/.builds" / BUILD
    (build / "manifest.json").write_text("{}")
    place.program(place.bin / "nvidia-smi", NVIDIA_SMI)
    pids = f"PID JOBID STEPID LOCALID GLOBALID\n{os.getpid()} 41 0 0 0\n4194304 41 batch - -\n"
    place.program(place.bin / "scontrol", f"#!/bin/sh\necho '{pids}'\n")
    spec = {
        "v": 1,
        "directory": str(tmp_path),
        "models": [],
        "routers": {"address": "", "ports": [], "drain_seconds": 1},
    }
    place.set(place.root / "models.json", json.dumps(spec))
    argv = ["node", "--engine", str(build.parent.parent), "--spec", str(place.root / "models.json")]
    assert cli.main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == []
    assert told["engine"]["build"] == BUILD
    assert told["gpus"] == [{"index": 0, "bus_id": "00000000:3B:00.0", "memory_mib": 32768, "used_mib": 800}]
    (job,) = told["jobs"]
    assert (job["job"], job["gpus_mib"]) == (41, [790])
    assert job["host_mib"] > 1


@pytest.mark.parametrize(
    ("used", "given", "told"),
    [
        # Nothing on its first one yet.
        ({"b1": 790}, {0, 1}, [0, 790]),
        ({"b3": 5}, {2, 3}, [0, 5]),
        ({}, {1}, [0]),
        ({"b0": 1, "b1": 2, "b2": 3, "b3": 4}, set(), [1, 2, 3, 4]),
        # Which ones the job has is not known, or is not what is seen.
        ({"b1": 790}, set(), None),
        ({"b1": 790}, {0}, None),
        ({"b1": 790, "elsewhere": 3}, {1}, None),
        ({"b1": 790}, {1, 7}, None),
        ({}, set(), None),
    ],
)
def test_memory_is_that_of_the_gpu_it_is_on(used: dict[str, int], given: set[int], told: list[int] | None) -> None:
    there = [{"index": number, "bus_id": f"b{number}"} for number in range(4)]
    assert node.memory_by_gpu(used, given, there) == told


def test_without_gpus_a_node_knows_nothing_of_them() -> None:
    assert node.memory_by_gpu({}, {0}, []) is None


def test_slurm_tells_each_process_its_gpus(tmp_path: Path) -> None:
    for pid, environ in {1: "A=b\0SLURM_JOB_GPUS=0,1\0", 2: "SLURM_JOB_GPUS=0,1\0SLURM_STEP_GPUS=3\0", 3: ""}.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "environ").write_text(environ)
    assert node.gpus_given(tmp_path, [1, 3, 4]) == {0, 1}
    assert node.gpus_given(tmp_path, [2]) == {3}
    assert node.gpus_given(tmp_path, [3]) == set()


def test_what_a_job_has_on_its_second_gpu_is_not_shown_as_on_its_first() -> None:
    rows = [measured.Row("fast", "vasp-02", device, 900, 32768) for device in ("gpu0", "gpu1")]
    for told, shown in (([0, 790], [0, 790]), (None, [None, None])):
        facts = {"vasp-02": {"jobs": [{"job": 41, "host_mib": 700, "gpus_mib": told}]}}
        assert [row.now_mib for row in measured.with_measures(rows, 41, {}, facts)] == shown


def test_a_node_without_anything_still_answers(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    place.program(place.bin / "scontrol", "#!/bin/sh\necho 'slurmd is away' >&2; exit 1\n")
    argv = ["node", "--engine", "/nonexistent", "--spec", "/nonexistent", "--smi", "/nonexistent"]
    assert cli.main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert [problem.split(":")[0] for problem in told["problems"]] == ["engine", "models", "gpus", "jobs"]


def test_a_job_is_made_from_the_plan_that_its_comment_names(place: Home, capsys: pytest.CaptureFixture[str]) -> None:
    page = Page(place, capsys)
    assert (page.tier["digest"], page.tier["plan_is_current"]) == (DIGEST, True)
