"""The first cluster's inventory, whole: what its hosts would get, checked by the programs that this machine has.

Those that only a host has (nginx, systemd, nft, Slurm) check the same files in `molecule/cluster`.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gleaner import engine_build, stage
from tests.lab.ansible import ROOT
from tests.render.beefcake2 import CONTROLLER, INVENTORY, NODES, Rendered

SHARED = "/cluster/shared"


def test_its_groups_are_the_seeds() -> None:
    ansible = Path(sys.executable).with_name("ansible-inventory")
    graph = subprocess.run(
        [ansible, "-i", INVENTORY, "--graph"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"--(\S+)", graph) == [
        "@ungrouped:", "@cluster:", "@slurm_controller:", CONTROLLER, "@slurm_nodes:", *NODES,
    ]  # fmt: skip


def test_every_template_of_every_role_is_rendered(site: Rendered, managed: Rendered) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "roles/*/templates/*"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    # The lab's own role makes containers, which a cluster has not.
    templates = {path for path in tracked if not path.startswith("roles/lab_host/")}
    # Its models bring chat templates of their own; the lab's tiers have this one written.
    own = {"roles/tier_job/templates/shared/ai/plans/tier.jinja.j2"}
    assert templates - site.templates - managed.templates == own


def test_files_are_where_the_seed_has_them(site: Rendered) -> None:
    assert site.paths(CONTROLLER) >= {
        f"{SHARED}/scripts/llama-cpp/run-14b.slurm",
        f"{SHARED}/scripts/llama-cpp/run-72b-distributed.slurm",
        f"{SHARED}/ai/plans/fast.json",
        f"{SHARED}/ai/plans/reasoning.json",
        "/etc/nginx/sites-available/ai-inference",
        "/etc/nginx/ai-inference/upstream-fast.conf",
        "/etc/nginx/ai-inference/upstream-reasoning.conf",
    }
    link = "/usr/local/bin/ai-inference-upstream"
    assert link in site.paths(CONTROLLER)


def test_jobs_have_the_names_and_the_policy_of_the_seed(site: Rendered) -> None:
    for script, name, nodes in (("run-14b", "llama-14b", 1), ("run-72b-distributed", "llama-72b", 3)):
        text = site.text(CONTROLLER, f"{SHARED}/scripts/llama-cpp/{script}.slurm")
        directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, flags=re.MULTILINE))
        assert directives["job-name"] == name
        assert (directives["partition"], directives["qos"]) == ("gpu_ai", "ai_opportunistic")
        assert int(directives["nodes"]) == nodes
        assert "--requeue" in text


def test_rpc_takes_the_fast_network_and_http_the_other(site: Rendered) -> None:
    plan = json.loads(site.text(CONTROLLER, f"{SHARED}/ai/plans/reasoning.json"))
    assert {node["rpc_address"].rpartition(".")[0] for node in plan["nodes"].values()} == {"10.0.1"}
    assert {node["address"].rpartition(".")[0] for node in plan["nodes"].values()} == {"10.0.0"}
    rpc = plan["server"]["args"][plan["server"]["args"].index("--rpc") + 1]
    assert rpc == "10.0.1.12:50052,10.0.1.13:50052"
    for node in NODES:
        rules = site.text(node, "/etc/gleaner/firewall.nft")
        assert "10.0.1.11" in rules
        assert "50052" in rules


def test_the_servers_run_as_volta_wants_it(site: Rendered) -> None:
    for tier in ("fast", "reasoning"):
        arguments = json.loads(site.text(CONTROLLER, f"{SHARED}/ai/plans/{tier}.json"))["server"]["args"]
        assert arguments[arguments.index("--flash-attn") + 1] == "off"
        assert int(arguments[arguments.index("--gpu-layers") + 1]) > 80
        assert arguments[arguments.index("--fit") + 1] == "off"


@pytest.mark.parametrize("which", ["site", "managed"])
def test_nothing_is_left_to_fill_in(which: str, request: pytest.FixtureRequest) -> None:
    rendered: Rendered = request.getfixturevalue(which)
    for host in (CONTROLLER, *NODES):
        for path in rendered.paths(host):
            if path.endswith(".pyz"):
                continue
            text = rendered.text(host, path)
            assert text.strip(), path
            # Jinja of a chat template is text that llama.cpp reads.
            wrong = r"\{\{|\{%|\bundefined\b|\bNone\b|AnsibleUndefined"
            assert path.endswith(".jinja") or not re.search(wrong, text), (host, path, text)
            if path.endswith(".json"):
                json.loads(text)


def test_every_shell_script_is_clean(site: Rendered) -> None:
    scripts = [
        site.folder / host / path.lstrip("/")
        for host in (CONTROLLER, *NODES)
        for path in site.paths(host)
        if not path.endswith(".pyz") and site.text(host, path).startswith(("#!/bin/sh", "#!/bin/bash"))
    ]
    assert len(scripts) >= 2
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_programs_take_their_configuration(site: Rendered) -> None:
    config = engine_build.Config.load(site.folder / CONTROLLER / "etc/gleaner/engine.json")
    assert config.toolkit is not None
    assert config.toolkit.wanted == {"sm": [70], "compute": []}
    models = {node: stage.Spec.load(site.folder / node / "etc/gleaner/models.json").models for node in NODES}
    assert {node: [model.name for model in models[node]] for node in NODES} == {
        "vasp-01": ["or1-behemoth-72b-q4_k_m"],
        "vasp-02": ["strand-rust-coder-14b-q8_0"],
        # What a worker computes on comes from its head.
        "vasp-03": [],
    }


def test_a_secret_is_in_no_file_but_its_own(managed: Rendered) -> None:
    for host in (CONTROLLER, *NODES):
        for path in managed.paths(host):
            if not path.endswith(".pyz"):
                text = managed.text(host, path)
                assert ("m" * 64 in text) == (path == "/etc/munge/munge.key"), path
                assert ("p" * 64 in text) == (path == "/etc/slurm/slurmdbd.conf"), path
                # Of this one only the hash is ever written.
                assert "s" * 64 not in text, path
                keys = ("/etc/gleaner/server.key", "/etc/nginx/ai-inference/server-key.conf")
                assert (hashlib.sha256(("s" * 64).encode()).hexdigest() in text) == (path in keys), path


def test_what_the_site_must_provide_is_in_one_file() -> None:
    """Until it is there, validate refuses the inventory: `tests/filters/test_validate.py`."""
    found = yaml.safe_load((ROOT / INVENTORY / "group_vars/all/provide.yml").read_text())
    assert set(found) == {"addresses", "model_files"}
    assert all(entry == {"source": None, "sha256": None} for entry in found["model_files"].values())
