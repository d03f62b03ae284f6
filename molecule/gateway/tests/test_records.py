"""Records that cannot be believed never reach nginx; the last good one stays while Slurm says that its job runs.

The registry is taken from the service user meanwhile, so that the supervisor cannot put its record right.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, REGISTRY, SERVICE_USER, run

RECORD = f"{REGISTRY}/fast.json"
EVIL = "6.6.6.6"
UPDATER = "gleaner-upstream"


def nginx() -> str:
    """All that nginx would read."""
    return run(CONTROLLER, "nginx -T 2>/dev/null")


def put(data: bytes) -> None:
    text = base64.b64encode(data).decode()
    run(CONTROLLER, f"echo {text} | base64 --decode > {RECORD}.new && mv -T {RECORD}.new {RECORD}")


@pytest.fixture(scope="module")
def good() -> Iterator[dict[str, Any]]:
    """The record of the tier that is being served."""
    cluster.wait_served()
    run(CONTROLLER, f"chown root:root {REGISTRY}")
    try:
        record: dict[str, Any] = json.loads(run(CONTROLLER, f"cat {RECORD}"))
        yield record
    finally:
        run(CONTROLLER, f"rm -rf {RECORD} {RECORD}.new; chown {SERVICE_USER}: {REGISTRY}")
        # Until then the tier is served by what the updater remembers.
        cluster.wait_until("the record is back", lambda: cluster.host(CONTROLLER).file(RECORD).is_file, 20)
        cluster.wait_served()


@pytest.fixture(autouse=True)
def _good_first(good: dict[str, Any]) -> None:
    """Each case starts from a routed tier and a record that the updater believes."""
    good["seq"] += 1
    put(json.dumps(good).encode())
    cluster.wait_until("routed", lambda: cluster.ask("/health").status == 200, 15)
    time.sleep(1.5)


def changed(**fields: object) -> bytes:
    """Stands for the good record with other fields."""
    return b"+" + json.dumps(fields).encode()


CASES = [
    pytest.param(b"", "not a JSON document", id="empty"),
    pytest.param(b"\x00\xff\xfegarbage", "not a JSON document", id="garbage"),
    pytest.param(b'{"v":1,"tier":"fast","job":', "not a JSON document", id="truncated"),
    pytest.param(b"[1]", "want an object", id="list"),
    pytest.param(b"x" * 20_000, "record", id="huge"),
    pytest.param(b"[" * 4000, "record", id="nested"),
    pytest.param(changed(v=2), "v: got 2", id="version"),
    pytest.param(changed(host=f"vasp-02; server {EVIL}"), "host: got", id="semicolon"),
    pytest.param(changed(host=f"vasp-02\nserver {EVIL};"), "host: got", id="newline"),
    pytest.param(changed(host="../../../etc/passwd"), "host: got", id="path"),
    pytest.param(changed(host=EVIL), "host: got 6.6.6.6", id="foreign-address"),
    pytest.param(changed(host="vasp-01"), "host: got vasp-01", id="node-of-another-tier"),
    pytest.param(changed(port=0), "port: got 0", id="port-0"),
    pytest.param(changed(port=70000), "port: got 70000", id="port-70000"),
    pytest.param(changed(port=22), "port: got 22", id="port-22"),
    pytest.param(changed(port=f"8080; server {EVIL}"), "port: got", id="port-text"),
    pytest.param(changed(tier="../reasoning"), "tier: got", id="tier-path"),
    pytest.param(changed(models=[f"a; server {EVIL}"]), "models: got", id="model-name"),
    pytest.param(changed(job=999999), "job: got 999999", id="foreign-job"),
    pytest.param(changed(restart=99), "restart: got 99", id="foreign-restart"),
    pytest.param(changed(supervisor=f"vasp-02; {EVIL}"), "supervisor: got", id="supervisor"),
    pytest.param(changed(line=70000), "line: got 70000", id="line"),
]


@pytest.mark.parametrize(("data", "why"), CASES)
def test_a_record_that_cannot_be_believed_changes_nothing_and_is_named(
    good: dict[str, Any], data: bytes, why: str
) -> None:
    if data.startswith(b"+"):
        good["seq"] += 1
        data = json.dumps({**good, **json.loads(data[1:])}).encode()
    configuration, cursor = nginx(), cluster.journal_cursor(UPDATER)
    put(data)
    said = cluster.wait_until(
        "the updater says why", lambda: t if why in (t := cluster.said_since(UPDATER, cursor)) else "", 10
    )
    assert "fast: " in said
    assert "the last good record stays" in said
    assert EVIL not in nginx()
    assert nginx() == configuration
    assert cluster.ask("/health").status == 200


def test_a_stale_record_stays_routed_while_its_job_runs() -> None:
    cursor = cluster.journal_cursor(UPDATER)
    cluster.wait_until(
        "the updater calls it stale", lambda: "record is stale" in cluster.said_since(UPDATER, cursor), 20
    )
    assert "the last good record stays" in cluster.said_since(UPDATER, cursor)
    assert cluster.ask("/health").status == 200


@pytest.mark.parametrize(
    "make",
    ["mkdir {0}", "mkfifo {0}", "ln -s /etc/shadow {0}", "ln -s /dev/zero {0}"],
    ids=["folder", "fifo", "link-to-secret", "link-to-device"],
)
def test_something_else_in_the_place_of_a_record_hangs_nothing_and_leaks_nothing(make: str) -> None:
    configuration, cursor = nginx(), cluster.journal_cursor(UPDATER)
    run(CONTROLLER, f"rm {RECORD} && " + make.format(RECORD))
    try:
        said = cluster.wait_until(
            "the updater says so", lambda: t if RECORD in (t := cluster.said_since(UPDATER, cursor)) else "", 10
        )
        assert "root:" not in said
        assert nginx() == configuration
    finally:
        run(CONTROLLER, f"rm -rf {RECORD}")
