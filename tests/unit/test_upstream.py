"""Records, Slurm and /health become routing: what is routed, what is not, and when nginx is reloaded."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gleaner import files, heartbeat, life, line, record, upstream
from gleaner.record import Record, Unreadable, Withdrawn
from gleaner.slurm import Job
from tests.unit.fakes import SERVER_KEY, Home, home, queue_line, wait_for

PLACES = {"vasp-02": "10.0.0.12", "vasp-03": "10.0.0.13"}
TIER = upstream.TierConfig("fast", "llama-14b", 8080, PLACES, PLACES)
RECORD = Record("fast", 41, 0, "vasp-02", 8080, (), 0, 5)
RUNNING = Job(41, "llama-14b", "RUNNING", 0, False, 60, "vasp-02", "None")


def job(**fields: Any) -> Job:
    return dataclasses.replace(RUNNING, **fields)


def read_as(**fields: Any) -> Record:
    return dataclasses.replace(RECORD, **fields)


# The decision


def fresh_memory(good: Record | None = None) -> upstream.Memory:
    """The record was seen to change at 100."""
    return upstream.Memory(good=good, run=RECORD.run, seq=4, moved_at=99.0)


def test_routes_what_is_fresh_and_running() -> None:
    assert upstream.decide(TIER, fresh_memory(), RECORD, [RUNNING], 100, 10) == upstream.Verdict(RECORD, "")


def test_first_sight_is_not_believed_until_the_record_moves() -> None:
    memory = upstream.Memory()
    assert upstream.decide(TIER, memory, RECORD, [RUNNING], 100, 10).target is None
    assert upstream.decide(TIER, memory, RECORD, [RUNNING], 101, 10).target is None
    assert upstream.decide(TIER, memory, read_as(seq=6), [RUNNING], 102, 10).target


@pytest.mark.parametrize(
    ("reading", "jobs", "why"),
    [
        (Withdrawn(), [RUNNING], "no record"),
        (Unreadable("x: EIO"), [RUNNING], "EIO"),
        (read_as(host="vasp-09"), [RUNNING], "host: got vasp-09, want one of vasp-02,vasp-03"),
        (read_as(port=22), [RUNNING], "port: got 22, want 8080"),
        (read_as(job=42), [RUNNING], "job: got 42, the tier's jobs are 41"),
        (RECORD, [], "the tier's jobs are none"),
        (read_as(restart=1), [RUNNING], "restart: got 1"),
        (read_as(host="vasp-03"), [RUNNING], "runs on vasp-02"),
        (RECORD, [job(preempted=True)], "being preempted"),
        (RECORD, [job(state="COMPLETING")], "COMPLETING"),
        (RECORD, [job(state="PENDING", nodes="")], "PENDING"),
        (RECORD, None, "Slurm does not answer"),
    ],
)
def test_never_starts_to_route(reading: record.Reading, jobs: list[Job] | None, why: str) -> None:
    verdict = upstream.decide(TIER, fresh_memory(), reading, jobs, 100, 10)
    assert verdict.target is None
    assert why in verdict.why


@pytest.mark.parametrize(
    ("reading", "jobs", "why"),
    [
        (Unreadable("fast.json: Stale file handle"), [RUNNING], "Stale file handle"),
        (read_as(host="vasp-09"), [RUNNING], "host: got vasp-09"),
        (read_as(port=22), [RUNNING], "port: got 22"),
        (read_as(job=99), [RUNNING], "job: got 99"),
        (RECORD, None, "Slurm does not answer; the record is fresh"),
    ],
)
def test_last_good_stays_while_the_job_runs(reading: record.Reading, jobs: list[Job] | None, why: str) -> None:
    verdict = upstream.decide(TIER, fresh_memory(RECORD), reading, jobs, 100, 10)
    assert verdict.target == RECORD
    assert why in verdict.why


def test_stale_record_stays_while_the_job_runs_and_falls_when_slurm_is_silent() -> None:
    memory = upstream.Memory(good=RECORD, run=RECORD.run, seq=5, moved_at=50)
    verdict = upstream.decide(TIER, memory, RECORD, [RUNNING], 100, 10)
    assert verdict.target == RECORD
    assert "stale" in verdict.why
    assert upstream.decide(TIER, memory, RECORD, None, 100, 10).target is None


@pytest.mark.parametrize(
    ("reading", "jobs"),
    [
        (Withdrawn(), [RUNNING]),
        (Withdrawn(), None),
        (RECORD, [job(preempted=True)]),
        (RECORD, [job(state="COMPLETING")]),
        (RECORD, [job(restarts=1)]),
        (RECORD, []),
        (Unreadable("x"), [job(preempted=True)]),
        (Unreadable("x"), [job(restarts=1)]),
        (Unreadable("x"), []),
        (Unreadable("x"), None),
        (read_as(job=99), [job(preempted=True)]),
    ],
)
def test_withdrawn_or_not_running_ends_routing(reading: record.Reading, jobs: list[Job] | None) -> None:
    assert upstream.decide(TIER, fresh_memory(RECORD), reading, jobs, 100, 10).target is None


def test_new_job_takes_over_although_its_seq_is_lower() -> None:
    memory = fresh_memory(RECORD)
    new = read_as(job=42, seq=1, host="vasp-03")
    jobs = [job(id=42, nodes="vasp-03")]
    assert upstream.decide(TIER, memory, new, jobs, 100, 10).target is None
    moved = dataclasses.replace(new, seq=2)
    assert upstream.decide(TIER, memory, moved, jobs, 101, 10).target == moved


def test_upstream_text() -> None:
    assert upstream.upstream_text("fast", "10.0.0.12", 8080) == (
        "upstream gleaner_fast { server 10.0.0.12:8080 max_fails=0; keepalive 32; keepalive_timeout 4s; }\n"
    )
    assert "server 127.0.0.1:9 down;" in upstream.upstream_text("fast", None, 0)


# The files


class FakeNginx:
    def __init__(self) -> None:
        self.refuses = ""
        self.fails = ""
        self.reloads = 0

    def test(self) -> str:
        return self.refuses

    def reload(self) -> str:
        self.reloads += not self.fails
        return self.fails


NODES = {"vasp-02": "127.0.0.1"}


class Site:
    """An updater's surroundings: registry, queue, health server, a stand-in for nginx."""

    def __init__(self, place: Home) -> None:
        self.place, self.nginx = place, FakeNginx()
        self.flags, self.upstreams = place.root / "flags", place.root / "nginx"
        self.flags.mkdir()
        self.upstreams.mkdir()
        self.config = upstream.Config(
            service_user="ai-inference",
            registry=place.registry,
            poll_seconds=0.05,
            stale_seconds=1.0,
            flags_dir=self.flags,
            upstream_dir=self.upstreams,
            tiers=(upstream.TierConfig("fast", "llama-14b", place.port, NODES, NODES),),
        )
        self.flag = self.flags / "fast.up"
        self.conf = self.upstreams / "upstream-fast.conf"
        self.health: int | None = 200
        self.server: http.server.ThreadingHTTPServer | None = None
        self.publisher: record.Publisher | None = None
        self.severed: list[tuple[str, int]] = []
        self.updater = upstream.Updater(self.config, self.nginx, self.sever)

    def sever(self, address: str, port: int) -> str:
        self.severed.append((address, port))
        return ""

    def serve(self) -> None:
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if site.health is None:
                    time.sleep(3)
                    return
                self.send_response(site.health)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.place.port), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def hang_up(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def run_job(self, **queue: str) -> None:
        self.queue(queue_line(**queue))
        self.publisher = record.Publisher(self.place.registry, beat_seconds=0.1)
        self.publisher.publish(read_as(port=self.place.port, restart=int(queue.get("restarts", "0"))))

    def queue(self, text: str) -> None:
        self.place.set(self.place.slurm / "queue", text)

    def until(self, what: Any, seconds: float = 8.0) -> None:
        def step() -> bool:
            self.updater.selector.select(0.02)
            self.updater.turn()
            return bool(what())

        wait_for(step, seconds)

    def turn_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end)

    @property
    def up(self) -> bool:
        return self.flag.exists()

    def restart(self) -> None:
        self.updater.close()
        self.updater = upstream.Updater(self.config, self.nginx, self.sever)

    def spoil(self, data: bytes) -> None:
        """Put this in the record's place; the publisher stops, so it stays."""
        if self.publisher is not None:
            # Nothing is removed on the way: the registry never shows a gap.
            self.publisher._wanted = self.publisher._written = None
            self.publisher = None
            time.sleep(0.3)
        files.write_atomic(record.path_of(self.place.registry, "fast"), data)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with home() as place:
        for name, value in place.environment().items():
            monkeypatch.setenv(name, value)
        made = Site(place)
        yield made
        made.hang_up()
        if made.publisher is not None:
            made.publisher.withdraw(1.0)
        made.updater.close()


def routed(site: Site) -> Site:
    site.serve()
    site.run_job()
    site.until(lambda: site.up)
    return site


def test_placeholder_before_any_tier_has_run(site: Site) -> None:
    assert site.conf.read_text() == upstream.upstream_text("fast", None, 0)
    site.turn_for(0.5)
    assert not site.up
    assert site.nginx.reloads == 0


def test_routes_with_one_reload_and_withdraws_with_none(site: Site) -> None:
    routed(site)
    assert f"server 127.0.0.1:{site.place.port} " in site.conf.read_text()
    assert site.nginx.reloads == 1
    assert site.publisher is not None
    assert site.publisher.withdraw(1.0)
    site.until(lambda: not site.up, 1.0)
    site.run_job(restarts="1")
    site.until(lambda: site.up)
    assert site.nginx.reloads == 1, "the address did not change"


def test_preemption_ends_routing_before_the_record_goes(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    routed(site)
    site.queue(queue_line(preempted="2026-11-24T01:10:00"))
    site.until(lambda: not site.up, 1.0)
    assert "routing off (job 41 restart 0): job 41 is being preempted" in capfd.readouterr().err


HOSTILE = {
    "empty": b"",
    "truncated": RECORD.encode()[:40],
    "garbage": os.urandom(200),
    "huge": b"x" * 100000,
    "path tricks": RECORD.encode().replace(b"vasp-02", b"../../etc"),
    "semicolon": RECORD.encode().replace(b"vasp-02", b"a; } server {"),
    "newline": RECORD.encode().replace(b"vasp-02", b"vasp\\n02"),
    "port out of range": RECORD.encode().replace(b"8080", b"99999"),
    "other port": RECORD.encode().replace(b"8080", b"22"),
    "foreign job": RECORD.encode().replace(b'"job":41', b'"job":99'),
}


def test_hostile_records_never_reach_nginx(site: Site) -> None:
    before = site.conf.read_text()
    site.serve()
    site.queue(queue_line())
    for name, data in HOSTILE.items():
        files.write_atomic(record.path_of(site.place.registry, "fast"), data)
        site.turn_for(0.2)
        assert not site.up, name
        assert site.conf.read_text() == before, name
    assert site.nginx.reloads == 0


def test_sign_of_life_is_no_record(site: Site) -> None:
    site.serve()
    site.queue(queue_line())
    for seq in range(5):
        life.write(site.place.registry, "fast", life.Sign(41, 0, seq))
        site.turn_for(0.1)
    assert not site.up
    assert site.nginx.reloads == 0


def test_hostile_records_leave_the_last_good_state(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    routed(site)
    conf = site.conf.read_text()
    for name, data in HOSTILE.items():
        capfd.readouterr()
        site.spoil(data)
        site.turn_for(0.2)
        assert site.up, name
        assert site.conf.read_text() == conf, name
        told = capfd.readouterr().err.splitlines()
        assert [line for line in told if "the last good record stays" in line] == told, name
        assert len(told) == 1, name
    assert site.nginx.reloads == 1
    site.queue("")
    site.until(lambda: not site.up, 1.0)


def test_stale_record_stays_while_running_and_falls_with_slurm(site: Site) -> None:
    routed(site)
    site.spoil(record.path_of(site.place.registry, "fast").read_bytes())
    site.turn_for(1.3)
    assert site.up
    site.place.set(site.place.slurm / "squeue.fails", "Unable to contact slurm controller")
    site.until(lambda: not site.up, 2.0)


def test_slurm_restarting_keeps_a_fresh_tier_routed(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    routed(site)
    site.place.set(site.place.slurm / "squeue.fails", "Unable to contact slurm controller")
    site.turn_for(1.5)
    assert site.up
    (site.place.slurm / "squeue.fails").unlink()
    site.turn_for(0.5)
    assert site.up
    told = capfd.readouterr().err
    assert told.count("Unable to contact") == 1
    assert "Slurm answers again" in told


def test_own_restart_neither_drops_nor_reloads(site: Site) -> None:
    routed(site)
    inode = site.flag.stat().st_ino
    site.restart()
    site.turn_for(1.0)
    assert site.flag.stat().st_ino == inode
    assert site.nginx.reloads == 1


def test_own_restart_with_garbage_in_the_registry_keeps_routing(site: Site) -> None:
    routed(site)
    site.spoil(b"{")
    site.restart()
    site.turn_for(1.0)
    assert site.up


def test_warning_of_squeue_is_no_row(site: Site) -> None:
    site.serve()
    site.run_job()
    site.queue("squeue: warning: something is deprecated\n" + queue_line())
    site.until(lambda: site.up)


def test_flag_of_a_tier_that_left_goes(site: Site) -> None:
    for name in ("gone.up", "gone.loaded"):
        (site.flags / name).write_text("")
    routed(site).restart()
    assert sorted(path.name for path in site.flags.iterdir()) == ["fast.loaded", "fast.up"]


def heard(channel: heartbeat.Channel, so_far: list[heartbeat.Message]) -> list[heartbeat.Message]:
    so_far += channel.receive()
    return so_far


@contextlib.contextmanager
def supervised(site: Site) -> Iterator[tuple[heartbeat.Channel, int]]:
    """A supervisor's end of the line to a gateway that routes its tier, and the `seq` up to which it will withdraw."""
    listener = heartbeat.listen("127.0.0.1")
    with contextlib.closing(listener):
        site.serve()
        site.queue(queue_line())
        site.publisher = record.Publisher(site.place.registry, beat_seconds=0.1)
        site.publisher.publish(
            read_as(port=site.place.port, restart=0, supervisor="vasp-02", line=listener.getsockname()[1])
        )
        site.until(lambda: site.up)
        site.until(lambda: select.select([listener], [], [], 0)[0])
        connection, _ = listener.accept()
        channel = heartbeat.Channel(connection)
        with contextlib.closing(channel):
            got: list[heartbeat.Message] = []
            site.until(lambda: heard(channel, got))
            line.check_greeting(got[0], SERVER_KEY, (41, 0))
            yield channel, 1 << 40


def test_a_withdrawal_over_the_line_counts_at_once_and_is_answered(site: Site) -> None:
    with supervised(site) as (channel, seq):
        channel.send(line.withdrawn(seq))
        got: list[heartbeat.Message] = []
        site.until(lambda: heard(channel, got))
        assert got == [line.away(seq)]
        assert not site.up
        assert isinstance(record.read(site.place.registry, "fast"), Record), "the file system still shows the record"
        site.turn_for(0.5)
        assert not site.up
        assert channel.receive() == [], "it is answered once"


def test_what_is_published_after_a_withdrawal_is_routed_again(site: Site) -> None:
    with supervised(site) as (channel, _):
        assert site.publisher is not None
        channel.send(line.withdrawn(site.publisher.retract()))
        site.until(lambda: not site.up)
        site.publisher.publish(read_as(port=site.place.port, restart=0))
        site.until(lambda: site.up)


def test_a_line_that_ends_withdraws_nothing(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    with supervised(site) as (channel, _):
        channel.close()
        site.turn_for(0.5)
        assert site.up
    said = "fast: no line to its supervisor (job 41 restart 0), its withdrawal may be seen later"
    assert said in capfd.readouterr().err


def test_own_restart_after_the_job_went_drops(site: Site) -> None:
    routed(site)
    site.queue("")
    site.restart()
    site.until(lambda: not site.up, 2.0)


def test_refused_connection_ends_routing_at_once(site: Site) -> None:
    routed(site)
    site.hang_up()
    site.until(lambda: not site.up, 1.0)
    site.serve()
    site.until(lambda: site.up, 2.0)
    assert site.nginx.reloads == 1


def test_one_late_health_answer_is_forgiven_two_are_not(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "HEALTH_TIMEOUT", 0.3)
    routed(site)
    site.health = None
    watched = site.updater.watched[0]
    site.until(lambda: watched.memory.health_failures == 1, 2.0)
    assert site.up
    site.health = 200
    site.until(lambda: watched.memory.health_failures == 0, 2.0)
    assert site.up
    site.health = None
    site.until(lambda: not site.up, 3.0)


@contextlib.contextmanager
def gone(site: Site) -> Iterator[None]:
    """A queue of connections that is full answers none of the packets of the next one, as a host does that is gone."""
    assert site.server is not None
    site.server.shutdown()
    site.server.socket.listen(0)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", site.place.port))
        yield


def test_streams_of_a_host_that_is_gone_are_ended(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(upstream, "HEALTH_TIMEOUT", 0.3)
    monkeypatch.setattr(upstream, "CONNECT_TIMEOUT", 0.5)
    routed(site)
    with gone(site):
        site.until(lambda: site.severed)
        site.turn_for(1.0)
    assert site.severed == [("127.0.0.1", site.place.port)]
    assert "127.0.0.1 does not answer: connections to it are closed" in capfd.readouterr().err


def test_the_probe_under_way_is_the_last_look(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CONNECT_TIMEOUT", 4.0)
    routed(site)
    watched = site.updater.watched[0]
    with gone(site):
        probe = watched.probe
        site.until(lambda: watched.probe is not None and watched.probe is not probe)
        probe = watched.probe
        site.queue("")
        site.until(lambda: not site.up)
        assert watched.parting is probe
        site.until(lambda: site.severed)
    assert probe is not None
    assert probe.failure == "timeout"


def test_a_host_that_is_lost_while_its_server_drains(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CONNECT_TIMEOUT", 0.5)
    routed(site)
    site.queue("")
    site.until(lambda: not site.up)
    site.turn_for(0.5)
    assert site.severed == []
    with gone(site):
        site.until(lambda: site.severed)


def test_a_server_that_is_routed_again_is_looked_at_as_ever(site: Site) -> None:
    routed(site)
    site.queue("")
    site.until(lambda: not site.up)
    assert site.updater.watched[0].parted
    site.queue(queue_line())
    site.until(lambda: site.up)
    assert not site.updater.watched[0].parted


def test_a_host_that_did_not_answer_needs_no_last_look(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CONNECT_TIMEOUT", 1.0)
    routed(site)
    memory = site.updater.watched[0].memory
    with gone(site):
        site.until(lambda: not memory.reached)
        assert site.up, "one answer that is late is forgiven"
        site.queue("")
        site.until(lambda: not site.up)
        assert site.severed == [("127.0.0.1", site.place.port)]


@pytest.mark.parametrize("how", ["withdrawn", "refused", "hung"])
def test_streams_of_a_host_that_is_there_are_left_alone(site: Site, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(upstream, "HEALTH_TIMEOUT", 0.3)
    monkeypatch.setattr(upstream, "CONNECT_TIMEOUT", 0.3)
    routed(site)
    if how == "withdrawn":
        assert site.publisher is not None
        site.publisher.withdraw(1.0)
    elif how == "refused":
        site.hang_up()
    else:
        site.health = None
    site.until(lambda: not site.up)
    site.turn_for(1.0)
    assert site.severed == []


def test_loading_server_is_not_routed(site: Site) -> None:
    site.health = 503
    site.serve()
    site.run_job()
    site.turn_for(1.5)
    assert not site.up
    site.health = 200
    site.until(lambda: site.up)


def test_refused_configuration_restores_the_old_file(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.nginx.refuses = "unknown directive"
    before = site.conf.read_text()
    site.serve()
    site.run_job()
    site.until(lambda: "unknown directive" in capfd.readouterr().err)
    assert site.conf.read_text() == before
    assert not site.up
    assert site.nginx.reloads == 0


def test_failed_reload_is_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "RETRY_SECONDS", 0.3)
    site.nginx.fails = "nginx is not running"
    site.serve()
    site.run_job()
    site.turn_for(1.2)
    assert not site.up
    site.nginx.fails = ""
    site.until(lambda: site.up)


def test_crash_between_write_and_reload_is_made_good(site: Site) -> None:
    routed(site)
    (site.flags / "fast.loaded").unlink()
    site.restart()
    site.until(lambda: site.nginx.reloads == 2)
    site.until(lambda: site.up)


def test_missing_registry_is_said_and_changes_nothing(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    routed(site)
    away = site.place.registry.with_name("away")
    site.place.registry.rename(away)
    site.turn_for(0.6)
    assert site.up
    assert "mounted?" in capfd.readouterr().err
    away.rename(site.place.registry)


def test_a_reading_that_raises_is_said_and_routing_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def faulty(*_: object) -> record.Reading:
        raise KeyError("no such thing")

    routed(site)
    with monkeypatch.context() as patch:
        patch.setattr(record, "read", faulty)
        site.turn_for(0.5)
        assert site.up
        told = capfd.readouterr().err
        assert told.count("fast: a fault of gleaner") == 1
        assert "in faulty" in told, "where it happened"
        assert told.count("KeyError('no such thing'); the last good record stays, its job 41 is running") == 1
        # Slurm is still heard.
        site.queue(queue_line(preempted="2026-11-24T01:10:00"))
        site.until(lambda: not site.up, 1.0)
    site.queue(queue_line())
    site.until(lambda: site.up, 2.0)


def test_a_reading_that_hangs_is_said_and_routing_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hung = threading.Event()
    genuine = record.read

    def hanging(registry: Path, tier: str) -> record.Reading:
        hung.wait(20)
        return genuine(registry, tier)

    routed(site)
    monkeypatch.setattr(record, "read", hanging)
    site.turn_for(2.5)
    assert site.up
    no_answer = f"{site.place.registry}: no answer for 1 s; the last good record stays, its job 41 is running"
    assert capfd.readouterr().err.count(no_answer) == 1
    # A new start meets the same, and finds the tier routed.
    site.restart()
    site.turn_for(1.5)
    assert site.up
    site.queue(queue_line(preempted="2026-11-24T01:10:00"))
    site.until(lambda: not site.up, 1.0)
    hung.set()


# Nothing less than SystemExit gets past the reader.
@pytest.mark.filterwarnings("ignore:Exception in thread registry")
def test_a_reader_that_has_ended_ends_the_updater(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(*_: object) -> record.Reading:
        raise SystemExit

    routed(site)
    monkeypatch.setattr(record, "read", ending)
    with pytest.raises(RuntimeError, match=f"the thread that reads {site.place.registry} has ended"):
        site.turn_for(2.0)


# nginx.service


class Proc:
    """A /proc with an nginx in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.pid_file = root, root / "nginx.pid"
        self.pid_file.write_text("10\n")

    def worker(self, pid: int, title: str = "nginx: worker process", parent: int = 10) -> None:
        (self.root / str(pid)).mkdir(exist_ok=True)
        (self.root / str(pid) / "stat").write_text(f"{pid} (nginx) S {parent} 0 0\n")
        (self.root / str(pid) / "cmdline").write_text(title)


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    (tmp_path / "bin").mkdir()
    Home.program(tmp_path / "bin" / "systemctl", f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    Home.program(tmp_path / "bin" / "nginx", f"#!/bin/sh\ncat {tmp_path}/fault >&2\ntest ! -s {tmp_path}/fault\n")
    (tmp_path / "fault").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(upstream, "RELOAD_SECONDS", 0.5)
    return Proc(tmp_path)


def test_reload_waits_until_new_workers_took_over(proc: Proc) -> None:
    nginx = upstream.SystemNginx(proc.pid_file, proc.root)
    proc.worker(11)
    proc.worker(99, parent=1)
    assert "still accept" in nginx.reload()
    assert (proc.root / "calls").read_text() == "reload nginx.service\n"

    def swap() -> None:
        time.sleep(0.1)
        proc.worker(12)
        proc.worker(11, "nginx: worker process is shutting down")

    thread = threading.Thread(target=swap)
    thread.start()
    began = time.monotonic()
    assert nginx.reload() == ""
    assert time.monotonic() - began >= 0.1
    thread.join()


def test_no_reload_without_nginx(proc: Proc) -> None:
    assert upstream.SystemNginx(proc.pid_file, proc.root).reload() == "nginx is not running"
    assert not (proc.root / "calls").exists()


def test_configuration_fault_carries_nginx_words(proc: Proc) -> None:
    nginx = upstream.SystemNginx(proc.pid_file, proc.root)
    assert nginx.test() == ""
    (proc.root / "fault").write_text("nginx: [emerg] host not found\n")
    assert "host not found" in nginx.test()


# The program


def test_program_runs_and_leaves_routing_as_it_is(site: Site) -> None:
    place = site.place
    config = {
        "v": 1,
        "registry": str(place.registry),
        "service_user": "ai-inference",
        "poll_seconds": 0.2,
        "stale_seconds": 10,
        "flags_dir": str(site.flags),
        "upstream_dir": str(site.upstreams),
        "tiers": [
            {
                "tier": "fast",
                "job_name": "llama-14b",
                "gateway_port": 1,
                "node_port": place.port,
                "nodes": NODES,
                "supervisors": NODES,
            },
        ],
    }
    for folder in (site.flags, site.upstreams):
        folder.chmod(0o777)
    place.set(place.root / "gateway.json", json.dumps(config))
    routed(site)
    child = place.start("route", "--config", str(place.root / "gateway.json"))
    wait_for(lambda: "found routed to vasp-02" in place.log("route"))
    child.terminate()
    assert child.wait(5) == 0
    assert site.up


def test_wrong_configuration_is_refused(site: Site) -> None:
    site.place.set(site.place.root / "gateway.json", '{"v":1,"tiers":[{}]}')
    assert site.place.start("route", "--config", str(site.place.root / "gateway.json")).wait(10) == 10
    assert "not a gateway configuration" in site.place.log("route")
    assert "playbooks/gateway.yml" in site.place.log("route")


def test_watchdog_is_fed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    path = site.place.root / "notify"
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind(str(path))
        path.chmod(0o777)
        sock.settimeout(10)
        site.place.set(
            site.place.root / "gateway.json",
            '{"v":1,"registry":"/nonexistent","service_user":"x",'
            '"poll_seconds":0.2,"stale_seconds":10,"flags_dir":"/tmp","upstream_dir":"/tmp","tiers":[]}',
        )
        site.place.start("route", "--config", str(site.place.root / "gateway.json"), NOTIFY_SOCKET=str(path))
        assert sock.recv(100) == b"READY=1"
        assert sock.recv(100) == b"WATCHDOG=1"
