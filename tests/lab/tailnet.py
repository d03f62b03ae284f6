"""The lab's own tailnet: headscale on the host coordinator, people on the host laptop."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab import ansible, cluster
from tests.lab.ansible import LAB_ID, Run
from tests.lab.cluster import CONTROLLER

INVENTORY = "molecule/tailnet/inventory"
COORDINATOR, LAPTOP = "coordinator", "laptop"
LAPTOP_ADDRESS = f"10.213.{LAB_ID}.21"
# Who sits at the laptop, and the port of each one's proxy into the tailnet.
PEOPLE = {"alice": 1055, "bob": 1065, "mallory": 1075}
TAG = "tag:llm-gateway"
HOST = "slurm-ctl.tailnet.lab"
HEADSCALE = "/srv/tailnet/headscale --config /etc/headscale.yaml"


@dataclass(frozen=True)
class Answer:
    """What curl got: status 0 when nothing came."""

    status: int
    body: str
    error: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Lab:
    programs: Path
    folder: Path
    keys: list[str] = field(default_factory=list)
    """Every auth key that was handed out."""
    answered_mallory_before: bool = False
    """Whether she reached the gateway while the tailnet admitted everybody to everything."""

    def play(self, name: str, *arguments: str, key: str = "", **variables: object) -> Run:
        """A playbook over the lab with its tailnet; variables, and the auth key if one is given, come in a file."""
        extra = self.folder / "extra.json"
        secret = {"vault_tailscale_auth_key": key} if key else {}
        extra.write_text(json.dumps({"tailnet_programs": str(self.programs), **variables, **secret}))
        try:
            return ansible.playbook(name, "-i", INVENTORY, "-e", f"@{extra}", *arguments)
        finally:
            extra.unlink()

    def headscale(self, *words: str) -> Any:
        return json.loads(cluster.run(COORDINATOR, f"{HEADSCALE} --output json {shlex.join(words)}"))

    def auth_key(self, user: str, tag: str = "") -> str:
        number = next(one["id"] for one in self.headscale("users", "list") if one["name"] == user)
        tags = ["--tags", tag] if tag else []
        self.keys.append(str(self.headscale("preauthkeys", "create", "--user", str(number), *tags)["key"]))
        return self.keys[-1]

    def join(self, person: str) -> None:
        cluster.put(LAPTOP, "/run/key", self.auth_key(person))
        cluster.run(
            LAPTOP,
            f"/srv/tailnet/tailscale --socket=/run/tailscaled-{person}/socket up --auth-key=file:/run/key "
            f"--hostname={person} --login-server=http://10.213.{LAB_ID}.20:8080 --timeout=60s; "
            "code=$?; rm /run/key; exit $code",
        )

    def enforce(self, **variables: object) -> None:
        """Write the policy of the inventory, have headscale try its tests, and put it in force."""
        file = self.folder / "policy.hujson"
        run = self.play("playbooks/tailnet_policy.yml", tailnet_policy_file=str(file), **variables)  # type: ignore[arg-type]
        assert run.code == 0, run.output
        self.set_policy(file.read_text())

    def set_policy(self, text: str) -> None:
        cluster.put(COORDINATOR, "/root/policy", text)
        cluster.run(COORDINATOR, f"{HEADSCALE} policy set --file /root/policy")

    def forget(self) -> None:
        for name in (COORDINATOR, LAPTOP):
            cluster.forget(name)


def serve_status() -> dict[str, str]:
    """Paths that the controller hands on, and where they lead."""
    config = json.loads(cluster.run(CONTROLLER, "tailscale serve status --json")) or {}
    return {
        f"{host.rpartition(':')[2]}{mount}": handler.get("Proxy") or handler.get("Text", "")
        for host, web in (config.get("Web") or {}).items()
        for mount, handler in web["Handlers"].items()
    }


def ask(person: str, path: str, body: object = None, headers: tuple[str, ...] = (), host: str = HOST) -> Answer:
    """A request of somebody at the laptop, through the tailnet."""
    words = ["curl", "-sS", "--max-time", "120", "--proxy", f"socks5h://127.0.0.1:{PEOPLE[person]}"]
    words += ["--write-out", r"\n%{http_code}"]
    for header in headers:
        words += ["--header", header]
    if body is not None:
        words += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
    done = cluster.host(LAPTOP).run(shlex.join([*words, f"http://{host}{path}"]))
    text, _, status = str(done.stdout).rpartition("\n")
    return Answer(int(status or 0), text, str(done.stderr))


def connects(person: str, port: int) -> bool:
    """Whether a connection of somebody at the laptop to a port of the controller is taken, by SOCKS5 (RFC 1928)."""
    host = HOST.encode()
    ask = b"\x05\x01\x00" + b"\x05\x01\x00\x03" + bytes([len(host)]) + host + port.to_bytes(2, "big")
    program = (
        "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 20); s.settimeout(20); "
        "ask = bytes.fromhex(sys.argv[2]); s.sendall(ask[:3]); assert s.recv(2) == b'\\5\\0'; s.sendall(ask[3:]); "
        "answer = s.recv(4); print(answer[1] if answer else 'closed')"
    )
    return cluster.run(LAPTOP, shlex.join(["python3", "-c", program, str(PEOPLE[person]), ask.hex()])) == "0"


def chat(model: str, stream: bool = False, tokens: int = 16) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Name the capital of France."}],
        "max_tokens": tokens,
        "stream": stream,
    }


def log_since(mark: str, tier: str) -> list[str]:
    """Lines of the gateway's access log that came after ``mark`` lines."""
    return cluster.run(CONTROLLER, f"tail -n +{int(mark) + 1} {log(tier)}").splitlines()


def log(tier: str) -> str:
    return f"/var/log/nginx/ai-inference-{tier}.access.log"


def log_mark(tier: str) -> str:
    return cluster.run(CONTROLLER, f"wc -l <{log(tier)}")
