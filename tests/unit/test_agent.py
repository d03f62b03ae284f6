"""What the agent does with one process: bind, limit, watch, kill."""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gleaner import agent, engine, heartbeat, joblog
from tests.unit.fakes import SERVER_KEY, Home, alive, home, wait_for


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


def task(place: Home, **more: object) -> agent.Task:
    value = {
        "start": 1,
        "argv": [str(place.engine / "llama-server"), "--host", "127.0.0.1", "--port", str(place.port)],
        "environment": {"FAKE_SERVER": str(place.server)},
        "numa_node": None,
        "log": str(place.root / "router.log"),
        "address": "127.0.0.1",
        "port": place.port,
        "role": "router",
        "cache": None,
        "confine": None,
        "engine": place.publish(),
        "gpus": {"count": 0, "shared": False},
        **more,
    }
    return agent.Task.from_message(value)


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5\n", {5}), ("\n", set()), ("0,2-3", {0, 2, 3})]
)
def test_cpulist(text: str, cpus: set[int]) -> None:
    assert agent.cpulist(text) == cpus


def sysfs(tmp_path: Path) -> Path:
    for node, cpus in ((0, "0-19"), (1, "20-39")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    return tmp_path


@pytest.fixture
def _numactl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    Home.program(tmp_path / "bin" / "numactl", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.mark.usefixtures("_numactl")
def test_binding_stays_inside_the_cores_that_slurm_gave(tmp_path: Path) -> None:
    assert agent.binding(1, {18, 19, 20, 22}, sysfs(tmp_path)) == [
        "numactl",
        "--membind=1",
        "--physcpubind=20,22",
        "--",
    ]


@pytest.mark.usefixtures("_numactl")
def test_binding_without_a_core_of_the_node_binds_memory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert agent.binding(1, {0, 1}, sysfs(tmp_path)) == ["numactl", "--membind=1", "--"]
    assert "Slurm gave no core of it (got [0, 1])" in capfd.readouterr().err


def test_no_binding_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert agent.binding(None, {0}) == []
    assert "no NUMA binding" in capfd.readouterr().err


def test_unknown_numa_node_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"numa_node: got 7, this machine has 0, 1"):
        agent.binding(7, {0}, sysfs(tmp_path))


def test_missing_numactl_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="numactl is not installed"):
        agent.binding(0, {0}, sysfs(tmp_path))


def test_memlock_limit_is_raised_to_the_hard_one() -> None:
    code = (
        "import resource as r; h = r.getrlimit(r.RLIMIT_MEMLOCK)[1];"
        "h = (64 << 20) if h == r.RLIM_INFINITY else h;"
        "r.setrlimit(r.RLIMIT_MEMLOCK, (0, h));"
        "from gleaner.agent import raise_memlock as f;"
        "print(f() == h >> 20, r.getrlimit(r.RLIMIT_MEMLOCK) == (h, h))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(agent.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "True True\n"


def test_unlimited_memlock_is_minus_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (0, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    assert agent.raise_memlock() == -1


@pytest.mark.parametrize(("role", "variable"), [("router", r"tiers\[\].gateway_port"), ("worker", "RPC port")])
def test_port_of_another_program_is_refused(place: Home, role: str, variable: str) -> None:
    one = task(place, role=role)
    agent.require_free(one)
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("0.0.0.0", place.port))
        squatter.listen()
        with pytest.raises(ValueError, match=f"{variable}: 127.0.0.1:{place.port} cannot be listened on"):
            agent.require_free(one)


def test_process_states() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        wait_for(lambda: agent.process_state(child.pid) == "alive")
        child.send_signal(signal.SIGSTOP)
        wait_for(lambda: agent.process_state(child.pid) == "stopped")
        child.send_signal(signal.SIGKILL)
        wait_for(lambda: agent.process_state(child.pid) == "zombie")
    finally:
        child.kill()
        child.wait()
    assert agent.process_state(child.pid) == "gone"


@contextlib.contextmanager
def launched(place: Home) -> Iterator[agent.Process]:
    """A server, whose words go to `router.log`; what is left of it is killed."""
    log = joblog.File(place.root / "router.log", "fast 41.1 vasp-02")
    output, pipe = os.pipe2(os.O_CLOEXEC)
    reader = joblog.Reader(output, log.put)
    process = agent.Process.launch(task(place), pipe, SERVER_KEY)
    os.close(pipe)
    try:
        yield process
    finally:
        process.kill_group()
        os.waitpid(process.pid, 0)
        reader.join(5)
        log.close(5)


# Some Pythons warn of a fork beside threads. What runs between fork and exec takes no lock of ours.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_process_has_its_own_group_and_one_secret(
    place: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLEANER_TOKEN", "secret")
    with launched(place) as process:
        wait_for(lambda: place.started)
        assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
        assert "GLEANER_TOKEN" not in place.started[0]["environment"]
        assert place.started[0]["environment"]["LLAMA_API_KEY"] == SERVER_KEY
        assert SERVER_KEY not in " ".join(place.started[0]["argv"]) + capfd.readouterr().err
        child = wait_for(lambda: (place.server / "child").exists() and int((place.server / "child").read_text()))
        resident, _ = agent.group_memory(process.pid)
        assert resident > 1
        assert process.kill_group()
    wait_for(lambda: not alive(child))


def test_group_memory_counts_locked_pages_of_children() -> None:
    code = (
        "import ctypes, mmap, time; m = mmap.mmap(-1, 8 << 20); m.write(b'x' * (8 << 20));"
        "a = ctypes.addressof(ctypes.c_char.from_buffer(m));"
        "print(ctypes.CDLL(None).mlock(ctypes.c_void_p(a), 8 << 20), flush=True); time.sleep(60)"
    )
    shell = subprocess.Popen(
        ["/bin/sh", "-c", f'"{sys.executable}" -c "{code}" & wait'],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with shell:
        try:
            assert shell.stdout is not None
            assert shell.stdout.readline() == "0\n", "this test needs 8 MiB of lockable memory"
            assert agent.group_memory(shell.pid)[1] == 8
        finally:
            os.killpg(shell.pid, signal.SIGKILL)


def answers(place: Home, key: str = SERVER_KEY) -> bool:
    """Ask once whether anything is in flight."""
    with selectors.DefaultSelector() as selector:
        check = agent.BusyCheck(selector, task(place), key)
        check.begin()
        try:
            for _ in range(200):
                selector.select(0.05)
                answer = check.advance()
                if answer is not None:
                    return answer
        finally:
            check.close()
    raise AssertionError("no answer")


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_busy_check_asks_without_loading_a_model(place: Home) -> None:
    log = place.root / "router.log"
    with launched(place) as process:
        wait_for(lambda: (place.server / "child").exists())
        # Before it listens, a refused connection also means that nothing is in flight.
        asked = "GET /slots?model=one&autoload=false"
        wait_for(lambda: not answers(place) and log.exists() and asked in log.read_text())
        assert "model=two" not in log.read_text()
        assert answers(place, "another key"), "a server that does not tell was taken for idle"
        place.set(place.server / "busy")
        assert answers(place)
        (place.server / "busy").unlink()
        place.set(place.server / "model-loads")
        assert answers(place)
        (place.server / "model-loads").unlink()
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert answers(place), "a server that does not answer was taken for idle"
        assert time.monotonic() - began < 3
    assert not answers(place), "a dead server was taken for busy"


def refusal(place: Home) -> str:
    """Why an agent does not start the server that its supervisor wants."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        child = place.start("agent", GLEANER_SUPERVISOR=f"127.0.0.1:{port}", GLEANER_TOKEN="token")
        listener.settimeout(10)
        channel = heartbeat.Channel(listener.accept()[0])
    try:
        channel.send({"start": vars(task(place))})
        refused = wait_for(lambda: [message for message in channel.receive() if "refused" in message])
        return str(refused[0]["why"])
    finally:
        channel.close()
        child.wait(10)


def test_no_server_starts_without_a_key(place: Home) -> None:
    file = place.root / "server.key"
    place.set(file, "0123456789,sk-two\n")
    assert refusal(place) == f"{file}: got 17 characters, want 64 hexadecimal digits: run playbooks/tiers.yml"
    file.unlink()
    assert refusal(place) == f"{file}: cannot be read (No such file or directory): run playbooks/tiers.yml"
    assert not place.started
    assert "sk-two" not in place.log("agent")


def test_an_agent_that_one_of_two_networks_cuts_off_ends_what_it_started(place: Home) -> None:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        where = ",".join("{}:{}".format(*one.getsockname()) for one in listeners)
        child = place.start("agent", GLEANER_SUPERVISOR=where, GLEANER_TOKEN="t", SLURMD_NODENAME="vasp-02")
        lines = []
        for network, listener in enumerate(listeners):
            line = heartbeat.Channel(listener.accept()[0])
            stack.callback(line.close)
            (greeting, *_) = wait_for(line.receive)
            assert heartbeat.greeted_by(greeting, "t") == ("vasp-02", network)
            lines.append(line)
        lines[0].send({"start": vars(task(place))})
        started = wait_for(lambda: place.started)[0]["pid"]
        while child.poll() is None:
            assert time.monotonic() - lines[1].heard < 60
            for line in lines:
                with contextlib.suppress(heartbeat.ChannelClosed):
                    line.receive()
            with contextlib.suppress(heartbeat.ChannelClosed):
                lines[0].send({"beat": 1})
            time.sleep(0.5)
    assert child.wait() == 1
    assert "silent for 5 s" in place.log("agent")
    # Whoever would pass on what the agent says is gone.
    assert "supervisor is gone" in (place.root / "router.log").read_text()
    wait_for(lambda: not alive(started))


def test_agent_by_hand_says_who_starts_it(place: Home) -> None:
    assert place.start("agent").wait(10) == 2
    assert "started by `gleaner supervise`" in place.log("agent")


def test_a_node_that_sees_another_build_than_its_supervisor_says_so(place: Home) -> None:
    with pytest.raises(engine.EngineError, match=r"manifest\.json: this node sees [0-9a-f]{64}, its supervisor other"):
        agent.verify_engine({**place.publish(), "manifest": "other"})


def test_a_memory_that_cannot_be_written_is_done_without(place: Home) -> None:
    agent.verify_engine({**place.publish(), "memory": ""})
    agent.verify_engine({**place.publish(), "memory": str(place.root / "missing" / "engine.json")})
    assert not (place.root / "engine.json").exists()
