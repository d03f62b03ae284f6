"""GGUF headers: the facts that planning needs, read from metadata and tensor table alone.

A header is foreign data: each length is checked against the file's size and a bound before it is used, long
values are skipped rather than kept, the bounds hold for all parts of a split model together, and everything
that is wrong is one ``ValueError`` of one line. So is a server: what it sends has to be what was asked for, in time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import socket
import ssl
import stat
import struct
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union

FACTS_VERSION = 1

MAX_HEADER_BYTES = 128 * 2**20
MAX_KEYS = 8192
# GGUF allows 65535; those in use are shorter than a hundred.
MAX_KEY_BYTES = 1024
MAX_TENSORS = 65536
MAX_TENSOR_NAME_BYTES = 63
MAX_KEPT_STRING_BYTES = 4096
MAX_KEPT_ARRAY = 1024
# Keys, and the values of them that are kept.
MAX_KEPT_BYTES = 2**20
# The largest vocabularies have about 260,000 tokens and 520,000 merges.
MAX_ARRAY_STRINGS = 2**21
# LLAMA_MAX_LAYERS (src/llama-hparams.h).
MAX_LAYERS = 512
# Different names in the layers of one model; with tensors for each expert there are some hundred.
MAX_LAYER_TENSORS = 4096
MAX_PARTS = 512
WINDOW_BYTES = 2**20
# For a connection, and for each time that something is read from it.
HTTP_TIMEOUT_SECONDS = 30
# For all parts of a model.
HTTP_TOTAL_SECONDS = 600
# Beside the range that one request asks for: headers, also those of redirects.
HTTP_EXTRA_BYTES = 2**18


class BlockType(NamedTuple):
    """A ggml type: its name, elements per block, bytes per block (ggml/src/ggml-common.h)."""

    name: str
    elements: int
    size: int


GGML_TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 36),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
    42: BlockType("Q2_0", 64, 18),
}

_STRING, _ARRAY = 8, 9
# Metadata value types of fixed size: struct format of each.
_SCALARS: Mapping[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_LAYER = re.compile(r"blk\.([0-9]+)\.")
_LAYER_TENSOR = re.compile(r"[A-Za-z0-9_.-]{1,63}")
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
# llama_split_path (src/llama.cpp); a URL may have a query after it.
_FIRST_PART = re.compile(r"(.+)-00001-of-([0-9]{5})\.gguf(\?.*)?", re.DOTALL)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")

Value = Union[int, float, bool, str, "Kept"]


class Kept(NamedTuple):
    """What is kept of an array: its length, and its numbers when they are few."""

    length: int
    numbers: tuple[int | float | bool, ...] | None


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    size: int


class Header(NamedTuple):
    size_bytes: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_start: int


def _show(value: object) -> str:
    """A foreign value in a message: printable, short, one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


@dataclass
class _Budget:
    """What the header of a model may still take, of all its parts together."""

    header_bytes: int = MAX_HEADER_BYTES
    kept_bytes: int = MAX_KEPT_BYTES
    strings: int = MAX_ARRAY_STRINGS
    tensors: int = MAX_TENSORS
    deadline: float = field(default_factory=lambda: time.monotonic() + HTTP_TOTAL_SECONDS)


class _Window:
    """Reads forward through a source of known size, holding one window of it in memory."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes], limit: int) -> None:
        self.size = size
        self._fetch = fetch
        self._limit = min(size, limit)
        self._start = 0
        self._bytes = b""
        self._at = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    def _need(self, count: int, what: str) -> None:
        if self.position + count > self.size:
            raise ValueError(
                f"{what} at byte {self.position} takes {count} bytes of {self.size}: the file is truncated"
            )
        if self.position + count > self._limit:
            raise ValueError(f"{what} ends beyond the first {self._limit} bytes: no header is that long")

    def take(self, count: int, what: str) -> bytes:
        self._need(count, what)
        if self._at + count > len(self._bytes):
            self._start, self._at = self.position, 0
            wanted = min(max(count, WINDOW_BYTES), self._limit - self._start)
            self._bytes = self._fetch(self._start, wanted)
            if len(self._bytes) != wanted:
                raise ValueError(f"read {len(self._bytes)} of {wanted} bytes at byte {self._start}")
        taken = self._bytes[self._at : self._at + count]
        self._at += count
        return taken

    def skip(self, count: int, what: str) -> None:
        self._need(count, what)
        if self._at + count <= len(self._bytes):
            self._at += count
        else:
            self._start, self._at, self._bytes = self.position + count, 0, b""

    def skip_strings(self, count: int, what: str) -> None:
        window, at = self._bytes, self._at
        while count:
            count -= 1
            # The lengths of a vocabulary are most of a header: those inside the window are read without a call.
            if at + 8 <= len(window):
                end = at + 8 + _U64.unpack_from(window, at)[0]
                if end <= len(window):
                    at = end
                    continue
            self._at = at
            self.skip(self.u64(what), what)
            window, at = self._bytes, self._at
        self._at = at

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])


def _text(window: _Window, limit: int, what: str) -> str:
    length = window.u64(f"the length of {what}")
    if length > limit:
        raise ValueError(f"{what} is {length} bytes long; wanted at most {limit}")
    try:
        return window.take(length, what).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8") from None


def _string(window: _Window, what: str) -> str:
    """A string value; one that is too long to be a name (a chat template) is skipped and stands as ''."""
    length = window.u64(f"the length of {what}")
    if length > MAX_KEPT_STRING_BYTES:
        window.skip(length, what)
        return ""
    return window.take(length, what).decode(errors="replace")


def _array(window: _Window, budget: _Budget, what: str) -> Kept:
    kind = window.u32(f"the element type of {what}")
    length = window.u64(f"the length of {what}")
    if kind == _STRING:
        if length > budget.strings:
            raise ValueError(f"{what} has {length} strings; wanted at most {MAX_ARRAY_STRINGS} in all")
        budget.strings -= length
        window.skip_strings(length, what)
        return Kept(length, None)
    scalar = _SCALARS.get(kind)
    if scalar is None:
        raise ValueError(f"{what} is an array of value type {kind}; wanted numbers or strings")
    if length > MAX_KEPT_ARRAY:
        window.skip(length * scalar.size, what)
        return Kept(length, None)
    numbers = scalar.iter_unpack(window.take(length * scalar.size, what)) if length else iter(())
    return Kept(length, tuple(number for (number,) in numbers))


def _value(window: _Window, budget: _Budget, key: str) -> Value:
    what = f"the value of {_show(key)}"
    kind = window.u32(f"the type of {_show(key)}")
    if kind == _STRING:
        return _string(window, what)
    if kind == _ARRAY:
        return _array(window, budget, what)
    scalar = _SCALARS.get(kind)
    if scalar is None:
        raise ValueError(f"{what} has value type {kind}, which GGUF does not know")
    number: int | float | bool = scalar.unpack(window.take(scalar.size, what))[0]
    return number


def _kept_bytes(value: Value) -> int:
    if isinstance(value, Kept):
        return 8 * len(value.numbers or ())
    return len(value) if isinstance(value, str) else 8


def _tensor(window: _Window, index: int) -> Tensor:
    name = _text(window, MAX_TENSOR_NAME_BYTES, f"the name of tensor {index}")
    dimensions = window.u32(f"the dimension count of tensor {index}")
    if dimensions > 4:
        raise ValueError(f"tensor {_show(name)} has {dimensions} dimensions; wanted at most 4")
    rest = window.take(8 * dimensions + 12, f"the shape of tensor {index}")
    *shape, kind, offset = struct.unpack(f"<{dimensions}QIQ", rest)
    block = GGML_TYPES.get(kind)
    if block is None:
        raise ValueError(f"tensor {_show(name)} has ggml type {kind}, which this version of gleaner does not know")
    elements = 1
    for extent in shape:
        elements *= extent
        if not 0 < elements < 2**63:
            raise ValueError(f"tensor {_show(name)} has the impossible shape {shape}")
    row = shape[0] if shape else 1
    if row % block.elements:
        raise ValueError(
            f"tensor {_show(name)} has rows of {row} elements; {block.name} wants a multiple of {block.elements}"
        )
    return Tensor(name, tuple(shape), block, offset, elements // block.elements * block.size)


def _pad(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _parse(window: _Window, budget: _Budget) -> Header:
    magic = window.take(4, "the magic")
    if magic != b"GGUF":
        raise ValueError(f"not a GGUF file: it starts with {magic!r}, wanted b'GGUF'")
    version = window.u32("the version")
    if version and version & 0xFFFF == 0:
        raise ValueError("a big-endian GGUF file: convert it to little-endian")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}; wanted 2 or 3")
    tensor_count = window.u64("the tensor count")
    key_count = window.u64("the key count")
    if tensor_count > budget.tensors:
        raise ValueError(f"{tensor_count} tensors; wanted at most {MAX_TENSORS} in all")
    budget.tensors -= tensor_count
    if key_count > MAX_KEYS:
        raise ValueError(f"{key_count} metadata keys; wanted at most {MAX_KEYS}")

    metadata: dict[str, Value] = {}
    for index in range(key_count):
        key = _text(window, MAX_KEY_BYTES, f"metadata key {index}")
        if key in metadata:
            raise ValueError(f"metadata key {_show(key)} appears twice")
        metadata[key] = _value(window, budget, key)
        budget.kept_bytes -= len(key) + _kept_bytes(metadata[key])
        if budget.kept_bytes < 0:
            raise ValueError(f"metadata of more than {MAX_KEPT_BYTES} bytes besides long values: no model has that")

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {_show(alignment)}; wanted a power of two up to {2**20}")

    tensors: list[Tensor] = []
    names: set[str] = set()
    expected = 0
    for index in range(tensor_count):
        tensor = _tensor(window, index)
        if tensor.name in names:
            raise ValueError(f"tensor {_show(tensor.name)} appears twice")
        # llama.cpp refuses gaps and overlaps in the same way.
        if tensor.offset != expected:
            raise ValueError(f"tensor {_show(tensor.name)} lies at offset {tensor.offset}; wanted {expected}")
        names.add(tensor.name)
        tensors.append(tensor)
        expected = _pad(tensor.offset + tensor.size, alignment)
    budget.header_bytes -= window.position
    return Header(window.size, metadata, tuple(tensors), _pad(window.position, alignment))


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects within https only."""

    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        # It would be read to its end.
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.startswith("https://"):
            raise ValueError(f"it redirects to {_show(newurl)}; wanted https://")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Url:
    """A file on an https server, of which ranges are read.

    Whatever the server does, it ends: all that it sends, answers, headers and bodies that nobody wants, comes
    through a socket that counts bytes and looks at the clock.
    """

    def __init__(self, url: str, deadline: float) -> None:
        self.url = url
        self.size: int | None = None
        self._deadline = deadline
        self._bytes_left = 0
        context = ssl.create_default_context()
        context.sslsocket_class = self._socket_class()
        self._opener = urllib.request.build_opener(_NoDowngrade(), urllib.request.HTTPSHandler(context=context))

    def _socket_class(self) -> type[ssl.SSLSocket]:
        url = self

        class Bounded(ssl.SSLSocket):
            def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
                self.settimeout(url._timeout())
                count = super().recv_into(buffer, nbytes, flags)
                url._bytes_left -= count
                if url._bytes_left < 0:
                    raise OSError("the server sends more than was asked for")
                return count

        return Bounded

    def _timeout(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return min(left, HTTP_TIMEOUT_SECONDS)

    def fetch(self, start: int, count: int) -> bytes:
        """``count`` bytes from ``start``, fewer at the end of the file."""
        self._bytes_left = count + HTTP_EXTRA_BYTES
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{start + count - 1}"})
        try:
            with self._opener.open(request, timeout=self._timeout()) as answer:
                wanted = min(count, self._size(answer, start, count) - start)
                content: bytes = answer.read(wanted + 1)
        except (urllib.error.URLError, OSError, OverflowError, http.client.HTTPException) as error:
            raise _trouble(error) from error
        if len(content) != wanted:
            got = len(content) if len(content) < wanted else "more"
            raise ValueError(f"asked for {wanted} bytes at byte {start}, the server sent {got}")
        return content

    def _size(self, answer: Any, start: int, count: int) -> int:
        """The size of the file, once the answer to a request is for the range that was asked for."""
        given = answer.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(given)
        if answer.status != 206 or match is None:
            raise ValueError(
                f"the server does not serve byte ranges (HTTP {answer.status}, Content-Range {_show(given)})"
            )
        first, last, size = (int(number) for number in match.groups())
        if self.size not in (None, size):
            raise ValueError(f"the file had {self.size} bytes and now has {size}: it changes while it is read")
        if first != start or last != min(start + count, size) - 1:
            raise ValueError(f"asked for {count} bytes at byte {start}, the server answers with {given}")
        self.size = size
        return size


def _trouble(error: Exception) -> ValueError:
    """What went wrong between us and a server, in one line; words of the server may be among its own."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
    reason = getattr(error, "reason", error)
    # They are one from Python 3.10 on.
    if isinstance(reason, (TimeoutError, socket.timeout)):
        return ValueError(
            f"the server is too slow; wanted each answer within {HTTP_TIMEOUT_SECONDS} s, "
            f"all of them within {HTTP_TOTAL_SECONDS} s"
        )
    if isinstance(reason, OverflowError):
        return ValueError("the URL, or one that the server redirects to, has a port beyond all ports")
    words = " ".join(str(reason).split()) or type(reason).__name__
    return ValueError(words if words.isprintable() and len(words) <= 200 else _show(words))


def _read_url(url: str, budget: _Budget) -> Header:
    file = _Url(url, budget.deadline)
    first = file.fetch(0, WINDOW_BYTES)
    assert file.size is not None

    def fetch(start: int, count: int) -> bytes:
        if start + count <= len(first):
            return first[start : start + count]
        return file.fetch(start, count)

    return _parse(_Window(file.size, fetch, budget.header_bytes), budget)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _read_file(path: Path, budget: _Budget) -> Header:
    try:
        # Opening a FIFO would wait for its writer.
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a regular file")

            def fetch(start: int, count: int) -> bytes:
                file.seek(start)
                return file.read(count)

            return _parse(_Window(status.st_size, fetch, budget.header_bytes), budget)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def _read(source: str, budget: _Budget) -> Header:
    try:
        if source.startswith("https://"):
            return _read_url(source, budget)
        if source.startswith("file:///"):
            return _read_file(Path(urllib.parse.unquote(urllib.parse.urlsplit(source).path)), budget)
        if "://" in source:
            raise ValueError("wanted a path, file:///… or https://…")
        return _read_file(Path(source), budget)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def read_header(source: str) -> Header:
    """Metadata and tensor table of a GGUF file, from a path, a ``file:///`` or an ``https://`` URL.

    Raises ValueError, naming the source, for all but a sound little-endian GGUF header of version 2 or 3.
    """
    return _read(source, _Budget())


def part_sources(source: str, count: int) -> list[str]:
    """Where the parts of a split model lie, from the path or URL of the first of ``count`` (src/llama.cpp).

    Raises ValueError when the first part is not called as llama.cpp calls it.
    """
    name = _FIRST_PART.fullmatch(source)
    if name is None or int(name.group(2)) != count:
        raise ValueError(
            f"this is part 1 of {count}, but it is not called …-00001-of-{count:05d}.gguf: "
            "llama.cpp would not find the other parts either"
        )
    if count > MAX_PARTS:
        raise ValueError(f"a model of {count} parts; wanted at most {MAX_PARTS}")
    return [f"{name.group(1)}-{no:05d}-of-{count:05d}.gguf{name.group(3) or ''}" for no in range(1, count + 1)]


def _read_model(source: str) -> list[tuple[str, Header]]:
    """The header of a model, or of each part of a split one, with the source of each."""
    budget = _Budget()
    first = _read(source, budget)
    try:
        count = _parts(first)
        others = part_sources(source, count)[1:] if count > 1 else []
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return [(source, first), *((part, _read(part, budget)) for part in others)]


def _whole(header: Header, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int or not 0 <= value < 2**63:
        got = "missing" if value is None else _show(value)
        raise ValueError(f"metadata {key!r} is {got}; wanted a whole number")
    return value


def _parts(first: Header) -> int:
    """How many parts a model has whose first part has this header; 1 when it is not split."""
    count = _whole(first, "split.count", 1)
    if count <= 1:
        return 1
    no = _whole(first, "split.no")
    if no:
        raise ValueError(f"this is part {no + 1} of {count}: inspect the first part")
    return count


def _whole_or_list(header: Header, key: str, layers: int, default: int | list[int] | None = None) -> Any:
    value = header.metadata.get(key, default)
    if isinstance(value, Kept) and value.numbers is not None:
        value = list(value.numbers)  # type: ignore[arg-type]  # the next test checks each element
    if isinstance(value, list):
        if len(value) != layers or any(type(number) is not int or number < 0 for number in value):
            raise ValueError(f"metadata {key!r} is {_show(value)}; wanted {layers} whole numbers")
        return value[0] if value and len(set(value)) == 1 else value
    return _whole(header, key, default if isinstance(default, int) else None)


def _tensors(headers: Sequence[Header]) -> list[Tensor]:
    """The tensors of all parts of a model, once the parts are all there and of one model (as far as they tell)."""
    count = _parts(headers[0])
    if len(headers) != count:
        raise ValueError(f"{len(headers)} parts of a model of {count}; wanted all of them")
    for no, part in enumerate(headers[1:], 1):
        if part.metadata.get("split.no") != no or part.metadata.get("split.count") != count:
            raise ValueError(f"part {no + 1} of {count} is not that part of a split model: get it anew")
    names: set[str] = set()
    tensors = [tensor for header in headers for tensor in header.tensors]
    for tensor in tensors:
        if tensor.name in names:
            raise ValueError(f"tensor {_show(tensor.name)} is in two parts")
        names.add(tensor.name)
    if count > 1:
        wanted = _whole(headers[0], "split.tensors.count")
        if wanted != len(tensors):
            raise ValueError(f"{len(tensors)} tensors in {count} parts; the first part wants {wanted}: get them anew")
    return tensors


def facts_of(header: Header, *others: Header) -> dict[str, Any]:
    """The header facts (``v`` 1) of a model; sizes in bytes, from the tensors' types and shapes.

    ``others`` are the second and later parts of a split model: its facts are those of the whole. Raises
    ValueError for what no model can be.
    """
    metadata = header.metadata
    tensors = _tensors((header, *others))
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
        raise ValueError(f"metadata 'general.architecture' is {_show(architecture)}; wanted a name")

    layers = _whole(header, f"{architecture}.block_count")
    if not 0 < layers <= MAX_LAYERS:
        raise ValueError(f"{layers} layers; wanted at most {MAX_LAYERS}, and at least one")
    n_embd = _whole(header, f"{architecture}.embedding_length")
    n_head = _whole_or_list(header, f"{architecture}.attention.head_count", layers, 0)
    heads = max(n_head) if isinstance(n_head, list) else n_head
    head_dim = n_embd // heads if heads else 0

    per_layer = [0] * layers
    layer_tensors: set[str] = set()
    token_embd = output = total = 0
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    n_vocab = vocabulary.length if isinstance(vocabulary, Kept) else 0
    tied = True
    for tensor in tensors:
        total += tensor.size
        layer = _LAYER.match(tensor.name)
        if layer is not None:
            number = int(layer.group(1))
            if number >= layers:
                raise ValueError(f"tensor {_show(tensor.name)} belongs to none of the {layers} layers")
            per_layer[number] += tensor.size
            layer_tensors.add(tensor.name[layer.end() :])
        elif tensor.name.startswith("token_embd"):
            token_embd += tensor.size
            if tensor.name == "token_embd.weight" and len(tensor.shape) == 2:
                n_vocab = tensor.shape[1]
        elif tensor.name.startswith("output"):
            output += tensor.size
            tied = tied and tensor.name != "output.weight"

    size = sum(part.size_bytes for part in (header, *others))
    if total > size:
        raise ValueError(f"tensors of {total} bytes in a file of {size}: it is truncated")
    name = metadata.get("general.name")
    file_type = metadata.get("general.file_type")
    window = _whole(header, f"{architecture}.attention.sliding_window", 0)
    given = metadata.get(f"{architecture}.attention.sliding_window_pattern")
    pattern: Any = given if type(given) is int else None
    if isinstance(given, Kept) and given.numbers is not None and given.length == layers:
        pattern = [bool(number) for number in given.numbers]
    facts = {
        "v": FACTS_VERSION,
        "architecture": architecture,
        "name": name if isinstance(name, str) else "",
        "file_type": file_type if type(file_type) is int else None,
        "n_layers": layers,
        "n_embd": n_embd,
        "n_ff": _whole_or_list(header, f"{architecture}.feed_forward_length", layers, 0),
        "n_head": n_head,
        "n_head_kv": _whole_or_list(header, f"{architecture}.attention.head_count_kv", layers, n_head),
        "head_dim_k": _whole(header, f"{architecture}.attention.key_length", head_dim),
        "head_dim_v": _whole(header, f"{architecture}.attention.value_length", head_dim),
        "n_vocab": n_vocab,
        "context_length": _whole(header, f"{architecture}.context_length"),
        "sliding_window": window or None,
        "sliding_window_pattern": pattern,
        "split": {"count": len(others) + 1, "no": 0} if others else None,
        "tied_output": tied,
        "n_tensors": len(tensors),
        "layer_tensors": sorted(layer_tensors),
        "size_bytes": size,
        "tensor_bytes": {"total": total, "token_embd": token_embd, "output": output, "per_layer": per_layer},
    }
    fault = facts_fault(facts)
    if fault is not None:
        raise ValueError(f"no model can be so: {fault}")
    return facts


def inspect(source: str) -> dict[str, Any]:
    """Header facts of the GGUF at a path or https URL: what the inventory records, and what planning reads.

    Of a split model ``source`` is the first part; the others are read beside it. Raises ValueError, naming the
    source.
    """
    headers = [header for _, header in _read_model(source)]
    try:
        return facts_of(*headers)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


class _Kind(NamedTuple):
    """What a fact may be, in words and as a test of the value and the number of layers."""

    wanted: str
    sound: Callable[[Any, int], bool]


def _whole_up_to(most: int) -> _Kind:
    return _Kind(
        f"a whole number up to {most}",
        lambda value, _: isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most,
    )


def _each(kind: _Kind) -> _Kind:
    return _Kind(
        f"{kind.wanted} for each layer",
        lambda value, layers: (
            isinstance(value, (list, tuple))
            and len(value) == layers
            and all(kind.sound(item, layers) for item in value)
        ),
    )


def _either(*kinds: _Kind) -> _Kind:
    return _Kind(", or ".join(kind.wanted for kind in kinds), lambda *value: any(kind.sound(*value) for kind in kinds))


_NULL = _Kind("null", lambda value, _: value is None)
_FLAG = _Kind("true or false", lambda value, _: isinstance(value, bool))
_TEXT = _Kind("text", lambda value, _: isinstance(value, str))
_NAME = _Kind("a name", lambda value, _: isinstance(value, str) and _ARCHITECTURE.fullmatch(value) is not None)
_TENSOR_NAMES = _Kind(
    f"at most {MAX_LAYER_TENSORS} names of tensors",
    lambda value, _: (
        isinstance(value, (list, tuple))
        and len(value) <= MAX_LAYER_TENSORS
        and all(isinstance(name, str) and _LAYER_TENSOR.fullmatch(name) for name in value)
    ),
)
_PART = _whole_up_to(MAX_PARTS)
_SPLIT = _Kind(
    "count and no",
    lambda value, _: isinstance(value, Mapping) and all(_PART.sound(value.get(key), 0) for key in ("count", "no")),
)
# llama.cpp reads most numbers as these.
_32_BITS = _whole_up_to(2**32 - 1)
# The largest file known has 2**42 bytes.
_BYTES = _whole_up_to(2**50)
# Beyond these bounds a number is a mistake or a trap; beside each is the largest that is known.
_WIDTH = _whole_up_to(2**20)  # 18432
_HEADS = _whole_up_to(2**12)  # 232
_HEAD_WIDTH = _whole_up_to(2**14)  # 576
_FEED_FORWARD = _whole_up_to(2**22)  # 73728
_TOKENS = _whole_up_to(2**22)  # 262208

_FACTS: Mapping[str, _Kind] = {
    "architecture": _NAME,
    "name": _TEXT,
    "file_type": _either(_32_BITS, _NULL),
    "n_embd": _WIDTH,
    "n_ff": _either(_FEED_FORWARD, _each(_FEED_FORWARD)),
    "n_head": _either(_HEADS, _each(_HEADS)),
    "n_head_kv": _either(_HEADS, _each(_HEADS)),
    "head_dim_k": _HEAD_WIDTH,
    "head_dim_v": _HEAD_WIDTH,
    "n_vocab": _TOKENS,
    "context_length": _32_BITS,
    "sliding_window": _either(_32_BITS, _NULL),
    "sliding_window_pattern": _either(_32_BITS, _each(_FLAG), _NULL),
    "split": _either(_SPLIT, _NULL),
    "tied_output": _FLAG,
    "n_tensors": _whole_up_to(MAX_TENSORS),
    "layer_tensors": _TENSOR_NAMES,
    "size_bytes": _BYTES,
    "tensor_bytes.total": _BYTES,
    "tensor_bytes.token_embd": _BYTES,
    "tensor_bytes.output": _BYTES,
    "tensor_bytes.per_layer": _each(_BYTES),
}


def facts_fault(facts: object) -> str | None:
    """What is wrong with recorded header facts (read from JSON), or None: shape and bounds, not their truth."""
    if not isinstance(facts, Mapping):
        return "they are not a JSON object"
    if facts.get("v") != FACTS_VERSION:
        return f"their version is {_show(facts.get('v'))}; wanted {FACTS_VERSION}"
    layers, sizes = facts.get("n_layers"), facts.get("tensor_bytes")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers <= MAX_LAYERS:
        return f"n_layers is {_show(layers)}; wanted 1 to {MAX_LAYERS}"
    if not isinstance(sizes, Mapping):
        return f"tensor_bytes is {_show(sizes)}; wanted a JSON object"
    given = {**facts, **{f"tensor_bytes.{key}": value for key, value in sizes.items()}}
    for key, kind in _FACTS.items():
        if key not in given:
            return f"{key} is missing; wanted {kind.wanted}"
        if not kind.sound(given[key], layers):
            return f"{key} is {_show(given[key])}; wanted {kind.wanted}"
    heads, kv_heads = (
        [value] * layers if isinstance(value, int) else value for value in (facts["n_head"], facts["n_head_kv"])
    )
    if any(kv > most for kv, most in zip(kv_heads, heads)):
        return f"n_head_kv is {_show(facts['n_head_kv'])}; wanted no more than n_head, {_show(facts['n_head'])}"
    if sum(sizes["per_layer"]) + sizes["token_embd"] + sizes["output"] > sizes["total"]:
        return "the parts of tensor_bytes are more than tensor_bytes.total"
    return None


def check_file(path: Path, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Header facts of a whole GGUF file on disk, once its tensors lie inside it and it is what was recorded.

    Of a split model ``path`` is the first part. ``facts`` are the recorded ones (None: not compared). Raises
    ValueError, naming the path, for a truncated file and for the first fact that differs.
    """
    parts = _read_model(str(path))
    for part, header in parts:
        for tensor in header.tensors:
            end = header.data_start + tensor.offset + tensor.size
            if end > header.size_bytes:
                raise ValueError(
                    f"{part}: tensor {_show(tensor.name)} ends at byte {end}; "
                    f"the file has {header.size_bytes}: it is truncated"
                )
    try:
        found = facts_of(*(header for _, header in parts))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if facts is not None:
        for key, value in found.items():
            if facts.get(key) != value:
                raise ValueError(
                    f"{path}: its header says {key} = {_short(value)}, "
                    f"the recorded facts say {_short(facts.get(key))}; "
                    f"record them anew with: gleaner gguf inspect {path}"
                )
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def render(facts: Mapping[str, Any]) -> str:
    """Header facts as the JSON text that is committed beside the inventory; one key a line."""
    lines = []
    for key, value in facts.items():
        lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="gguf_command", required=True)
    command = commands.add_parser("inspect", help="print the header facts of a GGUF file as JSON")
    command.add_argument("source", metavar="FILE|URL", help="a path, file:///… or https://…")
    command.add_argument("--output", metavar="FILE", help="write there instead of to standard output")


def run(args: argparse.Namespace) -> int:
    try:
        text = render(inspect(args.source))
        if args.output is None:
            sys.stdout.write(text)
        else:
            _write(Path(args.output), text)
    except (ValueError, OSError) as error:
        print(f"gleaner gguf inspect: {error}", file=sys.stderr)
        return 1
    return 0


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
