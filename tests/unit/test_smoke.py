"""Whether the tiers answer with a certain build: asked as a client asks, and told as it comes."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gleaner import keeper, smoke, status

NEW, OLD = "2-cpu-000000000002", "1-cpu-000000000001"
WHOLE = {"choices": [{"text": "x"}], "usage": {"completion_tokens": 8}}


class Gateway:
    """A port that answers completions, with what a test says."""

    def __init__(self) -> None:
        self.status, self.body = 200, json.dumps(WHOLE)
        self.asked: list[dict[str, Any]] = []
        gateway = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                gateway.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(gateway.status)
                self.end_headers()
                self.wfile.write(gateway.body.encode())

            def log_message(self, *_: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    yield made
    made.server.shutdown()
    made.server.server_close()


class Site:
    """One tier whose job runs a build, as `gleaner status` tells of it, one look after the other."""

    def __init__(self, root: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks: list[dict[str, Any]] = []
        self.root = root
        tier = SimpleNamespace(tier="fast", gateway_port=gateway.server.server_port)
        self.config: Any = SimpleNamespace(registry=root / "endpoints", tiers=(tier,))
        monkeypatch.setattr(keeper, "load_state", lambda _: {})
        monkeypatch.setattr(status, "look", self._look)
        monkeypatch.setattr(smoke, "POLL_SECONDS", 0.01)

    def _look(self, *_: object) -> list[dict[str, Any]]:
        return [self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]]

    def job(self, job: int, build: str) -> None:
        folder = self.root / "logs" / str(job)
        folder.mkdir(parents=True)
        (folder / "engine").symlink_to(f"/x/.builds/{build}")

    def says(self, state: str, job: int | None, why: str | None = None) -> None:
        self.looks.append({"tier": "fast", "state": state, "job": job, "reason": None, "why": why, "models": ["one"]})

    def wait(self, seconds: float = 5.0) -> list[str]:
        return smoke.wait(self.config, self.root / "state", "127.0.0.1", ["fast"], NEW, seconds)


@pytest.fixture
def site(tmp_path: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path, gateway, monkeypatch)
    made.job(1, OLD)
    made.job(2, NEW)
    return made


def test_the_old_build_s_answers_do_not_count(site: Site, gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    site.says("serving", 1)
    site.says("yielding", 1)
    site.says("loading", 2)
    site.says("serving", 2)
    assert site.wait() == []
    assert capsys.readouterr().out.splitlines() == [
        f"fast: serving (with {OLD})",
        f"fast: yielding (with {OLD})",
        "fast: loading",
        f"fast: answers with {NEW}",
    ]
    assert [one["model"] for one in gateway.asked] == ["one"]


@pytest.mark.parametrize(
    ("code", "body", "wrong"),
    [
        (500, "it fell over", "HTTP 500: it fell over"),
        (200, "<html>", "the answer is no completion: <html>"),
        (200, json.dumps({**WHOLE, "usage": {"completion_tokens": 0}}), "the answer has no tokens"),
    ],
)
def test_a_wrong_answer_is_told(site: Site, gateway: Gateway, code: int, body: str, wrong: str) -> None:
    site.says("serving", 2)
    gateway.status, gateway.body = code, body
    assert site.wait(0.05) == [f"fast did not answer within 0.05 s: answers wrongly: {wrong}"]


def test_a_tier_that_fails_is_told_with_the_reason(site: Site) -> None:
    site.says("paused", None, "the server died too often")
    assert site.wait(0.05) == ["fast did not answer within 0.05 s: paused (the server died too often)"]


def test_nobody_there_is_no_answer(site: Site, gateway: Gateway) -> None:
    site.says("serving", 2)
    site.config.tiers[0].gateway_port = 1
    (wrong,) = site.wait(0.05)
    assert "no answer: " in wrong
