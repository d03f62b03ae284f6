"""Stand-ins for what the unit tests lack: Slurm's commands on PATH, and a llama-server.

The programs under test are real processes, started from the zipapp as on a node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gleaner import slurm
from gleaner.engine import Manifest, identity, sums
from tools.build_zipapp import build

# Programs refuse to run as root, and root's own Python may be closed to others.
SERVICE_UID = 64299 if os.geteuid() == 0 else os.geteuid()
PYTHON = "/usr/bin/python3"
SERVER_KEY = "0123456789abcdef" * 4

# A file per command in the fake's folder decides what it answers; `calls` keeps what was asked.
SLURM = """#!/bin/sh
name=$(basename "$0")
echo "$name $*" >> "$FAKE_SLURM/calls"
if [ -e "$FAKE_SLURM/$name.sleep" ]; then sleep "$(cat "$FAKE_SLURM/$name.sleep")"; fi
if [ -e "$FAKE_SLURM/$name.fails" ]; then cat "$FAKE_SLURM/$name.fails" >&2; exit 1; fi
case "$name" in
srun)
    while [ "${1#--}" != "$1" ]; do shift; done
    if [ -z "$FAKE_NODES" ]; then exec "$@"; fi
    for node in $FAKE_NODES; do SLURMD_NODENAME=$node "$@" & done
    wait ;;
scontrol)
    if [ "$1" = --version ]; then echo "slurm 24.11.5"; exit; fi
    if [ "$2" = node ]; then cat "$FAKE_SLURM/nodes" || exit 1; exit; fi
    if [ "$1" = show ]; then cat "$FAKE_SLURM/job" || exit 1; fi
    if [ "$1" = requeue ]; then sed -i 's/PreemptTime=[^ ]*/PreemptTime=None/' "$FAKE_SLURM/job"; fi ;;
squeue) case "$*" in *--nodelist*) cat "$FAKE_SLURM/stays" ;; *) cat "$FAKE_SLURM/queue" ;; esac ;;
sstat) cat "$FAKE_SLURM/memory" ;;
sbatch) cat "$FAKE_SLURM/submitted" ;;
sacct) cat "$FAKE_SLURM/accounting" ;;
esac
"""

# Enough of a router: /health, /v1/models, /slots, completions, its key, children, and ways to misbehave.
SERVER = """#!/usr/bin/python3
import http.server, json, os, signal, subprocess, sys, threading, time
control = os.environ["FAKE_SERVER"]
def has(name):
    return os.path.exists(os.path.join(control, name))
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--list-devices" in sys.argv:
    print(open(os.path.join(control, "devices")).read())
    sys.exit(0)
with open(os.path.join(control, "started"), "a") as stream:
    stream.write(json.dumps({"pid": os.getpid(), "argv": sys.argv, "environment": dict(os.environ)}) + "\\n")
if has("dies"):
    sys.exit(7)
child = subprocess.Popen(["sleep", "1000"])
with open(os.path.join(control, "child"), "w") as stream:
    stream.write(str(child.pid))
def end(*_):
    if not has("ignores-term"):
        os._exit(0)
signal.signal(signal.SIGTERM, end)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_):
        pass
    def do_GET(self):
        print("GET", self.path, flush=True)
        status, value = 200, {"status": "ok"}
        if self.path == "/health" and has("loading"):
            status = 503
        elif self.path != "/health" and self.headers["Authorization"] != "Bearer " + os.environ["LLAMA_API_KEY"]:
            status = 401
        elif self.path.startswith("/v1/models"):
            second = "loading" if has("model-loads") else "unloaded"
            value = {"data": [{"id": "one", "status": {"value": "loaded"}},
                              {"id": "two", "status": {"value": second}}]}
        elif self.path.startswith("/slots"):
            value = [{"id": 0, "is_processing": has("busy")}]
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\\r\\n%s\\r\\n0\\r\\n\\r\\n" % (len(body), body))
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers["Authorization"] == "Bearer " + os.environ["LLAMA_API_KEY"]
        body = json.dumps({"usage": {"completion_tokens": 0 if has("mute") else 8}}).encode()
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True
http.server.ThreadingHTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
"""

# An RPC server: one client at a time, and nothing is said.
RPC_SERVER = """#!/usr/bin/python3
import json, os, socket, sys, time
control = os.environ["FAKE_SERVER"]
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
host = arguments["--host"]
if os.path.exists(os.path.join(control, "deaf-" + host)):
    time.sleep(1000)
listener = socket.create_server((host, int(arguments["--port"])))
with open(os.path.join(control, "workers"), "a") as stream:
    line = {"pid": os.getpid(), "argv": sys.argv, "environment": dict(os.environ)}
    stream.write(json.dumps(line) + "\\n")
while True:
    client, _ = listener.accept()
    with open(os.path.join(control, "probes"), "a") as stream:
        stream.write(host + "\\n")
    client.close()
"""

# What the jobs of these tests are made from.
DIGEST = "0123456789abcdef"

JOB = (
    "JobId={job} JobName=llama-14b UserId=ai-inference(64200) GroupId=ai-inference(64200) MCS_label=N/A "
    "Priority=100 Nice=0 Account=ai QOS=ai_opportunistic JobState={state} Reason={reason} Dependency=(null) "
    "Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode={code} RunTime={ran} TimeLimit={limit} TimeMin=N/A "
    "SubmitTime=2026-11-24T01:00:00 EligibleTime=2026-11-24T01:00:00 AccrueTime=2026-11-24T01:00:00 "
    "StartTime=2026-11-24T01:00:01 EndTime=2026-11-25T01:00:01 Deadline=N/A "
    "PreemptEligibleTime=2026-11-24T01:00:01 PreemptTime={preempted} SuspendTime=None SecsPreSuspend=0 "
    "Partition=gpu_ai NodeList=vasp-02 BatchHost=vasp-02 NumNodes=1 Comment={comment}\n"
)


def job_text(**fields: str) -> str:
    """One line of `scontrol show job -o`."""
    defaults = {
        "job": "41",
        "state": "RUNNING",
        "reason": "None",
        "code": "0:0",
        "ran": "00:10:00",
        "limit": "UNLIMITED",
        "preempted": "None",
        "comment": "gleaner:" + DIGEST,
    }
    return JOB.format(**{**defaults, **fields})


def queue_line(**fields: str) -> str:
    """One line of our squeue format."""
    defaults = {
        "job": "41",
        "name": "llama-14b",
        "state": "RUNNING",
        "restarts": "0",
        "preempted": "N/A",
        "start": "2026-11-24T01:00:01",
        "ran": "10:00",
        "nodes": "vasp-02",
        "reason": "None",
        "comment": "gleaner:" + DIGEST,
    }
    return "".join(f"{value:<24}|" for value in {**defaults, **fields}.values()) + "\n"


# Slurm 24.11 with -d; 22.05 lacks some fields that are not read.
NODE = (
    "NodeName={name} Arch=x86_64 CoresPerSocket=8 CPUAlloc={cpus_held} CPUEfctv={cpus} CPUTot={cpus} CPULoad=0.12 "
    "AvailableFeatures=(null) ActiveFeatures=(null) Gres=gpu:v100s:{gpus}(S:0) GresDrain=N/A "
    "GresUsed=gpu:v100s:{gpus_held}(IDX:N/A) NodeAddr={name} NodeHostName={name} Version=24.11.5 "
    "OS=Linux 6.12.0 #1 SMP Debian RealMemory={mem_mib} AllocMem={mem_held_mib} FreeMem=1000 Sockets=2 Boards=1 "
    "State={state} ThreadsPerCore={threads_per_core} TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A Partitions=gpu_ai,vasp "
    "BootTime=2026-11-24T01:00:00 SlurmdStartTime=2026-11-24T01:00:00 LastBusyTime=2026-11-24T01:00:00 "
    "ResumeAfterTime=None CfgTRES=cpu={cpus},mem={mem_mib}M,gres/gpu={gpus} AllocTRES= CurrentWatts=0 AveWatts=0\n"
)


def node_line(node: slurm.Node, state: str) -> str:
    """One line of `scontrol show node -o -d`."""
    return NODE.format(**{**dataclasses.asdict(node), "state": state})


def wait_for(what: Callable[[], Any], seconds: float = 10.0) -> Any:
    """The first true answer; a failure when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := what():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Home:
    """A folder that the service user may write, with fake commands, engine, plan and registry."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="gleaner-test-"))
        self.slurm, self.server = self.root / "slurm", self.root / "server"
        self.registry, self.plans = self.root / "ai" / "endpoints", self.root / "ai" / "plans"
        self.events = self.root / "ai" / "events"
        self.bin, self.engine = self.root / "bin", self.root / "engine" / "bin"
        for folder in (self.slurm, self.server, self.registry, self.plans, self.events, self.bin, self.engine):
            folder.mkdir(parents=True)
        for command in ("srun", "scontrol", "squeue", "sbatch", "scancel", "sacct", "sstat"):
            self.program(self.bin / command, SLURM)
        self.program(self.engine / "llama-server", SERVER)
        self.program(self.engine / "ggml-rpc-server", RPC_SERVER)
        self.publish()
        self.pyz = build(self.root)
        self.port = free_port()
        self.set(self.slurm / "job", job_text())
        self.set(self.slurm / "queue", "")
        self.set(self.slurm / "submitted", "41\n")
        self.set(self.slurm / "accounting", "")
        self.set(self.slurm / "stays", "")
        self.set(self.slurm / "memory", "")
        self.set(self.root / "server.key", SERVER_KEY + "\n")
        for path in [self.root, *self.root.rglob("*")]:
            os.chown(path, SERVICE_UID, SERVICE_UID)
        self.children: list[subprocess.Popen[str]] = []

    def publish(self) -> dict[str, str]:
        """Write the manifest of the engine as it is now; what a supervisor tells its agents of it."""
        prefix = self.engine.parent
        Manifest("key", "1", "cpu", {}, "c++", "x86-64-v3", (), sums(prefix)).write(prefix)
        return {"prefix": str(prefix), "manifest": identity(prefix), "memory": str(self.root / "engine.json")}

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def set(self, path: Path, text: str = "") -> None:
        """Write a control file whole, readable by the service user."""
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text)
        os.chown(temporary, SERVICE_UID, SERVICE_UID)
        temporary.replace(path)

    @property
    def calls(self) -> list[str]:
        try:
            return (self.slurm / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []

    def calls_of(self, command: str) -> list[str]:
        return [call for call in self.calls if call.startswith(command)]

    @property
    def started(self) -> list[dict[str, Any]]:
        """What each start of the fake server saw."""
        return self._starts("started")

    @property
    def workers(self) -> list[dict[str, Any]]:
        """What each start of a fake RPC server saw."""
        return self._starts("workers")

    def _starts(self, name: str) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in (self.server / name).read_text().splitlines()]
        except FileNotFoundError:
            return []

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "FAKE_SLURM": str(self.slurm),
            "FAKE_SERVER": str(self.server),
            "GLEANER_SERVER_KEY_FILE": str(self.root / "server.key"),
            **more,
        }

    def gateway_config(self) -> dict[str, Any]:
        """What /etc/gleaner/gateway.json says, for one tier."""
        nodes = {"vasp-02": "10.0.0.12"}
        tier = {"tier": "fast", "job_name": "llama-14b", "node_port": 8080, "nodes": nodes, "supervisors": nodes}
        return {
            "v": 1,
            "registry": str(self.registry),
            "service_user": "ai-inference",
            "poll_seconds": 1,
            "stale_seconds": 10,
            "flags_dir": str(self.root),
            "upstream_dir": str(self.root),
            "tiers": [tier],
        }

    def keeper_config(self, script: Path) -> dict[str, Any]:
        """What /etc/gleaner/keeper.json says, for one tier."""
        need = {
            "priority": 10,
            "nodes": ["vasp-02"],
            "node_count": 1,
            "gpus_per_node": 1,
            "cpus_per_node": 8,
            "mem_mib": 65536,
        }
        return {
            "v": 1,
            "service_user": "ai-inference",
            "poll_seconds": 0.1,
            "yield_seconds": 30,
            "accounting_seconds": 120,
            "claim_after_seconds": 60,
            "lost_seconds": 60,
            "registry": str(self.registry),
            "state": str(self.root / "keeper-state.json"),
            "tiers": [{"tier": "fast", "job_name": "llama-14b", "script": str(script), "digest": DIGEST, "need": need}],
        }

    def start(self, *argv: str, **environment: str) -> subprocess.Popen[str]:
        """A gleaner program, as the service user, its log in `<command>.log`."""
        with (self.root / f"{argv[0]}.log").open("a") as log:
            os.fchown(log.fileno(), SERVICE_UID, SERVICE_UID)
            child = subprocess.Popen(
                [PYTHON, str(self.pyz), *argv],
                env=self.environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                cwd=self.root,
                start_new_session=True,
                user=SERVICE_UID if os.geteuid() == 0 else None,
                group=SERVICE_UID if os.geteuid() == 0 else None,
            )
        self.children.append(child)
        return child

    def log(self, command: str) -> str:
        return (self.root / f"{command}.log").read_text()

    def close(self) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(10)
        for start in [*self.started, *self.workers]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(start["pid"], signal.SIGKILL)
        wait_for(self._removed)

    def _removed(self) -> bool:
        # An agent that has just lost its supervisor writes its last words meanwhile.
        with contextlib.suppress(OSError):
            shutil.rmtree(self.root)
        return not self.root.exists()


@contextlib.contextmanager
def home() -> Iterator[Home]:
    place = Home()
    try:
        yield place
    except BaseException:
        for log in sorted([*place.root.glob("*.log"), *place.root.glob("ai/logs/*/*.log")]):
            print(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        raise
    finally:
        place.close()
