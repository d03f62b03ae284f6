"""Hostile GGUF headers: sound facts or one clear error, in bounded memory and steps, whatever the header says."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gleaner import gguf
from tests.fuzz import gguf_header as fuzzer
from tests.unit import gguf_claims as claims
from tests.unit.gguf_claims import Field

PLAIN = claims.fields(claims.values())
SPLIT = claims.split_fields()


def test_what_is_spoiled_here_is_sound(tmp_path: Path) -> None:
    facts = claims.claim(claims.write_parts(tmp_path, [claims.content(PLAIN)]))
    assert facts is not None
    assert facts["n_head_kv"] == [1, 2]
    (tmp_path / "split").mkdir()
    parts = [claims.content(part, tensors=2) for part in SPLIT]
    whole = claims.claim(claims.write_parts(tmp_path / "split", parts))
    assert whole == {**facts, "size_bytes": sum(map(len, parts)), "split": {"count": 2, "no": 0}}


def test_a_file_that_is_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole = claims.content(PLAIN)
    for size in range(len(whole)):
        first = claims.write_parts(tmp_path, [whole[:size]])
        claims.claim(first)
        with pytest.raises(ValueError, match=r"truncated"):
            gguf.check_file(first)


@pytest.mark.parametrize("cut", [0, 1])
def test_a_part_that_is_cut_at_any_byte_is_refused(tmp_path: Path, cut: int) -> None:
    parts = [claims.content(part, tensors=2) for part in SPLIT]
    for size in range(0, len(parts[cut]), 3):
        spoiled = [part[:size] if no == cut else part for no, part in enumerate(parts)]
        first = claims.write_parts(tmp_path, spoiled)
        claims.claim(first)
        with pytest.raises(ValueError, match=r"truncated"):
            gguf.check_file(first)


def one_spoiled(header: list[Field], *names: str) -> Iterator[list[Field]]:
    """The header with one field at one extreme; ``names`` are words in the names of the fields (none: all)."""
    for at, field in enumerate(header):
        if not names or any(name in field.name for name in names):
            for content in claims.extremes(field):
                yield [*header[:at], field._replace(content=content), *header[at + 1 :]]


def test_every_field_at_every_extreme(tmp_path: Path) -> None:
    for spoiled in one_spoiled(PLAIN):
        claims.claim(claims.write_parts(tmp_path, [claims.content(spoiled)]), traced=True)


@pytest.mark.parametrize("no", [0, 1])
def test_split_metadata_that_lies(tmp_path: Path, no: int) -> None:
    for spoiled in one_spoiled(SPLIT[no], "split", "count of tensors", "count of keys"):
        parts = [spoiled if index == no else part for index, part in enumerate(SPLIT)]
        claims.claim(claims.write_parts(tmp_path, [claims.content(part, tensors=2) for part in parts]), traced=True)


KEYS = list(claims.values())
NUMBERS = st.sampled_from([*range(6), 31, 32, 63, 64, 2**16, 2**31 - 1, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1])


def packable(kind: int, number: int) -> float:
    """A number as a value of this type."""
    if kind in (claims.F32, claims.F64):
        return float(number)
    if kind == claims.BOOL:
        return bool(number)
    (value,) = struct.unpack(
        claims.FORMATS[kind], number.to_bytes(8, "little")[: struct.calcsize(claims.FORMATS[kind])]
    )
    return int(value)


SCALAR_KINDS = st.sampled_from(sorted(claims.FORMATS))
TEXTS = st.one_of(st.text(max_size=40).map(str.encode), st.binary(max_size=80), st.just(b"x" * 5000))
VALUES = st.one_of(
    st.builds(
        lambda kind, number: lambda name: claims.scalar(name, kind, packable(kind, number)), SCALAR_KINDS, NUMBERS
    ),
    st.builds(
        lambda kind, numbers: lambda name: claims.array(name, kind, [packable(kind, number) for number in numbers]),
        SCALAR_KINDS,
        st.lists(NUMBERS, max_size=6),
    ),
    st.builds(lambda texts: lambda name: claims.array(name, claims.STRING, texts), st.lists(TEXTS, max_size=4)),
    st.builds(lambda content: lambda name: claims.string(name, content), TEXTS),
)
LAYER_NAMES = st.builds("blk.{}.{}".format, NUMBERS, st.text(max_size=12))
TENSOR_NAMES = st.one_of(st.sampled_from(claims.TENSORS), LAYER_NAMES, st.text(max_size=20))


@given(
    changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=30), VALUES, max_size=5),
    names=st.lists(TENSOR_NAMES, max_size=6),
)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_metadata(tmp_path: Path, changes: dict[str, Callable[[str], list[Field]]], names: list[str]) -> None:
    header = claims.fields({**claims.values(), **changes}, names)
    claims.claim(claims.write_parts(tmp_path, [claims.content(header, tensors=len(names))]))


@given(data=st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_several_damages_at_once(tmp_path: Path, data: st.DataObject) -> None:
    """Fields at extremes, left out, repeated, and those of one header in another's place."""
    parts = [list(part) for part in data.draw(st.sampled_from([[PLAIN], SPLIT]))]
    for _ in range(data.draw(st.integers(1, 4))):
        part = data.draw(st.sampled_from(parts))
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(part) - 1)] * 2)))
        damage = data.draw(st.sampled_from(["extreme", "extreme", "without", "twice", "foreign"]))
        if damage == "extreme":
            worst = claims.extremes(part[first]) or [b""]
            part[first] = part[first]._replace(content=data.draw(st.sampled_from(worst)))
        elif damage == "without":
            del part[first : min(last, first + 3)]
        elif damage == "twice":
            part[first:first] = part[first:last]
        else:
            part[first] = data.draw(st.sampled_from(PLAIN))
    contents = [claims.content(part) for part in parts]
    cut = data.draw(st.integers(0, len(contents[-1])))
    contents[-1] = data.draw(st.sampled_from([contents[-1], contents[-1][:cut]]))
    claims.claim(claims.write_parts(tmp_path, contents))


def with_architecture(name: str) -> list[Field]:
    metadata = {key.replace("llama.", f"{name}."): value for key, value in claims.values().items()}
    return claims.fields({**metadata, "general.architecture": lambda key: claims.string(key, name.encode())})


@pytest.mark.parametrize("name", ["a", "llama4", "gpt-2_x.y", "9b"])
def test_a_name_is_an_architecture(tmp_path: Path, name: str) -> None:
    facts = claims.claim(claims.write_parts(tmp_path, [claims.content(with_architecture(name))]))
    assert facts is not None
    assert facts["architecture"] == name


@pytest.mark.parametrize("name", ["", "Llama", "llama\n", "a b", "../a", "-a", "ł", "a" * 65, "a\0", "{{ a }}"])
def test_anything_else_is_no_architecture(tmp_path: Path, name: str) -> None:
    first = claims.write_parts(tmp_path, [claims.content(with_architecture(name))])
    assert claims.claim(first) is None
    with pytest.raises(ValueError, match=r"'general\.architecture' is '.*; wanted a name"):
        gguf.inspect(str(first))


@pytest.mark.parametrize(
    ("layers", "name", "words"),
    [
        (gguf.MAX_LAYERS, f"blk.{gguf.MAX_LAYERS - 1}.attn_q.weight", None),
        (gguf.MAX_LAYERS + 1, "blk.0.attn_q.weight", "513 layers; wanted at most 512"),
        (1, "blk.1.attn_q.weight", "belongs to none of the 1 layers"),
        (1, f"blk.{10**40}.a", "belongs to none of the 1 layers"),
        (1, "blk.0.a b", "layer_tensors is"),
        (1, "blk.0.\n", "layer_tensors is"),
        (1, "blk.\u0660.a", None),
    ],
)
def test_layers_that_a_model_may_have(tmp_path: Path, layers: int, name: str, words: str | None) -> None:
    metadata = claims.values()
    metadata["llama.block_count"] = lambda key: claims.scalar(key, claims.U32, layers)
    for key in ("llama.attention.head_count_kv", "llama.attention.sliding_window_pattern"):
        del metadata[key]
    first = claims.write_parts(tmp_path, [claims.content(claims.fields(metadata, [name]))])
    assert (claims.claim(first) is None) == (words is not None)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            gguf.inspect(str(first))


def test_more_tensors_than_file_is_a_truncated_file(tmp_path: Path) -> None:
    first = claims.write_parts(tmp_path, [claims.content(PLAIN, tensors=0)])
    assert claims.claim(first) is None
    with pytest.raises(ValueError, match=r"tensors of 1536 bytes in a file of \d+: it is truncated"):
        gguf.inspect(str(first))


def test_a_header_of_long_strings_is_fetched_once(tmp_path: Path) -> None:
    """Each string ends beyond the window that it begins in, and the file is far longer than any header."""
    path = tmp_path / "long.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, gguf.MAX_KEYS))
        for number in range(200):
            file.write(struct.pack("<Q8sIQ", 8, b"%08d" % number, claims.STRING, gguf.WINDOW_BYTES))
            file.seek(gguf.WINDOW_BYTES, 1)
        file.truncate()
    size = path.stat().st_size
    assert claims.attempt(lambda: gguf.inspect(str(path)), tmp_path, size, traced=True) is None
    assert claims.CountedWindow.fetches <= gguf.MAX_HEADER_BYTES // gguf.WINDOW_BYTES + 1


@pytest.mark.parametrize("finding", sorted(fuzzer.FINDINGS.iterdir()), ids=lambda path: path.name)
def test_what_the_fuzzer_found_does_no_harm(tmp_path: Path, finding: Path) -> None:
    claims.claim(claims.write_parts(tmp_path, fuzzer.parts_of(finding.read_bytes())), traced=True)


@pytest.mark.parametrize("depth", [1, 2, 100_000])
def test_arrays_of_arrays_are_refused_at_any_depth(tmp_path: Path, depth: int) -> None:
    nested = [Field("nested", struct.pack("<IQ", claims.ARRAY, 1) * depth)]
    header = claims.fields({"a": lambda name: [Field("type", struct.pack("<I", claims.ARRAY)), *nested]})
    first = claims.write_parts(tmp_path, [claims.content(header)])
    assert claims.claim(first, traced=True) is None
    with pytest.raises(ValueError, match="'a' is an array of value type 9; wanted numbers or strings"):
        gguf.inspect(str(first))
