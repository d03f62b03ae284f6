"""Time to the first token, of several servers in turn. Runs on the host that all admit; standard library only.

Standard input holds this program when it comes over ssh, so the one argument is JSON:
{"servers": {"name": "host:port", …}, "request": {…}, "pairs": 40, "keep_alive": true, "key_file": "/…"}.
llama-server itself answers only who brings the key; the gateway has its own.
Prints JSON: for each server the seconds of each request, in order.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from pathlib import Path

WARM_UP = 3


def first_token_seconds(connection: http.client.HTTPConnection, body: bytes, headers: dict[str, str]) -> float:
    """From the first byte of the request, connecting included when it is needed, to the first token's event."""
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}, wanted 200: {response.read(500)!r}")
    taken = None
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        choices = json.loads(line[6:])["choices"]
        if taken is None and choices and choices[0]["delta"].get("content"):
            taken = time.perf_counter() - began
    if taken is None:
        raise RuntimeError("the stream had no token")
    return taken


def main() -> None:
    order = json.loads(sys.argv[1])
    servers: dict[str, str] = order["servers"]
    body = json.dumps(order["request"]).encode()
    key = Path(order["key_file"]).read_text().strip()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    if not order["keep_alive"]:
        headers["Connection"] = "close"
    connections = {name: http.client.HTTPConnection(place, timeout=60) for name, place in servers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    names = list(servers)
    for turn in range(-WARM_UP, order["pairs"]):
        # Who comes later finds warmer caches, so each is first in its turn.
        names.append(names.pop(0))
        for name in names:
            taken = first_token_seconds(connections[name], body, headers)
            if not order["keep_alive"]:
                connections[name].close()
            if turn >= 0:
                seconds[name].append(taken)
    json.dump(seconds, sys.stdout)


if __name__ == "__main__":
    main()
