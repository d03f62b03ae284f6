"""Filters that lead to gleaner's own arithmetic: check, convert, call a pure function."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Ansible loads this file by its path and knows nothing of src/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gleaner import cuda, digest, guide, plan, site, sizing, slurmconf, tailnet
from gleaner import plan_changes as changes_of_plans

_NODE_VARIABLES = ("cluster_address", "rpc_address", "cpus", "memory_mib", "gpus", "sockets", "threads_per_core")


def _plain(value: Any) -> Any:
    """Lazy and tagged values of a template as builtins; what JSON lacks stays, to be called a problem."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def site_nodes(names: Iterable[str], hostvars: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The declared nodes of a site; a variable that a host lacks is left out, for site_problems to name."""
    # Ansible puts a host's variables together anew each time that they are asked for.
    known = {str(name): hostvars[name] for name in names}
    return {
        name: {key: _plain(variables[key]) for key in _NODE_VARIABLES if key in variables}
        for name, variables in known.items()
    }


def tiers_of_node(value: Iterable[Mapping[str, Any]], node: str) -> list[str]:
    return site.places_of_node(_plain(list(value)), str(node))


def _problem(problem: site.Problem) -> dict[str, str]:
    return {
        "variable": problem.variable,
        "got": problem.got,
        "wanted": problem.wanted,
        "cure": problem.cure,
        "text": str(problem),
    }


def site_problems(value: Mapping[str, Any]) -> list[dict[str, str]]:
    whole = _plain(value)
    return [_problem(problem) for problem in plan.problems(whole, site.read_headers(whole))]


def site_examined(value: Mapping[str, Any], secrets: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    whole = _plain(value)
    found, plans = plan.examine(whole, site.read_headers(whole))
    found = [*found, *site.secret_problems(whole, _plain(secrets))]
    return {"problems": [_problem(problem) for problem in found], "plans": plans}


def tier_plan(value: Mapping[str, Any], tier: str) -> dict[str, Any]:
    whole = _plain(value)
    return plan.plan_tier(whole, str(tier), site.read_headers(whole))


def tier_digest(value: Mapping[str, Any], script: str) -> str:
    return digest.of(_plain(value), str(script))


def tensor_split(value: int, memory: Iterable[float]) -> dict[str, Any]:
    return sizing.tensor_split(_plain(value), _plain(memory))


def memory_plan(value: Mapping[str, Any], wishes: Mapping[str, Any], devices: Iterable[Any]) -> dict[str, Any]:
    return sizing.memory_plan(_plain(value), _plain(wishes), _plain(devices))


def site_plans(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    whole = _plain(value)
    headers = site.read_headers(whole)
    return [plan.plan_tier(whole, tier["name"], headers) for tier in whole["tiers"]]


def plan_table(value: Iterable[Mapping[str, Any]]) -> str:
    return plan.table(_plain(list(value)))


def plan_changes(value: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> list[str]:
    return changes_of_plans.changes(_plain(list(value)), _plain(list(after)))


def node_models(value: Mapping[str, Any], node: str) -> list[dict[str, Any]]:
    whole = _plain(value)
    return site.node_models(whole, site.read_headers(whole), str(node))


def _tailnet(value: Mapping[str, Any]) -> tailnet.Tailnet:
    whole = _plain(value)
    return tailnet.read(whole["tailnet"], site.gateway_ports(whole))


def tailnet_paths(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    return tailnet.served(_tailnet(value))


def tailnet_superseded(value: Mapping[str, Any]) -> list[str]:
    ports = site.gateway_ports(_plain(value)).values()
    return [f"http://{host}:{port}" for port in ports for host in ("127.0.0.1", "localhost")]


def tailnet_capabilities(value: Mapping[str, Any]) -> dict[str, str]:
    return {path.tier: path.capability for path in _tailnet(value).paths if path.capability}


def tailnet_policy(value: Mapping[str, Any]) -> str:
    return tailnet.policy_text(_tailnet(value))


def guide_facts(value: Mapping[str, Any]) -> dict[str, Any]:
    return guide.facts(_plain(value))


def slurm_version_of(value: str) -> str:
    return slurmconf.version_of(str(value))


def slurm_preemption_settings(version: str) -> dict[str, str]:
    return slurmconf.preemption_settings(str(version))


def slurm_policy_gap(show_config: str, version: str) -> list[str]:
    return slurmconf.policy_gap(str(show_config), str(version))


def slurm_conf_nodes(text: str) -> list[str]:
    return slurmconf.nodes(str(text))


def slurm_by_hand(lines: Iterable[str], show_config: str) -> list[str]:
    return slurmconf.by_hand(_plain(list(lines)), str(show_config))


def slurm_partition_gap(
    show_partition: str, wanted: Iterable[Mapping[str, Any]], site_nodes: Iterable[str], groups: Iterable[str] = ()
) -> list[str]:
    asked = (_plain(list(wanted)), _plain(list(site_nodes)), _plain(list(groups)))
    return slurmconf.partition_gap(str(show_partition), *asked)


def slurm_cluster_problems(
    show_config: str,
    show_partition: str,
    show_node: str,
    wanted: Mapping[str, Any],
    plans: Iterable[Mapping[str, Any]],
) -> list[str]:
    shown = (str(show_config), str(show_partition), str(show_node))
    return [str(problem) for problem in slurmconf.cluster_problems(*shown, _plain(wanted), _plain(list(plans)))]


def slurm_waiting_qos(show_qos: str, ai_qos: str, paying: Iterable[str]) -> list[str]:
    return slurmconf.waiting_qos(str(show_qos), str(ai_qos), _plain(list(paying)))


def slurm_conf_included(text: str, path: str) -> list[str]:
    return slurmconf.included(str(text), str(path))


def slurm_conf_with(files: Mapping[str, str], lines: Iterable[str], partitions: Iterable[str] = ()) -> dict[str, str]:
    return slurmconf.with_lines(_plain(files), _plain(list(lines)), _plain(list(partitions)))


def slurm_accounting_policy(
    ai: Mapping[str, Any], paying: Mapping[str, Any], grace_seconds: int, managed: bool = True
) -> dict[str, list[dict[str, Any]]]:
    return slurmconf.accounting_policy(_plain(ai), _plain(paying), int(grace_seconds), bool(managed))


def apt_driver_changes(simulated: str, packages: str, loaded: bool) -> list[str]:
    return cuda.driver_changes(str(simulated), str(packages), bool(loaded))


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "apt_driver_changes": apt_driver_changes,
            "guide_facts": guide_facts,
            "memory_plan": memory_plan,
            "node_models": node_models,
            "plan_changes": plan_changes,
            "plan_table": plan_table,
            "site_examined": site_examined,
            "site_nodes": site_nodes,
            "site_plans": site_plans,
            "site_problems": site_problems,
            "slurm_accounting_policy": slurm_accounting_policy,
            "slurm_conf_nodes": slurm_conf_nodes,
            "slurm_by_hand": slurm_by_hand,
            "slurm_cluster_problems": slurm_cluster_problems,
            "slurm_conf_included": slurm_conf_included,
            "slurm_conf_with": slurm_conf_with,
            "slurm_partition_gap": slurm_partition_gap,
            "slurm_policy_gap": slurm_policy_gap,
            "slurm_preemption_settings": slurm_preemption_settings,
            "slurm_version_of": slurm_version_of,
            "slurm_waiting_qos": slurm_waiting_qos,
            "tailnet_capabilities": tailnet_capabilities,
            "tailnet_paths": tailnet_paths,
            "tailnet_policy": tailnet_policy,
            "tailnet_superseded": tailnet_superseded,
            "tensor_split": tensor_split,
            "tier_digest": tier_digest,
            "tier_plan": tier_plan,
            "tiers_of_node": tiers_of_node,
        }
