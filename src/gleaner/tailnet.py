"""The way in from a tailnet: which path leads to which tier, and the policy file that says who may ask.

A policy is made of grants, which only ever add. A grant admits to a port of the gateway's host and cannot tell paths
apart: tiers that differ in who may ask them differ by a port of their own, or by an app capability, which
`tailscale serve` hands to the gateway in a header (https://tailscale.com/docs/features/access-control/grants).

What serve tells of who asks is believed on sockets that root alone reaches. The loopback address would not do:
tailscaled, which is root, connects there for others, too, when ssh forwards a port or a node has its network in
userspace.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gleaner.site import Checker

# What a new tailnet begins with, in the new and in the old form. As long as it stands, every other rule is in vain.
ALLOW_ALL = (
    {"grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]},
    {"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]},
)
HTTPS_PORT, HTTP_PORT = 443, 80
SSH_PORT = 22
# Of the role gateway: a folder of root's, with a socket for each tier.
SOCKETS = "/run/gleaner-tailnet"
# What clients write behind a tier's path begins with one of these.
API = ("v1", "health")

_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DOMAIN = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9-]{2,63}")
_MOUNT = re.compile(r"/([A-Za-z0-9_~-][A-Za-z0-9._~-]*/)*")
_TAG = re.compile(r"tag:[A-Za-z][A-Za-z0-9-]{0,62}")
_GROUP = re.compile(r"group:[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
# headscale's users that no identity provider knows end with the @.
_USER = re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{0,128}")
_AUTOGROUP = re.compile("autogroup:(member|tagged|admin|owner|it-admin|network-admin|billing-admin|auditor|shared)")
_SERVICE = re.compile(r"svc:[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# What `tailscale serve --accept-app-caps` takes.
_CAPABILITY = re.compile(r"([a-z0-9-]+\.)+[a-z]{2,}/[A-Za-z0-9-]+(/[A-Za-z0-9-]+)*")
_EXAMPLES = {_USER: "alice@example.com", _GROUP: "group:ai-users", _TAG: "tag:ci", _AUTOGROUP: "autogroup:member"}

_KEYS = ("hostname", "domain", "https", "tag", "tag_owners", "service", "groups", "paths", "access", "outsiders")
_PATH_KEYS = ("path", "tier", "port", "capability")
_ACCESS_KEYS = ("who", "tiers")


@dataclass(frozen=True)
class Path:
    """One way to a tier."""

    tier: str
    mount: str
    """What is stripped from requests: ``/reasoning/v1/models`` becomes ``/v1/models``."""
    port: int
    target: str
    gateway_port: int
    """Where the tier answers on the cluster's own network."""
    capability: str = ""
    """Without it the gateway refuses who comes this way; empty where whoever reaches the port may ask."""


@dataclass(frozen=True)
class Access:
    """Who may ask which tiers."""

    who: tuple[str, ...]
    """Selectors of the policy: ``alice@example.com``, ``group:ai-users``, ``tag:ci``, ``autogroup:member``."""
    tiers: tuple[str, ...]


@dataclass(frozen=True)
class Tailnet:
    hostname: str
    domain: str
    https: bool
    tag: str
    tag_owners: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    paths: tuple[Path, ...]
    access: tuple[Access, ...]
    service: str = ""
    """A Tailscale Service, ``svc:llm``, by whose name the paths are there, too; empty for none."""
    outsiders: tuple[str, ...] = ()
    """Users and tags whom the policy's own tests are to find refused."""

    @property
    def host(self) -> str:
        return f"{self.hostname}.{self.domain}"

    def url(self, path: Path) -> str:
        """Where a tier is for clients of the tailnet, with a slash at its end."""
        scheme, usual = ("https", HTTPS_PORT) if self.https else ("http", HTTP_PORT)
        return f"{scheme}://{self.host}{'' if path.port == usual else f':{path.port}'}{path.mount}"


def examine(check: Checker, value: object, ports: Mapping[str, object]) -> None:
    """Everything that is wrong with the variable ``tailnet``; ``ports`` has each tier's port of the gateway."""
    net = check.entry(value, "tailnet", _KEYS)
    if net is None:
        return
    check.text(
        net.get("hostname"),
        "tailnet.hostname",
        _HOSTNAME,
        "the controller's name on the tailnet, in lower case",
        "for example hostname: slurm-ctl",
    )
    check.text(
        net.get("domain"),
        "tailnet.domain",
        _DOMAIN,
        "the tailnet's own domain",
        "the admin console shows it under DNS, for example domain: tail0000.ts.net",
    )
    check.flag(net.get("https", True), "tailnet.https")
    check.text(
        net.get("tag"),
        "tailnet.tag",
        _TAG,
        "the tag of the auth key, by which the policy knows the gateway",
        "for example tag: tag:llm-gateway",
    )
    for index, owner in enumerate(check.items(net.get("tag_owners", ["autogroup:admin"]), "tailnet.tag_owners")):
        _check_selector(check, owner, f"tailnet.tag_owners[{index}]")
        _check_group(check, owner, f"tailnet.tag_owners[{index}]", net)
    if net.get("service") is not None:
        check.text(
            net["service"],
            "tailnet.service",
            _SERVICE,
            "a Tailscale Service that is defined in the admin console",
            "for example service: svc:llm",
        )
    _check_groups(check, net.get("groups"))
    _check_paths(check, net, ports)
    served = [path.get("tier") for path in _mappings(net.get("paths"))]
    for index, item in enumerate(check.items(net.get("access"), "tailnet.access")):
        _check_access(check, item, f"tailnet.access[{index}]", net, served)
    groups = net["groups"] if isinstance(net.get("groups"), Mapping) else {}
    named = [who for entry in _mappings(net.get("access")) for who in _list(entry.get("who"))]
    admitted = [*named, *(who for name in named if isinstance(name, str) for who in _list(groups.get(name)))]
    for index, who in enumerate(check.items(net.get("outsiders") or [], "tailnet.outsiders")):
        _check_selector(check, who, f"tailnet.outsiders[{index}]", (_USER, _TAG))
        if who in admitted:
            cure = "take it out of tailnet.outsiders, or out of who may ask"
            check.add(f"tailnet.outsiders[{index}]", who, "somebody whom no access admits", cure)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [item for item in _list(value) if isinstance(item, Mapping)]


def _check_selector(
    check: Checker,
    value: object,
    variable: str,
    kinds: Sequence[re.Pattern[str]] = (_USER, _GROUP, _TAG, _AUTOGROUP),
) -> None:
    if not (isinstance(value, str) and any(kind.fullmatch(value) for kind in kinds)):
        wanted = ", ".join(_EXAMPLES[kind] for kind in kinds)
        check.add(variable, value, f"a user, group or tag as the policy has them: {wanted}", "write it in that form")


def _check_group(check: Checker, who: object, variable: str, net: Mapping[str, Any]) -> None:
    groups = net.get("groups") or {}
    if isinstance(who, str) and _GROUP.fullmatch(who) and isinstance(groups, Mapping) and who not in groups:
        check.add(variable, who, "a group of tailnet.groups", f"list its users there: {who}: […]")


def _check_groups(check: Checker, value: object) -> None:
    groups = check.mapping(value, "tailnet.groups") if value is not None else {}
    for name, members in groups.items():
        variable = f"tailnet.groups[{name}]"
        if not (isinstance(name, str) and _GROUP.fullmatch(name)):
            check.add(variable, name, "a name such as group:ai-users", "begin it with group:")
        people = check.items(members, variable, "list its users: [alice@example.com]")
        if isinstance(members, list) and not people:
            check.add(variable, members, "at least one user", "a group of nobody admits nobody: list its users")
        for index, who in enumerate(people):
            _check_selector(check, who, f"{variable}[{index}]", (_USER,))


def _check_paths(check: Checker, net: Mapping[str, Any], ports: Mapping[str, object]) -> None:
    usual = HTTPS_PORT if net.get("https", True) is True else HTTP_PORT
    cure = "for example paths: [{path: /, tier: fast}, {path: /reasoning/, tier: reasoning}]"
    paths = check.items(net.get("paths"), "tailnet.paths", cure)
    seen: dict[tuple[object, object], str] = {}
    capabilities: dict[str, object] = {}
    for index, item in enumerate(paths):
        prefix = f"tailnet.paths[{index}]"
        path = check.entry(item, prefix, _PATH_KEYS)
        if path is None:
            continue
        mount = check.text(
            path.get("path"),
            f"{prefix}.path",
            _MOUNT,
            "a path that begins and ends with /",
            "for example path: /reasoning/",
        )
        if not isinstance(path.get("tier"), str) or path.get("tier") not in ports:
            wanted = f"one of the tiers {', '.join(sorted(ports))}"
            check.add(f"{prefix}.tier", path.get("tier"), wanted, "name a tier of the inventory")
        port = check.whole(path.get("port", usual), f"{prefix}.port", 1, 65535, str(usual))
        if path.get("capability") is not None:
            cure = "a name below a domain of your own, for example capability: example.com/cap/reasoning"
            name = check.text(path["capability"], f"{prefix}.capability", _CAPABILITY, "an app capability", cure)
            if name is not None and f".{name.split('/')[0]}".endswith(".tailscale.com"):
                check.add(f"{prefix}.capability", name, "one that is not Tailscale's own", cure)
        if mount is not None and mount.split("/")[1] in API:
            own = f"a path that does not begin with {' or '.join(f'/{word}/' for word in API)}"
            check.add(f"{prefix}.path", mount, own, "those are paths of the API itself: for example path: /reasoning/")
        if port == SSH_PORT:
            check.add(f"{prefix}.port", port, "a port that ssh does not have", "for example port: 8443")
        if isinstance(path.get("tier"), str):
            capability = path.get("capability")
            if capabilities.setdefault(path["tier"], capability) != capability:
                same = f"that of the tier's other path, {capabilities[path['tier']] or 'none'}"
                check.add(f"{prefix}.capability", capability, same, "to the gateway all ways to a tier are one")
        if mount is not None and port is not None:
            if (port, mount) in seen:
                free = f"another path or port than {seen[port, mount]}"
                check.add(prefix, f"{mount} on port {port}", free, "each path leads to one tier")
            seen[port, mount] = prefix


def _check_access(check: Checker, item: object, prefix: str, net: Mapping[str, Any], served: Sequence[object]) -> None:
    entry = check.entry(item, prefix, _ACCESS_KEYS)
    if entry is None:
        return
    for index, who in enumerate(check.items(entry.get("who"), f"{prefix}.who")):
        _check_selector(check, who, f"{prefix}.who[{index}]")
        _check_group(check, who, f"{prefix}.who[{index}]", net)
    for index, tier in enumerate(check.items(entry.get("tiers"), f"{prefix}.tiers")):
        if not isinstance(tier, str) or tier not in served:
            wanted = "a tier of tailnet.paths"
            check.add(f"{prefix}.tiers[{index}]", tier, wanted, "give the tier a path, or leave it out here")


def read(value: Mapping[str, Any], ports: Mapping[str, int]) -> Tailnet:
    """The typed form of a ``tailnet`` without problems."""
    https = value.get("https", True)
    usual = HTTPS_PORT if https else HTTP_PORT
    return Tailnet(
        hostname=value["hostname"],
        domain=value["domain"],
        https=https,
        tag=value["tag"],
        tag_owners=tuple(value.get("tag_owners", ["autogroup:admin"])),
        groups={name: tuple(members) for name, members in (value.get("groups") or {}).items()},
        paths=tuple(
            Path(
                tier=path["tier"],
                mount=path["path"],
                port=path.get("port", usual),
                target=f"unix:{SOCKETS}/{path['tier']}.sock",
                gateway_port=ports[path["tier"]],
                capability=path.get("capability") or "",
            )
            for path in value["paths"]
        ),
        access=tuple(Access(tuple(entry["who"]), tuple(entry["tiers"])) for entry in value["access"]),
        service=value.get("service") or "",
        outsiders=tuple(value.get("outsiders") or ()),
    )


def _capabilities(paths: Iterable[Path], port: int) -> list[str]:
    return sorted({path.capability for path in paths if path.port == port and path.capability})


def served(net: Tailnet) -> list[dict[str, Any]]:
    """What `tailscale serve` is to hand on, a path each, as the module ``tailscale_serve`` takes it.

    Each path of a port has all of its capabilities: requests that share a connection share what serve asks for.
    """
    return [
        {
            "mount": path.mount,
            "target": path.target,
            "port": path.port,
            "https": net.https,
            "app_capabilities": _capabilities(net.paths, path.port),
        }
        for path in net.paths
    ]


def grants(net: Tailnet) -> list[dict[str, Any]]:
    """One for each set of people and each port, with the capabilities that they are to have on it."""
    found: list[dict[str, Any]] = []
    for entry in net.access:
        mine = [path for path in net.paths if path.tier in entry.tiers]
        for port in sorted({path.port for path in mine}):
            capabilities = _capabilities(mine, port)
            places = [net.tag, *([net.service] if net.service else [])]
            grant: dict[str, Any] = {"src": list(entry.who), "dst": places, "ip": [f"tcp:{port}"]}
            if capabilities:
                grant["app"] = {name: [{}] for name in capabilities}
            found.append(grant)
    return found


def _examples(who: Iterable[str], groups: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Users and tags who stand for a list of selectors: tests of a policy know no group, nor all members."""
    found = []
    for one in who:
        if one in groups:
            found.append(groups[one][0])
        elif _USER.fullmatch(one) or _TAG.fullmatch(one):
            found.append(one)
    return found


def tests(net: Tailnet) -> list[dict[str, Any]]:
    """The policy's own tests: who is admitted where, and that nobody goes around tailscale serve.

    Of each group its first member. A port that all members of the tailnet may reach is not asked of outsiders.
    """
    open_to: dict[str, set[int]] = {}
    public: dict[bool, set[int]] = {False: set(), True: set()}
    for entry in net.access:
        granted = {path.port for path in net.paths if path.tier in entry.tiers}
        for one in entry.who:
            if _AUTOGROUP.fullmatch(one):
                # Whether somebody is of one by a role, an inventory does not know: nothing is asked of that port then.
                public[one == "autogroup:tagged"] |= granted
        for who in _examples(entry.who, net.groups):
            members = {who, *(name for name, people in net.groups.items() if who in people)}
            open_to[who] = {
                path.port
                for other in net.access
                if members & set(other.who)
                for path in net.paths
                if path.tier in other.tiers
            }
    for who in net.outsiders:
        open_to.setdefault(who, set())
    ports = sorted({path.port for path in net.paths})
    around = sorted({path.gateway_port for path in net.paths} - set(ports))
    found = []
    for who, admitted in open_to.items():
        test: dict[str, Any] = {"src": who, "proto": "tcp"}
        if admitted:
            test["accept"] = [f"{net.tag}:{port}" for port in sorted(admitted)]
        refused = [*around, *(port for port in ports if port not in admitted | public[bool(_TAG.fullmatch(who))])]
        test["deny"] = [f"{net.tag}:{port}" for port in refused]
        found.append(test)
    return found


def policy(net: Tailnet) -> dict[str, Any]:
    """The whole policy file of a tailnet that has no other, as data."""
    value: dict[str, Any] = {}
    if net.groups:
        value["groups"] = {name: list(people) for name, people in net.groups.items()}
    # A policy has to say of each tag that it names who may give it.
    named = [one for entry in net.access for one in entry.who] + [*net.outsiders, *net.tag_owners]
    tags = dict.fromkeys([net.tag, *(one for one in named if _TAG.fullmatch(one))])
    value["tagOwners"] = {tag: list(net.tag_owners) for tag in tags}
    if net.service:
        value["autoApprovers"] = {"services": {net.service: [net.tag]}}
    value["grants"] = grants(net)
    value["tests"] = tests(net)
    return value


def policy_text(net: Tailnet) -> str:
    """The policy file, with what has to be known before it is put in force."""
    default, older = (json.dumps(one).removeprefix("{").removesuffix("}") for one in ALLOW_ALL)
    return (
        "// Who may ask the models, made from the inventory's variable `tailnet`: edit that, not this.\n"
        "//\n"
        "// It is a whole policy file. Where the tailnet has one already, take these entries over into it.\n"
        "// Grants only add: as long as the rule with which a new tailnet begins is there, these refuse nobody.\n"
        "// Remove it:\n"
        f"//     {default}\n"
        f"// or, as older files have it,\n"
        f"//     {older}\n"
        f"{json.dumps(policy(net), indent=2, ensure_ascii=False)}\n"
    )


def allow_all(value: Mapping[str, Any]) -> bool:
    """Whether a policy has the default rule of a new tailnet, in its new or its old form, or has no rules at all."""
    if "grants" not in value and "acls" not in value:
        return True
    return any(rule in (value.get(key) or []) for one in ALLOW_ALL for key, rules in one.items() for rule in rules)
