"""The rest of what molecule's scenario `reasoning` begins: every part of a layer-split tier is lost in every way."""

from __future__ import annotations

import pytest

from tests.lab import split
from tests.lab.cluster import HEAD, WORKERS

(WORKER,) = WORKERS


@pytest.mark.parametrize(
    ("node", "signal", "busy"),
    [
        pytest.param(WORKER, "KILL", False, id="worker-killed"),
        pytest.param(WORKER, "STOP", False, id="worker-frozen"),
        pytest.param(HEAD, "KILL", True, id="head-killed-while-generating"),
        pytest.param(HEAD, "STOP", False, id="head-frozen"),
    ],
)
def test_a_process_that_dies_or_freezes(node: str, signal: str, busy: bool) -> None:
    split.lose_process(node, signal, busy=busy)


@pytest.mark.parametrize(
    ("node", "networks"),
    [
        pytest.param(WORKER, "m", id="worker-from-the-cluster-network"),
        pytest.param(WORKER, "mr", id="worker-from-both"),
        pytest.param(HEAD, "m", id="head-from-the-cluster-network"),
        pytest.param(HEAD, "r", id="head-from-the-rpc-network"),
        pytest.param(HEAD, "mr", id="head-from-both"),
    ],
)
def test_a_node_that_is_cut_off(node: str, networks: str) -> None:
    split.lose_network(node, networks)


def test_a_head_whose_node_is_rebooted() -> None:
    split.lose_power(HEAD)
