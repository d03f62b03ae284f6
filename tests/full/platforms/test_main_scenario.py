"""What site.yml promises, on whatever Debian the lab has: both tiers serve, and a second run finds nothing to do."""

from __future__ import annotations

import pytest

from tests.lab import cluster
from tests.lab.ansible import succeed
from tests.lab.cluster import NODES, SMOLLM2, SPLIT_PORT, THINKING, run


@pytest.mark.parametrize(("model", "port"), [(SMOLLM2, cluster.PORT), (THINKING, SPLIT_PORT)])
def test_both_tiers_answer(model: str, port: int) -> None:
    cluster.wait_until(f"{port} answers", lambda: cluster.complete(model, port=port).status == 200)


@pytest.mark.parametrize("dry", [["--check", "--diff"], []], ids=["dry", "real"])
def test_a_second_run_changes_nothing(dry: list[str]) -> None:
    done = succeed("site.yml", *dry)
    assert set(done.changed.values()) == {0}, done.output


def test_nodes_have_the_controllers_configuration() -> None:
    for file in ("slurm.conf", "gres.conf", "cgroup.conf"):
        written = run(cluster.CONTROLLER, f"cat /etc/slurm/{file}")
        assert all(run(node, f"cat /run/slurm/conf/{file}") == written for node in NODES)
