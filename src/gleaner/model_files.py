"""How a model lies in the folder of a node: its file or files, and the one sum that stands for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def place_of(name: str, count: int) -> str:
    """What becomes visible of a model of so many files: its file, or a folder of its name."""
    return name if count > 1 else f"{name}.gguf"


def file_names(name: str, count: int) -> list[str]:
    """Its files, in the order of the parts; llama.cpp finds the others by the name of the first (llama_split_path)."""
    if count == 1:
        return [f"{name}.gguf"]
    return [f"{name}-{no:05d}-of-{count:05d}.gguf" for no in range(1, count + 1)]


def first_file(name: str, count: int) -> str:
    """What `--model` names, relative to the folder of the models."""
    place = place_of(name, count)
    return f"{place}/{file_names(name, count)[0]}" if count > 1 else place


def sum_of(sums: Sequence[str]) -> str:
    """The sha256 of its file, or that of the sums of its parts, one a line."""
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(f"{one}\n" for one in sums).encode()).hexdigest()
