"""A confined program does its work and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gleaner import agent, confine

# Nothing that the program can do mends an older kernel. On the lab a test fails where RPC servers are not confined.
pytestmark = pytest.mark.skipif(confine.version() < 6, reason="this kernel enforces no or fewer of Landlock's rules")

PYTHON = Path(sys.executable).resolve()
LOADERS = [path.resolve() for path in Path("/lib64").glob("ld-linux*")]


def run(code: str, writable: Path, port: int = 1) -> str:
    """What a confined Python says; its last line names the error, if any."""
    rules = confine.Ruleset([PYTHON, *LOADERS], [writable, Path("/dev")], port)
    try:
        done = subprocess.run(
            [PYTHON, "-c", code], capture_output=True, text=True, preexec_fn=rules.enforce, check=False, timeout=30
        )
    finally:
        rules.close()
    return (done.stdout + done.stderr).strip().rpartition("\n")[2]


def test_it_writes_where_it_may_and_nowhere_else(tmp_path: Path) -> None:
    mine, others = tmp_path / "mine", tmp_path / "others"
    mine.mkdir()
    others.mkdir()
    (others / "record.json").write_text("{}")
    assert run(f"open({str(mine / 'x')!r}, 'w').write('y'); print('done')", mine) == "done"
    assert (mine / "x").read_text() == "y"
    assert run("open('/dev/null', 'w').write('y'); print('done')", mine) == "done"
    for attempt in (
        f"open({str(others / 'x')!r}, 'w')",
        f"open({str(others / 'record.json')!r}, 'a')",
        f"import os; os.unlink({str(others / 'record.json')!r})",
        f"import os; os.rename({str(mine / 'x')!r}, {str(others / 'x')!r})",
        f"import os; os.truncate({str(others / 'record.json')!r}, 0)",
        f"import os; os.symlink('/', {str(others / 'x')!r})",
    ):
        assert "PermissionError" in run(attempt, mine) or "Errno 18" in run(attempt, mine), attempt
    assert {path.name for path in others.iterdir()} == {"record.json"}


def test_it_starts_no_other_program(tmp_path: Path) -> None:
    assert "PermissionError" in run("import os; os.execv('/bin/sh', ['sh', '-c', 'echo done'])", tmp_path)


def test_it_listens_on_its_port_and_connects_to_nobody(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as free:
        taken, port = server.getsockname()[1], free.getsockname()[1]
        free.close()
        code = "import socket; socket.create_server(('127.0.0.1', {})); print('done')"
        assert run(code.format(port), tmp_path, port) == "done"
        assert "PermissionError" in run(code.format(port), tmp_path, port=1)
        connect = f"import socket; socket.create_connection(('127.0.0.1', {taken})); print('done')"
        assert "PermissionError" in run(connect, tmp_path, port)


def test_it_signals_nobody_and_gains_nothing(tmp_path: Path) -> None:
    assert "PermissionError" in run(f"import os; os.kill({os.getpid()}, 0)", tmp_path)
    status = "print(*[line for line in open('/proc/self/status') if line.startswith('NoNewPrivs')])"
    assert run(status, tmp_path).split() == ["NoNewPrivs:", "1"]
    assert run("import resource as r; print(r.getrlimit(r.RLIMIT_CORE))", tmp_path) == "(0, 0)"


@pytest.mark.parametrize(
    ("version", "lacks"),
    [
        (0, "starting programs, writing, truncating files, connecting, signalling"),
        (1, "truncating files, connecting, signalling"),
        (2, "truncating files, connecting, signalling"),
        (3, "connecting, signalling"),
        (5, "signalling"),
        (6, ""),
    ],
)
def test_an_older_kernel_enforces_what_it_knows_and_the_rest_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, lacks: str
) -> None:
    monkeypatch.setattr(confine, "version", lambda: version)
    attempts = {
        "writing": f"open({str(tmp_path / 'x')!r}, 'w')",
        "truncating files": f"import os; os.truncate({str(tmp_path / 'mine')!r}, 0)",
        "signalling": f"import os; os.kill({os.getpid()}, 0)",
    }
    (tmp_path / "mine").touch()
    rules = confine.Ruleset([PYTHON, *LOADERS], [], 1)
    rules.close()
    assert rules.lacks == lacks
    for what, code in attempts.items():
        refused = "PermissionError" in run(code, Path("/dev"))
        assert refused is (what not in lacks), what


def test_a_missing_device_file_of_cuda_is_brought_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: asked.append(argv))
    agent.bring_uvm(tmp_path)
    (tmp_path / "nvidiactl").touch()
    agent.bring_uvm(tmp_path)
    (tmp_path / "nvidia-uvm").touch()
    agent.bring_uvm(tmp_path)
    assert asked == [["nvidia-modprobe", "-u", "-c=0"]]
    assert capfd.readouterr().err == ""
