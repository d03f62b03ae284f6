"""llama-server is killed while clients are being answered: what each of them gets, until all is well again."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import threading
import time
from dataclasses import dataclass

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, PORT, SMOLLM2, TIER_NODE, Answer, run

# Nobody waits longer than for a model to be loaded.
WAIT_SECONDS = 30.0
ASKERS = 3


@dataclass(frozen=True)
class Stream(Answer):
    """A streamed answer; `whole` when the connection ended as HTTP says that a body ends."""

    whole: bool

    @property
    def done(self) -> bool:
        return self.body.rstrip().endswith(b"data: [DONE]")


def stream(tokens: int, begun: threading.Event) -> Stream:
    """A streamed completion, read to its end, whatever that is; sets `begun` at the first piece."""
    start = time.monotonic()
    connection = http.client.HTTPConnection(cluster.address(CONTROLLER), PORT, timeout=WAIT_SECONDS)
    body = {"model": SMOLLM2, "prompt": "Count:", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    status, headers, content, whole = 0, {}, b"", True
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            status, headers = response.status, {name.lower(): value for name, value in response.getheaders()}
            while piece := response.read1(65536):
                content += piece
                begun.set()
    except (http.client.IncompleteRead, ConnectionResetError):
        whole = False
    finally:
        connection.close()
    return Stream(status, headers, content, time.monotonic() - start, whole)


def ask_until(enough: threading.Event) -> list[Answer]:
    """Completions of one token in turn, plain and streamed, each begun after the former has ended."""
    answers: list[Answer] = []
    while not enough.is_set():
        answers.append(cluster.complete(SMOLLM2))
        answers.append(stream(1, threading.Event()))
    return answers


def assert_served(answer: Answer) -> None:
    assert answer.seconds < WAIT_SECONDS, answer
    if isinstance(answer, Stream):
        assert answer.whole, answer
        assert answer.done, answer
    else:
        assert answer.json["choices"], answer


def test_a_killed_server_costs_what_was_in_flight_and_everybody_is_told() -> None:
    assert cluster.complete(SMOLLM2).status == 200
    server = cluster.router_pid()
    begun, enough = threading.Event(), threading.Event()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        streamed = pool.submit(stream, 1900, begun)
        assert begun.wait(WAIT_SECONDS)
        # The model answers one at a time: this one waits behind the stream.
        plain = pool.submit(cluster.complete, SMOLLM2, 100)
        time.sleep(0.5)
        assert not streamed.done()
        assert not plain.done()
        run(TIER_NODE, f"kill -KILL {server}")
        askers = [pool.submit(ask_until, enough) for _ in range(ASKERS)]
        try:
            cluster.away_and_back(30)
            time.sleep(3)
        finally:
            enough.set()
        in_flight = streamed.result()
        later = [answer for asker in askers for answer in asker.result()]

    # Nothing can be added to a stream that has begun, and nothing must look like its end.
    assert in_flight.status == 200
    *lines, _cut = in_flight.body.splitlines()
    assert len(lines) > 1
    assert all(line.startswith(b"data: ") for line in lines if line), in_flight.body
    assert not in_flight.done
    assert not in_flight.whole
    cluster.assert_away(plain.result(), WAIT_SECONDS)

    for answer in later:
        if answer.status == 200:
            assert_served(answer)
        else:
            cluster.assert_away(answer)
    assert {answer.status for answer in later} == {200, 503}
    for kind in (Answer, Stream):
        served = [answer for answer in later if type(answer) is kind and answer.status == 200]
        assert served, f"no {kind.__name__} was served again"
