"""Bytes that a model takes of each device and of each host.

Weights come from the tensor sizes in the header, the KV cache from its shape, compute buffers from the graph
(``gleaner.architectures``). What CUDA takes besides is read from llama.cpp's source and not measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gleaner import architectures
from gleaner.architectures import KV_BLOCKS, Batch, Device

MIB = 2**20
# A process on a CUDA device: its context, kernels and cuBLAS's workspace (0.3 to 0.5 GiB).
CUDA_CONTEXT_BYTES = 512 * MIB
# From so many rows on a quantised matrix is unpacked to f16 for cuBLAS (MMQ_DP4A_MAX_BATCH_SIZE, ggml-cuda/mmq.cuh).
CUDA_CUBLAS_ROWS = 64
# The pool of temporaries grows in steps (vmm_granularity, ggml-cuda.cu).
CUDA_POOL_STEP = 2 * MIB
# llama-server: program, threads, slots; of each token of the vocabulary, its text and the tables that find it.
SERVER_BYTES = 64 * MIB
SERVER_BYTES_OF_A_TOKEN = 256
RPC_SERVER_BYTES = 32 * MIB
# A process that uses CUDA: its libraries and pinned staging.
CUDA_PROCESS_BYTES = 2048 * MIB
# Supervisor, agent and srun.
JOB_BYTES = 128 * MIB
# llama-server keeps up to this many copies of a sliding window's cells for each slot, in host memory.
CONTEXT_CHECKPOINTS = 32
# GGUF file types whose matrices are not quantised (llama_ftype: F32, F16).
UNQUANTISED = (0, 1)


def mib(size: float) -> int:
    """Whole MiB, rounded up."""
    return -int(-size // MIB)


def _pad(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _rows(facts: Mapping[str, Any], batch: Batch) -> list[tuple[int, int]]:
    """Bytes of one token's K and V in each layer, in blocks of their types."""
    for name, value in (("k", batch.type_k), ("v", batch.type_v)):
        if value not in KV_BLOCKS:
            raise ValueError(
                f"kv_cache.{name} = {value!r}; wanted {' or '.join(KV_BLOCKS)}; cure: f16 is never wrong, only larger"
            )

    def row(elements: int, kind: str) -> int:
        size, block = KV_BLOCKS[kind]
        return -(-elements // block) * size

    heads = architectures.per_layer(facts["n_head_kv"], facts["n_layers"])
    # A V that lies transposed has the same width in all layers (src/llama-kv-cache.cpp).
    widths = heads if batch.flash_attention else [max(heads)] * len(heads)
    return [
        (row(k * facts["head_dim_k"], batch.type_k), row(v * facts["head_dim_v"], batch.type_v))
        for k, v in zip(heads, widths)
    ]


def kv_bytes(facts: Mapping[str, Any], batch: Batch) -> list[int]:
    """Bytes of the KV cache of each layer, for all requests: cells times (K row + V row); exact.

    Raises ValueError for an unknown type of cache.
    """
    cells = architectures.layer_cells(facts, batch)
    return [batch.parallel * count * (k + v) for count, (k, v) in zip(cells, _rows(facts, batch))]


def checkpoint_bytes(facts: Mapping[str, Any], batch: Batch) -> int:
    """Host memory of the context checkpoints that llama-server keeps for sliding windows; 0 without one."""
    windowed = architectures.windowed_layers(facts)
    one = sum(size for size, kept in zip(kv_bytes(facts, batch), windowed) if kept)
    return CONTEXT_CHECKPOINTS * one


def slot_weights(facts: Mapping[str, Any]) -> list[int]:
    """Bytes of the weights of each slot: the layers and, last, the output layer, which may repeat the embedding."""
    sizes = facts["tensor_bytes"]
    output = sizes["output"] + (sizes["token_embd"] if facts["tied_output"] else 0)
    return [*sizes["per_layer"], output]


def _other_weights(facts: Mapping[str, Any]) -> int:
    """Bytes of what belongs to no layer, such as the frequencies of RoPE; each device has them."""
    sizes = facts["tensor_bytes"]
    return int(sizes["total"] - sizes["token_embd"] - sizes["output"] - sum(sizes["per_layer"]))


def cuda_pool_bytes(facts: Mapping[str, Any], batch: Batch) -> int:
    """Temporaries of the greediest operation on a V100 (ggml_cuda_mul_mat_cublas_impl, ggml-cuda.cu).

    cuBLAS gets a quantised matrix unpacked to f16, without flash attention all of a layer's K in f32 and the
    softmax of its scores in f16. Products of Volta are f32 and go to their place without a copy.
    """
    layers, tokens = facts["n_layers"], batch.tokens
    heads = max(architectures.per_layer(facts["n_head"], layers))
    kv_heads = max(architectures.per_layer(facts["n_head_kv"], layers))
    n_ff, n_embd = max(architectures.per_layer(facts["n_ff"], layers)), facts["n_embd"]
    cells = batch.cells * batch.parallel
    needs = [0]
    if tokens >= CUDA_CUBLAS_ROWS:
        unpacked = 0 if facts["file_type"] in UNQUANTISED else 2 * n_embd * n_ff
        needs.append(unpacked + 2 * tokens * max(n_ff, n_embd))
    if not batch.flash_attention:
        needs.append(4 * cells * kv_heads * facts["head_dim_k"])
        needs.append(2 * batch.cells * tokens * heads)
    return _pad(max(needs), CUDA_POOL_STEP)


@dataclass(frozen=True)
class Use:
    """Bytes that one model takes of one device."""

    weights: int
    kv: int
    compute: int
    other: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute + self.other


def uses(facts: Mapping[str, Any], batch: Batch, places: Sequence[int], devices: Sequence[Device]) -> list[Use]:
    """What a model takes of each device, the head's CPU last; ``places`` as for ``compute_bytes``."""
    compute = architectures.compute_bytes(facts, batch, places, devices)
    return uses_with(facts, batch, places, devices, compute)


def uses_with(
    facts: Mapping[str, Any],
    batch: Batch,
    places: Sequence[int],
    devices: Sequence[Device],
    compute: Sequence[int],
) -> list[Use]:
    """``uses`` with compute buffers that are known already."""
    cpu = len(devices) - 1
    weights, kv, cells = [0] * len(devices), [0] * len(devices), kv_bytes(facts, batch)
    for slot, (place, size) in enumerate(zip(places, slot_weights(facts))):
        weights[place] += size
        if slot < facts["n_layers"]:
            kv[place] += cells[slot]
    for place in set(places):
        weights[place] += _other_weights(facts)
    if not (facts["tied_output"] and places[-1] == cpu):
        weights[cpu] += facts["tensor_bytes"]["token_embd"]
    pool = cuda_pool_bytes(facts, batch)
    return [
        Use(
            weights=weights[index],
            kv=kv[index],
            compute=compute[index],
            other=CUDA_CONTEXT_BYTES + pool if device.cuda and index in places else 0,
        )
        for index, device in enumerate(devices)
    ]


def sketch(facts: Mapping[str, Any], places: Sequence[int], keep: int = 4) -> tuple[dict[str, Any], list[int]]:
    """A model with, of the layers of a kind and shape on a device, the first ``keep`` and the last; and their places.

    As much lies in its compute buffers at once as in those of the whole one; the holes between may differ. It makes
    searches fast; what they find is computed with the whole model.
    """
    layers = facts["n_layers"]
    windowed = architectures.windowed_layers(facts)
    shapes = {key: architectures.per_layer(facts[key], layers) for key in ("n_ff", "n_head", "n_head_kv")}
    alike: dict[tuple[int, ...], list[int]] = {}
    for layer in range(layers):
        kind = (places[layer], windowed[layer], *(sizes[layer] for sizes in shapes.values()))
        alike.setdefault(kind, []).append(layer)
    kept = sorted({layer for some in alike.values() for layer in (*some[:keep], some[-1])})
    small = {
        **facts,
        "n_layers": len(kept),
        "sliding_window_pattern": [windowed[layer] for layer in kept],
        **{key: [sizes[layer] for layer in kept] for key, sizes in shapes.items()},
    }
    return small, [*(places[layer] for layer in kept), places[layers]]


def server_bytes(facts: Mapping[str, Any], batch: Batch, *, cuda: bool, prompt_cache_mib: int = 0) -> int:
    """Host memory of a llama-server process besides what it computes with: vocabulary, logits, checkpoints, cache."""
    logits = 4 * batch.parallel * int(facts["n_vocab"])
    own = SERVER_BYTES + SERVER_BYTES_OF_A_TOKEN * int(facts["n_vocab"]) + (CUDA_PROCESS_BYTES if cuda else 0)
    return own + logits + checkpoint_bytes(facts, batch) + prompt_cache_mib * MIB


def rpc_server_bytes(facts: Mapping[str, Any], *, cuda: bool) -> int:
    """Host memory of a ggml-rpc-server process besides what it computes with: the largest tensor on its way."""
    return RPC_SERVER_BYTES + staging_bytes(facts) + (CUDA_PROCESS_BYTES if cuda else 0)


def staging_bytes(facts: Mapping[str, Any]) -> int:
    """Bytes of the largest piece of the model that is sent whole: the output matrix, or a layer, to be safe."""
    return int(max(slot_weights(facts)))
