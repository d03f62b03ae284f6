"""The lab, or another site, as a benchmark meets it: its inventory, its hosts over ssh, and this machine in words."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INVENTORY = "inventories/lab"


@dataclass(frozen=True)
class Lab:
    """One lab of this checkout, known by its id; or the site of another inventory."""

    id: str
    inventory: str = INVENTORY
    # An inventory that adds hosts to it.
    more: str = ""

    @property
    def is_lab(self) -> bool:
        return self.inventory == INVENTORY

    @property
    def environment(self) -> dict[str, str]:
        plain = {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
        return os.environ | plain | {"GLEANER_LAB_ID": self.id, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}

    def value(self, host: str, name: str) -> Any:
        """A variable of a host, as Ansible sees it; LookupError when the host does not have it."""
        run = subprocess.run(
            [_tool("ansible"), *self._inventories(), host, "-m", "ansible.builtin.debug", "-a", f"var={name}"],
            cwd=ROOT,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
        )
        value = json.loads(run.stdout.partition("=>")[2])[name]
        if str(value).startswith("VARIABLE IS NOT DEFINED"):
            raise LookupError(f"{name} of {host} in {self.inventory}: not defined")
        return value

    def variable(self, host: str, name: str) -> str:
        """The same as text."""
        return str(self.value(host, name))

    def ssh(self, host: str) -> list[str]:
        """The command that runs a command on a host as its administrator; on a site with sudo."""
        if not self.is_lab:
            return ["ssh", host, "sudo", "--non-interactive"]
        return ["ssh", "-F", f"{self.variable(host, 'lab_access')}/ssh_config-{self.id}", host]

    def playbook(self, name: str, **environment: str) -> Play:
        """Run a playbook and time it; RuntimeError with its last lines when it fails."""
        began, used = time.monotonic(), _seconds_of_children()
        lines: list[str] = []
        starts: list[tuple[float, str]] = []
        with subprocess.Popen(
            [_tool("ansible-playbook"), *self._inventories(), name],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if heading := re.match(r"(?:TASK|RUNNING HANDLER|PLAY) \[(.*)\]|PLAY RECAP", line):
                    starts.append((time.monotonic(), heading[1] or ""))
        seconds = time.monotonic() - began
        if process.returncode:
            raise RuntimeError(f"{name} ended with {process.returncode}; its last lines:\n{''.join(lines[-40:])}")
        changed = re.findall(r"^(\S+) +: .* changed=([1-9]\d*)", "".join(lines), re.MULTILINE)
        tasks = [(after - start, task) for (start, task), (after, _) in zip(starts, starts[1:])]
        cpu_seconds = _seconds_of_children() - used
        return Play(seconds, {host: int(count) for host, count in changed}, tasks, cpu_seconds)

    def _inventories(self) -> list[str]:
        return ["-i", self.inventory, *(["-i", self.more] if self.more else [])]


@dataclass(frozen=True)
class Play:
    """A run of a playbook: its time, the hosts that it changed, the time of each task, and what it computed here."""

    seconds: float
    changed: Mapping[str, int]
    tasks: Sequence[tuple[float, str]]
    cpu_seconds: float


def lab_from_environment() -> Lab:
    """The lab that GLEANER_LAB_ID names, as for `make`."""
    return Lab(os.environ.get("GLEANER_LAB_ID") or "0")


def output(ssh: list[str], *command: str) -> str:
    """What a command on a host prints."""
    run = subprocess.run([*ssh, shlex.join(command)], check=True, capture_output=True, text=True)
    return (run.stdout + run.stderr).strip()


def put(ssh: list[str], path: str, text: str) -> None:
    """Write a file on a host."""
    subprocess.run([*ssh, shlex.join(["tee", path])], input=text, text=True, check=True, stdout=subprocess.DEVNULL)


def machine() -> Mapping[str, str]:
    """This machine and this commit, as rows for a table."""
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    system = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": f"{os.cpu_count()} processors, {memory_mib / 1024:.0f} GiB of memory, "
        f"{system['PRETTY_NAME'].strip(chr(34))}, Linux {platform.release().partition('-')[0]}",
        "load before the run": f"{os.getloadavg()[0]:.2f} (mean of one minute)",
    }


def commit() -> str:
    """The commit that is measured, and whether files differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    # What the benchmarks write is not what they measure.
    changed = _git("status", "--porcelain", "--", ".", ":!docs")
    return head + (" with changes that are not committed" if changed else "")


def ansible_version() -> str:
    return importlib.metadata.version("ansible-core")


def _seconds_of_children() -> float:
    """Processor time of all that this process has started and that has ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def _tool(name: str) -> str:
    """A program of the same virtual environment as this Python."""
    return str(Path(sys.prefix) / "bin" / name)
