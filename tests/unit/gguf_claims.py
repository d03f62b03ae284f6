"""What has to hold of any GGUF, sound or hostile; and small ones that are made field by field, to be spoiled.

The unit tests and the fuzzer (tests/fuzz) share it.
"""

from __future__ import annotations

import functools
import itertools
import json
import struct
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

from gleaner import gguf, plan
from tests.unit import sites

MOST_WORDS = 400
"""Characters of an error beside the name of its source."""
MOST_BYTES = 2**18
"""Memory that reading takes beside what a file of its size may: a length that is believed takes more."""


class CountedWindow(gguf._Window):
    """Counts what a header costs: steps of the parser, and bytes that are fetched."""

    steps: ClassVar[int] = 0
    fetches: ClassVar[int] = 0
    fetched_bytes: ClassVar[int] = 0

    def __init__(self, size: int, fetch: Callable[[int, int], bytes], limit: int) -> None:
        def counted(start: int, count: int) -> bytes:
            CountedWindow.fetches += 1
            CountedWindow.fetched_bytes += count
            return fetch(start, count)

        super().__init__(size, counted, limit)

    def _need(self, count: int, what: str) -> None:
        CountedWindow.steps += 1
        super()._need(count, what)

    @classmethod
    def reset(cls) -> None:
        cls.steps = cls.fetches = cls.fetched_bytes = 0


def attempt(read: Callable[[], dict[str, Any]], folder: Path, size: int, *, traced: bool) -> dict[str, Any] | None:
    """The facts that are read from files of ``size`` bytes in all, or None where they are refused as they have to be.

    A file is read once, and each step of the parser takes three bytes or more. ``traced``: memory is measured, too,
    which takes its time.
    """
    most = MOST_BYTES + 4 * size
    # What threads of other tests take meanwhile is counted, too, but not each time.
    for _ in range(3 if traced else 1):
        CountedWindow.reset()
        if traced:
            tracemalloc.start()
        try:
            with mock.patch.object(gguf, "_Window", CountedWindow):
                facts = read()
        except ValueError as error:
            claim_refusal(str(error), str(folder))
            facts = None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        if peak < most:
            break
    assert peak < most
    assert CountedWindow.fetched_bytes <= size
    assert CountedWindow.steps <= size // 3 + 8 * CountedWindow.fetches + 8
    return facts


def claim_refusal(text: str, source: str) -> None:
    """An error is one short line of printable characters that begins with its source."""
    assert text.startswith(source)
    assert text.isprintable()
    assert len(text) <= len(source) + MOST_WORDS


def claim(first: Path, *, traced: bool = False) -> dict[str, Any] | None:
    """The facts of a file, which are sound and which the planner survives; None where it is refused.

    ``first`` lies in a folder of its own, with the other parts of a split model.
    """
    size = sum(path.stat().st_size for path in first.parent.iterdir())
    inspected = attempt(lambda: gguf.inspect(str(first)), first.parent, size, traced=traced)
    checked = attempt(lambda: gguf.check_file(first), first.parent, size, traced=False)
    assert checked in (inspected, None)
    if inspected is not None:
        assert gguf.facts_fault(inspected) is None
        text = gguf.render(inspected)
        assert json.loads(text) == inspected
        claim_plan(inspected)
    return inspected


def claim_plan(facts: Mapping[str, Any], **changes: Any) -> None:
    """The planner takes a model with these facts, or names what is wrong; ``changes`` are those of all tiers."""
    told = {key: facts[key] for key in facts if key not in ("name", "size_bytes", "n_tensors")}
    _claim_plan(json.dumps(told), json.dumps(changes))


@functools.cache
def _claim_plan(facts: str, changes: str) -> None:
    model = {"name": "", "size_bytes": 2**40, "n_tensors": 1, **json.loads(facts)}
    headers = dict.fromkeys(("small", "other", "large"), model)
    for backend in ("cuda", "cpu"):
        value = sites.site()
        value["llama_cpp"]["backend"] = backend
        for tier in value["tiers"]:
            tier.update(json.loads(changes))
        for problem in plan.problems(value, headers):
            assert str(problem).isprintable()


class Field(NamedTuple):
    """One field of a GGUF as it stands in the file."""

    name: str
    content: bytes
    is_text: bool = False


FORMATS = dict(zip((*range(8), 10, 11, 12), (f"<{letter}" for letter in "BbHhIif?Qqd")))
U16, (U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64) = 2, range(4, 13)


def text(name: str, content: bytes) -> list[Field]:
    return [Field(f"length of {name}", struct.pack("<Q", len(content))), Field(name, content, is_text=True)]


def scalar(name: str, kind: int, value: float) -> list[Field]:
    return [Field(f"type of {name}", struct.pack("<I", kind)), Field(name, struct.pack(FORMATS[kind], value))]


def string(name: str, content: bytes) -> list[Field]:
    return [Field(f"type of {name}", struct.pack("<I", STRING)), *text(name, content)]


def array(name: str, kind: int, values: Sequence[Any]) -> list[Field]:
    head = [
        Field(f"type of {name}", struct.pack("<I", ARRAY)),
        Field(f"element type of {name}", struct.pack("<I", kind)),
        Field(f"count of {name}", struct.pack("<Q", len(values))),
    ]
    if kind == STRING:
        return [*head, *itertools.chain.from_iterable(text(f"item of {name}", value) for value in values)]
    return [*head, *(Field(f"item of {name}", struct.pack(FORMATS[kind], value)) for value in values)]


def tensor(name: str, shape: Sequence[int], offset: int) -> list[Field]:
    """A tensor of F32."""
    return [
        *text(name, name.encode()),
        Field(f"dimensions of {name}", struct.pack("<I", len(shape))),
        *(Field(f"extent of {name}", struct.pack("<Q", extent)) for extent in shape),
        Field(f"kind of {name}", struct.pack("<I", 0)),
        Field(f"offset of {name}", struct.pack("<Q", offset)),
    ]


Values = dict[str, Callable[[str], list[Field]]]

WIDTH, TOKENS = 32, 3


def values() -> Values:
    """The metadata of a small llama of two layers, with a value of almost each type."""
    return {
        "general.architecture": lambda name: string(name, b"llama"),
        "general.name": lambda name: string(name, b"small"),
        "general.alignment": lambda name: scalar(name, U32, 32),
        "general.file_type": lambda name: scalar(name, U32, 1),
        "general.size": lambda name: scalar(name, U64, 1),
        "general.flag": lambda name: scalar(name, BOOL, True),
        "llama.block_count": lambda name: scalar(name, U32, 2),
        "llama.context_length": lambda name: scalar(name, U32, 4096),
        "llama.embedding_length": lambda name: scalar(name, I32, WIDTH),
        "llama.feed_forward_length": lambda name: scalar(name, U64, 64),
        "llama.attention.head_count": lambda name: scalar(name, U32, 2),
        "llama.attention.head_count_kv": lambda name: array(name, U32, [1, 2]),
        "llama.attention.key_length": lambda name: scalar(name, I64, 32),
        "llama.attention.value_length": lambda name: scalar(name, U16, 32),
        "llama.attention.sliding_window": lambda name: scalar(name, U32, 512),
        "llama.attention.sliding_window_pattern": lambda name: array(name, BOOL, [True, False]),
        "llama.rope.freq_base": lambda name: scalar(name, F64, 1e6),
        "tokenizer.ggml.tokens": lambda name: array(name, STRING, [b"a", b"", "ß".encode()]),
        "tokenizer.ggml.scores": lambda name: array(name, F32, [0.0] * TOKENS),
    }


TENSORS = ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight", "output.weight")
"""Each is a matrix of WIDTH times TOKENS elements in F32."""
TENSOR_BYTES = 4 * WIDTH * TOKENS


def fields(metadata: Values, names: Sequence[str] = TENSORS) -> list[Field]:
    """All fields of a header."""
    found = [
        Field("magic", b"GGUF", is_text=True),
        Field("version", struct.pack("<I", 3)),
        Field("count of tensors", struct.pack("<Q", len(names))),
        Field("count of keys", struct.pack("<Q", len(metadata))),
    ]
    for key, value in metadata.items():
        found += [*text(f"key {key}", key.encode()), *value(key)]
    for index, name in enumerate(names):
        found += tensor(name, [WIDTH, TOKENS], TENSOR_BYTES * index)
    return found


def content(header: Iterable[Field], tensors: int = len(TENSORS)) -> bytes:
    """A file of these fields and the data of so many tensors."""
    head = b"".join(field.content for field in header)
    return head + bytes(-len(head) % 32 + TENSOR_BYTES * tensors)


def split_fields() -> list[list[Field]]:
    """The fields of each part of a model of two parts."""

    def part(no: int) -> Values:
        return {
            "split.no": lambda name: scalar(name, U16, no),
            "split.count": lambda name: scalar(name, U16, 2),
            "split.tensors.count": lambda name: scalar(name, I32, len(TENSORS)),
        }

    return [fields({**values(), **part(0)}, TENSORS[:2]), fields(part(1), TENSORS[2:])]


def write_parts(folder: Path, contents: Sequence[bytes]) -> Path:
    """Write the only part of a model, or all parts of a split one, into an empty folder; returns the first."""
    names = [f"m-{no:05d}-of-{len(contents):05d}.gguf" for no in range(1, len(contents) + 1)]
    for name, part in zip(names if len(contents) > 1 else ["m.gguf"], contents):
        (folder / name).write_bytes(part)
    return folder / (names[0] if len(contents) > 1 else "m.gguf")


_EDGES = (5, 8, 12, 16, 21, 31, 32, 53, 63, 64)
_EXTREMES = {*range(6), *(2**bits + step for bits in _EDGES for step in (-1, 0, 1))}
_ODD_TEXT = (b"\n", b"\0", b"\x1b", b"\xff", b"\xf0\x9f\x98\x80", "\u2028".encode(), b"'", b"blk.0.")


def extremes(field: Field) -> list[bytes]:
    """What a field of this width can hold at its worst: numbers at all edges, or odd characters."""
    width = len(field.content)
    if field.is_text:
        return [(odd * width)[:width] for odd in _ODD_TEXT]
    value = int.from_bytes(field.content, "little")
    numbers = {number % 2 ** (8 * width) for number in (*_EXTREMES, value - 1, value + 1, 2 * value)}
    return [number.to_bytes(width, "little") for number in sorted(numbers - {value})]
