"""A run that was killed in the middle of an installation is followed by one that finishes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import cluster
from tests.lab.ansible import ROOT, succeed
from tests.lab.cluster import run

NODE = "vasp-03"
ONLY = ("playbooks/cluster.yml", "--limit", NODE, "--tags", "cluster_base")


@pytest.fixture
def broken() -> Iterator[None]:
    """A node on which apt refuses all work."""
    said = cluster.host(NODE).run((ROOT / "tests/lab/kill_dpkg").read_text())
    assert said.rc == 0, said
    assert "dpkg was interrupted" in said.stderr
    yield
    run(NODE, "dpkg --purge killer needy hello && rm -r /root/broken")


def states() -> list[str]:
    return run(NODE, "dpkg-query --show --showformat='${db:Status-Status} ' killer needy hello").split()


@pytest.mark.usefixtures("broken")
def test_an_installation_that_was_killed_is_finished() -> None:
    dry = succeed(*ONLY, "--check", "--diff")
    assert "-killer half-configured" in dry.output
    assert "-needy unpacked" in dry.output
    assert cluster.host(NODE).run("apt-get --yes install hello").rc != 0

    assert succeed(*ONLY).changed == {NODE: 1}
    assert states() == ["installed"] * 3
    assert run(NODE, "dpkg --audit && apt-get check -qq") == ""
    assert succeed(*ONLY).changed == {NODE: 0}
