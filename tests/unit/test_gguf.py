"""GGUF headers: facts from real files, and one clear error for anything else."""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_package
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gleaner import gguf
from tests.unit import gguf_claims as claims
from tests.unit import gguf_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write_model(tmp_path_factory.mktemp("gguf") / "small.gguf")


def spoiled(path: Path, folder: Path, change: Callable[[bytearray], None]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    copy = folder / "spoiled.gguf"
    copy.write_bytes(content)
    return copy


def test_facts_of_a_small_model(small: Path) -> None:
    f32 = 4
    layer = f32 * (2 * 64 + 64 * 64 + 64 + 2 * (32 * 64 + 32) + 64 * 64 + 3 * 64 * 128)
    embedding = f32 * 256 * 64
    assert gguf.inspect(str(small)) == {
        "v": 1,
        "architecture": "qwen2",
        "name": "test",
        "file_type": 0,
        "n_layers": 2,
        "n_embd": 64,
        "n_ff": 128,
        "n_head": 4,
        "n_head_kv": 2,
        "head_dim_k": 16,
        "head_dim_v": 16,
        "n_vocab": 256,
        "context_length": 4096,
        "sliding_window": None,
        "sliding_window_pattern": None,
        "split": None,
        "tied_output": False,
        "n_tensors": 27,
        "layer_tensors": [
            *("attn_k.bias", "attn_k.weight", "attn_norm.weight", "attn_output.weight", "attn_q.bias"),
            *("attn_q.weight", "attn_v.bias", "attn_v.weight"),
            *("ffn_down.weight", "ffn_gate.weight", "ffn_norm.weight", "ffn_up.weight"),
        ],
        "size_bytes": small.stat().st_size,
        "tensor_bytes": {
            "total": 2 * layer + 2 * embedding + f32 * 64,
            "token_embd": embedding,
            "output": embedding + f32 * 64,
            "per_layer": [layer, layer],
        },
    }


def test_facts_that_only_some_models_have(tmp_path: Path) -> None:
    def extra(writer: Any) -> None:
        writer.add_array("llama.attention.sliding_window_pattern", [True, False])

    path = gguf_files.write_model(
        tmp_path / "odd.gguf",
        architecture="llama",
        n_head_kv=[4, 2],
        head_dim=32,
        sliding_window=512,
        tied=True,
        extra=extra,
    )
    facts = gguf.inspect(str(path))
    assert facts["n_head_kv"] == [4, 2]
    assert (facts["head_dim_k"], facts["head_dim_v"]) == (32, 32)
    assert (facts["sliding_window"], facts["sliding_window_pattern"]) == (512, [True, False])
    assert facts["tied_output"] is True
    assert gguf.facts_fault(facts) is None


def test_an_architecture_of_one_head_count_for_all_has_a_number(tmp_path: Path) -> None:
    path = gguf_files.write_model(tmp_path / "even.gguf", n_head_kv=[2, 2])
    assert gguf.inspect(str(path))["n_head_kv"] == 2


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (gguf_files.write_qwen25_14b_q8_0, "strand-rust-coder-14b-q8_0"),
        (gguf_files.write_qwen25_72b_q4_k_m, "or1-behemoth-72b-q4_k_m"),
    ],
)
def test_recorded_facts_of_beefcake2_follow_from_the_published_shapes(
    tmp_path: Path, write: Callable[[Path], Path], name: str
) -> None:
    path = write(tmp_path / f"{name}.gguf")
    recorded = (ROOT / f"inventories/beefcake2/models/{name}.json").read_text()
    assert gguf.render(gguf.check_file(path, json.loads(recorded))) == recorded


@pytest.mark.parametrize("path", sorted((ROOT / "inventories").glob("*/models/*.json")), ids=lambda path: path.stem)
def test_recorded_facts_are_whole(path: Path) -> None:
    assert gguf.facts_fault(json.loads(path.read_text())) is None


PACKAGE_TYPES = {int(kind) for kind in gguf_package.GGML_QUANT_SIZES}


@pytest.mark.parametrize("kind", sorted(PACKAGE_TYPES))
def test_block_sizes_are_those_of_the_gguf_package(kind: int) -> None:
    block = gguf.GGML_TYPES[kind]
    package = gguf_package.GGMLQuantizationType(kind)
    assert block.name == package.name
    # The package counts a Q8_1 block's two halves as floats; ggml-common.h has 2 + 2 + 32 bytes.
    expected = (32, 36) if block.name == "Q8_1" else gguf_package.GGML_QUANT_SIZES[package]
    assert (block.elements, block.size) == expected


def test_q2_0_which_the_package_lacks_is_64_elements_in_18_bytes() -> None:
    assert {kind: gguf.GGML_TYPES[kind] for kind in gguf.GGML_TYPES.keys() - PACKAGE_TYPES} == {42: ("Q2_0", 64, 18)}


def test_truncated_data_is_refused(tmp_path: Path, small: Path) -> None:
    path = spoiled(small, tmp_path, lambda content: content.__delitem__(slice(-200, None)))
    gguf.inspect(str(path))
    with pytest.raises(ValueError, match=r"'output\.weight' ends at byte .* truncated"):
        gguf.check_file(path)


def test_another_models_facts_are_refused_with_the_first_difference(small: Path) -> None:
    facts = {**gguf.inspect(str(small)), "n_layers": 3}
    with pytest.raises(ValueError, match="its header says n_layers = 2, the recorded facts say 3; record them"):
        gguf.check_file(small, facts)


@pytest.mark.parametrize("keep", [0, 3, 4, 12, 23, 24, 40, 1000, 3000])
def test_a_cut_header_is_refused(tmp_path: Path, small: Path, keep: int) -> None:
    path = spoiled(small, tmp_path, lambda content: content.__delitem__(slice(keep, None)))
    with pytest.raises(ValueError, match="truncated"):
        gguf.inspect(str(path))


def put(at: int, fmt: str, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(fmt, content, at, value)


def put_before(mark: bytes, back: int, fmt: str, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(fmt, content, content.index(mark) - back, value)


def put_after(mark: bytes, on: int, fmt: str, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(fmt, content, content.index(mark) + len(mark) + on, value)


TENSOR = b"blk.0.attn_q.weight"
TOKENS = b"tokenizer.ggml.tokens"

HOSTILE: list[tuple[str, Callable[[bytearray], None], str]] = [
    ("magic", put(0, "<I", 0), "not a GGUF file"),
    ("version 1", put(4, "<I", 1), "GGUF version 1; wanted 2 or 3"),
    ("version 4", put(4, "<I", 4), "GGUF version 4; wanted 2 or 3"),
    ("big endian", put(4, ">I", 3), "big-endian"),
    ("tensor count", put(8, "<Q", 2**60), "tensors; wanted at most"),
    ("more tensors than there are", put(8, "<Q", 60000), "tensor"),
    ("key count", put(16, "<Q", 2**63), "metadata keys; wanted at most"),
    ("key length", put(24, "<Q", 2**40), "metadata key 0 is .* bytes long"),
    ("key not UTF-8", put(32, "<B", 0xFF), "metadata key 0 is not UTF-8"),
    ("string length", put_after(b"general.name", 4, "<Q", 2**50), "truncated"),
    ("value type", put_after(b"general.name", 0, "<I", 77), "value type 77"),
    ("array length", put_after(TOKENS, 8, "<Q", 2**60), "strings; wanted at most"),
    ("array of arrays", put_after(TOKENS, 4, "<I", 9), "array of value type 9"),
    ("string in an array", put_after(TOKENS, 16, "<Q", 2**62), "truncated"),
    ("layers", put_after(b"qwen2.block_count", 4, "<I", 5000), "5000 layers; wanted at most"),
    ("fewer layers than tensors", put_after(b"qwen2.block_count", 4, "<I", 1), "none of the 1 layers"),
    ("wrong type of a key", put_after(b"qwen2.block_count", 0, "<I", 6), "wanted a whole number"),
    ("tensor name length", put_before(TENSOR, 8, "<Q", 64), "bytes long; wanted at most 63"),
    ("dimensions", put_after(TENSOR, 0, "<I", 5), "5 dimensions"),
    ("empty shape", put_after(TENSOR, 4, "<Q", 0), "impossible shape"),
    ("huge shape", put_after(TENSOR, 4, "<Q", 2**62), "impossible shape"),
    ("tensor type", put_after(TENSOR, 20, "<I", 4), "ggml type 4"),
    ("rows of part of a block", put_after(TENSOR, 20, "<I", 12), "Q4_K wants a multiple of 256"),
    ("offset", put_after(TENSOR, 24, "<Q", 2**63), "lies at offset"),
]


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_header_is_one_clear_error(
    tmp_path: Path, small: Path, change: Callable[[bytearray], None], words: str
) -> None:
    path = spoiled(small, tmp_path, change)
    assert claims.claim(path) is None
    with pytest.raises(ValueError, match=words):
        gguf.inspect(str(path))


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (b"qwen2.block_count", b"general.file_type", "metadata key 'qwen2.block_count'"),
        (b"blk.0.attn_q.weight", b"blk.1.attn_q.weight", "tensor 'blk.0.attn_q.weight'"),
    ],
)
def test_what_appears_twice_is_refused(tmp_path: Path, small: Path, first: bytes, second: bytes, what: str) -> None:
    def repeat(content: bytearray) -> None:
        at = content.index(second)
        content[at : at + len(second)] = first

    with pytest.raises(ValueError, match=f"{what} appears twice"):
        gguf.inspect(str(spoiled(small, tmp_path, repeat)))


@given(st.binary(max_size=200))
@settings(deadline=1000)
def test_garbage_is_a_value_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.gguf"
    for start in (b"", b"GGUF\x03\0\0\0"):
        path.write_bytes(start + content)
        with pytest.raises(ValueError, match=r"garbage\.gguf: "):
            gguf.check_file(path)


@given(changes=st.lists(st.tuples(st.integers(0, 6000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
@settings(deadline=2000, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_a_value_error_or_facts(
    tmp_path_factory: pytest.TempPathFactory, small: Path, changes: list[tuple[int, bytes]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    content = bytearray(small.read_bytes())
    for at, patch in changes:
        content[at : at + len(patch)] = patch
    path.write_bytes(content)
    refusal = f"{path}: "
    try:
        json.dumps(gguf.check_file(path))
    except ValueError as error:
        refusal = str(error)
    assert refusal.startswith(f"{path}: ")


def test_memory_stays_bounded_whatever_the_header_claims(tmp_path: Path) -> None:
    path = tmp_path / "wide.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = b"tokenizer.ggml.scores"
    head += struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 6, 2**24)
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(len(head) + 4 * 2**24)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"general\.architecture"):
        gguf.inspect(str(path))
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def header(tensors: int, *pairs: tuple[bytes, bytes]) -> bytes:
    """A header up to its tensor table, of keys and their encoded values."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs)) + b"".join(text(key) + value for key, value in pairs)


def numbered(count: int, value: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"key-%d" % number, value) for number in range(count)]


STRINGS = struct.pack("<IIQ", 9, 8, gguf.MAX_ARRAY_STRINGS) + bytes(8 * gguf.MAX_ARRAY_STRINGS)
NUMBERS = struct.pack("<IIQ", 9, 11, 1024) + struct.pack("<q", 2**40) * 1024
EMOJI = struct.pack("<I", 8) + text("\N{GRINNING FACE}".encode() * 1024)
ONE = struct.pack("<IB", 0, 1)
LONG_KEYS = [(b"%0900d" % number + "\N{GRINNING FACE}".encode(), ONE) for number in range(1200)]
TENSORS = b"".join(
    text(b"%060d" % number) + struct.pack("<I4QIQ", 4, 1, 1, 1, 8, 0, 32 * number) for number in range(gguf.MAX_TENSORS)
)


LARGE = {
    "strings": (header(0, (b"a", STRINGS)), "general.architecture"),
    "strings twice": (header(0, (b"a", STRINGS), (b"b", STRINGS[:16])), "'b' has 2097152 strings; wanted at most"),
    "numbers": (header(0, *numbered(200, NUMBERS)), "metadata of more than 1048576 bytes"),
    "long strings": (header(0, *numbered(1100, EMOJI)), "metadata of more than 1048576 bytes"),
    "long keys": (header(0, *LONG_KEYS), "metadata of more than 1048576 bytes"),
    "tensors": (header(gguf.MAX_TENSORS) + TENSORS, "general.architecture"),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_largest_headers_take_little_time(tmp_path: Path, name: str) -> None:
    content, words = LARGE[name]
    path = tmp_path / "large.gguf"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=words):
        gguf.inspect(str(path))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", ["numbers", "long strings", "long keys", "tensors"])
def test_the_largest_headers_take_little_memory(tmp_path: Path, name: str) -> None:
    content, words = LARGE[name]
    path = tmp_path / "large.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=words):
        gguf.inspect(str(path))
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()


def test_the_parts_of_a_model_share_its_bounds(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf._Budget, "__init__", lambda budget: budget.__dict__.update(BUDGET))
    with pytest.raises(ValueError, match=r"00003-of-00003\.gguf: 7 tensors; wanted at most 65536 in all"):
        gguf.inspect(str(parts[0]))


BUDGET = {"header_bytes": 2**20, "kept_bytes": 2**20, "strings": 1000, "tensors": 26}


def test_strings_across_the_edge_of_a_window_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [b"x" * (number % 37) for number in range(300)]
    array = struct.pack("<IIQ", 9, 8, len(words)) + b"".join(text(word) for word in words)
    path = tmp_path / "edge.gguf"
    path.write_bytes(header(0, (b"tokens", array), (b"after", ONE)))
    for window_bytes in range(1, 80):
        monkeypatch.setattr(gguf, "WINDOW_BYTES", window_bytes)
        assert gguf.read_header(str(path)).metadata == {"tokens": (300, None), "after": 1}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated"):
        gguf.read_header(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put_after(b"qwen2.block_count", 4, "<I", 0), "0 layers; wanted at most 512, and at least one"),
        (put(4, "<I", 0), "GGUF version 0; wanted 2 or 3"),
        (put_after(b"general.architecture", 4, "<Q", 2**20), "truncated"),
    ],
)
def test_what_no_model_can_be_has_no_facts(
    tmp_path: Path, small: Path, change: Callable[[bytearray], None], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        gguf.inspect(str(spoiled(small, tmp_path, change)))


def test_a_number_beyond_json_and_sense_has_no_facts(tmp_path: Path) -> None:
    def extra(writer: Any) -> None:
        writer.add_uint64("qwen2.attention.sliding_window", 2**63)

    path = gguf_files.write_model(tmp_path / "odd.gguf", extra=extra)
    with pytest.raises(ValueError, match="sliding_window' is 9223372036854775808; wanted a whole number"):
        gguf.inspect(str(path))


@pytest.mark.parametrize("pattern", [["a", "b"], [1.5, 0.0], -3])
def test_a_strange_window_pattern_is_never_half_a_fact(tmp_path: Path, pattern: object) -> None:
    def extra(writer: Any) -> None:
        key = "qwen2.attention.sliding_window_pattern"
        writer.add_int32(key, pattern) if isinstance(pattern, int) else writer.add_array(key, pattern)

    path = gguf_files.write_model(tmp_path / "odd.gguf", extra=extra)
    if pattern == -3:
        with pytest.raises(ValueError, match="sliding_window_pattern is -3"):
            gguf.inspect(str(path))
    else:
        assert gguf.facts_fault(gguf.inspect(str(path))) is None


def test_an_error_is_one_short_line(tmp_path: Path) -> None:
    def extra(writer: Any) -> None:
        writer.add_array("qwen2.attention.head_count", list(range(1000)))

    path = gguf_files.write_model(tmp_path / "long.gguf", extra=extra)
    with pytest.raises(ValueError, match="wanted 2 whole numbers") as caught:
        gguf.inspect(str(path))
    assert len(str(caught.value)) < len(str(path)) + 200


def test_a_file_url_is_decoded_as_staging_does(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "a model %.gguf"
    path.write_bytes(small.read_bytes())
    assert gguf.inspect(path.as_uri()) == gguf.inspect(str(small))


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    with pytest.raises(ValueError, match="not a regular file"):
        gguf.inspect(str(tmp_path / "fifo.gguf"))


@pytest.mark.parametrize("source", ["ftp://host/x.gguf", "http://host/x.gguf", "file://host/x.gguf"])
def test_other_schemes_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"wanted a path, file:///… or https://…"):
        gguf.inspect(source)


def test_missing_files_and_folders_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        gguf.inspect(str(tmp_path / "none.gguf"))
    with pytest.raises(ValueError, match="directory"):
        gguf.inspect(str(tmp_path))
    with pytest.raises(ValueError, match="not a regular file"):
        gguf.inspect("/dev/null")


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A split model of three parts, ten tensors each but for the last."""
    gguf_files.write_model(tmp_path / "parts.gguf", part_tensors=10)
    found = sorted(tmp_path.glob("parts-*.gguf"))
    assert [path.name for path in found] == [f"parts-0000{no}-of-00003.gguf" for no in (1, 2, 3)]
    return found


def test_facts_of_a_split_model_are_those_of_the_whole(parts: list[Path], small: Path) -> None:
    whole = gguf.inspect(str(small))
    facts = gguf.check_file(parts[0])
    assert facts == gguf.inspect(parts[0].as_uri())
    assert facts == {
        **whole,
        "split": {"count": 3, "no": 0},
        "size_bytes": sum(path.stat().st_size for path in parts),
    }
    assert facts["n_tensors"] == 27


def test_only_the_first_part_of_a_split_model_has_facts(parts: list[Path]) -> None:
    with pytest.raises(ValueError, match="this is part 2 of 3: inspect the first part"):
        gguf.inspect(str(parts[1]))


def test_a_model_of_one_part_is_not_split(tmp_path: Path) -> None:
    assert gguf.inspect(str(gguf_files.write_model(tmp_path / "one.gguf", split=(0, 1))))["split"] is None


def swap_with_the_third(parts: list[Path]) -> None:
    (parts[2].parent / "other").write_bytes(parts[1].read_bytes())
    parts[1].write_bytes(parts[2].read_bytes())


def of_another_count(parts: list[Path]) -> None:
    change = put_after(b"split.count", 4, "<H", 4)
    content = bytearray(parts[1].read_bytes())
    change(content)
    parts[1].write_bytes(content)


def twice_the_same_tensor(parts: list[Path]) -> None:
    content = parts[0].read_bytes()
    names = re.findall(rb"blk\.0\.\w+\.weight", content)
    second = parts[1].read_bytes()
    assert b"blk.1.attn_q.weight" in second
    assert b"blk.0.attn_q.weight" in names
    parts[1].write_bytes(second.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))


def fewer_tensors(parts: list[Path]) -> None:
    content = parts[0].read_bytes()
    at = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    parts[0].write_bytes(content[:at] + struct.pack("<i", 28) + content[at + 4 :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts[2].unlink(), r"parts-00003-of-00003\.gguf: No such file"),
        (lambda parts: parts[2].write_bytes(b"GGUF"), r"parts-00003-of-00003\.gguf: .*truncated"),
        (
            lambda parts: os.truncate(parts[1], parts[1].stat().st_size - 200),
            r"00002-of-00003\.gguf: tensor .*truncated",
        ),
        (swap_with_the_third, "part 2 of 3 is not that part"),
        (of_another_count, "part 2 of 3 is not that part"),
        (twice_the_same_tensor, "tensor 'blk.0.attn_q.weight' is in two parts"),
        (fewer_tensors, "27 tensors in 3 parts; the first part wants 28"),
    ],
)
def test_a_split_model_with_a_bad_part_is_refused(
    parts: list[Path], change: Callable[[list[Path]], object], words: str
) -> None:
    change(parts)
    with pytest.raises(ValueError, match=words):
        gguf.check_file(parts[0])


def test_parts_lie_beside_the_first() -> None:
    assert gguf.part_sources("/a/b-00001-of-00002.gguf", 2) == ["/a/b-00001-of-00002.gguf", "/a/b-00002-of-00002.gguf"]
    url = "https://host/m-00001-of-00002.gguf?download=true"
    assert gguf.part_sources(url, 2)[1] == "https://host/m-00002-of-00002.gguf?download=true"


@pytest.mark.parametrize(
    ("source", "count", "words"),
    [
        ("/a/b.gguf", 2, r"it is not called …-00001-of-00002\.gguf"),
        ("/a/b-00001-of-00003.gguf", 2, "it is not called"),
        ("/a/b-00002-of-00002.gguf", 2, "it is not called"),
        ("/a/b-00001-of-60000.gguf", 60000, "a model of 60000 parts; wanted at most 512"),
    ],
)
def test_parts_of_another_name_are_not_found(source: str, count: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gguf.part_sources(source, count)


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gguf.add_arguments(parser)
    return parser.parse_args(words)


def test_inspect_prints_the_facts(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gguf.run(parsed("inspect", str(small))) == 0
    assert json.loads(capsys.readouterr().out) == gguf.inspect(str(small))


def test_inspect_writes_the_facts_and_nothing_on_error(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "facts.json"
    assert gguf.run(parsed("inspect", f"file://{small}", "--output", str(output))) == 0
    assert json.loads(output.read_text()) == gguf.inspect(str(small))
    assert gguf.run(parsed("inspect", str(tmp_path / "none"), "--output", str(output))) == 1
    assert "No such file" in capsys.readouterr().err
    assert json.loads(output.read_text()) == gguf.inspect(str(small))
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
    assert gguf.run(parsed("inspect", str(small), "--output", str(tmp_path / "no/facts.json"))) == 1
    assert "No such file" in capsys.readouterr().err
