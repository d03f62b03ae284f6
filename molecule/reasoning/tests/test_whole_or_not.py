"""A layer-split tier is whole or not there, whatever of it dies, freezes or is cut off; and it comes back by itself.

The worst of each kind, beside a killed worker, which is a lesson of test_lessons.py; tests/full/lab has the rest.
"""

from __future__ import annotations

import pytest

from tests.lab import split
from tests.lab.cluster import HEAD, WORKERS

(WORKER,) = WORKERS


@pytest.mark.parametrize(
    ("node", "signal", "busy"),
    [
        # /health of the head goes on to be good.
        pytest.param(WORKER, "STOP", True, id="worker-frozen-while-generating"),
        pytest.param(HEAD, "KILL", False, id="head-killed"),
        pytest.param(HEAD, "STOP", True, id="head-frozen-while-generating"),
    ],
)
def test_a_process_that_dies_or_freezes(node: str, signal: str, busy: bool) -> None:
    split.lose_process(node, signal, busy=busy)


def test_a_worker_that_is_cut_off_from_the_rpc_network() -> None:
    split.lose_network(WORKER, "r")


def test_a_worker_whose_node_is_rebooted() -> None:
    split.lose_power(WORKER)
