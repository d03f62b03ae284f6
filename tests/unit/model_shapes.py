"""Models as recorded and of any shape, wishes, and what lies in a compute buffer at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from gleaner import architectures, ggml_graph, placement
from gleaner.architectures import Batch, Device
from tests.unit import sites

ROOT = Path(__file__).resolve().parents[2]
TINY, GEMMA, SMOL = "tiny-random-llama-f16", "gemma-3-270m-q4_k_m", "smollm2-135m-instruct-q4_1"
BEHEMOTH, CODER = "or1-behemoth-72b-q4_k_m", "strand-rust-coder-14b-q8_0"
QWEN = "the shape of Qwen3-8B"


def recorded(name: str) -> dict[str, Any]:
    if name == QWEN:
        shape = {"n_layers": 36, "n_embd": 4096, "n_ff": 12288, "n_head": 32, "n_head_kv": 8, "n_vocab": 151936}
        sizes = {"total": 0, "token_embd": 0, "output": 0, "per_layer": [0] * 36}
        return sites.facts(architecture="qwen3", head_dim_k=128, head_dim_v=128, tensor_bytes=sizes, **shape)
    (path,) = ROOT.glob(f"inventories/*/models/{name}.json")
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def places(facts: dict[str, Any], shares: Sequence[float]) -> list[int]:
    """The device of each slot; the CPU's alone when there is no other."""
    return placement.device_of_each_layer(facts["n_layers"], shares or [1])


class _InUse(ggml_graph._Buffer):
    """A buffer that knows how much of it was in use at once."""

    def __init__(self, alignment: int) -> None:
        super().__init__(alignment)
        self.in_use = 0

    def take(self, size: int) -> int:
        offset = super().take(size)
        self.in_use = max(self.in_use, self.end - sum(length for _, length in self.free))
        return offset


def in_use(facts: dict[str, Any], batch: Batch, where: list[int], devices: list[Device]) -> list[int]:
    """For each device, the most that lay in its compute buffer at once."""
    made: list[_InUse] = []

    def buffer(alignment: int) -> _InUse:
        made.append(_InUse(alignment))
        return made[-1]

    with mock.patch.object(ggml_graph, "_Buffer", buffer):
        sizes = architectures.compute_bytes(facts, batch, where, devices)
    found = [max(one.in_use for one in made[index :: len(devices)]) for index in range(len(devices))]
    assert all(used <= size for used, size in zip(found, sizes))
    return found


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """A model of any known architecture and of any shape."""
    architecture = draw(st.sampled_from(sorted(architectures.ARCHITECTURES)))
    layers, kv_heads = draw(st.integers(1, 20)), draw(st.integers(1, 8))
    size = draw(st.sampled_from([32, 64, 96, 128, 256]))
    n_ff: int | list[int] = 32 * draw(st.integers(1, 400))
    if draw(st.integers(0, 3)) == 0:
        n_ff = [draw(st.sampled_from([128, 1280])) for _ in range(layers)]
    return sites.facts(
        architecture=architecture,
        n_layers=layers,
        n_embd=32 * draw(st.integers(1, 160)),
        n_ff=n_ff,
        n_head=kv_heads * draw(st.sampled_from([1, 2, 4, 8])),
        n_head_kv=kv_heads,
        head_dim_k=size,
        head_dim_v=size,
        n_vocab=draw(st.sampled_from([100, 32000, 152064])),
        sliding_window=draw(st.sampled_from([None, 128, 512, 1024])),
        tied_output=draw(st.booleans()),
        tensor_bytes={"total": 10 * layers + 20, "token_embd": 10, "output": 10, "per_layer": [10] * layers},
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    flash_attention = draw(st.booleans())
    types = st.sampled_from(["f16", "q8_0", "q4_0"])
    return Batch(
        context_tokens=draw(st.integers(1, 131072)),
        parallel=draw(st.sampled_from([1, 1, 2, 3, 8])),
        ubatch_tokens=draw(st.integers(1, 1024)),
        type_k=draw(types),
        type_v=draw(types) if flash_attention else "f16",
        flash_attention=flash_attention,
    )


@st.composite
def laid_out(draw: st.DrawFn, facts: dict[str, Any]) -> tuple[list[int], list[Device]]:
    shares = draw(st.lists(st.integers(1, 4), max_size=3))
    cuda = draw(st.booleans())
    return places(facts, shares), [*(Device(cuda=cuda) for _ in shares), Device()]
