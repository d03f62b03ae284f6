"""The builds of the engine that stay on the shared file system."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import cluster
from tests.lab.ansible import succeed
from tests.lab.cluster import CONTROLLER, run

ROOT = "/cluster/shared/ai/llama.cpp"
OLD, OLDER, OLDEST = "0.0.3-cpu-test", "0.0.2-cpu-test", "0.0.1-cpu-test"


def engine_link() -> str:
    return f"/cluster/shared/ai/logs/{cluster.running_job().id}/engine"


def builds() -> set[str]:
    return set(run(CONTROLLER, f"ls {ROOT}/.builds").split())


@pytest.fixture
def older_builds() -> Iterator[None]:
    """Three, of which the running job says that it runs the oldest."""
    link = engine_link()
    before = run(CONTROLLER, f"readlink {link}")
    for name, day in ((OLD, 3), (OLDER, 2), (OLDEST, 1)):
        folder = f"{ROOT}/.builds/{name}"
        run(
            CONTROLLER, f"mkdir {folder} && touch -d 2001-01-0{day} {folder} && ln -s .builds/{name} {ROOT}/{name[:-5]}"
        )
    run(CONTROLLER, f"ln -sfn {ROOT}/.builds/{OLDEST} {link}")
    yield
    run(CONTROLLER, f"ln -sfn {before} {link}; rm -rf {ROOT}/.builds/0.0.*-cpu-test {ROOT}/0.0.*-cpu")


def test_a_running_job_says_which_build_it_runs() -> None:
    named = run(CONTROLLER, f"readlink {engine_link()}")
    program = run(cluster.TIER_NODE, f"readlink /proc/{cluster.router_pid()}/exe")
    assert program == f"{named}/bin/llama-server"
    assert named == run(CONTROLLER, f"readlink -f {ROOT}/current")


def test_old_builds_go_but_for_what_is_in_use(older_builds: None) -> None:
    current = run(CONTROLLER, f"readlink -f {ROOT}/current").rpartition("/")[2]
    succeed("playbooks/engine.yml")
    assert builds() == {current, OLD, OLDEST}
    assert OLDER[:-5] not in run(CONTROLLER, f"ls {ROOT}").split()
    again = succeed("playbooks/engine.yml")
    assert set(again.changed.values()) == {0}
    assert cluster.complete(cluster.SMOLLM2).status == 200
