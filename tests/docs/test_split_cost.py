"""The arithmetic of benchmarks/split.py, and what it makes of the plan, without a lab."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, split, split_host
from tests.unit import sites

NODES = ("vasp-01", "vasp-02", "vasp-03")
SHOWN = """\
1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever preferred_lft forever
2: host0    inet 10.213.5.11/24 brd 10.213.5.255 scope global host0\\       valid_lft forever
3: rpc0    inet 10.214.5.1/24 brd 10.214.5.255 scope global rpc0\\       valid_lft forever
3: rpc0    inet6 fe80::1/64 scope link \\       valid_lft forever preferred_lft forever
"""


def line(number: int, way: str, prompt: float, answer: float) -> str:
    figures = {"tokens": 64, "bytes": 64000, "packets": 128}
    phases = {"prompt": {**figures, "tokens_per_second": prompt}, "answer": {**figures, "tokens_per_second": answer}}
    return json.dumps({"round": number, "way": way, "interface": "rpc0", **phases})


def results(*rounds: tuple[float, float, float, float]) -> str:
    return "\n".join(
        line(number, way, 10 * speed, speed)
        for number, row in enumerate(rounds)
        for way, speed in reversed(list(zip(split.WAYS, row)))
    )


def plan() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    site = sites.site()
    wish = argparse.Namespace(model="small", threads=2, prompt_tokens=512, answer_tokens=64)
    return site, *split.plans(site, sites.headers(), wish, NODES)


def test_shares_are_of_the_splits_time() -> None:
    found = split.shares({split.ALONE: 100.0, split.OWN_RPC: 80.0, split.SPLIT: 50.0})
    assert (found.computing, found.rpc, found.network) == pytest.approx((0.5, 0.125, 0.375))
    assert found.lost == pytest.approx(1 - 50.0 / 100.0)


def test_what_the_host_wrote_is_read_in_the_order_of_rounds() -> None:
    measured = split.read("srun: something that was said\n" + results((9, 9, 8, 7), (99, 99, 88, 77)))
    assert split.speeds(measured, "answer") == {
        split.SPLIT: [7, 77],
        split.OWN_RPC: [8, 88],
        split.AGAIN: [9, 99],
        split.ALONE: [9, 99],
    }
    assert split.whole(measured, 2)
    assert not split.whole(measured, 3)
    assert not split.whole(split.read(results((9, 9, 8, 7)).rpartition("\n")[0]), 1)


def test_a_failure_on_the_host_is_told() -> None:
    with pytest.raises(RuntimeError, match="after 1 measurements: no RPC server"):
        split.read(line(0, split.ALONE, 1, 1) + '\n{"failed": "no RPC server at 10.0.0.1:50052"}')


def test_the_report_says_where_the_time_goes() -> None:
    measured = split.read(results((100, 100, 62.5, 50), (100, 104, 62.5, 50), (100, 101, 62.5, 50)))
    text = split.split_report(measured)
    assert "| writing an answer | split | 50.0 | 50.0 to 50.0 |" in text
    assert (
        "| writing an answer | 50 % (50 % to 50 %) | 30 % (30 % to 30 %) | 20 % (20 % to 20 %) "
        "| 50 % (50 % to 50 %) | 1 % |"
    ) in text
    # 64000 bytes and 128 packets for 64 tokens; 20 ms each, of which one node takes 10 and its own RPC 16.
    assert "| writing an answer | 1.0 | 2.0 | 20.000 | +10.000 | +4.000 |" in text


@pytest.mark.parametrize(
    ("lost", "noise", "said"),
    [
        ([0.1, 0.2, 0.3], 0.05, "20 % (10 % to 30 %)"),
        ([0.1, 0.2, 0.3], 0.2, "untold: the noise is 20 %"),
        ([-0.1, 0.2, 0.3], 0.05, "untold: the rounds say -10 % to 30 %"),
    ],
)
def test_a_noisy_run_tells_nothing(lost: list[float], noise: float, said: str) -> None:
    assert split.verdict(lost, noise) == said


def test_the_document_has_a_place_for_it() -> None:
    assert report.replace(report.DOCUMENT.read_text(), "split", "figures")


def test_the_ways_differ_in_the_split_alone() -> None:
    site, planned, _ = plan()
    ways = split.ways(planned["server"]["args"], split.model_file(site, "small"))
    assert tuple(ways) == split.WAYS
    assert ways[split.ALONE] == ways[split.AGAIN]
    assert not set(split.SPLIT_FLAGS) & set(ways[split.ALONE])
    for way, words in ((split.SPLIT, "RPC"), (split.OWN_RPC, "RPC-HERE")):
        arguments = ways[way]
        assert arguments[arguments.index("--rpc") + 1] == words
        assert split.without_split(arguments) == ways[split.ALONE]
    placed = split_host.endpoints_of(ways, [1234, 1235], ["10.0.0.2:50052", "10.0.0.3:50052"])
    assert placed[split.OWN_RPC][placed[split.OWN_RPC].index("--rpc") + 1] == "127.0.0.1:1234,127.0.0.1:1235"
    assert placed[split.SPLIT][placed[split.SPLIT].index("--rpc") + 1] == "10.0.0.2:50052,10.0.0.3:50052"


def test_a_file_of_the_site_is_read_where_it_lies() -> None:
    site = {"models": [{"name": "a", "source": "file:///srv/a.gguf"}, {"name": "b", "source": "https://x/b.gguf"}]}
    assert split.model_file(site, "a") == "/srv/a.gguf"
    assert split.model_file(site, "b") == "/scratch/ai/models/b.gguf"


def test_the_script_starts_a_server_on_each_worker_and_measures_on_the_head() -> None:
    site, planned, alone = plan()
    text = split.script(planned, split.host_memory_mib(site, planned, alone), "/shared/split", "/engine/bin", 2)
    nodes = planned["nodes"]
    servers = [one for one in text.splitlines() if "ggml-rpc-server" in one]
    assert len(servers) == 2
    for (name, node), started in zip(list(nodes.items())[1:], servers):
        assert node["role"] == "worker"
        assert f"--nodelist={name} " in started
        assert f"-H {node['rpc_address']} -p {planned['rpc_port']} -t 2" in started
        assert started.endswith("&")
    last = text.splitlines()[-1]
    assert f"--nodelist={next(iter(nodes))} python3 -m benchmarks.split_host task.json" in last


def test_each_way_is_first_in_its_turn() -> None:
    turns = list(split_host.turns(split.WAYS, 4))
    assert [way for number, way in turns[::4]] == list(split.WAYS)
    assert all({way for other, way in turns if other == number} == set(split.WAYS) for number in range(4))


def test_the_interface_is_that_of_the_address() -> None:
    assert split_host.interface_of("10.214.5.1", SHOWN) == "rpc0"
    with pytest.raises(ValueError, match="wanted the node's rpc_address"):
        split_host.interface_of("10.214.5.11", SHOWN)


def test_counters_are_the_kernels() -> None:
    assert set(split_host.counters("lo")) == set(split_host.COUNTERS)
    assert Path("/sys/class/net/lo/statistics/rx_bytes").exists()
