"""Who on the tailnet may ask the gateway: the policy file of a site, from its inventory.

A tailnet's policy is made of grants, which only ever add. A grant admits to a port of the gateway's host and cannot tell
paths apart: tiers that differ in who may ask them differ by a port of their own, or by an app capability, which
`tailscale serve` hands to the gateway in a header (https://tailscale.com/docs/features/access-control/grants).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What a new tailnet begins with. As long as it stands, every other rule is in vain.
ALLOW_ALL = (
    {"src": ["*"], "dst": ["*"], "ip": ["*"]},
    {"action": "accept", "src": ["*"], "dst": ["*:*"]},
)
SSH_PORT = 22


@dataclass(frozen=True)
class Path:
    """One tier on the tailnet."""

    tier: str
    mount: str
    port: int
    target: str
    capability: str
    """Empty where whoever reaches the port may ask."""


@dataclass(frozen=True)
class Access:
    """Who may ask which tiers."""

    who: tuple[str, ...]
    """Selectors of the policy: ``alice@example.com``, ``group:ai``, ``tag:ci``, ``autogroup:member``."""
    tiers: tuple[str, ...]
    examples: tuple[str, ...]
    """Users or tags who are to be admitted, for the policy's own tests."""


def grants(tag: str, paths: Sequence[Path], access: Sequence[Access]) -> list[dict[str, Any]]:
    """The grants, one for each set of people and port."""
    found: list[dict[str, Any]] = []
    for entry in access:
        mine = [path for path in paths if path.tier in entry.tiers]
        for port in sorted({path.port for path in mine}):
            capabilities = sorted({path.capability for path in mine if path.port == port and path.capability})
            grant: dict[str, Any] = {"src": list(entry.who), "dst": [tag], "ip": [f"tcp:{port}"]}
            if capabilities:
                grant["app"] = {name: [{}] for name in capabilities}
            found.append(grant)
    return found


def tests(tag: str, paths: Sequence[Path], access: Sequence[Access], strangers: Sequence[str]) -> list[dict[str, Any]]:
    """The policy's own tests: who is admitted where, that nobody reaches ssh by it, and strangers nothing."""
    ports = sorted({path.port for path in paths})
    found = []
    for entry in access:
        open_ports = {path.port for path in paths if path.tier in entry.tiers}
        for who in entry.examples:
            found.append(
                {
                    "src": who,
                    "proto": "tcp",
                    "accept": [f"{tag}:{port}" for port in ports if port in open_ports],
                    "deny": [f"{tag}:{port}" for port in [SSH_PORT, *ports] if port not in open_ports],
                }
            )
    found += [
        {"src": who, "proto": "tcp", "deny": [f"{tag}:{port}" for port in [SSH_PORT, *ports]]} for who in strangers
    ]
    return found


def policy(
    tag: str,
    owners: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    paths: Sequence[Path],
    access: Sequence[Access],
    strangers: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole policy file as data: JSON is HuJSON, too."""
    value: dict[str, Any] = {}
    if groups:
        value["groups"] = {name: list(members) for name, members in groups.items()}
    value["tagOwners"] = {tag: list(owners)}
    value["grants"] = grants(tag, paths, access)
    value["tests"] = tests(tag, paths, access, strangers)
    return value


def is_allow_all(rule: Mapping[str, Any]) -> bool:
    """The default rule of a tailnet, in its new or its old form."""
    return any({key: rule.get(key) for key in one} == one for one in ALLOW_ALL)


def text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
