"""The engine is changed for another real version and back: what fails goes back by itself, and says why."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.full.lab.test_models import SOURCES
from tests.lab import cluster, preempt
from tests.lab.ansible import ROOT, Run, playbook, started, succeed
from tests.lab.cluster import CONTROLLER, SMOLLM2, SPLIT_PORT, THINKING, run

BUILDS = "/cluster/shared/ai/llama.cpp"
NOW, OTHER = "0.5.0-dev-0c1e570", "0.1.0-dev"
UPGRADE = ("playbooks/upgrade_engine.yml", "-e", f"llama_cpp_version={OTHER}", "-e", "planner_truth_quick=true")
# Whatever is known against the build.
RETRY = "-ellama_cpp_retry=true"
ROLLBACK = "playbooks/rollback_engine.yml"


@pytest.fixture(scope="module", autouse=True)
def _as_before() -> Iterator[None]:
    subprocess.run([sys.executable, "tools/fetch_lab_sources.py", "--other-engine", str(SOURCES)], cwd=ROOT, check=True)
    preempt.wait_served()
    yield
    run(CONTROLLER, f"rm -f {BUILDS}/history.json")
    succeed("site.yml")
    preempt.wait_served()


def version(path: str) -> str:
    """Of the build to which a link leads."""
    return run(CONTROLLER, f"readlink {path}").rpartition("/")[2].rpartition("-")[0]


def in_use() -> str:
    return version(f"{BUILDS}/current")


def running() -> set[str]:
    """Versions of the builds that the tiers' jobs run."""
    jobs = [cluster.running_job(name).id for name in (cluster.JOB_NAME, cluster.SPLIT_JOB)]
    return {version(f"/cluster/shared/ai/logs/{job}/engine") for job in jobs}


def serves() -> bool:
    return cluster.complete(SMOLLM2).status == 200 and cluster.complete(THINKING, port=SPLIT_PORT).status == 200


def all_with(name: str) -> bool:
    return in_use() == f"{name}-cpu" and running() == {f"{name}-cpu"} and serves()


def upgrade(*more: str) -> Run:
    return playbook(*UPGRADE, *more, timeout=1800)


def test_a_dry_run_builds_and_moves_nothing() -> None:
    before = run(CONTROLLER, f"ls {BUILDS}/.builds")
    done = upgrade("--check", "--diff")
    assert done.code == 0, done.output
    assert f"{OTHER}-cpu is to be built" in done.text
    assert "into engine.yml of the inventory" not in done.text
    assert run(CONTROLLER, f"ls {BUILDS}/.builds") == before
    assert all_with(NOW)


def test_the_tiers_move_to_the_other_version_and_are_seen_to_answer() -> None:
    done = upgrade()
    assert done.code == 0, done.output
    assert f"Write llama_cpp_version: {OTHER} into engine.yml" in done.text
    assert all_with(OTHER)
    dry = upgrade("--check", "--diff")
    again = upgrade()
    for run_again in (dry, again):
        assert run_again.code == 0, run_again.output
        assert set(run_again.changed.values()) == {0}, run_again.output


def test_one_command_goes_back_and_stays_there() -> None:
    done = succeed(ROLLBACK)
    assert f"The tiers run with {NOW}-cpu-" in done.text
    assert all_with(NOW)
    again = succeed(ROLLBACK)
    assert set(again.changed.values()) == {0}, again.output
    assert all_with(NOW)
    refused = upgrade()
    assert refused.code != 0
    assert f"{OTHER}-cpu-" in refused.text
    assert "from which a person went back; cure: " in refused.text
    assert all_with(NOW)


def test_a_build_that_is_not_whole_is_not_gone_back_to() -> None:
    build = run(CONTROLLER, f"readlink -f {BUILDS}/{OTHER}-cpu")
    with spoilt(f"{build}/bin/llama-server"):
        refused = playbook(ROLLBACK, "-e", f"engine_build={build.rpartition('/')[2]}")
    assert refused.code != 0
    assert "bin/llama-server: sha256: got" in refused.text
    assert all_with(NOW)


def test_paying_jobs_are_not_taken_for_a_bad_build_and_the_move_goes_on_afterwards() -> None:
    with started(*UPGRADE, RETRY, "-e", "tier_engine_wait_seconds=20") as play:
        cluster.wait_until("the move begins", moving, 300)
        with preempt.paying(*preempt.BOTH):
            output, _ = play.communicate(timeout=300)
    assert play.returncode != 0, output
    text = " ".join(output.split())
    assert "could not be asked: queued" in text
    assert f"all tiers are planned with {OTHER}-cpu-" in text
    assert in_use() == f"{NOW}-cpu"
    done = upgrade(RETRY)
    assert done.code == 0, done.output
    assert all_with(OTHER)
    succeed(ROLLBACK)
    assert all_with(NOW)


def test_a_move_that_is_killed_is_left_by_the_way_back() -> None:
    with started(*UPGRADE, RETRY) as play:
        cluster.wait_until("the move begins", moving, 300)
        cluster.wait_until("a tier is told to yield", lambda: running_or_none() != {f"{NOW}-cpu"}, 120)
        play.send_signal(signal.SIGKILL)
    assert in_use() == f"{NOW}-cpu"
    succeed(ROLLBACK)
    assert all_with(NOW)
    assert not moving()


def test_a_version_with_which_the_tiers_do_not_answer_goes_back_by_itself_and_is_not_tried_again() -> None:
    """Its server is one that ends at once; its manifest is right, as that of a build that is broken by its source."""
    build = run(CONTROLLER, f"readlink -f {BUILDS}/{OTHER}-cpu")
    with spoilt(f"{build}/bin/llama-server", "#!/bin/sh\nexit 3\n"):
        resum(build)
        done = upgrade(RETRY)
        assert done.code != 0
        assert f"the tiers are back with {NOW}-cpu-" in done.text
        assert "did not answer in" in done.text
        assert "the server died too often" in done.text
        assert all_with(NOW)
        for again in (upgrade(), playbook("site.yml", "-e", f"llama_cpp_version={OTHER}", "--tags", "build,always")):
            assert again.code != 0
            assert "with which the tiers failed" in again.text
    resum(build)


def moving() -> bool:
    """A move has begun and not ended."""
    # 2: there is no history yet. A host that cannot be asked raises by itself.
    code = cluster.host(CONTROLLER).run(f"grep -qs '\"target\"' {BUILDS}/history.json").rc
    assert code in (0, 1, 2)
    return bool(code == 0)


def running_or_none() -> set[str]:
    """As `running`, and empty while a tier has no job that runs, which is what a test waits for."""
    try:
        return running()
    except AssertionError:
        return set()


@contextmanager
def spoilt(file: str, text: str = "spoilt") -> Iterator[None]:
    """Another content in the place of a file of a build."""
    run(CONTROLLER, f"cp --preserve=mode {file} /root/kept && printf {text!r} > {file}")
    try:
        yield
    finally:
        run(CONTROLLER, f"cp /root/kept {file} && rm /root/kept")


def resum(build: str) -> None:
    """Have the manifest tell of the server as it is now."""
    program = (
        "import hashlib, json;"
        f"path, server = '{build}/manifest.json', 'bin/llama-server'; value = json.load(open(path));"
        f"value['sha256'][server] = hashlib.sha256(open('{build}/' + server, 'rb').read()).hexdigest();"
        "json.dump(value, open(path, 'w'))"
    )
    run(CONTROLLER, f'python3 -c "{program}"')
