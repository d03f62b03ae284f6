"""What the filters tensor_split and memory_plan answer, and that they refuse in words whatever they are given."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gleaner import architectures, memory, placement, plan, sizing
from gleaner.architectures import Batch, Device
from tests.unit import sites
from tests.unit.model_shapes import BEHEMOTH, QWEN, SMOL, recorded

V100S = {"memory_mib": 32768}
REMOTE = {**V100S, "remote": True}
HOST = {"memory_mib": 384000, "backend": "cpu"}
WISHES = {"context_tokens": 131072, "ubatch_tokens": 64, "kv_cache": {"k": "q4_0", "v": "f16"}}


def test_the_first_clusters_split() -> None:
    """26 layers and the output layer are on the head, which stands last in llama.cpp's order."""
    assert sizing.tensor_split(80, [32, 32, 32]) == {
        "tensor_split": [27, 27, 27],
        "layers": [27, 27, 26],
        "output_device": 2,
    }


def test_a_device_without_memory_has_no_layers_and_not_the_output() -> None:
    assert sizing.tensor_split(3, [10, 30, 0]) == {"tensor_split": [1, 3, 0], "layers": [1, 2, 0], "output_device": 1}


@settings(deadline=None)
@given(st.integers(1, 128), st.lists(st.integers(0, 100), min_size=1, max_size=5).filter(any))
def test_layers_are_those_that_llama_cpp_places(n_layers: int, memories: list[int]) -> None:
    if sum(map(bool, memories)) > n_layers + 1:
        return
    found = sizing.tensor_split(n_layers, memories)
    places = placement.device_of_each_layer(n_layers, found["tensor_split"])
    assert [places[:-1].count(device) for device in range(len(memories))] == found["layers"]
    assert places[-1] == found["output_device"]


def test_the_first_clusters_memory_is_that_of_its_plan() -> None:
    site = sites.beefcake2()
    headers = {model["name"]: recorded(model["name"]) for model in site["models"]}
    planned = plan.plan_tier(site, "reasoning", headers)
    found = sizing.memory_plan(recorded(BEHEMOTH), WISHES, [REMOTE, REMOTE, V100S])
    assert found["fits"] is True
    assert found["tensor_split"] == planned["tensor_split"]
    rows = [{**row, "device": f"devices[{index}]"} for index, row in enumerate(planned["memory"][:3])]
    assert found["devices"] == rows


def test_the_heads_cpu_may_stand_behind_its_devices() -> None:
    found = sizing.memory_plan(recorded(BEHEMOTH), WISHES, [REMOTE, REMOTE, V100S, HOST])
    assert [row["layers"] for row in found["devices"]] == ["0-26", "27-53", "54-79 + output", ""]
    cpu = found["devices"][-1]
    assert (cpu["device"], cpu["weights"], cpu["kv"], cpu["limit"]) == ("devices[3]", 669, 0, 384000)
    assert found["tensor_split"] == [27, 27, 27]


def test_a_cpu_alone_holds_everything() -> None:
    facts = recorded(SMOL)
    found = sizing.memory_plan(facts, {"context_tokens": 4096, "parallel": 2}, [{"memory_mib": 500, "backend": "cpu"}])
    (row,) = found["devices"]
    (use,) = memory.uses(facts, Batch(4096, 2), [0] * 31, [Device()])
    assert found["tensor_split"] == []
    assert row["layers"] == "0-29 + output"
    assert [row[key] for key in ("weights", "kv", "compute", "other")] == [
        memory.mib(part) for part in (use.weights, use.kv, use.compute, use.other)
    ]
    assert (found["fits"], row["verdict"], row["headroom"]) == (True, "fits", 500 - row["total"])
    wishes = {"context_tokens": 65536, "parallel": 2}
    assert sizing.memory_plan(facts, wishes, [{"memory_mib": 500, "backend": "cpu"}])["fits"] is False


def test_memory_in_use_shifts_layers_away() -> None:
    def counts(*devices: dict[str, Any]) -> list[int]:
        found: list[int] = sizing.memory_plan(recorded(BEHEMOTH), WISHES, devices)["tensor_split"]
        return found

    used = {**REMOTE, "memory_used_mib": 4096}
    first, second, third = counts(used, REMOTE, V100S)
    assert first < 27 < second
    assert [first, second, third] == counts({**REMOTE, "memory_mib": 28672}, REMOTE, V100S)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"facts": None}, "header facts = undefined; wanted those of version 1, of a model that the planner knows (they"),
    ({"facts": {"v": 2}}, "header facts = {'v': 2}; wanted those of version 1, of a model that the planner knows (th"),
    ({"facts": sites.facts(architecture="novel")}, "(architecture novel (known: gemma3, llama, qwen2, qwen3)); cure: "),
    ({"wishes": None}, "wishes = undefined; wanted a dictionary; cure: write wishes as key: value pairs"),
    ({"wishes": {}}, "wishes.context_tokens = undefined; wanted a whole number from 1 to 16777216; cure: for example "),
    ({"wishes": {"context_tokens": -1}}, "wishes.context_tokens = -1; wanted a whole number from 1"),
    ({"wishes": {"context_tokens": 0}}, "wishes.context_tokens = 0; wanted a whole number from 1"),
    ({"wishes": {"context_tokens": "4096"}}, "wishes.context_tokens = '4096'; wanted a whole number"),
    ({"wishes": {"context_tokens": 4096, "parallel": 0}}, "wishes.parallel = 0; wanted a whole number from 1 to 64"),
    ({"wishes": {"context_tokens": 4096, "ubatch_tokens": 0.5}}, "wishes.ubatch_tokens = 0.5; wanted a whole number"),
    ({"wishes": {"context_tokens": 4096, "flash_attn": True}}, "cure: did you mean flash_attention?"),
    ({"wishes": {"context_tokens": 4096, "flash_attention": "on"}}, "wishes.flash_attention = 'on'; wanted true or f"),
    ({"wishes": {"context_tokens": 4096, "kv_cache": {"k": "q4_1"}}}, "wanted f16 or q8_0 or q4_0; cure: did you mean"),
    ({"wishes": {"context_tokens": 4096, "kv_cache": "q4_0"}}, "wishes.kv_cache = 'q4_0'; wanted a dictionary"),
    (
        {"wishes": {"context_tokens": 4096, "kv_cache": {"k": "q4_0", "v": "q4_0"}}},
        "wishes.kv_cache.v = 'q4_0'; wanted f16 without flash_attention; cure: v: f16 with a quantised k, or flash_a",
    ),
    (
        {
            "facts": sites.facts(head_dim_k=48, head_dim_v=48),
            "wishes": {"context_tokens": 4096, "kv_cache": {"k": "q8_0"}},
        },
        "wishes.kv_cache.k = 'q8_0'; wanted f16 for heads of 48 elements, no multiple of 32; cure: k: f16",
    ),
    (
        {"devices": []},
        "devices = []; wanted at least one device; cure: one item a device: devices: [{memory_mib: 32768}]",
    ),
    ({"devices": V100S}, "devices = {'memory_mib': 32768}; wanted a list; cure: one item a device"),
    ({"devices": [32768]}, "devices[0] = 32768; wanted a dictionary; cure: write devices[0] as key: value pairs"),
    (
        {"devices": [{}]},
        "devices[0].memory_mib = undefined; wanted a whole number from 1 to 2147483648; cure: for exam",
    ),
    ({"devices": [{"memory_mib": -5}]}, "devices[0].memory_mib = -5; wanted a whole number"),
    (
        {"devices": [{**V100S, "memory_used_mib": 32768}]},
        "memory_used_mib = 32768; wanted a whole number from 0 to 32767",
    ),
    ({"devices": [{**V100S, "backend": "rocm"}]}, "devices[0].backend = 'rocm'; wanted cpu or cuda; cure: "),
    ({"devices": [{**V100S, "remote": "yes"}]}, "devices[0].remote = 'yes'; wanted true or false"),
    ({"devices": [{**V100S, "gpu": 1}]}, "devices[0].gpu = 1; wanted one of memory_mib, memory_used_mib, backend, rem"),
    (
        {"devices": [V100S, REMOTE]},
        "devices[1] = 'a remote device behind a device of the head'; wanted llama.cpp's order: remote devices, those",
    ),
    (
        {"devices": [HOST, V100S]},
        "devices[1] = \"a device of the head behind the head's CPU\"; wanted llama.cpp's order",
    ),
    (
        {"devices": [HOST, HOST]},
        "devices[1] = \"the head's CPU behind the head's CPU\"; wanted llama.cpp's order: remote",
    ),
    ({"devices": [V100S] * 6}, "devices = 6; wanted at most 5 for 4 layers and the output; cure: leave devices out"),
    (
        {"facts": recorded(QWEN), "devices": [V100S] * 17},
        "devices = 17; wanted at most 16 for 36 layers and the output",
    ),
]


@pytest.mark.parametrize(("spoilt", "words"), REFUSED)
def test_what_cannot_be_answered_is_refused_in_words(spoilt: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {"facts": sites.facts(), "wishes": {"context_tokens": 4096}, "devices": [V100S]}
    assert sizing.memory_plan(**good)["fits"] is True
    with pytest.raises(ValueError, match=r"; wanted .*; cure: ") as refused:
        sizing.memory_plan(**{**good, **spoilt})
    assert words in str(refused.value)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="; wanted") as refused:
        sizing.memory_plan({}, {"parallel": -1}, [{"memory_mib": "x"}, REMOTE])
    variables = [line.split(" = ")[0] for line in str(refused.value).splitlines()]
    assert variables == [
        "header facts",
        "wishes.context_tokens",
        "wishes.parallel",
        "devices[0].memory_mib",
        "devices[1]",
    ]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
JUNK_WISHES = st.fixed_dictionaries(
    {"context_tokens": st.integers(-1, 2**25) | JUNK},
    optional={
        "parallel": st.integers(0, 65) | JUNK,
        "ubatch_tokens": st.integers(0, 2**21) | JUNK,
        "kv_cache": st.fixed_dictionaries({}, optional={key: st.sampled_from(["f16", "q4_0", "x"]) for key in "kv"}),
        "flash_attention": st.booleans() | JUNK,
    },
)
JUNK_DEVICES = st.lists(
    st.fixed_dictionaries(
        {"memory_mib": st.integers(0, 2**32) | JUNK},
        optional={
            "memory_used_mib": st.integers(0, 100) | JUNK,
            "backend": st.sampled_from(["cpu", "cuda"]) | JUNK,
            "remote": st.booleans(),
        },
    )
    | JUNK,
    max_size=4,
)


@st.composite
def junk_facts(draw: st.DrawFn) -> Any:
    """Header facts that no model may have, though their shape is right."""
    size = st.integers(0, 2**40) | st.integers(0, 300)
    layers = draw(st.integers(1, 6))
    per_layer = size | st.lists(size, min_size=layers, max_size=layers)
    changes = {key: draw(size) for key in ("n_embd", "n_vocab", "context_length", "head_dim_k")}
    return sites.facts(
        architecture=draw(st.sampled_from([*architectures.ARCHITECTURES, "novel"])),
        n_layers=layers,
        **changes,
        head_dim_v=draw(st.sampled_from([changes["head_dim_k"], 0, 7])),
        **{key: draw(per_layer) for key in ("n_ff", "n_head", "n_head_kv")},
        sliding_window=draw(st.none() | size),
        sliding_window_pattern=draw(
            st.none() | st.integers(0, 9) | st.lists(st.booleans(), min_size=layers, max_size=layers)
        ),
        tensor_bytes={"total": 2**40, "token_embd": 5, "output": 0, "per_layer": [draw(st.integers(0, 9))] * layers},
    )


def in_words(error: ValueError) -> bool:
    return all(re.match(r".* = .*; wanted .*; cure: .+", line) for line in str(error).splitlines())


@settings(deadline=None, max_examples=300)
@given(st.just(sites.facts()) | junk_facts() | JUNK, JUNK_WISHES | JUNK, JUNK_DEVICES | JUNK)
def test_whatever_is_asked_is_answered_or_refused_in_words(facts: Any, wishes: Any, devices: Any) -> None:
    try:
        found = sizing.memory_plan(facts, wishes, devices)
    except ValueError as refused:
        if not in_words(refused):
            raise
        return
    assert all(row["total"] + row["headroom"] == row["limit"] for row in found["devices"])


@settings(deadline=None)
@given(st.integers(1, 128) | JUNK, st.lists(st.integers(0, 99) | JUNK, max_size=4) | JUNK)
def test_whatever_is_split_is_split_or_refused_in_words(n_layers: Any, memories: Any) -> None:
    try:
        found = sizing.tensor_split(n_layers, memories)
    except ValueError as refused:
        if not in_words(refused):
            raise
        return
    assert sum(found["layers"]) == n_layers
