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
from gleaner.smoke import Verdict

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
        # Time goes by in sleep alone.
        self.now = 0.0
        monkeypatch.setattr(smoke, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def _look(self, *_: object) -> list[dict[str, Any]]:
        return [self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]]

    def job(self, job: int, build: str) -> None:
        folder = self.root / "logs" / str(job)
        folder.mkdir(parents=True)
        (folder / "engine").symlink_to(f"/x/.builds/{build}")

    def says(self, state: str, job: int | None, why: str | None = None, failure: str | None = None) -> None:
        told = {"tier": "fast", "state": state, "job": job, "reason": None, "why": why or failure, "failure": failure}
        self.looks.append({**told, "models": ["one"]})

    def wait(self, seconds: float = 60.0) -> Verdict:
        return smoke.wait(self.config, self.root / "state", "127.0.0.1", ["fast"], NEW, seconds)


@pytest.fixture
def site(tmp_path: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path, gateway, monkeypatch)
    made.job(1, OLD)
    made.job(2, NEW)
    return made


def test_the_old_build_s_answers_do_not_count(site: Site, gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    site.says("serving", 1)
    site.says("serving", 1)
    site.says("yielding", 1)
    site.says("loading", 2)
    site.says("serving", 2)
    assert site.wait() == Verdict()
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
    assert site.wait(3) == Verdict(failed=(f"fast did not answer in 3 s: answers wrongly: {wrong}",))


def test_a_build_whose_jobs_fail_is_not_waited_for(site: Site) -> None:
    """Two jobs do, whose ends the keeper tells; what failed before is not this build's fault."""
    site.says("serving", 1, failure="job 1 ended: long ago")
    site.says("loading", 2, failure="job 1 ended: long ago")
    site.says("paused", None, failure="job 2 ended: exit code 11")
    site.says("loading", 3, failure="job 2 ended: exit code 11")
    site.says("paused", None, failure="job 3 ended: exit code 11")
    (failed,) = site.wait(600).failed
    assert failed.endswith("job 2 ended: exit code 11; job 3 ended: exit code 11")


def test_a_tier_that_loads_too_long_has_failed(site: Site) -> None:
    site.says("loading", 2)
    assert site.wait(3) == Verdict(failed=("fast did not answer in 3 s: loading",))


@pytest.mark.parametrize(
    ("state", "job", "why", "told"),
    [
        ("queued", 2, "Resources", "queued (Resources)"),
        ("yielding", 2, None, "yielding"),
        ("paused", None, "reasoning (priority 20) wants vasp-02", "paused (reasoning (priority 20) wants vasp-02)"),
        ("serving", 1, None, f"serving (with {OLD})"),
        ("unknown", None, None, "unknown"),
    ],
)
def test_a_tier_without_its_gpus_says_nothing_of_the_build(
    site: Site, state: str, job: int | None, why: str | None, told: str
) -> None:
    site.says(state, job, why)
    assert site.wait(3) == Verdict(unseen=(f"fast could not be asked: {told}",))


def test_a_tier_that_a_person_holds_is_not_waited_for(site: Site) -> None:
    site.says("held", None, "held by alice")
    assert site.wait(600) == Verdict(unseen=("fast could not be asked: held (held by alice)",))


def test_a_preemption_in_the_middle_is_waited_out(site: Site, gateway: Gateway) -> None:
    site.says("loading", 2)
    site.says("yielding", 2)
    for _ in range(20):
        site.says("queued", 2)
    site.says("serving", 2)
    assert site.wait(15) == Verdict()
    assert len(gateway.asked) == 1


def test_neither_a_tier_that_yields_just_now_nor_a_gateway_that_is_away_tells_of_the_build(
    site: Site, gateway: Gateway
) -> None:
    site.says("serving", 2)
    gateway.status = 503
    assert "HTTP 503" in site.wait(3).unseen[0]
    site.config.tiers[0].gateway_port = 1
    assert "no answer: " in site.wait(3).unseen[0]
