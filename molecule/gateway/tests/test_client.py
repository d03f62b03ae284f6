"""The gateway as a program meets it that uses the official client of the OpenAI API."""

from __future__ import annotations

import time

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, GEMMA3, PORT, SMOLLM2, TINY

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Name the capital of France."},
]


@pytest.fixture
def client() -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://{cluster.address(CONTROLLER)}:{PORT}/v1", api_key="none", max_retries=0, timeout=120
    )


def test_health_is_good() -> None:
    answer = cluster.ask("/health")
    assert (answer.status, answer.json) == (200, {"status": "ok"})


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {SMOLLM2, GEMMA3, TINY}


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=SMOLLM2, messages=MESSAGES, max_tokens=24, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_a_streamed_chat_has_the_same_words(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=SMOLLM2, messages=MESSAGES, max_tokens=24, temperature=0)
    stream = client.chat.completions.create(model=SMOLLM2, messages=MESSAGES, max_tokens=24, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3


def test_a_completion_is_answered_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=SMOLLM2, prompt="One, two, three,", max_tokens=12, temperature=0)
    stream = client.completions.create(
        model=SMOLLM2, prompt="One, two, three,", max_tokens=12, temperature=0, stream=True
    )
    assert whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text


def test_streams_are_not_buffered(client: openai.OpenAI) -> None:
    start = time.monotonic()
    stream = client.completions.create(
        model=SMOLLM2, prompt="Count:", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    moments = [time.monotonic() - start for _ in stream]
    assert len(moments) > 300
    assert moments[0] < moments[-1] / 4
    # Evenly spread, not in gusts: half of the pieces are there at about half of the time.
    middle = moments[len(moments) // 2] / moments[-1]
    assert 0.2 < middle < 0.8


def test_an_unknown_model_is_the_clients_mistake(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no-such-model"):
        client.completions.create(model="no-such-model", prompt="x", max_tokens=1)


HOST = b" HTTP/1.1\r\nHost: gateway\r\n"
# What the gateway itself answers, whether the tier is up or away.
MISTAKES = [
    pytest.param(b"GET /no/such/path" + HOST + b"\r\n", 404, id="unknown-path"),
    pytest.param(b"POST /models/unload" + HOST + b"Content-Length: 2\r\n\r\n{}", 404, id="path-of-the-router"),
    pytest.param(b"GET /slots" + HOST + b"\r\n", 404, id="others-prompts"),
    pytest.param(b"GET /v1/models?reload=1" + HOST + b"\r\n", 403, id="reload"),
    pytest.param(b"GET /" + b"x" * 20000 + HOST + b"\r\n", 414, id="long-path"),
    pytest.param(b"GET /health" + HOST + b"X: " + b"x" * 20000 + b"\r\n\r\n", 431, id="long-header"),
    pytest.param(b"POST /v1/completions" + HOST + b"Content-Length: 70000000\r\n\r\n", 413, id="large-body"),
    pytest.param(b"POST /v1/completions" + HOST + b"Content-Length: x\r\n\r\n", 400, id="no-length"),
    pytest.param(b"TRACE /health" + HOST + b"\r\n", 405, id="trace"),
    pytest.param(b"GET /health HTTP/1.1\r\n\r\n", 400, id="no-host"),
    pytest.param(b"GET /health HTTP/7.0\r\n\r\n", 505, id="version"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, id="tls"),
    pytest.param(b"what is this\r\n\r\n", 400, id="no-http"),
]


def assert_mistake(answer: cluster.Answer, status: int) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-type"].startswith("application/json"), answer
    error = answer.json["error"]
    assert error["message"], answer
    assert error["type"], answer
    assert error["code"] == status, answer


@pytest.mark.parametrize(("request_", "status"), MISTAKES)
def test_mistakes_are_answered_in_json(request_: bytes, status: int) -> None:
    assert_mistake(cluster.send(request_), status)


def test_what_llama_server_refuses_is_json() -> None:
    answer = cluster.ask("/v1/chat/completions", b"{ not json")
    assert answer.status in (400, 500), answer
    assert answer.json["error"]["message"], answer


def test_head_is_answered_without_a_body() -> None:
    answer = cluster.ask("/health", method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"].startswith("application/json"), answer
    unknown = cluster.ask("/no/such/path", method="HEAD")
    assert (unknown.status, unknown.body) == (404, b"")
    assert unknown.headers["content-type"].startswith("application/json"), unknown


def test_a_clients_own_key_does_not_matter(client: openai.OpenAI) -> None:
    """Programs insist on one."""
    for key in ("none", "sk-" + "0" * 48):
        assert list(client.with_options(api_key=key).models.list())
    assert cluster.ask("/v1/models").status == 200


def test_while_the_tier_is_away_every_path_says_so_and_when_to_come_back(client: openai.OpenAI) -> None:
    with cluster.tier_stopped():
        for path, body in (
            ("/health", None),
            ("/v1/models", None),
            ("/v1/completions", {"model": SMOLLM2, "prompt": "x"}),
            ("/v1/chat/completions", {"model": SMOLLM2, "messages": MESSAGES, "stream": True}),
        ):
            cluster.assert_away(cluster.ask(path, body))
        head = cluster.ask("/health", method="HEAD")
        assert (head.status, head.body) == (503, b""), head
        assert head.headers["content-type"].startswith("application/json"), head
        assert head.headers["retry-after"], head
        for request in MISTAKES:
            data, status = request.values
            assert isinstance(data, bytes)
            assert isinstance(status, int)
            assert_mistake(cluster.send(data), status)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=SMOLLM2, messages=MESSAGES)
        assert caught.value.status_code == 503
        assert caught.value.type == "unavailable_error"
        # A client that retries, as the official one does by itself, is served once the tier is back.
        cluster.run(CONTROLLER, "systemctl start gleaner-keeper")
        patient = client.with_options(max_retries=5)
        assert patient.chat.completions.create(model=SMOLLM2, messages=MESSAGES, max_tokens=1).choices
