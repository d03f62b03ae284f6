"""The lab as a benchmark meets it: its inventory, its controller over ssh, and this machine in words."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INVENTORY = "inventories/lab"


@dataclass(frozen=True)
class Lab:
    """One lab of this checkout, known by its id."""

    id: str

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"GLEANER_LAB_ID": self.id, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}

    def variable(self, host: str, name: str) -> str:
        """A variable of a host, as Ansible sees it; LookupError when the host does not have it."""
        run = subprocess.run(
            [_tool("ansible"), "-i", INVENTORY, host, "-m", "ansible.builtin.debug", "-a", f"var={name}"],
            cwd=ROOT,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
        )
        value = json.loads(run.stdout.partition("=>")[2])[name]
        if str(value).startswith("VARIABLE IS NOT DEFINED"):
            raise LookupError(f"{name} of {host} in {INVENTORY}: not defined")
        return str(value)

    def ssh(self, host: str) -> list[str]:
        """The command that runs a command on a host as its administrator."""
        return [
            "ssh",
            "-o",
            "BatchMode=yes",
            "-o",
            f"UserKnownHostsFile={self.variable(host, 'lab_access')}/known_hosts-{self.id}",
            "-i",
            self.variable(host, "ansible_ssh_private_key_file"),
            f"{self.variable(host, 'ansible_user')}@{self.variable(host, 'cluster_address')}",
        ]

    def playbook(self, name: str, log: Path) -> str:
        """Run a playbook, with its output in a file; return that output."""
        with log.open("w") as output:
            run = subprocess.run(
                [_tool("ansible-playbook"), "-i", INVENTORY, name],
                cwd=ROOT,
                env=self.environment | {"ANSIBLE_FORCE_COLOR": "0"},
                check=False,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        text = log.read_text()
        if run.returncode:
            raise RuntimeError(f"{name} ended with {run.returncode}; its last lines:\n{text[-2000:]}")
        return text


def lab_from_environment() -> Lab:
    """The lab that GLEANER_LAB_ID names, as for `make`."""
    return Lab(os.environ.get("GLEANER_LAB_ID") or "0")


def output(ssh: list[str], *command: str) -> str:
    """What a command on a host prints."""
    run = subprocess.run([*ssh, shlex.join(command)], check=True, capture_output=True, text=True)
    return (run.stdout + run.stderr).strip()


def machine() -> Mapping[str, str]:
    """This machine and this commit, as rows for a table."""
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    system = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": f"{os.cpu_count()} processors, {memory_mib / 1024:.0f} GiB of memory, "
        f"{system['PRETTY_NAME'].strip(chr(34))}, Linux {platform.release()}",
        "load before the run": f"{os.getloadavg()[0]:.2f} (mean of one minute)",
    }


def commit() -> str:
    """The commit that is measured, and whether files differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    # What the benchmarks write is not what they measure.
    changed = _git("status", "--porcelain", "--", ".", ":!docs")
    return head + (" with changes that are not committed" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def _tool(name: str) -> str:
    """A program of the same virtual environment as this Python."""
    return str(Path(sys.prefix) / "bin" / name)
