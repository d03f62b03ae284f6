"""GGUF headers by byte ranges over https: facts from an honest server, one clear error and an end with any other."""

from __future__ import annotations

import http.server
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gleaner import gguf
from tests.unit import gguf_claims as claims
from tests.unit import gguf_files

ENDLESS_BYTES = 64 * 2**20
"""What a server that never stops sends before it does, so that a test of a client that never stops fails."""
MOST_SENT_BYTES = ENDLESS_BYTES // 2
"""What may be sent to a client that stops in time: what it reads, and what lies in buffers on the way."""
DRIP_SECONDS = 0.02
LONG = claims.content(
    claims.fields({"a": lambda name: claims.string(name, bytes(2 * gguf.WINDOW_BYTES)), **claims.values()})
)
"""A model whose header is longer than what is read of it at a time."""


class Server(http.server.BaseHTTPRequestHandler):
    """Serves byte ranges of files, and at the paths in ``WAYS`` what these say."""

    contents: ClassVar[dict[str, bytes]] = {}
    any_answer = b""
    sent = 0
    served = 0

    def do_GET(self) -> None:
        what = WAYS.get(self.path.split("/")[1])
        try:
            if what is not None:
                what(self)
            elif self.path in self.contents:
                self.answer()
            else:
                self.send_error(404)
        except OSError:
            # The client has left.
            self.close_connection = True

    @property
    def wanted(self) -> tuple[int, int]:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        return int(first), int(last)

    @property
    def content(self) -> bytes:
        return self.contents.get(self.path, LONG)

    def part(self) -> bytes:
        first, last = self.wanted
        return self.content[first : last + 1]

    def head(self, first: int = 0, last: int = 0, size: int = 0, status: str = "206 Partial Content") -> bytes:
        """The head of an answer, without its last line; numbers are added to the true ones."""
        start = self.wanted[0]
        numbers = f"{start + first}-{start + len(self.part()) - 1 + last}/{len(self.content) + size}"
        return f"HTTP/1.1 {status}\r\nContent-Range: bytes {numbers}\r\n".encode()

    def answer(self, body: bytes | None = None, length: int | None = None, **changes: Any) -> None:
        body = self.part() if body is None else body
        self.send(self.head(**changes))
        self.send(b"" if length is None else b"Content-Length: %d\r\n" % length)
        self.send(b"\r\n" + body)
        type(self).served += len(body)

    def send(self, words: bytes) -> None:
        self.wfile.write(words)
        type(self).sent += len(words)

    def endless(self, words: bytes, again: bytes = b"x" * 2**16) -> None:
        self.send(words)
        for _ in range(0, ENDLESS_BYTES, len(again)):
            self.send(again)

    def drip(self, words: bytes, rest: bytes = b"") -> None:
        """A byte at a time, too slow for all and fast enough for each; in the end as it should be."""
        for at in range(len(words)):
            self.send(words[at : at + 1])
            time.sleep(DRIP_SECONDS)
        self.send(rest)

    def silent(self, words: bytes = b"") -> None:
        """Say no more, until the client leaves."""
        self.send(words)
        self.rfile.read(1)

    def redirect(self, where: str, body: bytes = b"") -> None:
        self.send(f"HTTP/1.1 302 Found\r\nLocation: {where}\r\n\r\n".encode() + body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def in_later_ranges(**changes: Any) -> Callable[[Server], None]:
    return lambda server: server.answer(**changes) if server.wanted[0] else server.answer()


# What a server does at a path, and the words of the error.
LIES: dict[str, tuple[Callable[[Server], None], str]] = {
    "whole-file": (lambda server: server.answer(status="200 OK"), r"does not serve byte ranges \(HTTP 200"),
    "endless-whole-file": (lambda server: server.endless(b"HTTP/1.1 200 OK\r\n\r\n"), "does not serve byte ranges"),
    "no-range": (lambda server: server.send(b"HTTP/1.1 206 OK\r\n\r\n"), "206, Content-Range ''"),
    "unknown-size": (
        lambda server: server.send(b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/*\r\n\r\n0123456789"),
        "Content-Range 'bytes 0-9/",
    ),
    "long-range": (
        lambda server: server.send(b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/" + b"9" * 60000 + b"\r\n\r\n"),
        "Content-Range 'bytes 0-9/9999",
    ),
    "other-start": (lambda server: server.answer(first=1), "the server answers with bytes 1-"),
    "other-end": (lambda server: server.answer(last=-1), "the server answers with bytes 0-"),
    "end-beyond-the-file": (lambda server: server.answer(last=1), "the server answers with bytes 0-"),
    "size-less-than-range": (lambda server: server.answer(size=-(2**21)), "the server answers with bytes 0-"),
    "size-changes": (in_later_ranges(size=1), "it changes while it is read"),
    "later-range-is-another": (in_later_ranges(first=1), "the server answers with bytes"),
    "fewer-bytes": (lambda server: server.answer(body=server.part()[:1000]), r"the server sent 1000$|1000 bytes read"),
    "fewer-bytes-than-length": (
        lambda server: server.answer(body=server.part()[:1000], length=len(server.part())),
        r"the server sent 1000$|1000 bytes read",
    ),
    "no-bytes": (lambda server: server.answer(body=b"", length=0), "the server sent 0"),
    "more-bytes": (lambda server: server.answer(body=server.part() + b"x"), "the server sent more"),
    "more-bytes-by-length": (
        lambda server: server.answer(body=server.part() + b"x", length=len(server.part()) + 1),
        "the server sent more",
    ),
    "endless-body": (lambda server: server.endless(server.head() + b"\r\n"), "the server sent more"),
    "chunk-of-all": (
        lambda server: server.endless(server.head() + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n"),
        "more than was asked for|more than 65536 bytes",
    ),
    "endless-small-chunks": (
        lambda server: server.endless(server.head() + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 4096),
        "more than was asked for",
    ),
    "endless-trailers": (
        lambda server: server.endless(server.head() + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 8192),
        "more than was asked for",
    ),
    "endless-continue": (
        lambda server: server.endless(b"", b"HTTP/1.1 100 Go on\r\n\r\n" * 4096),
        "more than was asked",
    ),
    "endless-headers": (
        lambda server: server.endless(b"HTTP/1.1 206 OK\r\n", b"a: b\r\n" * 8192),
        "more than 100 headers",
    ),
    "long-headers": (
        lambda server: server.endless(b"HTTP/1.1 206 OK\r\n", b"a: " + b"b" * 65000 + b"\r\n"),
        "more than was asked for",
    ),
    "long-header": (lambda server: server.endless(b"HTTP/1.1 206 OK\r\na: "), "more than 65536 bytes|too long"),
    "long-status": (lambda server: server.endless(b"HTTP/1.1 206 "), "more than 65536 bytes|too long"),
    "noise": (lambda server: server.send(b"\xff" * 100 + b"\n"), "xff|ÿ"),
    "odd-reason": (lambda server: server.send(b"HTTP/1.1 500 a\x1b[2J\x85b\r\n\r\n"), r"a\\x1b\[2J"),
    "long-reason": (lambda server: server.send(b"HTTP/1.1 500 " + b"a" * 60000 + b"\r\n\r\n"), "aaaa…"),
    "endless-error": (lambda server: server.endless(b"HTTP/1.1 404 Not Found\r\n\r\n"), "Not Found"),
    "silent-end": (lambda server: None, "without response|EOF|reset"),
    "to-http": (
        lambda server: server.redirect("http://127.0.0.1:9/x"),
        "redirects to 'http://127.0.0.1:9/x'; wanted https",
    ),
    "to-a-file": (
        lambda server: server.redirect("file:///etc/passwd"),
        "Redirection to url .file:///etc/passwd. is not allowed",
    ),
    "to-ftp": (lambda server: server.redirect("ftp://localhost/x"), "redirects to 'ftp://"),
    "to-a-long-url": (lambda server: server.redirect("http://" + "a" * 60000), "redirects to 'http://aaa"),
    "to-nonsense": (lambda server: server.redirect("https://[::1"), "Invalid IPv6"),
    "to-itself": (lambda server: server.redirect(server.path), "infinite loop"),
    "to-ever-more": (lambda server: server.redirect(f"/to-ever-more/{time.monotonic_ns()}"), "infinite loop"),
    "to-no-port": (
        lambda server: server.redirect(f"https://localhost:{10**30}/"),
        "a port beyond all ports|Servname not supported",
    ),
}


def dripped(words: Callable[[Server], bytes]) -> Callable[[Server], None]:
    """These words a byte at a time, then the rest of a sound answer."""
    return lambda server: server.drip(words(server), server.head().split(b"\r\n", 1)[1] + b"\r\n" + server.part())


SLOW: dict[str, Callable[[Server], None]] = {
    "silent": lambda server: server.silent(),
    "silent-after-headers": lambda server: server.silent(server.head() + b"\r\n"),
    "dripped-status": dripped(lambda server: b"HTTP/1.1 206 " + b"a" * 1000 + b"\r\n"),
    "dripped-headers": dripped(lambda server: b"HTTP/1.1 206 OK\r\n" + b"a: 0123456789\r\n" * 90),
    "dripped-continue": dripped(lambda server: b"HTTP/1.1 100 OK\r\n\r\n" * 50 + b"HTTP/1.1 206 OK\r\n"),
    "dripped-body": lambda server: server.drip(server.head() + b"\r\n" + server.part()[:1000], server.part()[1000:]),
    "dripped-chunks": lambda server: server.drip(
        server.head() + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nG\r\n" * 200
    ),
}

WAYS: dict[str, Callable[[Server], None]] = {
    **{path: way for path, (way, _) in LIES.items()},
    **SLOW,
    "detour": lambda server: server.redirect("/model.gguf", b"a page that nobody reads"),
    "endless-detour": lambda server: server.endless(b"HTTP/1.1 302 Found\r\nLocation: /model.gguf\r\n\r\n"),
    "any": lambda server: server.send(server.any_answer),
}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for localhost."""
    path = tmp_path_factory.mktemp("https") / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(path.with_name("key.pem")), "-out", str(path)),
        ],
        check=True,
        capture_output=True,
    )
    return path


@pytest.fixture
def https(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The base URL of the https server, its certificate trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Server.sent = Server.served = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"https://localhost:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = gguf_files.write_model(tmp_path / "small.gguf")
    Server.contents = {"/model.gguf": path.read_bytes() + bytes(8 * 2**20)}
    return path


def test_a_url_is_read_by_ranges_and_not_beyond_the_header(https: str, small: Path) -> None:
    facts = gguf.inspect(f"{https}/model.gguf")
    assert facts["size_bytes"] == small.stat().st_size + 8 * 2**20
    assert {**facts, "size_bytes": 0} == {**gguf.inspect(str(small)), "size_bytes": 0}
    assert Server.served <= gguf.WINDOW_BYTES


def test_a_long_header_is_read_in_two_ranges(https: str, tmp_path: Path) -> None:
    Server.contents = {"/long.gguf": LONG}
    (tmp_path / "long.gguf").write_bytes(LONG)
    assert gguf.inspect(f"{https}/long.gguf") == gguf.inspect(str(tmp_path / "long.gguf"))
    assert gguf.WINDOW_BYTES < Server.served < 2 * gguf.WINDOW_BYTES


def test_the_parts_of_a_url_are_read_beside_it(https: str, tmp_path: Path) -> None:
    gguf_files.write_model(tmp_path / "parts.gguf", part_tensors=10)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    Server.contents = {f"/{path.name}?download=true": path.read_bytes() for path in parts}
    assert gguf.inspect(f"{https}/{parts[0].name}?download=true") == gguf.inspect(str(parts[0]))
    del Server.contents[f"/{parts[2].name}?download=true"]
    with pytest.raises(ValueError, match=r"/parts-00003-of-00003\.gguf\?download=true: Not Found"):
        gguf.inspect(f"{https}/{parts[0].name}?download=true")


@pytest.mark.parametrize("path", ["detour", "endless-detour"])
def test_a_redirect_is_followed_and_its_page_not_read(https: str, small: Path, path: str) -> None:
    assert gguf.inspect(f"{https}/{path}") == gguf.inspect(f"{https}/model.gguf")
    assert Server.sent < MOST_SENT_BYTES


@pytest.mark.parametrize("path", LIES)
def test_a_server_that_lies_is_one_clear_error_and_an_end(https: str, path: str) -> None:
    url = f"{https}/{path}"
    with pytest.raises(ValueError, match=LIES[path][1]) as caught:
        gguf.inspect(url)
    claims.claim_refusal(str(caught.value), f"{url}: ")
    assert Server.sent < MOST_SENT_BYTES


@pytest.mark.parametrize("path", SLOW)
def test_a_server_that_drags_has_an_end(https: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "HTTP_TOTAL_SECONDS", 1)
    url = f"{https}/{path}"
    with pytest.raises(ValueError, match="the server is too slow; wanted each answer within 30 s") as caught:
        gguf.inspect(url)
    claims.claim_refusal(str(caught.value), f"{url}: ")


@pytest.mark.parametrize("path", ["silent", "silent-after-headers"])
def test_a_server_that_is_silent_has_an_end(https: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "HTTP_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"the server is too slow; wanted each answer within 0\.5 s"):
        gguf.inspect(f"{https}/{path}")


def test_the_parts_of_a_model_share_the_time(https: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part comes in time, all of them do not."""
    contents = [claims.content(part, tensors=2) for part in claims.split_fields()]
    names = [claims.write_parts(tmp_path, contents).name.replace("00001-of", f"{no:05d}-of") for no in (1, 2)]
    Server.contents = {f"/{name}": content for name, content in zip(names, contents)}
    now = time.monotonic()
    monkeypatch.setattr("gleaner.gguf.time.monotonic", lambda: now + 400 * Server.served // len(contents[0]))
    with pytest.raises(ValueError, match=r"m-00002-of-00002\.gguf: the server is too slow.* all of them within 600 s"):
        gguf.inspect(f"{https}/{names[0]}")


def test_a_server_that_does_not_speak_tls_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(gguf, "HTTP_TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(ValueError, match="the server is too slow"):
        gguf.inspect(f"https://127.0.0.1:{mute.getsockname()[1]}/x.gguf")


def test_a_server_that_is_not_there_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="refused"):
            gguf.inspect(f"https://127.0.0.1:{taken.getsockname()[1]}/x.gguf")


def test_a_stranger_with_a_certificate_of_its_own_is_refused(https: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ValueError, match="certificate verify failed"):
        gguf.inspect(f"{https}/model.gguf")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://localhost/a b.gguf", "control characters"),
        ("https://localhost:x/", "nonnumeric port"),
        (f"https://localhost:{10**30}/", "a port beyond all ports|Servname not supported"),
        ("https://", "no host given"),
        ("https://[::1/", "Invalid IPv6 URL"),
        ("https://a..b/", "label empty"),
    ],
)
def test_a_url_that_is_none_is_a_value_error(monkeypatch: pytest.MonkeyPatch, url: str, words: str) -> None:
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with pytest.raises(ValueError, match=words):
        gguf.inspect(url)


HEADERS = (
    *("Content-Range: bytes 0-9/10", "Content-Range: bytes 0-9/99999999999999999999", "Content-Range: bytes 5-0/3"),
    *("Content-Length: 10", "Content-Length: -1", "Content-Length: " + "9" * 5000, "Content-Length: x"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: \xff", "Connection: keep-alive", "Location: /any"),
    *(
        "Location: https://localhost:0/",
        "Location: \x00",
        "",
        ": ",
        " folded",
        "a" * 70000,
        "\xff: \xff",
        "=?utf-8?q?x?= : y",
    ),
)


@given(
    status=st.sampled_from(
        ["HTTP/1.1 206 OK", "HTTP/1.0 206", "HTTP/1.1 301 x", "HTTP/1.1 308 x", "HTTP/0.9", "HTTP/1.1 -1", ""]
    )
    | st.text(max_size=20),
    headers=st.lists(st.sampled_from(HEADERS), max_size=4),
    body=st.sampled_from(
        [b"", b"0123456789", b"a\r\n0123456789\r\n0\r\n\r\n", b"-1\r\nx", b"x\r\n", b"f" * 5000 + b"\r\n"]
    )
    | st.binary(max_size=40),
)
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_answer_is_one_clear_error(https: str, status: str, headers: list[str], body: bytes) -> None:
    Server.any_answer = "\r\n".join([status, *headers, "", ""]).encode("latin-1", errors="replace") + body
    with pytest.raises(ValueError, match=r"^https://") as caught:
        gguf.inspect(f"{https}/any")
    claims.claim_refusal(str(caught.value), f"{https}/any: ")
