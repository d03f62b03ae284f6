"""Memory: exact caches, totals that only grow, and the sketch that searches go by."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gleaner import architectures, memory
from gleaner.architectures import Batch, Device
from tests.unit import sites
from tests.unit.model_shapes import (
    BEHEMOTH,
    CODER,
    GEMMA,
    SMOL,
    TINY,
    batches,
    in_use,
    laid_out,
    models,
    places,
    recorded,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("k", "v", "gib"),
    [("f16", "f16", 40), ("q8_0", "q8_0", 21.25), ("q4_0", "q4_0", 11.25), ("q4_0", "f16", 25.625)],
)
def test_cache_of_the_72b_at_131072_tokens(k: str, v: str, gib: float) -> None:
    batch = Batch(131072, type_k=k, type_v=v, flash_attention=v != "f16")
    layers = memory.kv_bytes(recorded(BEHEMOTH), batch)
    assert sum(layers) == gib * GIB
    assert layers == [layers[0]] * 80


def test_a_transposed_v_is_as_wide_as_in_the_widest_layer() -> None:
    facts = sites.facts(n_head_kv=[1, 2, 1, 1])
    rows = [heads * 32 * 2 for heads in (1, 2, 1, 1)]
    assert memory.kv_bytes(facts, Batch(1, flash_attention=True)) == [256 * 2 * row for row in rows]
    assert memory.kv_bytes(facts, Batch(1)) == [256 * (row + rows[1]) for row in rows]


@pytest.mark.parametrize(("k", "v", "variable"), [("q5_1", "f16", "k"), ("f16", "F16", "v"), ("f16", "", "v")])
def test_a_type_of_cache_that_is_not_known_is_named(k: str, v: str, variable: str) -> None:
    with pytest.raises(ValueError, match=rf"^kv_cache\.{variable} = '.*'; wanted f16 or q8_0 or q4_0; cure: f16"):
        memory.kv_bytes(sites.facts(), Batch(4096, type_k=k, type_v=v))


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_lies_somewhere_and_the_embedding_on_the_cpu(tied: bool) -> None:
    # 2 MiB belong to no layer, such as the frequencies of RoPE: each device has them.
    facts = sites.facts(tied_output=tied)
    facts["tensor_bytes"]["total"] += 2 * 2**20
    mib = 2**20
    uses = memory.uses(facts, Batch(256), [0, 0, 1, 1, 1], [Device()] * 3)
    output = 3 + 3 * tied
    for use, wanted in zip(uses, (8 + 8 + 2, 8 + 8 + output + 2, 3)):
        assert wanted * mib <= use.weights < wanted * mib + 2**14
    (alone,) = memory.uses(facts, Batch(256), [0] * 5, [Device()])
    # On the CPU alone a tied output is the embedding itself.
    assert 40 * mib <= alone.weights < 40 * mib + 2**14


def test_cuda_takes_its_context_only_where_layers_lie() -> None:
    devices = [Device(cuda=True), Device(cuda=True), Device()]
    uses = memory.uses(sites.facts(), Batch(4096), [0, 0, 0, 0, 0], devices)
    assert uses[0].other >= memory.CUDA_CONTEXT_BYTES
    assert [use.other for use in uses[1:]] == [0, 0]


# Growth


@settings(deadline=None)
@given(st.sampled_from([TINY, GEMMA, SMOL, CODER, BEHEMOTH]), batches(), st.integers(1, 5000), st.data())
def test_the_total_of_a_recorded_model_never_falls_when_the_context_grows(
    name: str, batch: Batch, more: int, data: st.DataObject
) -> None:
    """A shape can be made up for which it does: what a buffer's holes save may be more than what the cache grows."""
    facts = recorded(name)
    where, devices = data.draw(laid_out(facts))
    larger = Batch(**{**vars(batch), "context_tokens": batch.context_tokens + more})
    before, after = (memory.uses(facts, one, where, devices) for one in (batch, larger))
    assert all(low.total <= high.total for low, high in zip(before, after))


@settings(deadline=None)
@given(models(), batches(), st.integers(1, 5000), st.data())
def test_a_total_falls_by_no_more_than_the_holes_of_a_buffer(
    facts: dict[str, Any], batch: Batch, more: int, data: st.DataObject
) -> None:
    where, devices = data.draw(laid_out(facts))
    larger = Batch(**{**vars(batch), "context_tokens": batch.context_tokens + more})
    before, after = (memory.uses(facts, one, where, devices) for one in (batch, larger))
    used = in_use(facts, batch, where, devices)
    assert all(low.total - (low.compute - need) <= high.total for low, high, need in zip(before, after, used))


# The sketch


@settings(deadline=None)
@given(models(), batches(), st.data())
def test_as_much_lies_in_the_buffers_of_a_sketch_at_once(
    facts: dict[str, Any], batch: Batch, data: st.DataObject
) -> None:
    where, devices = data.draw(laid_out(facts))
    small, few = memory.sketch(facts, where)
    assert in_use(small, batch, few, devices) == in_use(facts, batch, where, devices)


@pytest.mark.parametrize("name", [TINY, SMOL, CODER, BEHEMOTH])
@pytest.mark.parametrize("flash_attention", [True, False])
def test_buffers_of_a_sketch_are_those_of_the_model_when_layers_are_alike(name: str, flash_attention: bool) -> None:
    facts = recorded(name)
    where, devices = places(facts, [1, 1, 1]), [Device()] * 4
    small, few = memory.sketch(facts, where)
    assert small["n_layers"] <= 15
    for batch in (Batch(32768, flash_attention=flash_attention), Batch(4096, 4, 64, flash_attention=flash_attention)):
        assert architectures.compute_bytes(small, batch, few, devices) == architectures.compute_bytes(
            facts, batch, where, devices
        )


def test_a_sketch_keeps_layers_of_every_shape() -> None:
    facts = sites.facts(n_layers=12, n_ff=[128] * 11 + [4096])
    small, few = memory.sketch(facts, [0] * 13)
    assert small["n_ff"] == [128] * 5 + [4096]
    assert few == [0] * 7
