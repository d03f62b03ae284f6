"""What the guide for clients tells of a site: where its tiers are, what they serve, how much they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gleaner import site, tailnet


def facts(value: Mapping[str, Any]) -> dict[str, Any]:
    """Host, tiers and their URLs, as the guide's template wants them.

    Reads of a site no more than that takes, so that the guide of an inventory can be read that still lacks addresses or
    sums. Raises KeyError where a tier or the tailnet itself is not whole.
    """
    ports = site.gateway_ports(value)
    split = {tier["model"] for tier in value["tiers"] if tier["kind"] == "layer_split"}
    net = None
    if value.get("tailnet") is not None:
        net = tailnet.read({**value["tailnet"], "groups": {}}, ports)
    ways = {path.tier: path for path in reversed(net.paths)} if net else {}
    tiers = []
    for tier in value["tiers"]:
        way = ways.get(tier["name"])
        drain = tier.get("drain_seconds")
        inside = f"http://{_inside(value)}:{tier['gateway_port']}/"
        reasons = tier["kind"] == "layer_split" and tier.get("reasoning_format") != "none"
        tiers.append(
            {
                "name": tier["name"],
                "kind": tier["kind"],
                "url": net.url(way) if net and way else inside,
                "inside_url": inside,
                "on_tailnet": way is not None,
                "port": tier["gateway_port"],
                "capability": way.capability if way else "",
                "gpus": tier.get("gpus_per_node") or 1 if tier["kind"] == "router" else 1 + len(tier["workers"]),
                "models": [_names(model) for model in _models(value, tier, split)],
                "models_max": tier.get("models_max") or site.Tier.models_max,
                "context_tokens": tier["context_tokens"],
                "parallel": tier.get("parallel") or site.Tier.parallel,
                "drain_seconds": site.Tier.drain_seconds if drain is None else drain,
                "reasons": reasons,
            }
        )
    return {
        "cluster_name": value["cluster_name"],
        "controller": value["controller"],
        "host": net.host if net else None,
        "tiers": tiers,
    }


def _inside(value: Mapping[str, Any]) -> str:
    """Where the gateway listens for the cluster's own network: the first such address, or the controller's own."""
    others = [str(one) for one in value.get("gateway_listen") or [] if not str(one).startswith(("127.", "[::1]"))]
    address: str = (others or [value["controller_address"] or value["controller"]])[0]
    return address


def _models(value: Mapping[str, Any], tier: Mapping[str, Any], split: set[str]) -> list[Mapping[str, Any]]:
    """As ``Site.models_of``: a router tier without ``models`` serves all that no layer-split tier names."""
    if tier["kind"] == "layer_split":
        wanted = {tier["model"]}
    else:
        wanted = set(tier.get("models") or {model["name"] for model in value["models"]} - split)
    return [model for model in value["models"] if model["name"] in wanted]


def _names(model: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": model["name"], "aliases": list(model.get("aliases") or [])}
