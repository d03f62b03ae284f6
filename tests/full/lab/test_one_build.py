"""Head and workers of different builds: impossible, and refused where a node is shown another file all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, SPLIT_JOB, SPLIT_PORT, WORKERS, run

WORKER = WORKERS[0]
OTHER = "/root/another-build"
SERVER = "bin/ggml-rpc-server"
# What the manifest says of this file is another file's sum; and a whole build of its own, made from the same inputs.
CHANGED = f"printf X >> {OTHER}/{SERVER}"
ANOTHER = (
    f"{CHANGED}; sum=$(sha256sum {OTHER}/{SERVER} | cut -d ' ' -f 1); "
    f'sed -i \'s|"{SERVER}": "[^"]*"|"{SERVER}": "\'$sum\'"|\' {OTHER}/manifest.json'
)


@contextmanager
def shown(edit: str) -> Iterator[str]:
    """The worker's node sees another build in the place of the one that its tier runs, as a stale mount would show."""
    build = run(CONTROLLER, "readlink -f /cluster/shared/ai/llama.cpp/current")
    run(WORKER, f"rm -rf {OTHER} && cp -r {build} {OTHER} && {edit} && mount --bind {OTHER} {build}")
    try:
        yield build
    finally:
        run(WORKER, f"umount --lazy {build}; rm -rf {OTHER}")
        run(CONTROLLER, "gleaner tier reasoning restarted")
        cluster.wait_served(port=SPLIT_PORT)


def newest_log() -> str:
    return run(CONTROLLER, "cat $(ls -td /cluster/shared/ai/logs/*/supervisor.log | head -n 1)")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (CHANGED, f"{SERVER}: sha256: got"),
        (ANOTHER, "manifest.json: this node sees"),
    ],
    ids=["changed", "another"],
)
def test_a_worker_that_sees_another_build_starts_nothing(edit: str, said: str) -> None:
    cluster.wait_served(port=SPLIT_PORT)
    before = cluster.running_job(SPLIT_JOB)
    with shown(edit) as build:
        run(CONTROLLER, "gleaner tier reasoning restarted")
        cluster.wait_until("the tier says why it does not start", lambda: f"agent on {WORKER}: {build}" in newest_log())
        assert said in newest_log()
        assert cluster.host(WORKER).run("pgrep --full ggml-rpc-server").rc != 0
        assert cluster.ask("/health", port=SPLIT_PORT).status == 503
    assert cluster.running_job(SPLIT_JOB).id != before.id


def test_both_ends_run_from_the_same_folder() -> None:
    head = run(cluster.HEAD, f"readlink /proc/$(pgrep --oldest --uid {cluster.SERVICE_USER} llama-server)/exe")
    worker = run(WORKER, f"readlink /proc/$(pgrep --oldest --uid {cluster.SERVICE_USER} ggml-rpc-server)/exe")
    assert (
        head.rpartition("/bin/")[0]
        == worker.rpartition("/bin/")[0]
        == run(CONTROLLER, "readlink -f /cluster/shared/ai/llama.cpp/current")
    )
