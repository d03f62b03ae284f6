"""The README's commands, on a lab that serves. A command without a line in PRINTS fails."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import readme
from tests.lab import cluster, split
from tests.lab.ansible import ROOT, Run

# What is expected of each command, by its beginning.
PRINTS = {
    ".venv/bin/ansible-playbook -i inventories/SITE playbooks/validate.yml": r"failed=0",
    ".venv/bin/ansible-playbook -i inventories/SITE site.yml": r"failed=0",
    ".venv/bin/ansible-playbook -i inventories/SITE playbooks/tier.yml": r"reasoning: (held|loading|queued|serving)",
    "curl -s http://10.213.0.10:8080/health": r'\{"status":"ok"\}',
    "curl -s http://10.213.0.10:8080/v1/models": r'"smollm2-135m-instruct-q4_1"',
    "curl -s http://10.213.0.10:8081/v1/models": r'"smollm2-135m-thinking-q4_1"',
    "tail -n 5 /cluster/shared/ai/logs/$(": r"client connection",
    "gleaner status": r"fast +serving",
    "gleaner log": r"Z (router|supervisor|updater|keeper) .*\S",
    "gleaner report": r"others waited for us",
    "squeue": r"llama-14",
    "sinfo": r"vasp-03",
    "journalctl -u gleaner-keeper": r"fast: job \d+",
    "journalctl -u gleaner-upstream": r"fast: ",
    "tail -n 20 /cluster/shared/ai/logs/$(": r"\S",
    "tail -n 20 /cluster/shared/ai/logs/llama-14b.log": r"",
    "cat /cluster/shared/ai/endpoints/fast.json": r'"host":"vasp-02"',
    "tail -n 5 /var/log/nginx/ai-inference-fast.access.log": r"/health",
    "systemctl restart": r"",
}


NOTHING = dict.fromkeys((*cluster.HOSTS, "localhost"), 0)


@pytest.fixture(autouse=True)
def _served(request: pytest.FixtureRequest) -> None:
    cluster.wait_served()
    # The one before has held this tier.
    if "state=started" not in str(request.node.callspec.params["command"]):
        split.wait_served()


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays_held() -> Iterator[None]:
    yield
    if cluster.status("reasoning")["held"]:
        cluster.run(cluster.CONTROLLER, "gleaner tier reasoning started")


def wanted(command: str) -> str:
    """The most exact line for a command."""
    return PRINTS[max((begin for begin in PRINTS if command.startswith(begin)), key=len)]


@pytest.mark.parametrize("command", readme.on_this_machine())
def test_command_on_this_machine(command: str) -> None:
    mine = (
        command.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
        .replace("inventories/SITE", "inventories/lab")
        .replace("http://10.213.0.10:", f"http://{cluster.address(cluster.CONTROLLER)}:")
    )
    done = subprocess.run(mine, shell=True, cwd=ROOT, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(wanted(command), done.stdout), done.stdout
    if "site.yml" in command:
        assert Run(done.returncode, done.stdout).changed == NOTHING, "a second run, whole or dry, changes nothing"


@pytest.mark.parametrize("command", readme.on_the_controller())
def test_command_on_the_controller(command: str) -> None:
    assert re.search(wanted(command), cluster.run(cluster.CONTROLLER, command))
