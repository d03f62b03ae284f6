"""Rules: each has a site that breaks it and one, all but the same, that does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from gleaner import rules
from gleaner import site as site_model
from tests.unit import sites
from tests.unit.model_shapes import BEHEMOTH, CODER, recorded

Change = Callable[[dict[str, Any], dict[str, Any]], None]
FAST, REASONING = 0, 1


def case(change: Change | None, tier: int, ubatch_tokens: int = 512) -> rules.Case:
    """A tier of the good site, with a change of the site or of the header facts of its models."""
    value, headers = sites.site(), sites.headers()
    for name in ("vasp-04", "vasp-05"):
        value["nodes"][name] = sites.node(int(name[-1]) + 10)
    if change is not None:
        change(value, headers)
    site = site_model.read(value, headers)
    typed = list(site.tiers.values())[tier]
    return rules.Case(site, tier, typed, site.models_of(typed), ubatch_tokens)


def broken(change: Change | None, tier: int, ubatch_tokens: int = 512) -> set[str]:
    """The names of the rules with findings, doubtful ones too."""
    whole = case(change, tier, ubatch_tokens)
    return {rule.name for rule in rules.RULES if list(rule.find(whole))}


def tier(number: int, **changes: Any) -> Change:
    def change(value: dict[str, Any], headers: dict[str, Any]) -> None:
        value["tiers"][number].update(changes)

    return change


def engine(**changes: Any) -> Change:
    def change(value: dict[str, Any], headers: dict[str, Any]) -> None:
        value["llama_cpp"].update(changes)

    return change


def facts(name: str, **changes: Any) -> Change:
    def change(value: dict[str, Any], headers: dict[str, Any]) -> None:
        headers[name].update(changes)

    return change


def gpus(model: str, *nodes: str) -> Change:
    def change(value: dict[str, Any], headers: dict[str, Any]) -> None:
        for name in nodes or value["nodes"]:
            value["nodes"][name]["gpus"][0]["model"] = model

    return change


def second_split(worker: str) -> Change:
    """Another layer-split tier, on nodes with a GPU for each tier."""

    def change(value: dict[str, Any], headers: dict[str, Any]) -> None:
        for node in value["nodes"].values():
            node["gpus"] *= 2
        names = {"name": "second", "job_name": "llama-second", "gateway_port": 8082, "priority": 30}
        value["tiers"].append({**value["tiers"][REASONING], **names, "head": "vasp-04", "workers": [worker]})

    return change


def three_on_vasp_03(gpus_of_it: int) -> Change:
    """Three tiers that want a GPU of vasp-03 each, among them both of the good site."""

    def change(value: dict[str, Any], headers: dict[str, Any]) -> None:
        value["nodes"]["vasp-03"]["gpus"] *= gpus_of_it
        fast = value["tiers"][FAST]
        fast["nodes"] = ["vasp-03"]
        names = {"name": "third", "job_name": "llama-third", "gateway_port": 8082, "priority": 30}
        value["tiers"].append({**fast, **names})

    return change


def both(*changes: Change) -> Change:
    def change(value: dict[str, Any], headers: dict[str, Any]) -> None:
        for one in changes:
            one(value, headers)

    return change


HEADS = {"head_dim_k": 48, "head_dim_v": 48}
# Flash attention, and heads that it knows.
FLASH = both(
    engine(flash_attention=True),
    *(facts(name, head_dim_k=64, head_dim_v=64) for name in ("small", "other", "large")),
)
APART = tier(FAST, nodes=["vasp-04"])

# By rule: the tier, what breaks it there, and what is nearest to that and does not.
CASES: dict[str, tuple[int, Change, Change]] = {
    "known architecture": (FAST, facts("other", architecture="novel"), facts("large", architecture="novel")),
    "quantised V needs flash attention": (
        FAST,
        tier(FAST, kv_cache={"v": "q8_0"}),
        both(tier(FAST, kv_cache={"v": "q8_0"}), FLASH),
    ),
    "quantised KV fits the heads": (
        FAST,
        both(tier(FAST, kv_cache={"k": "q8_0"}), facts("small", **HEADS)),
        both(tier(FAST, kv_cache={"k": "f16"}), facts("small", **HEADS)),
    ),
    "flash attention on SM70 is an opt-in": (
        FAST,
        FLASH,
        both(FLASH, gpus("t4"), engine(cuda_architectures=["75-real"])),
    ),
    "flash attention knows the heads": (FAST, both(FLASH, facts("small", **HEADS)), FLASH),
    "K and V of one type over RPC with flash attention": (
        REASONING,
        FLASH,
        both(FLASH, tier(REASONING, kv_cache={"k": "q4_0", "v": "q4_0"})),
    ),
    "at most two RPC endpoints": (
        REASONING,
        tier(REASONING, workers=["vasp-02", "vasp-03", "vasp-04"]),
        tier(REASONING, workers=["vasp-03", "vasp-04"]),
    ),
    "one RPC server a node": (
        2,
        second_split("vasp-03"),
        second_split("vasp-05"),
    ),
    "the head is the first node": (
        REASONING,
        tier(REASONING, head="vasp-03", workers=["vasp-02", "vasp-04"]),
        tier(REASONING, head="vasp-02", workers=["vasp-03", "vasp-04"]),
    ),
    "CUDA is built for the GPUs": (FAST, gpus("a100", "vasp-02"), gpus("a100", "vasp-01")),
    "the GPU is known": (FAST, gpus("b300", "vasp-02"), both(gpus("b300"), engine(backend="cpu"))),
    "no prompt cache in host memory over RPC": (
        REASONING,
        tier(REASONING, prompt_cache_mib=1),
        tier(FAST, prompt_cache_mib=1),
    ),
    "a router tier uses one GPU": (
        FAST,
        both(
            lambda value, _: value["nodes"]["vasp-02"].update(gpus=value["nodes"]["vasp-02"]["gpus"] * 2),
            tier(FAST, gpus_per_node=2),
        ),
        lambda value, _: value["nodes"]["vasp-02"].update(gpus=value["nodes"]["vasp-02"]["gpus"] * 2),
    ),
    "scores travel in 32 bits": (
        REASONING,
        # Of each of two requests 131072 cells, 256 tokens, 32 heads, of 4 bytes each.
        both(facts("large", n_head=32), tier(REASONING, context_tokens=131072, parallel=2)),
        both(facts("large", n_head=31), tier(REASONING, context_tokens=131072, parallel=2)),
    ),
    "tiers on the same GPUs have an order": (REASONING, tier(FAST, priority=20), both(tier(FAST, priority=20), APART)),
    "tiers compete for the same GPUs": (FAST, tier(FAST, nodes=["vasp-02"]), tier(FAST, nodes=["vasp-02", "vasp-04"])),
    "a node has a GPU for each of its tiers": (2, three_on_vasp_03(2), three_on_vasp_03(3)),
    "the model was trained for the context": (
        FAST,
        tier(FAST, context_tokens=8193),
        tier(FAST, context_tokens=8192),
    ),
}


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.name)
def test_a_rule_is_broken_by_what_it_forbids_and_by_nothing_near(rule: rules.Rule) -> None:
    assert rule.name in CASES, f"give CASES a site that breaks the rule {rule.name!r} and one that does not"
    number, breaks, near = CASES[rule.name]
    assert rule.name in broken(breaks, number)
    assert rule.name not in broken(near, number)


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.name)
def test_a_finding_names_variable_value_wanted_and_cure(rule: rules.Rule) -> None:
    number, breaks, _ = CASES[rule.name]
    whole = case(breaks, number)
    for problem in rule.find(whole):
        assert re.match(rf"tiers\[{number}\]\.|models\[|llama_cpp_|hostvars\[", problem.variable)
        assert all((problem.got, problem.wanted, problem.cure))
    errors, warnings = rules.check(whole)
    texts = [str(problem) for problem in rule.find(whole)]
    if rule.level == "error":
        assert set(texts) <= {str(problem) for problem in errors}
        assert rule.name in rules.broken(whole)
    else:
        assert {f"{text}; because {rule.reason}" for text in texts} <= set(warnings)
        assert rule.name not in rules.broken(whole)


def test_no_case_is_of_a_rule_that_is_gone() -> None:
    assert list(CASES) == [rule.name for rule in rules.RULES]
    assert {rule.level for rule in rules.RULES} == {"error", "warning"}


@pytest.mark.parametrize("number", [FAST, REASONING])
def test_the_good_site_breaks_none(number: int) -> None:
    assert broken(APART, number) == set()


def test_a_request_has_scores_of_its_own() -> None:
    """Their stride is that of one request, not of all in the micro-batch."""
    wish = both(facts("large", n_head=16), tier(REASONING, context_tokens=131072, parallel=2))
    assert "scores travel in 32 bits" not in broken(wish, REASONING)
    assert "scores travel in 32 bits" in broken(wish, REASONING, ubatch_tokens=1024)
    flash = both(FLASH, tier(REASONING, kv_cache={"k": "f16", "v": "f16"}))
    assert "scores travel in 32 bits" not in broken(both(wish, flash), REASONING, ubatch_tokens=1024)


@pytest.mark.parametrize(
    ("architectures", "gpu", "runs"),
    [
        (["70-real"], "v100", True),
        (["70-real"], "t4", True),  # of one generation
        (["75-real"], "v100", False),
        (["70-real"], "a100", False),
        (["70"], "a100", True),  # the driver compiles PTX for later ones
        (["70-virtual"], "h100", True),
        (["80-virtual"], "v100s", False),
        (["90a-real"], "h100", True),
        (["60-real", "80-real"], "v100", False),
        (["60-real", "70-real"], "v100", True),
    ],
)
def test_what_cuda_was_built_for_runs_there(architectures: list[str], gpu: str, runs: bool) -> None:
    found = broken(both(engine(cuda_architectures=architectures), gpus(gpu)), FAST)
    assert ("CUDA is built for the GPUs" not in found) == runs


def test_a_gpu_that_is_not_known_is_named_with_its_host() -> None:
    whole = case(gpus("b300", "vasp-03"), REASONING)
    (warning,) = (text for text in rules.check(whole)[1] if "b300" in text)
    assert warning.startswith("hostvars[vasp-03].gpus = model 'b300'; wanted one of v100")


def test_of_heads_with_unlike_k_and_v_flash_attention_has_no_kernel() -> None:
    uneven = facts("small", architecture="gemma3", head_dim_k=128, head_dim_v=64)
    assert "flash attention knows the heads" in broken(both(FLASH, uneven), FAST)
    assert "flash attention knows the heads" not in broken(both(FLASH, uneven, engine(backend="cpu")), FAST)


def test_of_two_tiers_without_an_order_the_second_is_named() -> None:
    wish = tier(FAST, priority=20)
    assert "tiers on the same GPUs have an order" not in broken(wish, FAST)
    (problem,) = rules.check(case(wish, REASONING))[0]
    assert str(problem) == (
        "tiers[1].priority = 20; wanted another one than that of tier fast, which wants the GPUs of vasp-02 too; "
        "cure: give the tier that shall win the higher priority"
    )


def test_a_router_tier_competes_only_where_no_node_is_left_for_it() -> None:
    def competitors(nodes: list[str], gpus_of_vasp_02: int = 1) -> list[tuple[str, list[str]]]:
        def change(value: dict[str, Any], headers: dict[str, Any]) -> None:
            value["tiers"][FAST]["nodes"] = nodes
            value["nodes"]["vasp-02"]["gpus"] *= gpus_of_vasp_02

        whole = case(change, REASONING)
        return [(other.name, shared) for other, shared in rules.competitors(whole.site, whole.tier)]

    assert competitors(["vasp-02"]) == [("fast", ["vasp-02"])]
    assert competitors(["vasp-02", "vasp-03"]) == [("fast", ["vasp-02", "vasp-03"])]
    assert competitors(["vasp-02", "vasp-04"]) == []
    assert competitors(["vasp-04"]) == []
    assert competitors(["vasp-02"], gpus_of_vasp_02=2) == []


def test_with_a_fourth_node_both_tiers_of_the_first_cluster_run_at_once() -> None:
    value = sites.beefcake2()
    value["nodes"]["vasp-04"] = {
        **value["nodes"]["vasp-03"],
        "cluster_address": "10.0.0.14",
        "rpc_address": "10.0.1.14",
    }
    (fast,) = (tier for tier in value["tiers"] if tier["kind"] == "router")
    fast["nodes"] = ["vasp-02", "vasp-04"]
    site = site_model.read(value, {name: recorded(name) for name in (BEHEMOTH, CODER)})
    assert [rules.competitors(site, tier) for tier in site.tiers.values()] == [[], []]


def test_the_first_clusters_inventory_breaks_no_rule_but_wants_one_gpu_twice() -> None:
    value = sites.beefcake2()
    site = site_model.read(value, {name: recorded(name) for name in (BEHEMOTH, CODER)})
    for index, one in enumerate(site.tiers.values()):
        errors, warnings = rules.check(rules.Case(site, index, one, site.models_of(one), one.ubatch_tokens or 512))
        assert errors == []
        assert [text for text in warnings if "GPUs tier" not in text] == []
        assert len(warnings) == 1


def test_table_has_each_rule_and_no_bars_in_its_cells() -> None:
    head, line, *rows = rules.table().splitlines()
    assert head.count("|") == line.count("|") == 5
    assert [row.split(" | ")[0] for row in rows] == [f"| {rule.name}" for rule in rules.RULES]
    assert {row.count("|") for row in rows} == {5}
