"""Model files: what becomes visible, what never does, and what an interruption costs."""

from __future__ import annotations

import contextlib
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

from gleaner import download, files, stage
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
        self.ports: list[int] = []
        self.drain_seconds = 1
        self.lenders: list[str] = []

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
        routers = {"address": "127.0.0.1", "ports": self.ports, "drain_seconds": self.drain_seconds}
        value = {"v": 1, "directory": str(self.models), "routers": routers, "models": list(entries)}
        path.write_text(json.dumps({**value, "lenders": self.lenders}))
        return path

    def part(self, name: str = "one", sha256: str = SHA) -> Path:
        return self.models / ".staging" / f"{name}.{sha256[:12]}.part"

    def split(self, name: str = "big", **more: Any) -> dict[str, Any]:
        """A model of three parts."""
        parts = []
        for number, (start, end) in enumerate(((0, 100_000), (100_000, 250_000), (250_000, None))):
            file = self.root / f"part{number}.bin"
            file.write_bytes(DATA[start:end])
            sha256 = hashlib.sha256(DATA[start:end]).hexdigest()
            parts.append({"source": file.as_uri(), "sha256": sha256, "size_bytes": None})
        return {"name": name, "header": None, "parts": parts, **more}

    def run(self, action: str, *entries: dict[str, Any], wanted: list[str] | None = None) -> int:
        arguments = SimpleNamespace(action=action, spec=self.spec(*entries), wanted=wanted, json=False)
        return stage.run(arguments)  # type: ignore[arg-type]

    def found(self, *entries: dict[str, Any]) -> dict[str, Any]:
        return stage.check(stage.Spec.load(self.spec(*entries)))

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
    monkeypatch.setattr(files, "hash_file", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("fetched again"))
    assert store.run("stage", store.entry()) == 0


def test_check_tells_what_is_missing(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (store.models / "stray.gguf").write_bytes(b"x")
    assert store.run("check", store.entry()) == stage.EXIT_MISSING
    assert capsys.readouterr().out.splitlines() == [
        "one is not there, to be staged",
        "stray.gguf is not in the inventory and was not staged by gleaner, left alone",
    ]
    found = store.found(store.entry())
    assert (found["models"], found["foreign"], found["complete"]) == ({"one": "missing"}, ["stray.gguf"], False)
    assert not (store.models / ".staging").exists(), "check wrote something"


def test_corrupt_source_is_refused_and_stops_no_other(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = store.entry("bad", sha256="0" * 64)
    assert store.run("stage", wrong, store.entry()) == stage.EXIT_FAILED
    assert store.visible == ["one.gguf"]
    assert not (store.part("bad", "0" * 64)).exists()
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


def test_changed_file_is_found_and_replaced(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.run("stage", store.entry()) == 0
    (store.models / "one.gguf").write_bytes(DATA[:-1] + b"!")
    assert store.run("check", store.entry()) == stage.EXIT_MISSING
    assert "one was not verified, to be read before it is served" in capsys.readouterr().out
    assert store.run("stage", store.entry()) == 0
    assert (store.models / "one.gguf").read_bytes() == DATA
    assert store.run("check", store.entry()) == 0
    assert "one was there with another content, removed" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["on disk", "in the inventory"])
def test_changed_file_is_out_of_sight_before_its_replacement_comes_and_if_none_does(
    store: Store, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.run("stage", store.entry()) == 0
    if how == "on disk":
        (store.models / "one.gguf").write_bytes(DATA[:-1] + b"!")
        wanted = store.entry()
    else:
        wanted = store.entry(sha256=hashlib.sha256(DATA[:1000]).hexdigest())
    seen: list[list[str]] = []
    fetch = download.fetch

    def look(*arguments: Any) -> str:
        seen.append(store.visible)
        return fetch(*arguments)

    monkeypatch.setattr(download, "fetch", look)
    store.source.unlink()
    assert store.run("stage", wanted) == stage.EXIT_FAILED
    assert (seen, store.visible) == ([[]], [])
    assert store.run("check", wanted) == stage.EXIT_MISSING
    store.source.write_bytes(DATA if how == "on disk" else DATA[:1000])
    assert store.run("stage", wanted) == 0
    assert (seen, store.visible) == ([[], []], ["one.gguf"])
    assert store.run("check", wanted) == 0


def test_file_is_not_visible_while_it_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.run("stage", store.entry()) == 0
    os.utime(store.models / "one.gguf")
    seen: list[list[str]] = []
    hash_file = files.hash_file

    def look(*arguments: Any) -> str:
        seen.append(store.visible)
        return hash_file(*arguments)

    monkeypatch.setattr(files, "hash_file", look)
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("fetched"))
    assert store.run("stage", store.entry()) == 0
    assert (seen, store.visible) == ([[]], ["one.gguf"])
    assert store.run("check", store.entry()) == 0


def test_interrupted_reading_is_taken_up_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.run("stage", store.entry()) == 0
    os.utime(store.models / "one.gguf")

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "hash_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.run("stage", store.entry())
    assert store.visible == []
    assert store.run("stage") == 0
    assert (store.models / ".staging" / "one.doubt").exists()
    assert store.found()["foreign"] == ["one.doubt"]
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("fetched"))
    assert store.run("stage", store.entry()) == 0
    assert store.visible == ["one.gguf"]


def test_right_file_that_is_not_servable_stays_out_of_sight(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from gleaner import gguf

    def refuse(path: Path, facts: object = None) -> None:
        raise ValueError("n_layer: got 4, want 5")

    (store.models / "one.gguf").write_bytes(DATA)
    monkeypatch.setattr(gguf, "check_file", refuse)
    assert store.run("stage", store.entry()) == stage.EXIT_FAILED
    assert store.visible == []


# Models that leave


def test_model_that_the_inventory_no_longer_names_is_removed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.run("stage", store.entry(), store.entry("two")) == 0
    assert store.run("check", store.entry()) == stage.EXIT_MISSING
    assert "two is no longer in the inventory, to be removed" in capsys.readouterr().out
    assert store.visible == ["one.gguf", "two.gguf"], "check removed something"
    assert store.run("stage", store.entry()) == 0
    told = capsys.readouterr().out
    assert f"two.gone removed, {len(DATA)} bytes" in told
    assert json.loads(told.splitlines()[-1]) == {"changed": [], "removed": ["two"], "failed": []}
    assert store.visible == ["one.gguf"]
    assert sorted(path.name for path in (store.models / ".staging").iterdir()) == ["lock", "verified.json"]
    assert store.run("check", store.entry()) == 0


def test_what_another_inventory_would_do_is_told_from_names_and_sums(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [store.entry(), store.entry("two")]
    assert store.run("stage", *entries) == 0
    assert store.run("check", *entries, wanted=[f"one={SHA}", f"two={SHA}"]) == 0
    capsys.readouterr()
    assert store.run("check", *entries, wanted=[f"one={'0' * 64}", f"three={SHA}"]) == stage.EXIT_MISSING
    assert capsys.readouterr().out.splitlines() == [
        "one has another content than the inventory names, to be replaced",
        "three is not there, to be staged",
        "two is no longer in the inventory, to be removed",
    ]
    assert store.run("check", *entries, wanted=[]) == stage.EXIT_MISSING
    assert store.run("check", *entries, wanted=["one"]) == stage.EXIT_REFUSED


def test_last_model_of_a_node_is_removed(store: Store) -> None:
    assert store.run("stage", store.entry()) == 0
    assert store.run("stage") == 0
    assert store.visible == []
    assert store.run("check") == 0


@pytest.mark.parametrize("whose", ["brought by hand", "adopted", "overwritten", "of an older version"])
def test_file_that_we_did_not_stage_is_told_and_left(
    store: Store, whose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    two = store.models / "two.gguf"
    if whose == "overwritten":
        assert store.run("stage", store.entry(), store.entry("two")) == 0
    two.write_bytes(DATA)
    if whose == "adopted":
        assert store.run("stage", store.entry(), store.entry("two")) == 0
    if whose == "of an older version":
        assert store.run("stage", store.entry(), store.entry("two")) == 0
        ledger = store.models / ".staging" / "verified.json"
        known = json.loads(ledger.read_text())
        del known["two"]["staged"]
        ledger.write_text(json.dumps(known))
    assert store.run("stage", store.entry()) == 0
    assert store.visible == ["one.gguf", "two.gguf"]
    assert f"{two} is not in the inventory and was not staged by gleaner; left alone" in capsys.readouterr().out
    assert store.run("check", store.entry()) == 0


def test_what_we_staged_is_ours_after_it_was_read_again(store: Store) -> None:
    assert store.run("stage", store.entry(), store.entry("two")) == 0
    os.utime(store.models / "two.gguf")
    assert store.run("stage", store.entry(), store.entry("two")) == 0
    assert store.run("stage", store.entry()) == 0
    assert store.visible == ["one.gguf"]


def test_download_that_is_not_wanted_any_more_is_removed(store: Store) -> None:
    (store.models / ".staging").mkdir()
    part = store.models / ".staging" / "two.part"
    part.write_bytes(b"x")
    assert store.run("check", store.entry()) == stage.EXIT_MISSING
    assert store.run("stage", store.entry()) == 0
    assert not part.exists()


def test_file_brought_by_hand_is_verified_not_fetched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.models / "one.gguf").write_bytes(DATA)
    assert store.run("check", store.entry()) == stage.EXIT_MISSING
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("fetched"))
    assert store.run("stage", store.entry()) == 0
    assert store.run("check", store.entry()) == 0


def test_stray_file_is_told_and_left(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (store.models / "stray.gguf").write_bytes(b"x")
    assert store.run("stage", store.entry()) == 0
    assert store.visible == ["one.gguf", "stray.gguf"]
    assert "stray.gguf is not in the inventory and was not staged by gleaner; left alone" in capsys.readouterr().out


def test_full_disk_is_refused_before_a_byte_is_fetched(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("fetched"))
    assert store.run("stage", store.entry(size_bytes=len(DATA))) == stage.EXIT_FAILED
    assert f"got 1000 bytes free, want {len(DATA) + download.SPARE_BYTES}" in capsys.readouterr().err


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
    store.part().write_bytes(DATA[:200_000])
    assert store.run("stage", store.entry(source=source.url)) == 0
    assert source.ranges == ["bytes=200000-"]


def test_source_without_ranges_is_read_from_the_start(store: Store, source: Source) -> None:
    source.honours_ranges = False
    (store.models / ".staging").mkdir()
    store.part().write_bytes(b"x" * 1000)
    assert store.run("stage", store.entry(source=source.url)) == 0
    assert (store.models / "one.gguf").read_bytes() == DATA


def test_whole_part_is_taken_without_another_byte(store: Store, source: Source) -> None:
    (store.models / ".staging").mkdir()
    store.part().write_bytes(DATA)
    assert store.run("stage", store.entry(source=source.url)) == 0
    assert store.visible == ["one.gguf"]


def test_overlong_part_is_thrown_away(store: Store, source: Source) -> None:
    (store.models / ".staging").mkdir()
    store.part().write_bytes(b"x" * (len(DATA) + 1))
    assert store.run("stage", store.entry(source=source.url)) == 0
    assert (store.models / "one.gguf").read_bytes() == DATA


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (503, download.ATTEMPTS)])
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
    monkeypatch.setattr(download, "PROGRESS_SECONDS", 0.0)
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


@pytest.mark.parametrize(
    "text", ["{}", '{"v":1,"directory":"/x","models":[]}', '{"v":1,"directory":"/x","models":[{}]}']
)
def test_what_is_no_spec_is_refused_with_the_cure(
    store: Store, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "spec.json").write_text(text)
    namespace = SimpleNamespace(action="check", spec=tmp_path / "spec.json", wanted=None, json=False)
    assert stage.run(namespace) == stage.EXIT_REFUSED  # type: ignore[arg-type]
    assert "spec.json: " in capsys.readouterr().err


# Telling the node's routers


class Router:
    """A router that reads its folder when it is asked to, as llama-server does; `wrong` makes it misbehave."""

    def __init__(self, models: Path) -> None:
        self.models, self.busy, self.wrong, self.key = models, 0, "", ""
        self.asked: list[str] = []
        self.states = {path.stem: "unloaded" for path in models.glob("*.gguf")}
        router = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                router.asked.append(self.path)
                status, value = router.answer(self.path)
                if router.key and self.headers["Authorization"] != f"Bearer {router.key}":
                    status, value = 401, {}
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.port = self.server.server_port

    def answer(self, path: str) -> tuple[int, Any]:
        if self.wrong == "sick":
            return 503, {}
        if path.startswith("/slots"):
            self.busy -= 1
            return 200, [{"id": 0, "is_processing": self.busy >= 0}]
        if path == "/v1/models?reload=1" and self.wrong != "deaf":
            there = {path.stem for path in self.models.glob("*.gguf")}
            self.states = {name: self.states.get(name, "unloaded") for name in sorted(there)}
        return 200, {"data": [{"id": name, "status": {"value": state}} for name, state in self.states.items()]}

    def reloads(self) -> int:
        return self.asked.count("/v1/models?reload=1")

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def router(store: Store) -> Iterator[Router]:
    assert store.run("stage", store.entry(), store.entry("two")) == 0
    made = Router(store.models)
    store.ports = [made.port]
    yield made
    made.stop()


def test_running_router_is_told_of_each_model_that_comes(
    store: Store, router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [store.entry(), store.entry("two"), store.entry("three"), store.entry("four")]
    assert store.run("stage", *entries) == 0
    assert (sorted(router.states), router.reloads()) == (["four", "one", "three", "two"], 2)
    assert f"the router on 127.0.0.1:{router.port} serves three\n" in capsys.readouterr().out


def test_a_router_is_asked_with_the_servers_key(
    store: Store, router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    router.key = SERVER_KEY
    (tmp_path / "server.key").write_text(SERVER_KEY + "\n")
    monkeypatch.setattr(files, "SERVER_KEY", tmp_path / "server.key")
    assert store.run("stage", store.entry(), store.entry("two"), store.entry("three")) == 0
    assert "three" in router.states
    router.key = "another one"
    assert store.run("stage", store.entry(), store.entry("two"), store.entry("three"), store.entry("four")) != 0
    assert "was started with another key" in capsys.readouterr().err


def test_router_that_lists_everything_is_left_alone(store: Store, router: Router) -> None:
    assert store.run("check", store.entry(), store.entry("two")) == 0
    assert store.run("stage", store.entry(), store.entry("two")) == 0
    assert router.reloads() == 0


def test_router_that_missed_a_model_is_told_later(
    store: Store, router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    del router.states["two"]
    assert store.run("check", store.entry(), store.entry("two")) == stage.EXIT_MISSING
    assert "two is not listed by a running router, which is to be told" in capsys.readouterr().out
    assert store.run("stage", store.entry(), store.entry("two")) == 0
    assert "two" in router.states
    assert store.run("check", store.entry(), store.entry("two")) == 0


def test_router_that_does_not_run_reads_the_folder_when_it_starts(store: Store, router: Router) -> None:
    router.stop()
    assert store.run("stage", store.entry(), store.entry("three")) == 0
    assert store.visible == ["one.gguf", "three.gguf"]
    assert store.run("check", store.entry(), store.entry("three")) == 0


def test_model_that_leaves_is_let_go_before_it_is_deleted(
    store: Store, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[bool] = []
    left_over = stage.left_over

    def look(spec: stage.Spec) -> list[Path]:
        gone.append("two" not in router.states)
        return left_over(spec)

    monkeypatch.setattr(stage, "left_over", look)
    assert store.run("stage", store.entry()) == 0
    assert gone == [True]
    assert list(router.states) == ["one"]
    assert store.visible == ["one.gguf"]


def test_requests_to_a_model_that_leaves_may_end_first(store: Store, router: Router) -> None:
    router.states["two"], router.busy, store.drain_seconds = "loaded", 2, 20
    assert store.run("stage", store.entry()) == 0
    reload = router.asked.index("/v1/models?reload=1")
    assert router.asked[:reload].count("/slots?model=two&autoload=false") == 3
    assert store.visible == ["one.gguf"]


def test_model_that_is_never_idle_is_unloaded_in_the_end(
    store: Store, router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    router.states["two"], router.busy = "loaded", 1000
    assert store.run("stage", store.entry()) == 0
    assert "two still at work after 1 s, unloaded" in capsys.readouterr().out
    assert list(router.states) == ["one"]


def test_other_models_are_not_asked_whether_they_work(store: Store, router: Router) -> None:
    router.states["one"], router.busy = "loaded", 1000
    assert store.run("stage", store.entry()) == 0
    assert not [path for path in router.asked if path.startswith("/slots")]


@pytest.mark.parametrize(
    ("wrong", "told"), [("deaf", "it lists two"), ("sick", "/v1/models: HTTP 503")], ids=["deaf", "sick"]
)
def test_router_that_does_not_hear_keeps_the_model_from_being_deleted(
    store: Store,
    router: Router,
    wrong: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stage, "TELL_SECONDS", 1.0)
    router.wrong = wrong
    assert store.run("stage", store.entry(), store.entry("three")) == stage.EXIT_FAILED
    assert f"did not read {store.models} again within 1 s: {told}" in capsys.readouterr().err
    assert store.visible == ["one.gguf", "three.gguf"], "one failure stopped the others"
    assert (store.models / ".staging" / "two.gone").exists()
    assert store.run("check", store.entry(), store.entry("three")) == stage.EXIT_MISSING
    router.wrong = ""
    assert store.run("stage", store.entry(), store.entry("three")) == 0
    assert not (store.models / ".staging" / "two.gone").exists()
    assert sorted(router.states) == ["one", "three"]


def test_doubtful_model_is_let_go_while_it_is_read(
    store: Store, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(store.models / "two.gguf")
    seen: list[list[str]] = []

    def look(*_: object) -> str:
        seen.append(sorted(router.states))
        return SHA

    monkeypatch.setattr(files, "hash_file", look)
    assert store.run("stage", store.entry(), store.entry("two")) == 0
    assert seen == [["one"]]
    assert sorted(router.states) == ["one", "two"]


# Split models

PARTS = [f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


def test_split_model_appears_whole_as_a_folder(store: Store, checked: list[tuple[Path, Any]]) -> None:
    assert store.run("stage", store.split()) == 0
    assert store.visible == ["big"]
    assert sorted(path.name for path in (store.models / "big").iterdir()) == PARTS
    assert b"".join((store.models / "big" / name).read_bytes() for name in PARTS) == DATA
    assert [path.name for path, _ in checked] == [PARTS[0]]
    assert store.run("check", store.split()) == 0
    assert {stat & 0o777 for stat in (path.stat().st_mode for path in (store.models / "big").iterdir())} == {0o644}


def test_split_model_that_lacks_a_part_is_not_visible_and_is_gone_on_with(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = store.split()
    (store.root / "part2.bin").unlink()
    assert store.run("stage", entry) == stage.EXIT_FAILED
    assert store.visible == []
    fetched: list[str] = []
    fetch = download.fetch

    def look(source: download.Source, part: Path) -> str:
        fetched.append(source.name)
        return fetch(source, part)

    monkeypatch.setattr(download, "fetch", look)
    assert store.run("stage", store.split()) == 0
    assert fetched == ["big-00003-of-00003"]
    assert store.visible == ["big"]


def test_corrupt_part_is_named(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    entry = store.split()
    (store.root / "part1.bin").write_bytes(b"x")
    assert store.run("stage", entry) == stage.EXIT_FAILED
    assert "big-00002-of-00003: sha256: got" in capsys.readouterr().err
    assert store.visible == []


@pytest.mark.parametrize("how", ["changed", "missing", "added"])
def test_split_model_with_another_content_is_replaced(store: Store, how: str) -> None:
    assert store.run("stage", store.split()) == 0
    part = store.models / "big" / PARTS[1]
    if how == "changed":
        part.write_bytes(b"x")
    elif how == "missing":
        part.unlink()
    else:
        (store.models / "big" / "other.gguf").touch()
    assert store.run("check", store.split()) == stage.EXIT_MISSING
    assert store.run("stage", store.split()) == 0
    assert sorted(path.name for path in (store.models / "big").iterdir()) == PARTS
    assert part.read_bytes() == DATA[100_000:250_000]


def test_split_model_that_leaves_the_list_goes_and_a_foreign_one_stays(store: Store) -> None:
    assert store.run("stage", store.split()) == 0
    (store.models / "theirs").mkdir()
    (store.models / "theirs" / "x-00001-of-00002.gguf").touch()
    found = store.found()
    assert (found["leaving"], found["foreign"]) == (["big"], ["theirs"])
    assert store.run("stage") == 0
    assert store.visible == ["theirs"]
    assert sorted(path.name for path in (store.models / ".staging").iterdir()) == ["lock", "verified.json"]


def test_model_that_becomes_split_takes_the_place_of_the_whole_one_and_back(store: Store) -> None:
    assert store.run("stage", store.entry("big")) == 0
    assert store.visible == ["big.gguf"]
    assert store.run("stage", store.split()) == 0
    assert store.visible == ["big"]
    assert store.run("stage", store.entry("big")) == 0
    assert store.visible == ["big.gguf"]


def test_room_for_all_parts_is_asked_for_first(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = store.split()
    for part, size in zip(entry["parts"], (100_000, 150_000, 50_000), strict=True):
        part["size_bytes"] = size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=download.SPARE_BYTES + 200_000))
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("fetched"))
    assert store.run("stage", entry) == stage.EXIT_FAILED
    assert f"want {len(DATA) + download.SPARE_BYTES} for big" in capsys.readouterr().err


def test_parts_of_another_revision_are_not_gone_on_with(store: Store) -> None:
    """Same names, same number of parts: the first came whole of one revision, the inventory now has another."""
    before = store.split()
    (store.root / "part1.bin").unlink()
    assert store.run("stage", before) == stage.EXIT_FAILED
    entry = store.split()
    other = store.root / "other.bin"
    other.write_bytes(b"another first part")
    entry["parts"][0] = {"source": other.as_uri(), "sha256": hashlib.sha256(other.read_bytes()).hexdigest()}
    assert store.run("stage", entry) == 0
    assert (store.models / "big" / PARTS[0]).read_bytes() == b"another first part"
    assert sorted(path.name for path in (store.models / ".staging").iterdir()) == ["lock", "verified.json"]


def test_what_began_wrong_is_begun_anew_before_anybody_is_blamed(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    (store.models / ".staging").mkdir()
    store.part().write_bytes(b"what somebody sent before")
    assert store.run("stage", store.entry()) == 0
    assert (store.models / "one.gguf").read_bytes() == DATA
    assert "beginning anew" in capsys.readouterr().out


@pytest.fixture
def lengthless(source: Source, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A source that does not say how much it sends."""
    opened = download.opened

    @contextlib.contextmanager
    def without_length(*arguments: Any) -> Iterator[Any]:
        with opened(*arguments) as (stream, start, _):
            yield stream, start, None

    monkeypatch.setattr(download, "opened", without_length)
    return source


def test_a_source_that_sends_too_much_is_cut_off(
    store: Store, lengthless: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store.run("stage", store.entry(source=lengthless.url, size_bytes=1000)) == stage.EXIT_FAILED
    assert "sends more than 1000 bytes" in capsys.readouterr().err
    assert store.visible == []


def test_room_is_looked_for_while_nobody_knows_how_much_comes(
    store: Store, lengthless: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=download.SPARE_BYTES + 1000))
    assert store.run("stage", store.entry(source=lengthless.url)) == stage.EXIT_FAILED
    assert "bytes free" in capsys.readouterr().err


def test_what_an_earlier_version_remembered_is_not_read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.run("stage", store.entry()) == 0
    path = store.models / ".staging" / "verified.json"
    (mark,) = json.loads(path.read_text())["one"]["files"].values()
    old = {"sha256": SHA, "staged": True, **dict(zip(("size", "mtime_ns", "inode"), mark))}
    path.write_text(json.dumps({"one": old}))
    monkeypatch.setattr(files, "hash_file", lambda *_: pytest.fail("read again"))
    assert store.run("check", store.entry()) == 0
    assert store.run("stage", store.entry()) == 0
    assert store.run("stage") == 0
    assert store.visible == []
