"""A model with the layers of a 72B on the three devices of the first cluster's reasoning tier: loaded, no more."""

from __future__ import annotations

from pathlib import Path

from benchmarks import lab, sizing
from gleaner import plan as planner
from gleaner.architectures import Batch
from tests.lab.ansible import LAB_ID
from tests.unit import sites


def test_80_layers_and_the_output_lie_where_the_plan_has_them(tmp_path: Path) -> None:
    facts = sizing.facts_of(tmp_path, sizing.MINIATURE)
    site = sites.beefcake2()
    site["models"] = [{**model, "size_bytes": None} for model in site["models"]]
    headers = {model["name"]: facts for model in site["models"]}
    (tier,) = (tier for tier in site["tiers"] if tier["kind"] == "layer_split")
    shares = planner.plan_tier(site, tier["name"], headers)["tensor_split"]

    cache = tier["kv_cache"]
    batch = Batch(tier["context_tokens"], 1, tier["ubatch_tokens"], cache["k"], cache["v"])
    wanted = sizing.Case(sizing.MINIATURE, batch, tuple(map(float, shares)), real=True, idle=True)
    ((case, found),) = sizing.answers(lab.Lab(LAB_ID), tmp_path, [wanted])

    *layers, output = found["layers"]
    assert [layers.count(device) for device in range(3)] == [27, 27, 26]
    assert (layers, output) == (sorted(layers), 2), "the head's device is the last"
    result = sizing.Result()
    sizing.compare(case, facts, found, result)
    assert result.differences == []
