"""What Gleaner's own programs are given on the first cluster, read by the code that reads it there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gleaner import keeper, supervisor, upstream
from gleaner.engine import Manifest
from tests.render.beefcake2 import CONTROLLER, NODES, Rendered

KEEPER, GATEWAY = "etc/gleaner/keeper.json", "etc/gleaner/gateway.json"
FAST, REASONING = (f"cluster/shared/ai/plans/{tier}.json" for tier in ("fast", "reasoning"))


def given(site: Rendered, path: str, folder: Path, *lacking: str | int) -> Path:
    """A copy of a rendered file, without one of its keys; the build that a plan names is a manifest in the folder."""
    value: dict[str, Any] = json.loads(site.text(CONTROLLER, path))
    if "engine" in value:
        Manifest("key", "1", "cuda", {}, "c++", "x86-64-v3", (), {"bin/llama-server": "0" * 64}).write(folder)
        value["engine"]["prefix"] = str(folder)
    if lacking:
        inner: Any = value
        for key in lacking[:-1]:
            inner = inner[key]
        del inner[lacking[-1]]
    copy = folder / Path(path).name
    copy.write_text(json.dumps(value))
    return copy


def test_the_keeper_knows_each_tier_by_what_its_script_says(site: Rendered) -> None:
    config = keeper.Config.load(site.folder / CONTROLLER / KEEPER)
    fast, reasoning = config.tiers
    assert (fast.tier, fast.need.nodes, fast.need.node_count) == ("fast", ("vasp-02",), 1)
    assert (reasoning.tier, set(reasoning.need.nodes), reasoning.need.node_count) == ("reasoning", set(NODES), 3)
    for tier in config.tiers:
        assert tier.digest == keeper.script_digest(f"{site.folder}/{CONTROLLER}{tier.script}") != ""


def test_the_updater_asks_where_the_plans_have_their_servers(site: Rendered, tmp_path: Path) -> None:
    config = upstream.Config.load(site.folder / CONTROLLER / GATEWAY)
    assert config.registry == keeper.Config.load(site.folder / CONTROLLER / KEEPER).registry
    fast, reasoning = config.tiers
    assert fast.nodes == fast.supervisors == {"vasp-02": "10.0.0.12"}
    assert reasoning.nodes == {"vasp-01": "10.0.0.11"}
    for tier, path in ((fast, FAST), (reasoning, REASONING)):
        plan = supervisor.Plan.load(given(site, path, tmp_path))
        assert (tier.tier, tier.node_port, tier.supervisors) == (plan.tier, plan.port, plan.address_of)


def test_the_supervisor_takes_its_plans(site: Rendered, tmp_path: Path) -> None:
    fast = supervisor.Plan.load(given(site, FAST, tmp_path))
    assert (fast.head, fast.worker) == (None, None)
    assert fast.models == ("strand-rust-coder-14b-q8_0",)
    reasoning = supervisor.Plan.load(given(site, REASONING, tmp_path))
    assert reasoning.worker is not None
    assert (reasoning.head, reasoning.worker.port) == ("vasp-01", 50052)
    assert set(reasoning.rpc_address_of) == set(NODES)


@pytest.mark.parametrize(
    ("load", "path", "lacking"),
    [
        (keeper.Config.load, KEEPER, ("tiers", 0, "need", "mem_mib")),
        (upstream.Config.load, GATEWAY, ("tiers", 1, "supervisors")),
        (supervisor.Plan.load, FAST, ("server", "node_port")),
        (supervisor.Plan.load, REASONING, ("worker", "cache", "limit_mib")),
    ],
)
def test_a_file_that_lacks_something_is_refused(
    load: Callable[[Path], object], path: str, lacking: tuple[str | int, ...], site: Rendered, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"KeyError\\('{lacking[-1]}'\\)"):
        load(given(site, path, tmp_path, *lacking))
