"""The engine is changed for another real version and back: what fails goes back by itself, and says why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.full.lab.test_models import SOURCES
from tests.lab import cluster
from tests.lab.ansible import ROOT, playbook, succeed
from tests.lab.cluster import CONTROLLER, PORT, SMOLLM2, SPLIT_PORT, THINKING, run

BUILDS = "/cluster/shared/ai/llama.cpp"
NOW, OTHER = "0.5.0-dev-0c1e570", "0.1.0-dev"
UPGRADE = ("playbooks/upgrade_engine.yml", "-e", f"llama_cpp_version={OTHER}", "-e", "planner_truth_quick=true")


@pytest.fixture(scope="module", autouse=True)
def _as_before() -> Iterator[None]:
    subprocess.run([sys.executable, "tools/fetch_lab_sources.py", "--other-engine", str(SOURCES)], cwd=ROOT, check=True)
    cluster.wait_served()
    cluster.wait_served(port=SPLIT_PORT)
    yield
    run(CONTROLLER, f"rm -f {BUILDS}/history.json")
    succeed("site.yml")
    cluster.wait_served()
    cluster.wait_served(port=SPLIT_PORT)


def in_use() -> str:
    return run(CONTROLLER, f"readlink {BUILDS}/current")


def running() -> set[str]:
    """Versions of the builds that the tiers' jobs run."""
    links = [run(CONTROLLER, f"readlink /cluster/shared/ai/logs/{cluster.running_job(name).id}/engine")
             for name in (cluster.JOB_NAME, cluster.SPLIT_JOB)]  # fmt: skip
    return {link.rpartition("/")[2].rpartition("-")[0] for link in links}


def serves() -> bool:
    return cluster.complete(SMOLLM2).status == 200 and cluster.complete(THINKING, port=SPLIT_PORT).status == 200


def test_a_dry_run_builds_and_moves_nothing() -> None:
    before = run(CONTROLLER, f"ls {BUILDS}/.builds")
    done = playbook(*UPGRADE, "--check", "--diff")
    assert done.code == 0, done.output
    assert f"{OTHER}-cpu is to be built" in done.text
    assert (run(CONTROLLER, f"ls {BUILDS}/.builds"), in_use()) == (before, f"{NOW}-cpu")


def test_the_tiers_move_to_the_other_version_and_are_seen_to_answer() -> None:
    done = succeed(*UPGRADE, timeout=1800)  # type: ignore[arg-type]
    assert f"Write llama_cpp_version: {OTHER} into engine.yml" in done.text
    assert in_use() == f"{OTHER}-cpu"
    assert running() == {f"{OTHER}-cpu"}
    assert serves()
    again = succeed(*UPGRADE)
    assert set(again.changed.values()) == {0}, again.output


def test_one_command_goes_back() -> None:
    done = succeed("playbooks/rollback_engine.yml")
    assert f"The tiers run with {NOW}" in done.text
    assert in_use() == f"{NOW}-cpu"
    assert running() == {f"{NOW}-cpu"}
    assert serves()


def test_a_version_with_which_the_tiers_do_not_answer_goes_back_by_itself_and_is_not_tried_again() -> None:
    """Its server is one that ends at once; its manifest is right, as that of a build that is broken by its source."""
    build = run(CONTROLLER, f"readlink -f {BUILDS}/{OTHER}-cpu")
    server = f"{build}/bin/llama-server"
    run(CONTROLLER, f"cp {server} /root/llama-server && printf '#!/bin/sh\\nexit 3\\n' > {server}")
    resum(build, server)
    try:
        done = playbook(*UPGRADE, "-e", "tier_engine_wait_seconds=60")
        assert done.code != 0
        assert f"the tiers failed with it and are back with {NOW}-cpu" in done.text
        assert "did not answer within 60 s" in done.text
        assert in_use() == f"{NOW}-cpu"
        assert running() == {f"{NOW}-cpu"}
        assert serves()
        again = playbook("site.yml", "-e", f"llama_cpp_version={OTHER}", "--tags", "build,always")
        assert again.code != 0
        assert "with which the tiers failed" in again.text
    finally:
        run(CONTROLLER, f"cp /root/llama-server {server} && rm /root/llama-server")
        resum(build, server)
    assert PORT != SPLIT_PORT


def resum(build: str, file: str) -> None:
    """Have the manifest tell of the file as it is now."""
    program = (
        f"import hashlib, json; path = '{build}/manifest.json'; value = json.load(open(path));"
        f"value['sha256']['bin/llama-server'] = hashlib.sha256(open('{file}', 'rb').read()).hexdigest();"
        "json.dump(value, open(path, 'w'))"
    )
    run(CONTROLLER, f'python3 -c "{program}"')
