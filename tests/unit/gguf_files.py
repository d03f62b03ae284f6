"""GGUF files for tests, made with the `gguf` package: real headers over sparse data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Types = Callable[[str, int, int], gguf.GGMLQuantizationType]


def all_f32(name: str, rows: int, layer: int) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.F32


def q8_0(name: str, rows: int, layer: int) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.Q8_0


def q4_k_m(layers: int) -> Types:
    """The types that llama-quantize gives a 70B-class model for Q4_K_M (src/llama-quant.cpp).

    Rows that 256 does not divide fall back: Q4_K to Q5_0, Q6_K to Q8_0.
    """
    kinds = gguf.GGMLQuantizationType

    def more_bits(layer: int) -> bool:
        return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2

    def choose(name: str, columns: int, layer: int) -> gguf.GGMLQuantizationType:
        kind = kinds.Q4_K
        if name == "output.weight":
            kind = kinds.Q6_K
        elif "attn_v" in name:
            kind = kinds.Q6_K if more_bits(layer) else kinds.Q5_K
        elif "ffn_down" in name and more_bits(layer):
            kind = kinds.Q6_K
        if columns % 256:
            kind = {kinds.Q4_K: kinds.Q5_0, kinds.Q6_K: kinds.Q8_0}[kind]
        return kind

    return choose


def write_model(
    path: Path,
    *,
    architecture: str = "qwen2",
    name: str = "test",
    layers: int = 2,
    n_embd: int = 64,
    n_ff: int = 128,
    n_head: int = 4,
    n_head_kv: int | list[int] = 2,
    n_vocab: int = 256,
    context_length: int = 4096,
    file_type: int = 0,
    types: Types = all_f32,
    tied: bool = False,
    bias: bool = True,
    head_dim: int | None = None,
    sliding_window: int | None = None,
    split: tuple[int, int] | None = None,
    part_tensors: int = 0,
    extra: Callable[[Any], None] | None = None,
) -> Path:
    """A model file with the tensors of a llama-like architecture; its data is a hole. Returns the path.

    With ``part_tensors`` it is split into parts of so many tensors; returns the path of the first.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=part_tensors)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_block_count(layers)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_context_length(context_length)
    writer.add_token_list([f"token-{number}" for number in range(n_vocab)])
    # What llama.cpp wants besides, so that it loads the file; a tokenizer it does not need.
    writer.add_vocab_size(n_vocab)
    writer.add_tokenizer_model("none")
    writer.add_layer_norm_rms_eps(1e-5)
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if sliding_window is not None:
        writer.add_sliding_window(sliding_window)
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
    if extra is not None:
        extra(writer)

    def tensor(name: str, *shape: int, layer: int = -1) -> None:
        kind = types(name, shape[-1], layer) if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        block, size = gguf.GGML_QUANT_SIZES[kind]
        total = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, list(shape), np.dtype(np.float32), total, raw_dtype=kind)

    size = head_dim or n_embd // n_head
    heads = n_head_kv if isinstance(n_head_kv, list) else [n_head_kv] * layers
    tensor("token_embd.weight", n_vocab, n_embd)
    for layer in range(layers):
        block = f"blk.{layer}"
        kv = heads[layer] * size
        tensor(f"{block}.attn_norm.weight", n_embd)
        for part, rows in (("q", n_head * size), ("k", kv), ("v", kv)):
            tensor(f"{block}.attn_{part}.weight", rows, n_embd, layer=layer)
            if bias:
                tensor(f"{block}.attn_{part}.bias", rows)
            if part != "v" and architecture in ("qwen3", "gemma3"):
                tensor(f"{block}.attn_{part}_norm.weight", size)
        tensor(f"{block}.attn_output.weight", n_embd, n_head * size, layer=layer)
        tensor(f"{block}.ffn_norm.weight", n_embd)
        if architecture == "gemma3":
            tensor(f"{block}.post_attention_norm.weight", n_embd)
            tensor(f"{block}.post_ffw_norm.weight", n_embd)
        tensor(f"{block}.ffn_gate.weight", n_ff, n_embd, layer=layer)
        tensor(f"{block}.ffn_up.weight", n_ff, n_embd, layer=layer)
        tensor(f"{block}.ffn_down.weight", n_embd, n_ff, layer=layer)
    tensor("output_norm.weight", n_embd)
    if not tied:
        tensor("output.weight", n_vocab, n_embd)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    files = writer.fout
    assert files is not None
    headers = [file.tell() for file in files]
    writer.close()
    alignment = 32
    paths = writer.format_shard_names(path)
    for file_path, header, tensors in zip(paths, headers, writer.tensors):
        data = sum(-(-info.nbytes // alignment) * alignment for info in tensors.values())
        os.truncate(file_path, -(-header // alignment) * alignment + data)
    return paths[0]


def write_qwen25_14b_q8_0(path: Path) -> Path:
    """The published shape of Qwen2.5-14B (and of the Coder models on it), every matrix in Q8_0."""
    return write_model(
        path,
        name="Strand Rust Coder 14B",
        layers=48,
        n_embd=5120,
        n_ff=13824,
        n_head=40,
        n_head_kv=8,
        n_vocab=152064,
        context_length=32768,
        file_type=7,
        types=q8_0,
    )


def write_qwen25_72b_q4_k_m(path: Path) -> Path:
    """The published shape of Qwen2.5-72B, in Q4_K_M; 29568 columns make ffn_down fall back to 32-blocks."""
    return write_model(
        path,
        name="OR1 Behemoth 72B",
        layers=80,
        n_embd=8192,
        n_ff=29568,
        n_head=64,
        n_head_kv=8,
        n_vocab=152064,
        context_length=131072,
        file_type=15,
        types=q4_k_m(80),
    )
