"""Recorded header facts at their worst: refused in one line, or planned with bounded work."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gleaner import architectures, gguf, placement, plan
from gleaner import site as site_model
from tests.unit import gguf_claims as claims
from tests.unit import sites

LAYERS = 4
SIZES = ("n_embd", "n_ff", "n_head", "n_head_kv", "head_dim_k", "head_dim_v", "n_vocab")
# What is beyond the largest of each that is known, and what only a trap holds.
BOUNDS = {
    "n_layers": 512,
    "n_embd": 2**20,
    "n_ff": 2**22,
    "n_head": 2**12,
    "head_dim_k": 2**14,
    "head_dim_v": 2**14,
    "n_vocab": 2**22,
    "context_length": 2**32 - 1,
    "sliding_window": 2**32 - 1,
    "sliding_window_pattern": 2**32 - 1,
    "file_type": 2**32 - 1,
    "n_tensors": 65536,
    "size_bytes": 2**50,
}
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 2.0, float("nan"), "4", "", "a\nb", 10**30, 2**63, 2**62),
    *([], [0] * LAYERS, [1] * LAYERS, [True] * LAYERS, [-1] * LAYERS, [1.0] * LAYERS, [2**62] * LAYERS, [1] * 5),
    *({}, {"count": 2**62, "no": 0}, {"total": 1}, ["a\nb"], ["x" * 64], ["x"] * 4097, "x" * 5000),
]


@pytest.mark.parametrize("key", [*sites.facts(), *(f"tensor_bytes.{key}" for key in sites.facts()["tensor_bytes"])])
def test_a_fact_of_any_kind_is_refused_in_one_line_or_planned(key: str) -> None:
    for value in ODD:
        facts = sites.facts()
        outer, _, inner = key.partition(".")
        (facts[outer] if inner else facts)[inner or outer] = value
        fault = gguf.facts_fault(facts)
        if fault is None:
            claims.claim_plan(facts)
        else:
            claims.claim_refusal(fault, "")


@pytest.mark.parametrize("key", sites.facts())
def test_a_fact_that_is_missing_is_named(key: str) -> None:
    facts = sites.facts()
    del facts[key]
    fault = gguf.facts_fault(facts)
    assert fault is not None
    assert "their version" in fault if key == "v" else fault.startswith(key)


@pytest.mark.parametrize("key", BOUNDS)
def test_numbers_have_bounds(key: str) -> None:
    facts = sites.facts(**{key: BOUNDS[key]})
    if key == "n_layers":
        facts["tensor_bytes"]["per_layer"] = [0] * BOUNDS[key]
    assert gguf.facts_fault(facts) is None
    fault = gguf.facts_fault({**facts, key: BOUNDS[key] + 1})
    assert fault is not None
    assert fault.startswith(f"{key} is {BOUNDS[key] + 1}; wanted ")


@pytest.mark.parametrize(
    ("n_head", "n_head_kv"), [(4, 5), (0, 1), (4, [4, 4, 4, 5]), ([4, 4, 4, 1], 2), ([1, 2, 3, 4], [4, 3, 2, 1])]
)
def test_no_layer_has_more_kv_heads_than_heads(n_head: Any, n_head_kv: Any) -> None:
    fault = gguf.facts_fault(sites.facts(n_head=n_head, n_head_kv=n_head_kv))
    assert fault is not None
    assert fault.startswith("n_head_kv is ")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("architecture", sorted(architectures.ARCHITECTURES))
def test_a_size_of_nothing_is_not_planned(architecture: str, key: str) -> None:
    nothing = {"n_head": 0, "n_head_kv": 0} if key == "n_head" else {key: 0}
    facts = sites.facts(architecture=architecture, **nothing)
    assert gguf.facts_fault(facts) is None
    value = sites.site()
    value["tiers"][0]["kv_cache"] = {"k": "q8_0", "v": "f16"}
    found = plan.problems(value, {**sites.headers(), "small": facts})
    (problem,) = (one for one in found if one.variable == "models[small].header")
    assert key in problem.got
    assert problem.got.endswith(" of 0")


def test_models_without_attention_have_facts() -> None:
    """Mamba's: gleaner can record them, though it cannot plan them."""
    facts = sites.facts(architecture="mamba", n_head=0, n_head_kv=0, head_dim_k=0, head_dim_v=0, n_ff=0)
    assert gguf.facts_fault(facts) is None


def one_or_each(values: st.SearchStrategy[int], layers: int) -> st.SearchStrategy[int | list[int]]:
    return values | st.lists(values, min_size=layers, max_size=layers)


@st.composite
def sound_facts(draw: st.DrawFn) -> dict[str, Any]:
    """Facts that ``facts_fault`` accepts, with numbers at their edges."""

    def number(most: int) -> st.SearchStrategy[int]:
        return st.sampled_from([0, 1, 2, 3, 31, 32, 64, 96, 128, most - 1, most]).map(lambda value: min(value, most))

    layers = draw(st.integers(1, 9))
    heads = draw(one_or_each(number(2**12), layers))
    most_kv = min(heads) if isinstance(heads, list) else heads
    per_layer = draw(st.lists(number(2**40), min_size=layers, max_size=layers))
    embedding, output = draw(st.tuples(number(2**40), number(2**40)))
    facts = sites.facts(
        architecture=draw(st.sampled_from([*sorted(architectures.ARCHITECTURES), "novel"])),
        file_type=draw(st.none() | number(2**32 - 1)),
        n_layers=layers,
        n_embd=draw(number(2**20)),
        n_ff=draw(one_or_each(number(2**22), layers)),
        n_head=heads,
        n_head_kv=draw(one_or_each(number(most_kv), layers)) if most_kv else 0,
        head_dim_k=draw(number(2**14)),
        head_dim_v=draw(number(2**14)),
        n_vocab=draw(number(2**22)),
        context_length=draw(number(2**32 - 1)),
        sliding_window=draw(st.none() | number(2**32 - 1)),
        sliding_window_pattern=draw(
            st.none() | number(2**32 - 1) | st.lists(st.booleans(), min_size=layers, max_size=layers)
        ),
        tied_output=draw(st.booleans()),
        tensor_bytes={
            "total": sum(per_layer) + embedding + output + draw(number(2**40)),
            "token_embd": embedding,
            "output": output,
            "per_layer": per_layer,
        },
    )
    assert gguf.facts_fault(facts) is None
    return facts


@given(
    facts=sound_facts(),
    context_tokens=st.sampled_from([1, 256, 4096, 2**24]),
    parallel=st.sampled_from([1, 3, 64]),
    ubatch_tokens=st.sampled_from([None, 1, 512, 2048]),
    k=st.sampled_from(site_model.KV_TYPES),
    v=st.sampled_from(site_model.KV_TYPES),
)
@settings(deadline=None, max_examples=150)
def test_the_planner_takes_all_that_is_accepted(facts: dict[str, Any], k: str, v: str, **changes: Any) -> None:
    claims.claim_plan(facts, kv_cache={"k": k, "v": v}, **changes)


# The work of the planner, counted: it does not follow the numbers in the facts.


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of each graph that is walked."""
    found: list[int] = []
    walk = architectures.compute_bytes

    def counted(facts: Any, *rest: Any) -> list[int]:
        found.append(facts["n_layers"])
        return walk(facts, *rest)

    monkeypatch.setattr(architectures, "compute_bytes", counted)
    return found


@pytest.mark.parametrize("weight", [2**20, 2**32])
@pytest.mark.parametrize("size", [1, 2])
def test_a_plan_walks_a_thousand_graphs_at_most(walks: list[int], weight: int, size: int) -> None:
    heads = {"n_head": 2**12, "n_head_kv": 2**12, "head_dim_k": 2**14, "head_dim_v": 2**14}
    big = {} if size == 1 else {**heads, "n_vocab": 2**22}
    sizes = {"total": weight * 6, "token_embd": weight, "output": weight, "per_layer": [weight] * LAYERS}
    facts = sites.facts(tensor_bytes=sizes, **big)
    value = sites.site()
    for tier in value["tiers"]:
        tier["context_tokens"] = 2**24
    assert plan.problems(value, dict.fromkeys(sites.headers(), facts))
    assert 0 < len(walks) <= 1000


def test_a_graph_grows_with_the_layers_alone() -> None:
    graphs = []
    for layers in (1, 2, gguf.MAX_LAYERS):
        facts = sites.facts(n_layers=layers, n_vocab=2**22, n_head=2**12, n_ff=2**22, head_dim_k=2**14)
        builder = architectures._Builder(
            facts,
            architectures.Batch(2**24),
            512,
            [0] * (layers + 1),
            [architectures.Device(cuda=True), architectures.Device()],
        )
        graph = builder.build()
        graphs.append(len(graph.nodes) + len(graph.leaves))
    one, two, most = graphs
    assert most == one + (gguf.MAX_LAYERS - 1) * (two - one)
    assert two - one < 50


@pytest.mark.parametrize("devices", [1, 2, 3, placement.MAX_DEVICES])
def test_a_split_of_the_most_layers_tries_few(devices: int) -> None:
    slots = gguf.MAX_LAYERS + 1
    tried = 0

    def fill(first: int, last: int) -> float:
        nonlocal tried
        tried += 1
        return float(last - first)

    counts = placement.least_maximal_fill(slots, [fill] * devices)
    assert sum(counts) == slots
    assert max(counts) - min(counts) <= 1
    assert tried <= slots * slots


def test_a_split_is_the_best_of_all() -> None:
    """Against all splits there are, for slots and devices that are not alike."""
    weights = [3, 1, 0, 7, 2, 2, 5]
    limits, constants = [4.0, 1.0, 9.0], [1, 0, 2]

    def fill(device: int, first: int, last: int) -> float:
        return (sum(weights[first:last]) + constants[device]) / limits[device]

    def fills(counts: tuple[int, ...]) -> list[float]:
        ends = [0, *itertools.accumulate(counts)]
        return [fill(device, *ends[device : device + 2]) for device in range(len(counts))]

    splits = [counts for counts in itertools.product(range(1, 8), repeat=3) if sum(counts) == len(weights)]
    found = tuple(placement.least_maximal_fill(len(weights), [functools.partial(fill, device) for device in range(3)]))
    # The fullest is least full, then the second fullest, and so on.
    assert sorted(fills(found), reverse=True) == min(sorted(fills(counts), reverse=True) for counts in splits)


def test_a_model_of_one_layer_is_planned_on_one_device() -> None:
    value = sites.site()
    value["llama_cpp"]["backend"] = "cpu"
    value["tiers"][1]["workers"] = ["vasp-02"]
    sizes = {**sites.facts()["tensor_bytes"], "per_layer": [2**20]}
    got = plan.plan_tier(value, "reasoning", {**sites.headers(), "large": sites.facts(n_layers=1, tensor_bytes=sizes)})
    assert got["tensor_split"] == [2]
