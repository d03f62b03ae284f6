"""Every file that the roles write for `inventories/beefcake2`, rendered on this machine: its hosts are not asked."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.lab.ansible import ROOT, surroundings

PLUGINS = "tests/render"
INVENTORY = "inventories/beefcake2"
CONTROLLER, NODES = "slurm-ctl", ("vasp-01", "vasp-02", "vasp-03")
SHA256 = "0" * 64
ADDRESSES = {
    name: {"cluster": f"10.0.0.{number}", "rpc": f"10.0.1.{number}"}
    for name, number in zip((CONTROLLER, *NODES), (5, 11, 12, 13))
}
# What only a Slurm of our own wants.
MANAGED_SECRETS = {"vault_munge_key": "m" * 64, "vault_slurmdbd_password": "p" * 64}


@dataclass(frozen=True)
class Rendered:
    """The files of each host below a folder of its own, and which templates of roles they came from."""

    folder: Path
    templates: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> Rendered:
        """What was rendered into a folder before."""
        return cls(folder, frozenset((folder / "index").read_text().splitlines()))

    def text(self, host: str, path: str) -> str:
        return (self.folder / host / path.lstrip("/")).read_text()

    def paths(self, host: str) -> set[str]:
        """Absolute paths of a host's files."""
        folder = self.folder / host
        return {f"/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}


def provided() -> dict[str, object]:
    """What a site has to provide (`group_vars/all/provide.yml`); its Slurm is there already."""
    variables = yaml.safe_load((ROOT / INVENTORY / "group_vars/all/provide.yml").read_text())
    return {
        "addresses": ADDRESSES,
        "slurm_vasp_account": "vasp",
        "model_files": {
            name: {"source": f"https://models.example/{name}.gguf", "sha256": SHA256}
            for name in variables["model_files"]
        },
        "tailnet_users": ["alice@example.com", "bob@example.com"],
        "vault_server_key": "s" * 64,
    }


def render(folder: Path, **variables: object) -> Rendered:
    """Run site.yml over the inventory with plugins that write every file below the folder, and do nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    extra, index = folder / "provided.json", folder / "index"
    secrets = MANAGED_SECRETS if variables.get("slurm_manage_cluster") else {}
    extra.write_text(json.dumps({**provided(), **secrets, **variables}))
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")), "site.yml", "--inventory", INVENTORY,
            "--connection", "local", "--extra-vars", f"@{extra}",
        ],
        cwd=ROOT,
        env={
            **surroundings(),
            "ANSIBLE_STRATEGY": "render",
            "ANSIBLE_STRATEGY_PLUGINS": f"{PLUGINS}/strategy_plugins",
            "ANSIBLE_ACTION_PLUGINS": f"action_plugins:{PLUGINS}/action_plugins",
            "GLEANER_RENDER_TO": str(folder),
            "GLEANER_RENDER_INDEX": str(index),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "whole").touch()
    return Rendered.read(folder)
