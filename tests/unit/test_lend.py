"""Model files from another node: only what was verified there, only to the site, and never believed."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gleaner import download, lend, stage
from tests.unit.fakes import SERVER_KEY, wait_for
from tests.unit.test_stage import DATA, SHA, Store, checked, store  # noqa: F401  # fixtures

ROOT = Path(__file__).resolve().parents[2]


class Neighbour:
    """A node that lends, and what is asked of it."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.store = Store(root)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = lend.Server(self.socket, self.store.models, SERVER_KEY)
        self.thread = threading.Thread(target=self.server.serve_until_idle, args=(600.0,), daemon=True)
        self.thread.start()

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.socket.getsockname()[1], timeout=5)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def permitted(self, sha256: str = SHA, **headers: str) -> tuple[int, bytes]:
        return self.ask(f"/{sha256}", Authorization=f"Bearer {lend.permit(SERVER_KEY, sha256)}", **headers)


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "server.key"
    path.write_text(SERVER_KEY)
    monkeypatch.setenv("GLEANER_SERVER_KEY_FILE", str(path))
    return path


@pytest.fixture
def neighbour(tmp_path: Path, store: Store, key: Path) -> Iterator[Neighbour]:  # noqa: F811
    made = Neighbour(tmp_path / "neighbour")
    assert made.store.run("stage", made.store.entry(), made.store.split()) == 0
    yield made
    wait_for(lambda: made.server.busy == 0)
    # Under its lock: a request that ends writes the time, too, right after it was counted out.
    with made.server.lock:
        made.server.idle_since = 0.0
    made.thread.join(10)
    assert not made.thread.is_alive()
    made.socket.close()


def test_a_verified_file_is_lent_from_any_byte(neighbour: Neighbour) -> None:
    assert neighbour.permitted() == (200, DATA)
    assert neighbour.permitted(Range="bytes=299990-") == (206, DATA[299_990:])
    assert neighbour.permitted(Range="bytes=300001-")[0] == 416
    part = hashlib.sha256(DATA[100_000:250_000]).hexdigest()
    assert neighbour.permitted(part) == (200, DATA[100_000:250_000])


def test_a_large_file_reaches_a_slow_receiver_whole(neighbour: Neighbour) -> None:
    """More than the buffers of both sides hold, so that the lender has to wait."""
    data = os.urandom(1 << 20) * 48
    file = neighbour.store.models / "large.gguf"
    file.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    entry = {"sha256": sha256, "sums": [sha256], "staged": True, "files": stage.fingerprint(file)}
    (neighbour.store.models / ".staging" / "verified.json").write_text(json.dumps({"large": entry}))
    with socket.create_connection(neighbour.socket.getsockname()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        permit = lend.permit(SERVER_KEY, sha256)
        sock.sendall(f"GET /{sha256} HTTP/1.0\r\nAuthorization: Bearer {permit}\r\n\r\n".encode())
        time.sleep(0.3)
        got = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert got.partition(b"\r\n\r\n")[2] == data


def test_an_entry_that_cannot_be_read_hides_no_other(neighbour: Neighbour) -> None:
    path = neighbour.store.models / ".staging" / "verified.json"
    path.write_text(json.dumps({"a": {"sha256": 7}, "b": {}, **json.loads(path.read_text())}))
    assert neighbour.permitted()[0] == 200


@pytest.mark.parametrize(
    "permit", ["", "Bearer ", f"Bearer {SERVER_KEY}", f"Bearer {lend.permit(SERVER_KEY, '0' * 64)}"]
)
def test_a_stranger_gets_nothing(neighbour: Neighbour, permit: str) -> None:
    assert neighbour.ask(f"/{SHA}", Authorization=permit)[0] == 401


@pytest.mark.parametrize("path", ["/", "/../../etc/passwd", "/one.gguf", "/" + "0" * 64 + "/../x", "/" + "g" * 64])
def test_nothing_but_a_sum_is_a_path(neighbour: Neighbour, path: str) -> None:
    assert neighbour.ask(path, Authorization=f"Bearer {lend.permit(SERVER_KEY, '')}")[0] in (400, 404)


@pytest.mark.parametrize("how", ["unknown", "changed", "gone", "garbled"])
def test_what_was_not_found_right_is_not_lent(neighbour: Neighbour, how: str) -> None:
    file = neighbour.store.models / "one.gguf"
    if how == "changed":
        file.write_bytes(DATA)
    elif how == "gone":
        file.unlink()
    elif how == "garbled":
        (neighbour.store.models / ".staging" / "verified.json").write_text("[")
    assert neighbour.permitted("0" * 64 if how == "unknown" else SHA)[0] == 404


@pytest.mark.parametrize("split", [False, True])
def test_a_model_comes_from_the_neighbour_though_its_source_is_away(
    neighbour: Neighbour,
    store: Store,  # noqa: F811
    split: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entry: dict[str, Any] = store.split() if split else store.entry()
    for path in store.root.glob("*.bin"):
        path.unlink()
    store.lenders = ["http://127.0.0.1:1", neighbour.url]
    assert store.run("stage", entry) == 0
    assert store.visible == (["big"] if split else ["one.gguf"])
    assert f"comes from {neighbour.url[7:]}" in capsys.readouterr().out


def stage_from_source(store: Store) -> None:  # noqa: F811  # no fixture here
    """Whatever a neighbour does, the model comes whole."""
    assert store.run("stage", store.entry()) == 0
    assert (store.models / "one.gguf").read_bytes() == DATA


def test_a_neighbour_that_breaks_off_is_followed_by_the_source(
    neighbour: Neighbour,
    store: Store,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.lenders = [neighbour.url]
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    monkeypatch.setattr(socket.socket, "sendfile", lambda *_: (_ for _ in ()).throw(BrokenPipeError("cut")))
    stage_from_source(store)
    assert "going on elsewhere" in capsys.readouterr().out


def test_a_neighbour_that_lies_is_not_believed(
    neighbour: Neighbour,
    store: Store,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.lenders = [neighbour.url]
    wrong = neighbour.store.root / "wrong.bin"
    wrong.write_bytes(DATA[::-1])
    monkeypatch.setattr(lend, "file_of", lambda *_: wrong)
    stage_from_source(store)
    assert "sent another content" in capsys.readouterr().out


def test_without_the_sites_key_nobody_is_asked(
    neighbour: Neighbour,
    store: Store,  # noqa: F811
    key: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key.unlink()
    store.lenders = [neighbour.url]
    assert store.run("stage", store.entry()) == 0
    assert "no other node is asked" in capsys.readouterr().out


def test_it_takes_the_socket_of_systemd_and_ends_when_nothing_is_asked(
    neighbour: Neighbour, tmp_path: Path, key: Path
) -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    program = (
        "import sys; from gleaner import cli, lend; lend.IDLE_SECONDS = 1.0;"
        f"sys.exit(cli.main(['lend', '--directory', {str(neighbour.store.models)!r}]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.environ.update(LISTEN_PID=str(os.getpid())); {program}"],
        preexec_fn=lambda: os.dup2(listening.fileno(), lend.FIRST_SOCKET),
        pass_fds=(lend.FIRST_SOCKET,),
        env={**os.environ, "LISTEN_FDS": "1", "PYTHONPATH": str(ROOT / "src")},
    )
    try:
        connection = http.client.HTTPConnection("127.0.0.1", listening.getsockname()[1], timeout=5)
        connection.request("GET", f"/{SHA}", headers={"Authorization": f"Bearer {lend.permit(SERVER_KEY, SHA)}"})
        assert connection.getresponse().read() == DATA
        connection.close()
        assert child.wait(10) == 0
    finally:
        child.kill()
        listening.close()


def test_it_does_not_start_without_a_socket(tmp_path: Path, key: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gleaner", "lend", "--directory", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == lend.EXIT_REFUSED
    assert "gleaner-lend.socket" in done.stderr


def test_what_is_visible_without_having_been_read_is_not_lent(tmp_path: Path) -> None:
    (tmp_path / ".staging").mkdir()
    (tmp_path / "one.gguf").write_bytes(DATA)
    assert lend.file_of(tmp_path, SHA) is None
    mark = stage.fingerprint(tmp_path / "one.gguf")
    entry = {"one": {"sha256": SHA, "sums": [SHA], "staged": False, "files": mark}}
    (tmp_path / ".staging" / "verified.json").write_text(json.dumps(entry))
    assert lend.file_of(tmp_path, SHA) == tmp_path / "one.gguf"
