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
from typing import Any

import jinja2
import pytest
import yaml

from gleaner import engine_build, slurmconf, stage
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
    # The seed's name of it, with .sh, is a link to this: molecule/gateway looks for it, since links are not rendered.
    assert "/usr/local/bin/ai-inference-upstream" in site.paths(CONTROLLER)


def test_clients_find_both_tiers_where_the_seed_has_them(site: Rendered) -> None:
    text = site.text(CONTROLLER, "/etc/nginx/sites-available/ai-inference")
    listened = [re.findall(r"listen (\S+)", server) for server in text.split("\nserver {")[1:]]
    # tailscale serve leads to the sockets.
    assert listened == [
        [*(f"{address}:{port}" for address in ("127.0.0.1", "10.0.0.5")), f"unix:/run/gleaner-tailnet/{tier}.sock"]
        for tier, port in (("fast", 8080), ("reasoning", 8081))
    ]
    for path in ("/etc/gleaner/gateway.json", "/etc/gleaner/keeper.json"):
        assert json.loads(site.text(CONTROLLER, path))["registry"] == f"{SHARED}/ai/endpoints"


def test_the_reasoning_model_has_the_seeds_name_beside_its_own(site: Rendered) -> None:
    arguments = json.loads(site.text(CONTROLLER, f"{SHARED}/ai/plans/reasoning.json"))["server"]["args"]
    assert arguments[arguments.index("--alias") + 1] == "or1-behemoth-72b-q4_k_m,OR1-Behemoth"


def variables(*names: str) -> dict[str, Any]:
    """Of the inventory's files, as they are written."""
    found: dict[str, Any] = {}
    for name in names:
        found |= yaml.safe_load((ROOT / INVENTORY / f"group_vars/all/{name}.yml").read_text())
    return found


def test_paying_jobs_come_first_as_in_the_seed(managed: Rendered) -> None:
    given = variables("cluster", "provide", "slurm")
    policy = slurmconf.accounting_policy(
        {"qos": given["slurm_ai_qos"], "account": given["slurm_ai_account"], "user": given["service_user"]},
        {"qos": given["slurm_preempting_qos"], "account": "chemistry", "users": given["slurm_vasp_users"]},
        given["slurm_grace_seconds"],
    )
    assert policy["qos"] == [
        {"name": "ai_opportunistic", "priority": 100, "grace_time_seconds": 30, "preempt_mode": "requeue"},
        {"name": "vasp_priority", "priority": 1000, "preempt": ["ai_opportunistic"]},
    ]
    assert policy["accounts"][1] == {
        "name": "chemistry", "qos": ["vasp_priority"], "default_qos": "vasp_priority",
    }  # fmt: skip
    lines = managed.text(CONTROLLER, "/etc/slurm/slurm.conf").splitlines()
    partitions = [line.split() for line in lines if line.startswith("PartitionName=")]
    assert [(words[0], "Default=YES" in words) for words in partitions] == [
        ("PartitionName=gpu_vasp", True),
        ("PartitionName=gpu_ai", False),
    ]
    assert "AllowQos=vasp_priority" in partitions[0]
    assert "AllowQos=ai_opportunistic" in partitions[1]


def test_a_slurm_that_is_there_needs_one_secret_and_keeps_its_own(site: Rendered) -> None:
    """It was rendered with `vault_server_key` alone."""
    for host in (CONTROLLER, *NODES):
        assert not site.paths(host) & {"/etc/munge/munge.key", "/etc/slurm/slurmdbd.conf", "/etc/slurm/gres.conf"}


def test_a_node_of_ours_has_its_sockets_and_the_cores_of_its_gpus() -> None:
    """What validate lets an inventory say of them reaches Slurm."""
    node = {
        "cluster_address": "10.0.0.11", "cpus": 40, "sockets": 2, "threads_per_core": 2, "memory_mib": 384000,
        "gpus": [{"model": "v100s", "cores": "0-9", "device": "/dev/nvidia4"}, {"model": "a100"}],
    }  # fmt: skip

    def render(name: str) -> list[str]:
        folder = ROOT / "roles/slurm_controller/templates/etc/slurm"
        template = jinja2.Environment(trim_blocks=True).from_string((folder / name).read_text())
        text = template.render(slurm_controller_nodes={"vasp-01": node}, __slurm_controller_preemption={})
        return [line for line in text.splitlines() if line.startswith("NodeName=")]

    assert render("gres.conf.j2") == [
        "NodeName=vasp-01 Name=gpu Type=v100s File=/dev/nvidia4 Cores=0-9",
        "NodeName=vasp-01 Name=gpu Type=a100 File=/dev/nvidia1",
    ]
    (line,) = render("slurm.conf.j2")
    assert " CPUs=40 Sockets=2 CoresPerSocket=10 ThreadsPerCore=2 RealMemory=384000 Gres=gpu:a100:1,gpu:v100s:1" in line


def test_jobs_have_the_names_and_the_policy_of_the_seed(site: Rendered) -> None:
    for script, name, nodes in (("run-14b", "llama-14b", 1), ("run-72b-distributed", "llama-72b", 3)):
        text = site.text(CONTROLLER, f"{SHARED}/scripts/llama-cpp/{script}.slurm")
        directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, flags=re.MULTILINE))
        assert directives["job-name"] == name
        assert (directives["partition"], directives["qos"]) == ("gpu_ai", "ai_opportunistic")
        assert int(directives["nodes"]) == nodes
        assert "--requeue" in text
        # Five seconds before the end of the grace, of 30.
        assert directives["signal"] == "B:TERM@25"
        assert directives["output"] == f"{SHARED}/ai/logs/%x.log"
        assert f"\nlogs={SHARED}/ai/logs/$SLURM_JOB_ID\n" in text


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
    found = variables("provide")
    assert set(found) == {
        "addresses", "model_files", "slurm_vasp_account", "slurm_vasp_users", "slurm_ai_account", "service_uid",
        "tailnet_users",
    }  # fmt: skip
    # The seed names no other address.
    assert found["addresses"].pop(CONTROLLER) == {"cluster": "10.0.0.5"}
    assert found["addresses"] == {name: {"cluster": None, "rpc": None} for name in NODES}
    assert all(entry == {"source": None, "sha256": None} for entry in found["model_files"].values())
    assert found["slurm_vasp_account"] is found["tailnet_users"] is None
