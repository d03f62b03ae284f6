"""The first cluster's numbers that did not add up, by the planner and from its inventory."""

from __future__ import annotations

from typing import Any

import pytest

from gleaner import placement, plan
from gleaner.site import Problem
from tests.unit import sites
from tests.unit.model_shapes import BEHEMOTH, CODER, recorded

HEADERS = {name: recorded(name) for name in (BEHEMOTH, CODER)}
FAST, REASONING = 0, 1


def site(flash_attention: bool = False, **wishes: Any) -> dict[str, Any]:
    """The inventory with other wishes for its reasoning tier."""
    value = sites.beefcake2()
    value["tiers"][REASONING].update(wishes)
    value["llama_cpp"]["flash_attention"] = flash_attention
    return value


def problems(value: dict[str, Any]) -> list[Problem]:
    return plan.problems(value, HEADERS)


def fits(**wishes: Any) -> bool:
    """Whether the reasoning tier fits with other wishes, alone on the cluster."""
    value = site(**wishes)
    del value["tiers"][FAST]
    found = problems(value)
    assert all(problem.variable == "tiers[0].context_tokens" for problem in found)
    return not found


def test_its_inventory_fits_as_it_is() -> None:
    assert problems(sites.beefcake2()) == []


def test_27_27_27_leaves_the_head_26_layers_and_the_output() -> None:
    got = plan.plan_tier(sites.beefcake2(), "reasoning", HEADERS)
    assert got["tensor_split"] == [27, 27, 27]
    devices = [(row["device"], row["layers"]) for row in got["memory"][:3]]
    assert devices == [("vasp-02 gpu0", "0-26"), ("vasp-03 gpu0", "27-53"), ("vasp-01 gpu0", "54-79 + output")]
    # Their own numbers, which they took for head first, place the layers no differently.
    assert placement.device_of_each_layer(80, [26, 27, 27]) == placement.slots_of_counts(got["tensor_split"])


def test_the_labs_miniature_is_laid_out_as_the_72b() -> None:
    value = sites.beefcake2()
    value["models"] = [{**model, "size_bytes": None} for model in value["models"]]
    headers = {**HEADERS, BEHEMOTH: recorded("tiny-random-72b-f16")}
    small, large = (plan.plan_tier(value, "reasoning", known) for known in (headers, HEADERS))
    assert small["tensor_split"] == large["tensor_split"]
    assert small["server"]["args"] == large["server"]["args"]


def test_the_cache_that_the_table_shows_is_the_one_of_the_types() -> None:
    got = plan.plan_tier(sites.beefcake2(), "reasoning", HEADERS)
    # K in q4_0 and V in f16: 25.625 GiB, where they counted 11.5 and 23.
    assert sum(row["kv"] for row in got["memory"][:3]) == 26240
    got = plan.plan_tier(site(flash_attention=True, kv_cache={"k": "q4_0", "v": "q4_0"}), "reasoning", HEADERS)
    assert 11.25 * 1024 <= sum(row["kv"] for row in got["memory"][:3]) <= 11.25 * 1024 + 3
    got = plan.plan_tier(site(flash_attention=True, kv_cache={"k": "q8_0", "v": "q8_0"}), "reasoning", HEADERS)
    assert 21.25 * 1024 <= sum(row["kv"] for row in got["memory"][:3]) <= 21.25 * 1024 + 3


def test_the_crash_beyond_40000_tokens() -> None:
    """With a batch of 1024 and without flash attention, as they ran; 512 was their remedy."""
    assert fits(context_tokens=32768, ubatch_tokens=1024, batch_tokens=1024)
    assert not fits(context_tokens=40960, ubatch_tokens=1024, batch_tokens=1024)
    assert fits(context_tokens=40960, ubatch_tokens=512)


def test_the_whole_context_needs_a_small_micro_batch_or_flash_attention() -> None:
    assert not fits(ubatch_tokens=512)
    assert fits(ubatch_tokens=64)
    assert fits(ubatch_tokens=512, flash_attention=True, kv_cache={"k": "q8_0", "v": "q8_0"})
    (problem,) = problems(site(ubatch_tokens=512))
    assert problem.got.startswith("131072, with which vasp-02 gpu0 needs ")
    assert problem.wanted == "at most 32768 MiB"
    assert "the wanted context with a smaller micro-batch (context_tokens: 131072, ubatch_tokens: 128" in problem.cure
    assert "flash attention, an opt-in, with K and V in q8_0 (context_tokens: 131072" in problem.cure


def test_a_quantised_v_without_flash_attention_is_refused() -> None:
    (problem,) = problems(site(kv_cache={"k": "q4_0", "v": "q4_0"}))
    assert str(problem) == (
        "tiers[1].kv_cache.v = 'q4_0'; wanted f16 while llama_cpp_flash_attention is false; "
        "cure: v: f16 with a quantised k, or llama_cpp_flash_attention: true"
    )
    assert problems(site(flash_attention=True, kv_cache={"k": "q4_0", "v": "q4_0"})) == []


def test_two_14b_do_not_fit_and_what_does_is_said() -> None:
    value = sites.beefcake2()
    value["models"].append({**value["models"][0], "name": "second-14b"})
    headers = {**HEADERS, "second-14b": recorded(CODER)}
    (problem,) = plan.problems(value, headers)
    assert problem.variable == "tiers[0].models_max"
    assert problem.got.startswith("2, which can be second-14b ")
    assert f", {CODER} " in problem.got
    assert problem.wanted == "at most 32768 MiB, the GPU of vasp-02"
    assert problem.cure.startswith("models_max: 1")
    value["tiers"][FAST]["models_max"] = 1
    assert plan.problems(value, headers) == []


def test_both_tiers_want_one_gpu_and_the_choice_that_runs_both_is_offered() -> None:
    value = sites.beefcake2()
    for name in ("fast", "reasoning"):
        (warning,) = (text for text in plan.plan_tier(value, name, HEADERS)["warnings"] if "whose GPUs tier" in text)
        assert "vasp-02" in warning
        assert "reasoning has the higher priority" in warning
    choices = plan.plan_tier(value, "reasoning", HEADERS)["alternatives"]
    assert choices
    for choice in choices:
        assert choice["what"] == "both tiers at once, vasp-02 left to the other"
        assert (choice["head"], choice["workers"]) == ("vasp-01", ["vasp-03"])
        assert choice["context_tokens"] >= 32768
        wishes = {key: choice[key] for key in ("context_tokens", "ubatch_tokens", "kv_cache", "workers")}
        other = site(**wishes)
        assert problems(other) == []
        for name in ("fast", "reasoning"):
            planned = plan.plan_tier(other, name, HEADERS)
            assert not [text for text in planned["warnings"] if "GPUs" in text]
            assert planned["alternatives"] == []


def test_two_nodes_hold_the_model_at_32768_tokens() -> None:
    assert fits(workers=["vasp-03"], context_tokens=32768, ubatch_tokens=512)
    assert not fits(workers=["vasp-03"], context_tokens=131072, ubatch_tokens=16)


@pytest.mark.parametrize("change", [{"memory_mib": 24576}, {"memory_used_mib": 8192}])
def test_layers_shift_away_from_a_smaller_gpu_and_from_one_in_use(change: dict[str, int]) -> None:
    def split(name: str) -> list[int]:
        value = site(context_tokens=65536)
        value["nodes"][name]["gpus"] = [{**value["nodes"][name]["gpus"][0], **change}]
        counts: list[int] = plan.plan_tier(value, "reasoning", HEADERS)["tensor_split"]
        assert sum(counts) == 81
        return counts

    for index, name in enumerate(("vasp-02", "vasp-03", "vasp-01")):
        counts = split(name)
        assert counts[index] < 24
        assert all(count > 27 for other, count in enumerate(counts) if other != index)


def test_equal_workers_can_change_places() -> None:
    first, second = (
        plan.plan_tier(site(workers=workers), "reasoning", HEADERS)
        for workers in (["vasp-02", "vasp-03"], ["vasp-03", "vasp-02"])
    )
    assert first["tensor_split"] == second["tensor_split"]
    keys = ("layers", *plan.COLUMNS)
    assert [[row[key] for key in keys] for row in first["memory"][:3]] == [
        [row[key] for key in keys] for row in second["memory"][:3]
    ]


def test_no_choice_of_the_engine_is_offered_that_another_tier_cannot_have() -> None:
    """Flash attention is on for all tiers or for none, and over RPC it wants K and V of one type."""

    def offers_flash_attention(value: dict[str, Any]) -> bool:
        _, plans = plan.examine(value, HEADERS)
        (wanted,) = (one for one in plans if one["tier"] == "reasoning")
        return any(choice["flash_attention"] for choice in wanted["alternatives"])

    value = site(ubatch_tokens=512)
    assert offers_flash_attention(value)
    names = {"name": "other", "job_name": "llama-other", "gateway_port": 8082, "priority": 5}
    other = {**value["tiers"][REASONING], **names, "context_tokens": 4096}
    for cache, offered in (({"k": "f16", "v": "f16"}, True), ({"k": "q4_0", "v": "f16"}, False)):
        value["tiers"][REASONING + 1 :] = [{**other, "kv_cache": cache}]
        assert offers_flash_attention(value) is offered
