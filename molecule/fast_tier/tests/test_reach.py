"""Who reaches llama-server and the processes of its models: the gateway, root and the service user, nobody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.lab import cluster
from tests.lab.ansible import ROOT, playbook, succeed
from tests.lab.cluster import CONTROLLER, NODES, PORT, SERVICE_USER, SMOLLM2, TIER_NODE, TINY, run

REFUSED = "ConnectionRefusedError: [Errno 111] Connection refused"
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
ASK = """
import sys, urllib.error, urllib.request
url, key_file, body = sys.argv[1:]
headers = {"Content-Type": "application/json"}
if key_file:
    with open(key_file) as file:
        headers["Authorization"] = "Bearer " + file.read().strip()
request = urllib.request.Request(url, body.encode() or None, headers)
try:
    print(urllib.request.urlopen(request, timeout=60).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""
KEY_FILE = "/etc/gleaner/server.key"
# What would show, or spend, what is somebody else's; each with a body when it is a POST.
PRIVATE = [
    ("/slots", ""),
    ("/props", ""),
    ("/v1/models", ""),
    ("/v1/completions", '{"prompt": "x", "max_tokens": 1}'),
    ("/tokenize", '{"content": "x"}'),
]


def connect(user: str, name: str, address: str, port: int = PORT) -> str:
    """What a TCP connection by a user of a host meets."""
    done = cluster.run_as(user, name, "python3", "-c", CONNECT, address, str(port))
    return "open" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def status(user: str, name: str, url: str, body: str = "", key_file: str = "") -> int:
    """The HTTP status that a user of a host gets."""
    done = cluster.run_as(user, name, "python3", "-c", ASK, url, key_file, body)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def model_ports() -> set[int]:
    """Where the processes of the loaded models listen."""
    lines = run(TIER_NODE, "ss --no-header --listening --tcp --numeric --processes").splitlines()
    places = {line.split()[3].rpartition(":") for line in lines if "llama-server" in line}
    return {int(port) for address, _, port in places if address == "127.0.0.1"}


def test_of_the_hosts_only_the_controller_reaches_its_port() -> None:
    address = cluster.address(TIER_NODE)
    assert connect("root", CONTROLLER, address) == "open"
    for name in set(NODES) - {TIER_NODE}:
        assert connect("root", name, address) == REFUSED


def test_on_its_node_only_root_and_the_service_user_reach_its_port() -> None:
    address = cluster.address(TIER_NODE)
    for user in ("root", SERVICE_USER):
        assert connect(user, TIER_NODE, address) == "open"
    for user in ("alice", "nobody"):
        assert connect(user, TIER_NODE, address) == REFUSED


def test_the_ports_of_other_programs_are_their_own_affair() -> None:
    assert connect("alice", TIER_NODE, "127.0.0.1", 22) == "open"


def test_a_models_process_answers_nobody_without_the_key() -> None:
    for model in (SMOLLM2, TINY):
        assert cluster.complete(model).status == 200
    ports = model_ports()
    assert len(ports) == 2
    for port in ports:
        url = f"http://127.0.0.1:{port}"
        for path, body in PRIVATE:
            assert status("alice", TIER_NODE, url + path, body) == 401, path
            # It would have been answered.
            assert status(SERVICE_USER, TIER_NODE, url + path, body, KEY_FILE) == 200, path


def test_the_router_answers_no_user_of_the_controller_without_the_key() -> None:
    """nginx lets through what clients may ask; nobody goes around it."""
    assert cluster.complete(SMOLLM2).status == 200
    url = f"http://{cluster.address(TIER_NODE)}:{PORT}"
    unload = json.dumps({"model": SMOLLM2})
    slots = f"/slots?model={SMOLLM2}&autoload=false"
    for path, body in (("/v1/models", ""), (slots, ""), ("/models/unload", unload)):
        assert status("alice", CONTROLLER, url + path, body) == 401, path
    assert cluster.model_states()[SMOLLM2] == "loaded"
    assert status("root", CONTROLLER, url + slots, key_file=KEY_FILE) == 200


@pytest.mark.parametrize("name", [CONTROLLER, *NODES])
def test_the_key_is_in_files_that_users_cannot_read(name: str) -> None:
    paths = [KEY_FILE, *(["/etc/nginx/ai-inference/server-key.conf"] if name == CONTROLLER else [])]
    for path in paths:
        refused = cluster.run_as("alice", name, "cat", path)
        assert refused.returncode != 0
        assert "Permission denied" in refused.stderr


@pytest.fixture
def port_to_come(tmp_path: Path) -> Path:
    """Variables by which the tier moves to another port, and a model comes that is not what it should be."""
    variables = ROOT / "inventories/lab/group_vars/all"
    tiers = yaml.safe_load((variables / "tiers.yml").read_text())["tiers"]
    models = yaml.safe_load((variables / "models.yml").read_text())["models"]
    (tiny,) = (model for model in models if model["name"] == TINY)
    file = tmp_path / "moved.json"
    moved = [{**tier, "gateway_port": PORT + 10} if tier["name"] == "fast" else tier for tier in tiers]
    file.write_text(json.dumps({"tiers": moved, "models": [*models, {**tiny, "name": "other", "sha256": "0" * 64}]}))
    return file


def test_ports_are_closed_before_a_plan_names_them_and_while_an_old_server_listens(port_to_come: Path) -> None:
    address = cluster.address(TIER_NODE)
    listener = "import socket, time; s = socket.create_server(('', PORT)); time.sleep(600)".replace(
        "PORT", f"{PORT + 10}"
    )
    run(TIER_NODE, f'systemd-run --quiet --unit=test-listener --uid={SERVICE_USER} python3 -c "{listener}"')
    try:
        cluster.wait_until("it listens", lambda: connect("root", "vasp-01", address, PORT + 10) == "open")
        # The model is refused after the firewall was written: a run that fails must not leave a port open.
        failed = playbook("playbooks/tiers.yml", "--limit", TIER_NODE, "-e", f"@{port_to_come}")
        assert failed.failed == {TIER_NODE}, failed.output
        assert "other: sha256" in failed.text
        for port in (PORT, PORT + 10):
            assert connect("root", "vasp-01", address, port) == REFUSED
            assert connect("alice", TIER_NODE, address, port) == REFUSED
            assert connect("root", CONTROLLER, address, port) == "open"
        assert cluster.complete(SMOLLM2).status == 200
    finally:
        run(TIER_NODE, "systemctl stop test-listener")
        succeed("playbooks/tiers.yml", "--limit", TIER_NODE)
        run(TIER_NODE, "systemctl restart gleaner-firewall")
    assert connect("root", "vasp-01", address) == REFUSED
