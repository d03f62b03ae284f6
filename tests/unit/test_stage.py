"""Model files: what becomes visible, what never does, and what an interruption costs."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gleaner import files, record, slurm, stage, upstream
from tests.unit.fakes import SERVER_KEY

DATA = os.urandom(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


class Store:
    """A folder, a source file, and a spec."""

    def __init__(self, root: Path) -> None:
        self.root, self.models = root, root / "models"
        self.models.mkdir()
        self.source = root / "source.bin"
        self.source.write_bytes(DATA)

    def entry(self, name: str = "one", **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "source": self.source.as_uri(),
            "sha256": SHA,
            "size_bytes": None,
            "header": None,
            **more,
        }

    def spec(self, *entries: dict[str, Any]) -> Path:
        path = self.root / "models.json"
        path.write_text(json.dumps({"v": 1, "directory": str(self.models), "models": list(entries)}))
        return path

    def run(self, action: str, *entries: dict[str, Any]) -> int:
        return stage.run(SimpleNamespace(action=action, spec=self.spec(*entries)))  # type: ignore[arg-type]

    @property
    def visible(self) -> list[str]:
        return sorted(path.name for path in self.models.iterdir() if path.name != ".staging")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Any]]:
    """The header check is tested with its own module; here: that it is asked, and heeded."""
    from gleaner import gguf

    calls: list[tuple[Path, Any]] = []
    monkeypatch.setattr(gguf, "check_file", lambda path, facts=None: calls.append((path, facts)))
    return calls


@pytest.fixture
def store(tmp_path: Path, checked: list[tuple[Path, Any]]) -> Store:
    assert checked == []
    return Store(tmp_path)


class Source:
    """An HTTP source that honours ranges, or does not, and can break off."""

    def __init__(self) -> None:
        self.ranges: list[str | None] = []
        self.break_after: int | None = None
        self.honours_ranges = True
        self.status: int | None = None
        source = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                source.ranges.append(wanted)
                if source.status is not None:
                    self.send_error(source.status)
                    return
                start = int(wanted[6:-1]) if wanted and source.honours_ranges else 0
                if start >= len(DATA):
                    self.send_error(416)
                    return
                body = DATA[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if source.break_after is not None:
                    body, source.break_after = body[: source.break_after], None
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/m.gguf"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    made = Source()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_staged_verified_and_not_read_again(
    store: Store, checked: list[tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.run("stage", store.entry(header={"n_layer": 4})) == 0
    assert store.visible == ["one.gguf"]
    assert (store.models / "one.gguf").read_bytes() == DATA
    assert [facts for _, facts in checked] == [{"n_layer": 4}]
    assert checked[0][0].parent.name == ".staging", "checked after it was visible"
    assert store.run("check", store.entry()) == 0
    monkeypatch.setattr(stage, "hash_file", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(stage, "fetch", lambda *_: pytest.fail("fetched again"))
    assert store.run("stage", store.entry()) == 0


def test_check_tells_what_is_missing(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (store.models / "stray.gguf").write_bytes(b"x")
    assert store.run("check", store.entry()) == stage.EXIT_MISSING
    told = json.loads(capsys.readouterr().out)
    assert told["models"] == {"one": "missing"}
    assert told["unknown"] == ["stray.gguf"]
    assert not told["complete"]
    assert not (store.models / ".staging").exists(), "check wrote something"


def test_corrupt_source_is_refused_and_stops_no_other(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = store.entry("bad", sha256="0" * 64)
    assert store.run("stage", wrong, store.entry()) == stage.EXIT_FAILED
    assert store.visible == ["one.gguf"]
    assert not (store.models / ".staging" / "bad.part").exists()
    told = capsys.readouterr()
    assert f"bad: sha256: got {SHA}, want {'0' * 64}" in told.err
    assert json.loads(told.out.splitlines()[-1])["changed"] == ["one"]


def test_broken_header_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gleaner import gguf

    def refuse(path: Path, facts: object = None) -> None:
        raise ValueError("magic: got b'xxxx', want b'GGUF'")

    monkeypatch.setattr(gguf, "check_file", refuse)
    assert store.run("stage", store.entry()) == stage.EXIT_FAILED
    assert store.visible == []
    assert "not servable: magic" in capsys.readouterr().err


def test_real_header_check_refuses_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    assert store.run("stage", store.entry()) == stage.EXIT_FAILED
    assert store.visible == []
    assert "not servable" in capsys.readouterr().err


def test_changed_file_is_found_and_replaced(store: Store) -> None:
    assert store.run("stage", store.entry()) == 0
    (store.models / "one.gguf").write_bytes(DATA[:-1] + b"!")
    assert store.run("check", store.entry()) == stage.EXIT_MISSING
    assert store.run("stage", store.entry()) == 0
    assert (store.models / "one.gguf").read_bytes() == DATA
    assert store.run("check", store.entry()) == 0


def test_changed_file_stays_when_the_source_is_worse(store: Store) -> None:
    assert store.run("stage", store.entry()) == 0
    store.source.write_bytes(b"short")
    assert store.run("stage", store.entry(sha256="1" * 64)) == stage.EXIT_FAILED
    assert (store.models / "one.gguf").read_bytes() == DATA


def test_file_brought_by_hand_is_verified_not_fetched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.models / "one.gguf").write_bytes(DATA)
    assert store.run("check", store.entry()) == stage.EXIT_MISSING
    monkeypatch.setattr(stage, "fetch", lambda *_: pytest.fail("fetched"))
    assert store.run("stage", store.entry()) == 0
    assert store.run("check", store.entry()) == 0


def test_stray_file_is_told_and_left(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (store.models / "stray.gguf").write_bytes(b"x")
    assert store.run("stage", store.entry()) == 0
    assert store.visible == ["one.gguf", "stray.gguf"]
    assert "stray.gguf is not in the inventory; left alone" in capsys.readouterr().out


def test_full_disk_is_refused_before_a_byte_is_fetched(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(stage, "fetch", lambda *_: pytest.fail("fetched"))
    assert store.run("stage", store.entry(size_bytes=len(DATA))) == stage.EXIT_FAILED
    assert f"got 1000 bytes free, want {len(DATA) + stage.SPARE_BYTES}" in capsys.readouterr().err


def test_full_disk_is_seen_from_the_sources_size(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert store.run("stage", store.entry()) == stage.EXIT_FAILED
    assert store.visible == []


def test_source_of_another_size_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.run("stage", store.entry(size_bytes=len(DATA) + 1)) == stage.EXIT_FAILED
    assert f"got {len(DATA)} bytes, want size_bytes={len(DATA) + 1}" in capsys.readouterr().err


def test_interrupted_download_is_resumed(store: Store, source: Source) -> None:
    source.break_after = 100_000
    assert store.run("stage", store.entry(source=source.url)) == 0
    assert source.ranges == [None, "bytes=100000-"]
    assert (store.models / "one.gguf").read_bytes() == DATA


def test_part_of_an_earlier_run_is_resumed(store: Store, source: Source) -> None:
    (store.models / ".staging").mkdir()
    (store.models / ".staging" / "one.part").write_bytes(DATA[:200_000])
    assert store.run("stage", store.entry(source=source.url)) == 0
    assert source.ranges == ["bytes=200000-"]


def test_source_without_ranges_is_read_from_the_start(store: Store, source: Source) -> None:
    source.honours_ranges = False
    (store.models / ".staging").mkdir()
    (store.models / ".staging" / "one.part").write_bytes(b"x" * 1000)
    assert store.run("stage", store.entry(source=source.url)) == 0
    assert (store.models / "one.gguf").read_bytes() == DATA


def test_whole_part_is_taken_without_another_byte(store: Store, source: Source) -> None:
    (store.models / ".staging").mkdir()
    (store.models / ".staging" / "one.part").write_bytes(DATA)
    assert store.run("stage", store.entry(source=source.url)) == 0
    assert store.visible == ["one.gguf"]


def test_overlong_part_is_thrown_away(store: Store, source: Source) -> None:
    (store.models / ".staging").mkdir()
    (store.models / ".staging" / "one.part").write_bytes(b"x" * (len(DATA) + 1))
    assert store.run("stage", store.entry(source=source.url)) == 0
    assert (store.models / "one.gguf").read_bytes() == DATA


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (503, stage.ATTEMPTS)])
def test_refusing_source_is_named(
    store: Store, source: Source, status: int, asked: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source.status = status
    assert store.run("stage", store.entry(source=source.url)) == stage.EXIT_FAILED
    assert len(source.ranges) == asked
    assert f"HTTP {status}" in capsys.readouterr().err


def test_missing_local_source_is_named(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.run("stage", store.entry(source="file:///nonexistent/x.gguf")) == stage.EXIT_FAILED
    assert "/nonexistent/x.gguf" in capsys.readouterr().err


def test_progress_is_told(store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(stage, "PROGRESS_SECONDS", 0.0)
    assert store.run("stage", store.entry()) == 0
    assert "one 100 % 0.0/0.0 GiB" in capsys.readouterr().out


def test_second_stager_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    spec = stage.Spec.load(store.spec(store.entry()))
    with stage.locked(spec):
        assert store.run("stage", store.entry()) == stage.EXIT_FAILED
    assert "another `gleaner models stage` is at work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "../one"}, "models[].name"),
        ({"name": "a b"}, "models[].name"),
        ({"sha256": "abc"}, "models[one].sha256"),
        ({"source": "ftp://x/y"}, "models[one].source"),
        ({"size_bytes": -1}, "models[one].size_bytes"),
        ({"size_bytes": True}, "models[one].size_bytes"),
        ({"header": []}, "models[one].header"),
    ],
)
def test_wrong_spec_is_refused(
    store: Store, change: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store.run("stage", store.entry(**change)) == stage.EXIT_REFUSED
    assert told in capsys.readouterr().err


def test_double_name_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.run("check", store.entry(), store.entry()) == stage.EXIT_REFUSED
    assert "one twice" in capsys.readouterr().err


# Telling a running router


class Routing:
    """A gateway configuration and a router that lists models after a reload."""

    def __init__(self, root: Path) -> None:
        self.ids, self.asked, self.key = ["one"], 0, ""
        routing = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path in ("/v1/models", "/v1/models?reload=1")
                routing.asked += self.path.endswith("?reload=1")
                if routing.asked >= 2:
                    routing.ids = ["one", "two"]
                body = json.dumps({"data": [{"id": name} for name in routing.ids]}).encode()
                known = not routing.key or self.headers["Authorization"] == f"Bearer {routing.key}"
                self.send_response(200 if known else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.registry = root / "endpoints"
        self.registry.mkdir()
        tier = upstream.TierConfig("fast", "llama-14b", self.server.server_port, {"vasp-02": "127.0.0.1"})
        self.config = upstream.Config("ai", self.registry, 1, 10, root, root, (tier,))

    def publish(self, host: str = "vasp-02") -> None:
        record.write(self.registry, record.Record("fast", 1, 0, host, self.server.server_port, (), 0, 1))

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def routing(tmp_path: Path) -> Iterator[Routing]:
    made = Routing(tmp_path)
    yield made
    made.stop()


def test_reload_waits_for_the_model(routing: Routing, capsys: pytest.CaptureFixture[str]) -> None:
    routing.publish()
    assert stage.reload(routing.config, "fast", ["two"], 5) == 0
    assert routing.asked == 2
    assert "fast on vasp-02 serves one, two\nnewly serves two\n" in capsys.readouterr().out


def test_reload_of_what_is_listed_already_is_no_news(routing: Routing, capsys: pytest.CaptureFixture[str]) -> None:
    routing.publish()
    assert stage.reload(routing.config, "fast", [], 5) == 0
    assert routing.asked == 1
    assert capsys.readouterr().out == "fast on vasp-02 serves one\n"


def test_reload_of_a_tier_that_is_not_running_is_fine(routing: Routing, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.reload(routing.config, "fast", ["two"], 5) == 0
    routing.publish()
    routing.stop()
    assert stage.reload(routing.config, "fast", ["two"], 5) == 0
    assert capsys.readouterr().out.count("not running: it will read the folder when it starts") == 2


def test_reload_does_not_wait_for_a_node_that_is_gone(
    routing: Routing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_route(*_: object) -> set[str]:
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    routing.publish()
    monkeypatch.setattr(stage, "listed", no_route)
    monkeypatch.setattr(slurm, "jobs", lambda *_: [])
    assert stage.reload(routing.config, "fast", ["two"], 5) == 0
    assert "not running" in capsys.readouterr().out


def test_reload_names_what_is_not_listed(routing: Routing) -> None:
    routing.publish()
    with pytest.raises(stage.StageError, match="does not list three within 1 s"):
        stage.reload(routing.config, "fast", ["three"], 1)


def test_reload_brings_the_key(routing: Routing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SERVER_KEY", tmp_path / "server.key")
    files.SERVER_KEY.write_text(SERVER_KEY + "\n")
    routing.publish()
    routing.key = SERVER_KEY
    assert stage.reload(routing.config, "fast", [], 5) == 0
    files.SERVER_KEY.write_text("f" * 64)
    with pytest.raises(stage.StageError, match=r"another key than .*/server\.key: have the tier") as caught:
        stage.reload(routing.config, "fast", [], 5)
    assert "f" * 64 not in str(caught.value)


def test_reload_asks_no_foreign_host(routing: Routing) -> None:
    routing.publish("elsewhere")
    with pytest.raises(stage.StageError, match="host: got elsewhere, want one of vasp-02"):
        stage.reload(routing.config, "fast", [], 1)


def test_reload_of_an_unknown_tier_is_refused(routing: Routing) -> None:
    with pytest.raises(stage.StageError, match="--tier: got slow, want one of fast"):
        stage.reload(routing.config, "slow", [], 1)
