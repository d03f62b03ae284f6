"""playbooks/validate.yml over whole inventories: what it refuses and in which words, what it prints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.filters.ansible import ROOT, run

SHA256 = "0123456789abcdef" * 4
MODELS = [
    {
        "name": name,
        "source": f"https://models.example/{name}.gguf",
        "sha256": SHA256,
        "header": f"models/{name}.json",
    }
    for name in ("strand-rust-coder-14b-q8_0", "or1-behemoth-72b-q4_k_m")
]
NODES = ("vasp-01", "vasp-02", "vasp-03")
ADDRESSES = {
    "slurm-ctl": {"cluster": "10.0.0.5"},
    **{name: {"cluster": f"10.0.0.{number}", "rpc": f"10.0.1.{number}"} for number, name in enumerate(NODES, 11)},
}
SECRET = "not-to-be-printed-" * 3


def validate(inventory: Path, *more: str) -> tuple[int, str]:
    result = run("ansible-playbook", "playbooks/validate.yml", "-i", str(inventory), *more)
    return result.returncode, result.stdout + result.stderr


def problems(output: str) -> list[str]:
    return re.findall(r"^  - (\S+) = ", output, flags=re.MULTILINE)


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """The inventory of beefcake2 with its gaps filled."""
    copy = tmp_path / "site"
    shutil.copytree(ROOT / "inventories/beefcake2", copy)
    override(
        copy,
        addresses=ADDRESSES,
        slurm_vasp_account="vasp",
        models=MODELS,
        tailnet_users=["alice@example.com"],
        vault_server_key=SECRET,
    )
    return copy


def override(inventory: Path, **variables: Any) -> None:
    """Adds variables that win over those of the same name."""
    path = inventory / "group_vars/all/zz_override.yml"
    before = yaml.safe_load(path.read_text()) if path.exists() else {}
    path.write_text(yaml.safe_dump({**before, **variables}))


def tiers() -> list[dict[str, Any]]:
    text = (ROOT / "inventories/beefcake2/group_vars/all/tiers.yml").read_text()
    value: list[dict[str, Any]] = yaml.safe_load(text)["tiers"]
    return value


def test_beefcake2_lacks_exactly_what_its_administrator_must_fill_in() -> None:
    status, output = validate(ROOT / "inventories/beefcake2")
    assert status != 0
    assert problems(output) == [
        "slurm_vasp_account",
        *(f"hostvars[{name}].{network}_address" for name in NODES for network in ("cluster", "rpc")),
        "models[0].source",
        "models[0].sha256",
        "models[1].source",
        "models[1].sha256",
        "tailnet.groups[group:ai-users]",
        "vault_server_key",
    ]
    assert "hostvars[vasp-02].rpc_address = undefined; wanted an IPv4 address; cure: write the address" in output
    assert "UNREACHABLE" not in output


def test_beefcake2_filled_in_prints_its_plan_and_that_its_tiers_compete(inventory: Path) -> None:
    status, output = validate(inventory, "--check", "--diff")
    assert status == 0, output
    assert re.search(r"fast +vasp-02 gpu0 .* 32768 .* fits", output)
    assert re.search(r"reasoning +vasp-02 gpu0 +0-26 .* 32768 .* fits", output)
    assert re.search(r"reasoning +vasp-03 gpu0 +27-53 .* 32768 .* fits", output)
    assert re.search(r"reasoning +vasp-01 gpu0 +54-79 \+ output .* 32768 .* fits", output)
    assert "warning: fast: tiers[0].nodes = vasp-02, whose GPUs tier reasoning wants too" in output
    assert re.search(r"choice: reasoning: both tiers at once, vasp-02 left to the other .*workers: \[vasp-03\]", output)
    assert "changed=0" in output
    for host in ("vasp-01", "vasp-02", "vasp-03", "slurm-ctl"):
        assert not re.search(rf"^{host} +:", output, flags=re.MULTILINE)


@pytest.mark.parametrize(("managed", "wanted"), [(False, 1), (True, 3)])
def test_secrets_are_wanted_before_any_host_is_asked(inventory: Path, managed: bool, wanted: int) -> None:
    names = ["vault_server_key", "vault_munge_key", "vault_slurmdbd_password"][:wanted]
    override(inventory, slurm_manage_cluster=managed, vault_server_key=None)
    status, output = validate(inventory)
    assert status != 0
    assert problems(output) == names
    assert f"cure: `ansible-vault edit {inventory}/group_vars/all/vault.yml`" in output
    override(inventory, **dict.fromkeys(names, SECRET))
    status, output = validate(inventory, "-vvv")
    assert status == 0, output
    assert SECRET not in output
    override(inventory, vault_server_key=SECRET[:31])
    status, output = validate(inventory, "-vvv")
    assert status != 0
    assert "vault_server_key = 31 characters; wanted a text of 32 to 1024 characters; cure: " in output
    assert SECRET[:31] not in output


def test_lab_can_work() -> None:
    # In a checkout that never had a lab its secrets are not made yet.
    secrets = dict.fromkeys(("vault_server_key", "vault_munge_key", "vault_slurmdbd_password"), SECRET)
    status, output = validate(ROOT / "inventories/lab", "-e", json.dumps(secrets))
    assert status == 0, output


def test_plans_are_json_for_programs(inventory: Path) -> None:
    status, output = validate(inventory, "-e", "plan_format=json")
    assert status == 0, output
    start = output.index("=> {") + 3
    plans = json.JSONDecoder().raw_decode(output[start:])[0]["msg"]
    assert [plan["tier"] for plan in plans] == ["fast", "reasoning"]
    assert plans[0]["server"]["node_port"] == 8080


def test_all_problems_come_in_one_go_before_any_host_is_asked(inventory: Path) -> None:
    fast, reasoning = tiers()
    override(
        inventory,
        tiers=[
            {**fast, "kind": "rooter"},
            {**fast, "name": "second", "job_name": "second", "nodes": ["vasp-04"], "gpus_per_node": 2},
            {**reasoning, "gpus_per_node": 2},
        ],
        models=[{**MODELS[0], "sha256": "beef"}, {**MODELS[1], "header": "models/none.json"}],
    )
    status, output = validate(inventory)
    assert status != 0
    assert problems(output) == [
        "models[0].sha256",
        "models[1].header",
        "tiers[0].kind",
        "tiers[1].nodes[0]",
        "tiers[1].gateway_port",
        "tiers[2].gpus_per_node",
        "tiers[2].gpus_per_node",
        "tiers[2].gpus_per_node",
    ]
    assert "tiers[0].kind = 'rooter'; wanted router or layer_split; cure: did you mean router?" in output
    assert "UNREACHABLE" not in output


def test_limit_does_not_leave_the_inventory_unchecked() -> None:
    status, output = validate(ROOT / "inventories/beefcake2", "--limit", "vasp-02")
    assert status != 0
    assert "models[0].source" in problems(output)
    assert "UNREACHABLE" not in output


def test_what_does_not_fit_is_refused_with_what_does(inventory: Path) -> None:
    name = "second-14b"
    shutil.copy(inventory / f"models/{MODELS[0]['name']}.json", inventory / f"models/{name}.json")
    override(inventory, models=[*MODELS, {**MODELS[0], "name": name, "header": f"models/{name}.json"}])
    status, output = validate(inventory)
    assert status != 0
    assert problems(output) == ["tiers[0].models_max"]
    assert re.search(r"cure: models_max: 1(, or context_tokens: \d+)?$", output, flags=re.MULTILINE)


@pytest.mark.parametrize("group", ["slurm_controller", "slurm_nodes"])
def test_an_empty_group_is_named(inventory: Path, group: str) -> None:
    path = inventory / "hosts.yml"
    hosts = yaml.safe_load(path.read_text())
    hosts["all"]["children"]["cluster"]["children"][group]["hosts"] = {}
    path.write_text(yaml.safe_dump(hosts))
    status, output = validate(inventory)
    assert status != 0
    assert f"groups['{group}'] = " in output
    assert "cure: put the" in output


def test_a_missing_host_variable_is_named_with_its_host(inventory: Path) -> None:
    override(inventory, addresses={**ADDRESSES, "vasp-02": {"cluster": "10.0.0.12"}})
    status, output = validate(inventory)
    assert status != 0
    assert problems(output) == ["hostvars[vasp-02].rpc_address"]
