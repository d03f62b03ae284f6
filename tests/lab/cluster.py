"""The lab's cluster as its users and its administrator meet it: over ssh, Slurm's commands, and HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import testinfra
from testinfra.host import Host

from tests.lab.ansible import LAB_ID, ROOT

CONTROLLER = "slurm-ctl"
NODES = ("vasp-01", "vasp-02", "vasp-03")
HOSTS = (CONTROLLER, *NODES)
SSH_CONFIG = str(ROOT / f".lab/ssh_config-{LAB_ID}")
OCTETS = dict(zip(HOSTS, range(10, 14)))

# The tier reasoning of inventories/lab.
HEAD, WORKERS = "vasp-01", ("vasp-03",)
SPLIT_JOB, SPLIT_PORT, RPC_PORT = "llama-72b", 8081, 50052
THINKING = "smollm2-135m-thinking-q4_1"

# The tier fast of inventories/lab.
TIER_NODE = "vasp-02"
JOB_NAME = "llama-14b"
SERVICE_USER = "ai-inference"
PORT = 8080
SMOLLM2, GEMMA3, TINY = "smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m", "tiny-random-llama-f16"
REGISTRY = "/cluster/shared/ai/endpoints"
# A vault_server_key that is not the lab's.
OTHER_KEY = "0123456789abcdef" * 4

# A tier that lost its server, its job or its gateway is back by then, without a human.
BACK_SECONDS = 90.0
# No answer of a gateway whose tier is away takes longer: nothing hangs.
ANSWER_SECONDS = 5.0

T = TypeVar("T")


def address(name: str) -> str:
    return f"10.213.{LAB_ID}.{OCTETS[name]}"


def rpc_address(name: str) -> str:
    return f"10.214.{LAB_ID}.{OCTETS[name]}"


@cache
def host(name: str) -> Host:
    """A host of the lab, over ssh as its administrator."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=SSH_CONFIG, controlpath="~/.ansible/cp/gleaner-%%C")


def forget(name: str) -> None:
    """End the ssh connection that is kept open to a host, which is to be another machine."""
    subprocess.run(
        ["ssh", "-F", SSH_CONFIG, "-o", "ControlPath=~/.ansible/cp/gleaner-%C", "-O", "exit", name],
        check=False,
        capture_output=True,
    )


def run(name: str, command: str) -> str:
    """What a command prints on a host; it has to succeed."""
    done = host(name).run(command)
    assert done.rc == 0, f"{name}: {command}: exit code {done.rc}\n{done.stdout}{done.stderr}"
    return str(done.stdout).strip()


def bring(name: str, file: Path, path: str) -> None:
    """Copy a file of this machine to a host."""
    with file.open("rb") as stream:
        subprocess.run(["ssh", "-F", SSH_CONFIG, name, f"cat >{shlex.quote(path)}"], stdin=stream, check=True)


def put(name: str, path: str, text: str) -> None:
    """Write a file on a host, with a line's end after it."""
    run(name, f"cat > {path} <<'EOF'\n{text}\nEOF")


def wait_until(what: str, claim: Callable[[], T | None], seconds: float = BACK_SECONDS, every: float = 0.25) -> T:
    """Ask until the claim is true and give its value; AssertionError names what never came."""
    deadline = time.monotonic() + seconds
    while not (value := claim()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(every)
    return value


# Slurm


@dataclass(frozen=True)
class Job:
    id: int
    name: str
    user: str
    state: str
    node: str
    qos: str
    account: str
    restarts: int


def jobs() -> list[Job]:
    form = "JobID:|,Name:|,UserName:|,State:|,NodeList:|,QOS:|,Account:|,RestartCnt"
    found = []
    for line in run(CONTROLLER, f"squeue --noheader --Format='{form}'").splitlines():
        job, name, user, state, node, qos, account, restarts = (field.strip() for field in line.split("|"))
        found.append(Job(int(job), name, user, state, node, qos, account, int(restarts)))
    return found


def tier_job(name: str = JOB_NAME) -> Job | None:
    """The tier's job, running or waiting."""
    return next((job for job in jobs() if job.name == name and job.state != "COMPLETING"), None)


def running_job(name: str = JOB_NAME) -> Job:
    return wait_until(f"{name} is running", lambda: job if (job := tier_job(name)) and job.state == "RUNNING" else None)


def whole_status() -> dict[str, Any]:
    """All that `gleaner status` says."""
    value: dict[str, Any] = json.loads(run(CONTROLLER, "gleaner status --json"))
    return value


def status(tier: str) -> dict[str, Any]:
    """What `gleaner status` says of a tier."""
    lines: list[dict[str, Any]] = json.loads(run(CONTROLLER, "gleaner status --json --tiers"))["tiers"]
    return next(line for line in lines if line["tier"] == tier)


def journal_cursor(unit: str) -> str:
    """Where a unit's journal on the controller ends now."""
    return run(CONTROLLER, f"journalctl -u {unit} -n 0 --show-cursor --no-pager").rpartition("-- cursor: ")[2]


def said_since(unit: str, cursor: str) -> str:
    return run(CONTROLLER, f"journalctl -u {unit} -o cat --no-pager --after-cursor='{cursor}'")


def cut_power(name: str) -> None:
    """For a moment; the connection that brings the order may break with it."""
    with contextlib.suppress(RuntimeError):
        host(name).run("systemctl reboot --force --force")


def comment(job: int) -> str:
    """What `scontrol show job` says as a job's comment."""
    text = run(CONTROLLER, f"scontrol show job {job}")
    return next(
        (line.strip().partition("=")[2] for line in text.splitlines() if line.strip().startswith("Comment=")), ""
    )


def submit(command: str) -> int:
    """An ordinary user's sbatch; gives the job's id."""
    return int(run(CONTROLLER, f"runuser -u alice -- sbatch --parsable --chdir=/tmp --output=/dev/null {command}"))


def cancel(job: int) -> None:
    run(CONTROLLER, f"scancel {job}")


def run_as(user: str, name: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """A program that a user runs on a host; the exit code is the caller's to judge."""
    done = host(name).run(f"runuser -u {user} -- {shlex.join(argv)}")
    return subprocess.CompletedProcess(argv, done.rc, str(done.stdout), str(done.stderr))


def pids(name: str, command: str, user: str = SERVICE_USER) -> list[int]:
    """Processes of a user on a host whose command line has this, the oldest first."""
    found = host(name).run(f"pgrep --uid {user} --full '{command}'")
    return [int(pid) for pid in found.stdout.split()]


def router_pid() -> int:
    """llama-server in router mode; the models are in its children."""
    (pid,) = pids(TIER_NODE, "llama-server --models-dir")
    return pid


def model_pid(model: str) -> int:
    (pid,) = pids(TIER_NODE, f"llama-server .*--alias {model} ")
    return pid


# HTTP


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; status 0 when nobody listened."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(path: str, body: object = None, method: str = "", timeout: float = 120.0, port: int = PORT) -> Answer:
    """One request to the gateway."""
    start = time.monotonic()
    connection = http.client.HTTPConnection(address(CONTROLLER), port, timeout=timeout)
    try:
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
        connection.request(
            method or ("GET" if body is None else "POST"), path, data, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        content = response.read()
    except (ConnectionRefusedError, ConnectionResetError, http.client.RemoteDisconnected):
        return Answer(0, {}, b"", time.monotonic() - start)
    finally:
        connection.close()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, content, time.monotonic() - start)


def send(data: bytes) -> Answer:
    """Bytes for the gateway that no client library would send, and its answer."""
    start = time.monotonic()
    with socket.create_connection((address(CONTROLLER), PORT), ANSWER_SECONDS) as connection:
        connection.sendall(data)
        with contextlib.closing(http.client.HTTPResponse(connection)) as response:
            response.begin()
            content = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, content, time.monotonic() - start)


def complete(model: str, tokens: int = 1, port: int = PORT) -> Answer:
    return ask("/v1/completions", {"model": model, "prompt": "Once upon a time", "max_tokens": tokens}, port=port)


def stream(model: str, tokens: int, port: int = PORT) -> Answer:
    """A stream of so many tokens, read to its end; a whole one ends with `[DONE]`."""
    wish = {"model": model, "prompt": "Once upon a time", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    start = time.monotonic()
    try:
        return ask("/v1/completions", wish, port=port)
    except http.client.IncompleteRead as broken:
        return Answer(200, {}, broken.partial, time.monotonic() - start)


def is_whole(answer: Answer) -> bool:
    return answer.status == 200 and answer.body.rstrip().endswith(b"data: [DONE]")


def model_states() -> dict[str, str]:
    return {entry["id"]: entry["status"]["value"] for entry in ask("/v1/models").json["data"]}


def assert_away(answer: Answer, seconds: float = ANSWER_SECONDS) -> None:
    """What a client is told while a tier is away: promptly, as JSON, and when to come back."""
    assert answer.status == 503, answer
    assert answer.seconds < seconds, answer
    assert answer.headers["content-type"].startswith("application/json"), answer
    assert re.fullmatch(r"[1-9]\d*", answer.headers["retry-after"]), answer
    error = answer.json["error"]
    assert error["message"], answer
    assert error["type"] == "unavailable_error", answer
    assert error["code"] == 503, answer


def wait_slurm_answers() -> None:
    wait_until("slurmctld answers", lambda: host(CONTROLLER).run("scontrol ping").rc == 0)


def wait_served(seconds: float = BACK_SECONDS, port: int = PORT) -> None:
    """The tier answers, and what it answered before then was fit for clients."""
    watch(lambda answers: answers[-1].status == 200, seconds, port=port)


def watch(
    done: Callable[[list[Answer]], bool], seconds: float = BACK_SECONDS, refused: bool = False, port: int = PORT
) -> list[Answer]:
    """Ask /health again and again until done; whatever is not 200 has to be a proper 503.

    `refused`: nobody listening is allowed, too, since the test itself restarts nginx.
    """
    answers: list[Answer] = []
    deadline = time.monotonic() + seconds
    while not answers or not done(answers):
        assert time.monotonic() < deadline, f"not done within {seconds:g} s; the last answer: {answers[-1:]}"
        answer = ask("/health", timeout=ANSWER_SECONDS, port=port)
        if answer.status != 200 and not (refused and answer.status == 0):
            assert_away(answer)
        answers.append(answer)
        time.sleep(0.1)
    return answers


def watch_for(seconds: float, refused: bool = False) -> list[Answer]:
    """Watch what clients get for so long, whatever happens."""
    end = time.monotonic() + seconds
    return watch(lambda _: time.monotonic() >= end, seconds + ANSWER_SECONDS, refused)


def away_and_back(seconds: float = BACK_SECONDS) -> list[Answer]:
    """Watch the tier go and come back."""
    return watch(lambda answers: answers[-1].status == 200 and any(a.status == 503 for a in answers), seconds)


@contextlib.contextmanager
def tier_stopped() -> Iterator[None]:
    """No keeper and no job: the tier is away until the end of the block."""
    run(CONTROLLER, "systemctl stop gleaner-keeper")
    try:
        run(CONTROLLER, f"runuser -u {SERVICE_USER} -- scancel --name={JOB_NAME}")
        wait_until("the job is gone", lambda: not any(job.name == JOB_NAME for job in jobs()))
        wait_until("the gateway has noticed", lambda: ask("/health").status == 503)
        yield
    finally:
        run(CONTROLLER, "systemctl start gleaner-keeper")
        wait_served()
