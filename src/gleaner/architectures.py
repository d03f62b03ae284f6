"""The graph that llama.cpp computes for one micro-batch, for the architectures whose memory gleaner can plan.

Each builder repeats the order of ``src/models/*.cpp`` and ``src/llama-graph.cpp`` (llama.cpp at commit 0c1e570)
with sizes only. An architecture that is not here, or a model of one that has tensors which its graph here does
not use, is refused by name: its memory would be a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gleaner import ggml_graph
from gleaner.ggml_graph import Graph, Tensor, leaf, stored, view

KV_BLOCKS = {"f16": (2, 1), "q8_0": (34, 32), "q4_0": (18, 32)}
"""Bytes and elements of one block of each type of KV cache (ggml/src/ggml-common.h)."""

_DENSE = frozenset(
    f"{name}.weight"
    for name in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
)
_BIASES = frozenset(f"{name}.bias" for name in ("attn_q", "attn_k", "attn_v", "attn_output"))
_HEAD_NORMS = frozenset({"attn_q_norm.weight", "attn_k_norm.weight"})


class Architecture(NamedTuple):
    """What sets the graph of an architecture apart, and the tensors of a layer that it covers."""

    scaled_input: bool
    head_norms: bool
    post_norms: bool
    shapes_agree: bool
    """Whether K and V of a head have to be of one size, or llama.cpp aborts."""
    tensors: frozenset[str]
    sliding_window_pattern: int = 0
    """Every so many layers one sees the whole context, where the header does not say."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(False, False, False, True, _DENSE | _BIASES),
    "qwen2": Architecture(False, False, False, True, _DENSE | _BIASES),
    "qwen3": Architecture(False, True, False, True, _DENSE | _HEAD_NORMS),
    "gemma3": Architecture(
        True,
        True,
        True,
        False,
        _DENSE | _HEAD_NORMS | {"post_attention_norm.weight", "post_ffw_norm.weight"},
        sliding_window_pattern=6,
    ),
}


def unknown(facts: Mapping[str, Any]) -> str | None:
    """Why a model's memory cannot be planned, or None: its architecture, or what its graph here lacks."""
    architecture = ARCHITECTURES.get(facts["architecture"])
    if architecture is None:
        return f"architecture {facts['architecture']} (known: {', '.join(sorted(ARCHITECTURES))})"
    foreign = sorted(set(facts["layer_tensors"]) - architecture.tensors)
    if foreign:
        return f"architecture {facts['architecture']} with {', '.join(foreign[:4])} in its layers"
    k, v = facts["head_dim_k"], facts["head_dim_v"]
    if architecture.shapes_agree and k != v:
        return f"architecture {facts['architecture']} with heads of {k} (K) and {v} (V) elements"
    return None


@dataclass(frozen=True)
class Batch:
    """What a context is made with: tokens of one request, requests at a time, and how attention is computed."""

    context_tokens: int
    parallel: int = 1
    ubatch_tokens: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: bool = False
    outputs: int | None = None
    """Rows of logits per micro-batch. None: one for each request, as llama-server has it."""

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch: never more than the whole context, a multiple of the requests."""
        tokens = min(self.ubatch_tokens, self.cells * self.parallel)
        return _pad(tokens, self.parallel)

    @property
    def cells(self) -> int:
        """KV cells of one request: llama.cpp pads a context to 256 (src/llama-context.cpp)."""
        return _pad(self.context_tokens, 256)


class Device(NamedTuple):
    """What a device's kind changes in the graph: whether CUDA computes, and whether RPC leads to it."""

    cuda: bool = False
    remote: bool = False

    @property
    def alignment(self) -> int:
        """Bytes to which tensors are aligned (ggml-cuda.cu; TENSOR_ALIGNMENT of ggml-backend.cpp)."""
        return 128 if self.cuda else 64


def _pad(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def per_layer(value: int | Sequence[int], layers: int) -> list[int]:
    return [value] * layers if isinstance(value, int) else list(value)


def windowed_layers(facts: Mapping[str, Any]) -> list[bool]:
    """For each layer, whether it sees a sliding window only.

    llama.cpp passes over the window that a header has for an architecture without a pattern of its own.
    """
    layers: int = facts["n_layers"]
    usual = ARCHITECTURES[facts["architecture"]].sliding_window_pattern
    if not (usual and facts.get("sliding_window")):
        return [False] * layers
    pattern = facts.get("sliding_window_pattern")
    if pattern is None:
        pattern = usual
    if not isinstance(pattern, int):
        return [bool(item) for item in pattern]
    return [pattern == 0 or layer % pattern < pattern - 1 for layer in range(layers)]


def window_cells(facts: Mapping[str, Any], batch: Batch) -> int:
    """KV cells of one request in a layer that sees a window (src/llama-kv-cache-iswa.cpp)."""
    ubatch = min(batch.ubatch_tokens, batch.cells * batch.parallel)
    return _pad(min(batch.cells, (facts.get("sliding_window") or 0) + ubatch), 256)


def layer_cells(facts: Mapping[str, Any], batch: Batch) -> list[int]:
    """KV cells of one request in each layer."""
    window = window_cells(facts, batch)
    return [window if windowed else batch.cells for windowed in windowed_layers(facts)]


class _Attention:
    """The inputs that all layers of one kind (whole context, or window) share."""

    def __init__(self, facts: Mapping[str, Any], batch: Batch, tokens: int, cells: int, v_row: int) -> None:
        streams = batch.parallel
        self.cells = cells
        self.k_idxs = leaf((tokens, 1, 1, 1), item=8)
        # Without flash attention V lies transposed, and each element of a token has an index of its own.
        self.v_idxs = leaf((tokens * (1 if batch.flash_attention else v_row), 1, 1, 1), item=8)
        self.mask = leaf((cells, tokens // streams, 1, streams), item=2 if batch.flash_attention else 4)
        self.k_rotation = self.v_rotation = None
        # A quantised cache is rotated first, which spreads outliers (src/llama-kv-cache.cpp).
        if batch.type_k != "f16" and facts["head_dim_k"] % 64 == 0:
            size = 64
            while facts["head_dim_k"] % (2 * size) == 0:
                size *= 2
            self.k_rotation = leaf((size, size, 1, 1))
        if batch.type_v != "f16" and facts["head_dim_v"] % 64 == 0:
            self.v_rotation = leaf((64, 64, 1, 1))


class _Builder:
    def __init__(
        self, facts: Mapping[str, Any], batch: Batch, tokens: int, places: Sequence[int], devices: Sequence[Device]
    ) -> None:
        self.facts, self.batch, self.tokens, self.places, self.devices = facts, batch, tokens, places, devices
        self.kind = ARCHITECTURES[facts["architecture"]]
        self.graph = Graph()
        layers = facts["n_layers"]
        self.heads = per_layer(facts["n_head"], layers)
        self.kv_heads = per_layer(facts["n_head_kv"], layers)
        self.n_ff = per_layer(facts["n_ff"], layers)
        self.weights = {place: stored(place, weight=True) for place in set(places)}

    def matmul(self, layer: int, rows: int, source: Tensor) -> Tensor:
        return Tensor("mul_mat", (rows, *source.shape[1:]), [self.weights[self.places[layer]], source])

    def norm(self, layer: int, source: Tensor, pinned: bool = True) -> Tensor:
        plain = Tensor("rms_norm", source.shape, [source])
        if pinned and not self.devices[self.places[layer]].remote:
            # llama.cpp keeps a layer's norm from running on the device of the layer before it. It recognises a
            # device by its address, of which those behind RPC have two.
            plain.device = self.places[layer]
        return Tensor("mul", source.shape, [plain, self.weights[self.places[layer]]])

    def rotate(self, source: Tensor, rotation: Tensor) -> Tensor:
        rows = rotation.shape[0]
        count = source.shape[0] * source.shape[1] * source.shape[2] * source.shape[3] // rows
        flat = view(source, (rows, count, 1, 1), "reshape")
        return view(Tensor("mul_mat", (rows, count, 1, 1), [rotation, flat]), source.shape, "reshape")

    def attention(self, layer: int, source: Tensor, positions: Tensor, shared: _Attention) -> Tensor:
        facts, tokens, batch = self.facts, self.tokens, self.batch
        dim_k, dim_v = facts["head_dim_k"], facts["head_dim_v"]
        heads, kv_heads = self.heads[layer], self.kv_heads[layer]
        device = self.places[layer]
        query: Tensor = view(self.matmul(layer, dim_k * heads, source), (dim_k, heads, tokens, 1), "reshape")
        key: Tensor = view(self.matmul(layer, dim_k * kv_heads, source), (dim_k, kv_heads, tokens, 1), "reshape")
        value: Tensor = view(self.matmul(layer, dim_v * kv_heads, source), (dim_v, kv_heads, tokens, 1), "reshape")
        if self.kind.head_norms:
            query = self.norm(layer, query)
        query = Tensor("rope", query.shape, [query, positions])
        if self.kind.head_norms:
            key = self.norm(layer, key)
        key = Tensor("rope", key.shape, [key, positions])
        if self.kind.scaled_input:
            query = Tensor("scale", query.shape, [query])
        if shared.k_rotation is not None:
            query, key = self.rotate(query, shared.k_rotation), self.rotate(key, shared.k_rotation)
        if shared.v_rotation is not None:
            value = self.rotate(value, shared.v_rotation)
        window_kind = self.kind.sliding_window_pattern and facts.get("sliding_window")
        for tensor in (query, key, value) if window_kind else (query, value, key):
            self.graph.expand(tensor)

        cache_k, cache_v = stored(device), stored(device)
        flat_k = view(key, (dim_k * kv_heads, tokens, 1, 1))
        self.graph.expand(Tensor("set_rows", (0, 0, 0, 0), [flat_k, shared.k_idxs, cache_k], view_of=cache_k))
        if batch.flash_attention:
            flat_v = view(value, (dim_v * kv_heads, tokens, 1, 1))
        else:
            flat_v = view(value, (dim_v * kv_heads, tokens, 1, 1), "reshape")
            flat_v = view(flat_v, (1, dim_v * kv_heads * tokens, 1, 1), "reshape")
        self.graph.expand(Tensor("set_rows", (0, 0, 0, 0), [flat_v, shared.v_idxs, cache_v], view_of=cache_v))

        streams, cells = batch.parallel, shared.cells
        query = view(query, (dim_k, heads, tokens // streams, streams))
        query = view(query, (dim_k, tokens // streams, heads, streams), "permute")
        keys = view(view(cache_k, (0, 0, 0, 0)), (0, 0, 0, 0), "permute")
        values = view(view(cache_v, (0, 0, 0, 0)), (0, 0, 0, 0), "permute")
        if batch.flash_attention:
            extra = self._f16_copies(layer, cells) if self.devices[device].cuda else 0
            shape = (dim_v, heads, tokens // streams, streams)
            result = Tensor("flash_attn", shape, [query, keys, values, shared.mask], extra=extra)
            result = view(result, (dim_v * heads, tokens, 1, 1), "reshape")
        else:
            scores = Tensor("mul_mat", (cells, tokens // streams, heads, streams), [keys, query])
            scores = Tensor("soft_max", scores.shape, [scores, shared.mask])
            mixed = Tensor("mul_mat", (dim_v, tokens // streams, heads, streams), [values, scores])
            mixed = view(mixed, (dim_v, heads, tokens // streams, streams), "permute")
            result = Tensor("cont", (dim_v * heads, tokens, 1, 1), [mixed])
        self.graph.expand(result)
        if shared.v_rotation is not None:
            result = self.rotate(result, shared.v_rotation)
        return self.matmul(layer, facts["n_embd"], result)

    def _f16_copies(self, layer: int, cells: int) -> int:
        """Bytes of the f16 copies of a quantised K and V that CUDA's kernels want (ggml-cuda/fattn-common.cuh)."""
        facts, batch = self.facts, self.batch
        rows = cells * batch.parallel * self.kv_heads[layer]
        kept = ((facts["head_dim_k"], batch.type_k), (facts["head_dim_v"], batch.type_v))
        return sum(2 * rows * dim + 128 for dim, kind in kept if kind != "f16")

    def feed_forward(self, layer: int, source: Tensor) -> Tensor:
        up = self.matmul(layer, self.n_ff[layer], source)
        gate = self.matmul(layer, self.n_ff[layer], source)
        return self.matmul(layer, self.facts["n_embd"], Tensor("glu", gate.shape, [gate, up]))

    def build(self) -> Graph:
        facts, batch, tokens = self.facts, self.batch, self.tokens
        layers, n_embd = facts["n_layers"], facts["n_embd"]
        ids = leaf((tokens, 1, 1, 1))
        embeddings = leaf((n_embd, tokens, 1, 1))
        table = stored(len(self.devices) - 1, weight=True)
        current = self.graph.expand(Tensor("get_rows", (n_embd, tokens, 1, 1), [table, ids]))
        self.graph.expand(embeddings)
        if self.kind.scaled_input:
            current = Tensor("scale", current.shape, [current])
        positions = leaf((tokens, 1, 1, 1))
        v_rows = [heads * facts["head_dim_v"] for heads in self.kv_heads]
        whole = _Attention(facts, batch, tokens, batch.cells, max(v_rows))
        windowed = windowed_layers(facts)
        window = whole
        if any(windowed):
            window = _Attention(facts, batch, tokens, window_cells(facts, batch), max(v_rows))
        outputs = min(batch.outputs or batch.parallel, tokens)
        chosen = leaf((outputs, 1, 1, 1))

        for layer in range(layers):
            residual = current
            attended = self.attention(layer, self.norm(layer, current), positions, window if windowed[layer] else whole)
            if layer == layers - 1:
                attended = Tensor("get_rows", (n_embd, outputs, 1, 1), [attended, chosen])
                residual = Tensor("get_rows", (n_embd, outputs, 1, 1), [residual, chosen])
            if self.kind.post_norms:
                attended = self.norm(layer, attended)
            inner = Tensor("add", attended.shape, [attended, residual])
            fed = self.feed_forward(layer, self.norm(layer, inner))
            if self.kind.post_norms:
                fed = self.norm(layer, fed, pinned=False)
            current = Tensor("add", fed.shape, [fed, inner])
        normed = self.norm(layers, current, pinned=False)
        logits = self.matmul(layers, facts["n_vocab"], normed)
        ggml_graph.outputs([normed, logits])
        self.graph.expand(logits)
        return self.graph


def compute_bytes(
    facts: Mapping[str, Any], batch: Batch, places: Sequence[int], devices: Sequence[Device]
) -> list[int]:
    """Bytes of the compute buffer of each device; the last device is the head's CPU.

    ``places`` has the device of each layer and, last, of the output layer. The token embedding always lies on
    the CPU. llama-server reserves for a graph that reads a prompt and for one that writes a token of each request.
    The latter is smaller, but the holes between its tensors can make its buffer the larger one.
    """
    alignments = [device.alignment for device in devices]
    sizes = [
        ggml_graph.buffer_sizes(_Builder(facts, batch, tokens, places, devices).build(), alignments)
        for tokens in ({batch.tokens, batch.parallel} if batch.outputs is None else {batch.tokens})
    ]
    return [max(of_device) for of_device in zip(*sizes)]
