"""The lab's tailnet, with the controller on it; skipped by name where its programs cannot be built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import cluster, tailnet
from tests.lab.ansible import CACHE, ROOT
from tests.lab.telling import pytest_runtest_makereport as pytest_runtest_makereport
from tools import tailnet_programs


@pytest.fixture(scope="session")
def programs() -> Path:
    try:
        return tailnet_programs.build(CACHE / "tailnet")
    except tailnet_programs.NotHere as reason:
        # Nothing here can bring Go, or a way to its modules; a build that breaks is another error, and fails.
        pytest.skip(f"scenario tailnet: {reason}")


@pytest.fixture(scope="session")
def lab(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tailnet.Lab]:
    """headscale runs, and alice, bob and mallory are on its tailnet; the controller is not."""
    there = tailnet.Lab(programs, tmp_path_factory.mktemp("tailnet"))
    prepared = there.play(str(ROOT / "molecule/tailnet/prepare.yml"))
    assert prepared.code == 0, prepared.output
    known = {user["name"] for user in there.headscale("users", "list") or []}
    for user in {"admin", *tailnet.PEOPLE} - known:
        there.headscale("users", "create", user)
    for person in tailnet.PEOPLE:
        there.join(person)
    yield there
    there.forget()


@pytest.fixture(scope="session")
def served(lab: tailnet.Lab) -> tailnet.Lab:
    """The controller is on the tailnet as its inventory says, and the policy of the inventory is in force."""
    run = lab.play("playbooks/gateway.yml")
    assert run.code == 0, run.output
    run = lab.play("playbooks/tailnet.yml", key=lab.auth_key("admin", tag=tailnet.TAG))
    assert run.code == 0, run.output
    lab.answered_mallory_before = tailnet.ask("mallory", "/health").status != 0
    lab.enforce()
    return lab


@pytest.fixture(autouse=True)
def tiers(request: pytest.FixtureRequest) -> None:
    if "served" in request.fixturenames:
        cluster.wait_served()
        cluster.wait_until(
            "the reasoning tier is up", lambda: cluster.ask("/health", port=cluster.SPLIT_PORT).status == 200
        )
