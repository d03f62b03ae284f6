"""Graphs: the compute buffers and KV caches that llama.cpp's own programs reserved, and what never shrinks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gleaner import architectures, ggml_graph, memory
from gleaner.architectures import Batch, Device
from tests.unit import sites
from tests.unit.model_shapes import GEMMA, QWEN, SMOL, TINY, batches, in_use, laid_out, models, places, recorded

MIB = 2**20
# Figures are printed with two decimals.
HALF_A_DIGIT = 0.005 + 1e-9


def reserved_by_fit_params(name: str, shares: Sequence[float], wish: Batch) -> list[float]:
    """MiB as llama-fit-params prints them for devices behind RPC and, last, the CPU."""
    facts = recorded(name)
    devices = [*(Device(remote=True) for _ in shares), Device()]
    found = architectures.compute_bytes(facts, wish, places(facts, shares), devices)
    return [size / MIB for size in found]


def fit(context_tokens: int, ubatch_tokens: int, k: str, v: str, flash_attention: bool, parallel: int = 1) -> Batch:
    """A wish as llama-fit-params reserves it: with logits of every token."""
    return Batch(context_tokens, parallel, ubatch_tokens, k, v, flash_attention, outputs=ubatch_tokens)


# llama-fit-params of llama.cpp 0c1e570, -lv 5; a device without a layer has no compute buffer.
@pytest.mark.parametrize(
    ("name", "shares", "wish", "printed"),
    [
        (TINY, [2, 4, 1], fit(32768, 1024, "f16", "f16", False), [1027.05, 1028.06, 0, 514.33]),
        (TINY, [5, 3, 5], fit(131072, 1024, "f16", "f16", True), [1028.08, 1028.84, 193.25, 1025.36]),
        (TINY, [1], fit(4096, 100, "f16", "f16", False, parallel=2), [18.77, 1.64]),
        (GEMMA, [], fit(131072, 1024, "q8_0", "q4_0", True, parallel=4), [1029.00]),
        (GEMMA, [4, 5], fit(1000, 1024, "f16", "q4_0", True, parallel=4), [55.27, 1062.78, 28.80]),
        (GEMMA, [1], fit(131072, 100, "q4_0", "f16", False), [252.06, 51.67]),
        (SMOL, [2, 4], fit(512, 1024, "f16", "f16", False), [25.02, 113.16, 12.66]),
        (SMOL, [], fit(32768, 100, "q4_0", "f16", False, parallel=2), [126.04]),
        (SMOL, [1], fit(131072, 100, "f16", "q8_0", True), [27.22, 25.46]),
        (QWEN, [1, 2, 3], fit(4096, 100, "q8_0", "f16", True), [28.38, 34.63, 75.41, 11.20]),
        (QWEN, [3, 5, 3], fit(4096, 100, "q8_0", "f16", False, parallel=4), [70.57, 76.82, 81.65, 17.45]),
        # Of 100 and 16 tokens for seven requests llama.cpp makes 105 and 21.
        (GEMMA, [5, 5, 1], fit(4096, 100, "q4_0", "f16", False, parallel=7), [19.95, 20.98, 101.22, 12.73]),
        (TINY, [5, 5, 4], fit(1000, 16, "f16", "f16", False, parallel=7), [0.72, 0.74, 3.02, 0.38]),
    ],
)
def test_compute_buffers_are_those_of_llama_fit_params(
    name: str, shares: list[float], wish: Batch, printed: list[float]
) -> None:
    assert reserved_by_fit_params(name, shares, wish) == pytest.approx(printed, rel=0, abs=HALF_A_DIGIT)


# llama-server of the same build.
@pytest.mark.parametrize(
    ("shares", "wish", "compute", "kv"),
    [
        ([], Batch(4096, 16, 32, "q8_0", "q8_0", True), [3.21], [765.00]),
        ([1], Batch(4096, 16, 32, "q8_0", "q8_0", True), [3.21, 0.42], [765.00, 0]),
        ([4, 5], Batch(1024, 2, 4, flash_attention=True), [0.16, 0.45, 0.08], [21.00, 24.00, 0]),
    ],
)
def test_buffers_are_those_of_llama_server(
    shares: list[float], wish: Batch, compute: list[float], kv: list[float]
) -> None:
    facts = recorded(SMOL)
    found = memory.uses(facts, wish, places(facts, shares), [Device()] * (len(shares) + 1))
    assert [use.compute / MIB for use in found] == pytest.approx(compute, rel=0, abs=HALF_A_DIGIT)
    assert [use.kv / MIB for use in found] == kv


def test_the_graph_that_writes_can_need_more_than_the_one_that_reads() -> None:
    """The first case above: llama-server reserved 3.21 MiB, of which the graph that reads needs 3.14."""
    wish = Batch(4096, 16, 32, "q8_0", "q8_0", True)
    builder = architectures._Builder(recorded(SMOL), wish, wish.tokens, places(recorded(SMOL), []), [Device()])
    (reading,) = ggml_graph.buffer_sizes(builder.build(), [Device().alignment])
    assert reading / MIB == pytest.approx(3.14, rel=0, abs=HALF_A_DIGIT)
    assert architectures.compute_bytes(recorded(SMOL), wish, places(recorded(SMOL), []), [Device()]) > [reading]


def test_a_buffer_may_shrink_when_the_context_grows_as_llama_cpps_own_does() -> None:
    """A larger block leaves other holes than a smaller one: llama-fit-params printed 205.03 and 196.50 MiB."""
    smaller, larger = (
        reserved_by_fit_params(SMOL, [], fit(context, 1024, "f16", "f16", True)) for context in (2048, 3072)
    )
    assert smaller == pytest.approx([205.03], rel=0, abs=HALF_A_DIGIT)
    assert larger == pytest.approx([196.50], rel=0, abs=HALF_A_DIGIT)


def test_a_window_that_llama_cpp_does_not_know_saves_nothing() -> None:
    """llama-fit-params printed 16 MiB for 4 layers of 2 heads of 32, one of them for K and V, at 32768 tokens."""
    for architecture in ("llama", "qwen2", "qwen3"):
        facts = sites.facts(architecture=architecture, n_head=2, n_head_kv=1)
        for pattern in (None, 4, [True, True, True, False]):
            windowed = {**facts, "sliding_window": 512, "sliding_window_pattern": pattern}
            assert sum(memory.kv_bytes(windowed, Batch(32768))) == 16 * MIB
            assert memory.checkpoint_bytes(windowed, Batch(32768)) == 0


def test_a_window_saves_cells_where_llama_cpp_has_it() -> None:
    facts = sites.facts(architecture="gemma3", n_layers=12, sliding_window=512)
    batch = Batch(32768, 2, 300)
    # A window of 512 and a micro-batch of 300, padded to 256; each sixth layer sees the whole context.
    assert architectures.layer_cells(facts, batch) == [1024, 1024, 1024, 1024, 1024, 32768] * 2
    assert architectures.layer_cells({**facts, "sliding_window_pattern": 3}, batch) == [1024, 1024, 32768] * 4
    assert architectures.layer_cells({**facts, "sliding_window_pattern": [False] * 12}, batch) == [32768] * 12
    assert architectures.layer_cells({**facts, "sliding_window": None}, batch) == [32768] * 12
    assert architectures.layer_cells(facts, Batch(100, 2, 300)) == [256] * 12


def test_cuda_aligns_wider_and_copies_a_quantised_cache_for_flash_attention() -> None:
    """As read in ggml-cuda.cu and fattn-common.cuh: f16 copies of K and V of the whole context, each with padding."""
    assert (Device(cuda=True).alignment, Device().alignment) == (128, 64)

    def compute(cuda: bool, k: str, v: str) -> int:
        wish = Batch(8192, 2, 64, k, v, flash_attention=True)
        facts = recorded(QWEN)
        return architectures.compute_bytes(facts, wish, places(facts, [1]), [Device(cuda=cuda), Device()])[0]

    copy = 2 * 8192 * 2 * 8 * 128 + 128
    for k, v, copies in (("f16", "f16", 0), ("q8_0", "f16", copy), ("f16", "q4_0", copy), ("q4_0", "q4_0", 2 * copy)):
        without = compute(False, k, v)
        # Only what does not lie there at the same time can have the place of the copies.
        assert copies < compute(True, k, v) < copies + 1.01 * without, (k, v)


def test_what_no_graph_here_covers_is_named() -> None:
    assert architectures.unknown(sites.facts()) is None
    other = architectures.unknown(sites.facts(architecture="novel"))
    assert other == "architecture novel (known: gemma3, llama, qwen2, qwen3)"
    experts = sites.facts(layer_tensors=["attn_q.weight", "ffn_gate_exps.weight", "ffn_gate_inp.weight"])
    assert (
        architectures.unknown(experts)
        == "architecture llama with ffn_gate_exps.weight, ffn_gate_inp.weight in its layers"
    )
    for architecture in ("llama", "qwen2", "qwen3"):
        uneven = sites.facts(architecture=architecture, head_dim_k=192, head_dim_v=128)
        assert (
            architectures.unknown(uneven) == f"architecture {architecture} with heads of 192 (K) and 128 (V) elements"
        )
    assert architectures.unknown(sites.facts(architecture="gemma3", head_dim_k=192, head_dim_v=128)) is None


# What never shrinks


def grown(data: st.DataObject, batch: Batch, key: str) -> tuple[Batch, Batch]:
    """A batch and one with more of ``key``.

    A micro-batch is rounded up to a multiple of the requests, as llama.cpp does, so only one that needs no rounding
    can be compared when the requests become more.
    """
    if key == "parallel":
        more = batch.parallel + data.draw(st.integers(1, 4))
        multiple = batch.parallel * more
        ubatch_tokens = -(-batch.ubatch_tokens // multiple) * multiple
        return changed(batch, ubatch_tokens=ubatch_tokens), changed(batch, ubatch_tokens=ubatch_tokens, parallel=more)
    return batch, changed(batch, **{key: getattr(batch, key) + data.draw(st.integers(1, 2000))})


def changed(batch: Batch, **values: int) -> Batch:
    return Batch(**{**vars(batch), **values})


@pytest.mark.parametrize("key", ["context_tokens", "parallel", "ubatch_tokens"])
@settings(deadline=None)
@given(data=st.data())
def test_what_lies_in_memory_at_once_never_shrinks(key: str, data: st.DataObject) -> None:
    """The KV cache and what is in use of a compute buffer; the buffer itself has holes, which may."""
    facts, batch = data.draw(models()), data.draw(batches())
    where, devices = data.draw(laid_out(facts))
    less, more = grown(data, batch, key)
    used = (in_use(facts, one, where, devices) for one in (less, more))
    assert all(low <= high for low, high in zip(*used))
    kept = (memory.kv_bytes(facts, one) for one in (less, more))
    assert all(low <= high for low, high in zip(*kept))
    assert memory.cuda_pool_bytes(facts, less) <= memory.cuda_pool_bytes(facts, more)
    assert memory.checkpoint_bytes(facts, less) <= memory.checkpoint_bytes(facts, more)
