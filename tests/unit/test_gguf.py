"""GGUF headers: facts from real files, and one clear error for anything else."""

from __future__ import annotations

import argparse
import http.server
import json
import socket
import ssl
import struct
import subprocess
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf as gguf_package
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gleaner import gguf
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
    start = time.monotonic()
    with pytest.raises(ValueError, match=words) as caught:
        gguf.inspect(str(path))
    assert time.monotonic() - start < 1
    assert str(caught.value).startswith(f"{path}: ")


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


def test_only_the_first_part_of_a_split_model_has_facts(tmp_path: Path) -> None:
    first = gguf_files.write_model(tmp_path / "first.gguf", split=(0, 2))
    assert gguf.inspect(str(first))["split"] == {"count": 2, "no": 0}
    second = gguf_files.write_model(tmp_path / "second.gguf", split=(1, 2))
    with pytest.raises(ValueError, match="this is part 2 of 2: inspect the first part"):
        gguf.inspect(str(second))


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves byte ranges of one file; at /whole.gguf ignores them; at /away redirects to http."""

    content = b""
    served = 0

    def do_GET(self) -> None:
        content = type(self).content
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/model.gguf")
            self.end_headers()
            return
        if self.path == "/whole.gguf":
            self.send_response(200)
            self.end_headers()
            return
        if self.path != "/model.gguf":
            self.send_error(404)
            return
        first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)
        type(self).served += len(part)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def https(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The base URL of an https server with the small model, its certificate trusted."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Ranges.content = small.read_bytes() + bytes(8 * 2**20)
    Ranges.served = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://localhost:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_is_read_by_ranges_and_not_beyond_the_header(https: str, small: Path) -> None:
    facts = gguf.inspect(f"{https}/model.gguf")
    assert facts["size_bytes"] == small.stat().st_size + 8 * 2**20
    assert {**facts, "size_bytes": 0} == {**gguf.inspect(str(small)), "size_bytes": 0}
    assert Ranges.served <= gguf.WINDOW_BYTES


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.gguf", "Not Found"),
        ("whole.gguf", "does not serve byte ranges"),
        ("away", "redirects to 'http://127.0.0.1:9/model.gguf'; wanted https://"),
    ],
)
def test_a_url_that_cannot_be_read_is_a_value_error(https: str, path: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gguf.inspect(f"{https}/{path}")


def test_a_server_that_is_not_there_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="refused"):
            gguf.inspect(f"https://127.0.0.1:{taken.getsockname()[1]}/x.gguf")


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
