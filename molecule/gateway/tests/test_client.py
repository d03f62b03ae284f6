"""The gateway as a program meets it that uses the official client of the OpenAI API."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize(
    ("path", "body", "method", "status"),
    [
        ("/no/such/path", None, "GET", 404),
        ("/v1/chat/completions", b"{ not json", "POST", 0),
        ("/" + "x" * 20000, None, "GET", 414),
    ],
)
def test_mistakes_are_answered_in_json(path: str, body: bytes | None, method: str, status: int) -> None:
    answer = cluster.ask(path, body, method)
    assert answer.status >= 400, answer
    assert not status or answer.status == status, answer
    assert answer.json["error"]["message"], answer


def test_while_the_tier_is_away_every_path_says_so_and_when_to_come_back(client: openai.OpenAI) -> None:
    with cluster.tier_stopped():
        for path, body in (
            ("/health", None),
            ("/v1/models", None),
            ("/v1/completions", {"model": SMOLLM2, "prompt": "x"}),
            ("/v1/chat/completions", {"model": SMOLLM2, "messages": MESSAGES, "stream": True}),
        ):
            answer = cluster.ask(path, body)
            cluster.assert_away(answer)
            assert re.fullmatch(r"[1-9]\d*", answer.headers["retry-after"])
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=SMOLLM2, messages=MESSAGES)
        assert caught.value.status_code == 503
        assert caught.value.type == "unavailable_error"
        # A client that retries, as the official one does by itself, is served once the tier is back.
        cluster.run(CONTROLLER, "systemctl start gleaner-keeper")
        patient = client.with_options(max_retries=5)
        assert patient.chat.completions.create(model=SMOLLM2, messages=MESSAGES, max_tokens=1).choices
