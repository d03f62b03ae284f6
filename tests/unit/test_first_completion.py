"""The last words of `make up`: an answer, or exit code 1 and what was wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import openai
import pytest

from tools.first_completion import MODEL, answer_to


class Endpoint(ThreadingHTTPServer):
    """An OpenAI endpoint that gives the choices it was told to give."""

    choices: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": self.server.choices}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{endpoint.server_address[1]}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as one:
        yield one


def choice(content: str | None) -> dict[str, Any]:
    return {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}


def test_an_answer_is_given(endpoint: Endpoint, client: openai.OpenAI) -> None:
    endpoint.choices = [choice("A chip.")]
    assert answer_to("What is a GPU?", client) == "A chip."


@pytest.mark.parametrize("choices", [[choice("")], [choice(" \n")], [choice(None)], []])
def test_an_empty_answer_is_a_failure(endpoint: Endpoint, client: openai.OpenAI, choices: list[dict[str, Any]]) -> None:
    endpoint.choices = choices
    # Words given to sys.exit are printed, and the exit code is 1.
    with pytest.raises(SystemExit, match=rf"{MODEL} was asked 'What is a GPU\?' and answered .*, wanted some words"):
        answer_to("What is a GPU?", client)
