"""The tailnet of a site: what is wrong with it, its policy's grants and their tests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gleaner import site, tailnet
from tests.unit import sites

PORTS = {"fast": 8080, "reasoning": 8081}
TAG = "tag:llm-gateway"


def value(**changes: Any) -> dict[str, Any]:
    whole = {
        "hostname": "slurm-ctl",
        "domain": "tail0000.ts.net",
        "tag": TAG,
        "groups": {"group:ai": ["alice@example.com", "bob@example.com"]},
        "paths": [{"path": "/", "tier": "fast"}, {"path": "/reasoning/", "tier": "reasoning"}],
        "access": [{"who": ["group:ai"], "tiers": ["fast", "reasoning"]}],
    }
    return {**whole, **changes}


def net(**changes: Any) -> tailnet.Tailnet:
    return tailnet.read(value(**changes), PORTS)


def problems(**changes: Any) -> list[str]:
    checker = site.Checker()
    tailnet.examine(checker, value(**changes), PORTS)
    return [str(problem) for problem in checker.found]


APART = [{"path": "/", "tier": "fast"}, {"path": "/", "tier": "reasoning", "port": 8443}]
CAPABILITY = "example.com/cap/reasoning"
CAPABLE = [{"path": "/", "tier": "fast"}, {"path": "/reasoning/", "tier": "reasoning", "capability": CAPABILITY}]


def test_urls_are_what_clients_write() -> None:
    assert [net().url(path) for path in net().paths] == [
        "https://slurm-ctl.tail0000.ts.net/",
        "https://slurm-ctl.tail0000.ts.net/reasoning/",
    ]
    plain = net(https=False, paths=APART)
    assert [plain.url(path) for path in plain.paths] == [
        "http://slurm-ctl.tail0000.ts.net/",
        "http://slurm-ctl.tail0000.ts.net:8443/",
    ]
    sockets = ["unix:/run/gleaner-tailnet/fast.sock", "unix:/run/gleaner-tailnet/reasoning.sock"]
    assert [path.target for path in plain.paths] == sockets


def test_one_port_is_one_grant() -> None:
    assert tailnet.grants(net()) == [{"src": ["group:ai"], "dst": [TAG], "ip": ["tcp:443"]}]


def test_tiers_differ_by_a_port_of_their_own() -> None:
    few = net(
        paths=APART,
        access=[
            {"who": ["group:ai"], "tiers": ["fast"]},
            {"who": ["carol@example.com", "bob@example.com"], "tiers": ["reasoning"]},
        ],
    )
    assert [grant["ip"] for grant in tailnet.grants(few)] == [["tcp:443"], ["tcp:8443"]]
    alice, carol, bob = tailnet.tests(few)
    assert (alice["accept"], alice["deny"]) == ([f"{TAG}:443"], [f"{TAG}:8080", f"{TAG}:8081", f"{TAG}:8443"])
    assert (carol["accept"], carol["deny"]) == ([f"{TAG}:8443"], [f"{TAG}:8080", f"{TAG}:8081", f"{TAG}:443"])
    # He is of the group, too, though not its first member.
    assert (bob["accept"], bob["deny"]) == ([f"{TAG}:443", f"{TAG}:8443"], [f"{TAG}:8080", f"{TAG}:8081"])


def test_tiers_differ_by_a_capability_on_the_same_port() -> None:
    grants = tailnet.grants(
        net(
            paths=CAPABLE,
            access=[{"who": ["group:ai"], "tiers": ["fast"]}, {"who": ["tag:ci"], "tiers": ["fast", "reasoning"]}],
        )
    )
    assert [grant.get("app") for grant in grants] == [None, {CAPABILITY: [{}]}]
    assert {tuple(grant["ip"]) for grant in grants} == {("tcp:443",)}


def test_outsiders_reach_nothing_and_nobody_goes_around_serve() -> None:
    alice, mallory = tailnet.tests(net(outsiders=["mallory@example.com"]))
    assert (alice["accept"], alice["deny"]) == ([f"{TAG}:443"], [f"{TAG}:8080", f"{TAG}:8081"])
    assert mallory == {
        "src": "mallory@example.com",
        "proto": "tcp",
        "deny": [f"{TAG}:8080", f"{TAG}:8081", f"{TAG}:443"],
    }


def test_a_port_that_all_members_reach_is_not_asked_of_outsiders() -> None:
    everybody = net(access=[{"who": ["autogroup:member"], "tiers": ["fast"]}], outsiders=["mallory@example.com"])
    (mallory,) = tailnet.tests(everybody)
    assert mallory["deny"] == [f"{TAG}:8080", f"{TAG}:8081"]
    # She may be one of them.
    admins = net(access=[{"who": ["autogroup:admin"], "tiers": ["fast"]}], outsiders=["mallory@example.com"])
    assert tailnet.tests(admins)[0]["deny"] == [f"{TAG}:8080", f"{TAG}:8081"]
    tagged = net(access=[{"who": ["autogroup:tagged"], "tiers": ["fast"]}], outsiders=["mallory@example.com", "tag:ci"])
    mallory, ci = tailnet.tests(tagged)
    assert f"{TAG}:443" in mallory["deny"]
    assert f"{TAG}:443" not in ci["deny"]


def test_every_tag_that_is_named_has_an_owner() -> None:
    policy = tailnet.policy(net(access=[{"who": ["tag:ci"], "tiers": ["fast"]}], outsiders=["tag:printer"]))
    assert policy["tagOwners"] == {tag: ["autogroup:admin"] for tag in (TAG, "tag:ci", "tag:printer")}


def test_a_service_has_its_host_approved_and_the_same_grants() -> None:
    policy = tailnet.policy(net(service="svc:llm"))
    assert policy["autoApprovers"] == {"services": {"svc:llm": [TAG]}}
    assert [grant["dst"] for grant in policy["grants"]] == [[TAG, "svc:llm"]]


def test_the_file_is_whole_and_names_the_rule_to_remove() -> None:
    text = tailnet.policy_text(net())
    comments = [line for line in text.splitlines() if line.startswith("//")]
    found = json.loads("\n".join(line for line in text.splitlines() if not line.startswith("//")))
    assert found == tailnet.policy(net())
    assert list(found) == ["groups", "tagOwners", "grants", "tests"]
    assert not tailnet.allow_all(found)
    assert '//     "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]' in comments
    assert '//     "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]' in comments


def test_the_default_of_a_new_tailnet_is_known_in_all_forms() -> None:
    assert tailnet.allow_all({"grants": [{"src": ["group:ai"]}, {"src": ["*"], "dst": ["*"], "ip": ["*"]}]})
    assert tailnet.allow_all({"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]})
    assert tailnet.allow_all({"groups": {}})
    assert not tailnet.allow_all({"grants": [{"src": ["group:ai"], "dst": ["*"], "ip": ["*"]}]})


def test_a_good_one_has_no_problems() -> None:
    assert problems() == []
    assert problems(paths=CAPABLE, https=False, tag_owners=["group:ai"], outsiders=["tag:printer", "eve@"]) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hostname": "Slurm_CTL"}, "tailnet.hostname = 'Slurm_CTL'"),
        ({"domain": "tailnet"}, "tailnet.domain = 'tailnet'"),
        ({"https": "yes"}, "tailnet.https = 'yes'"),
        ({"tag": "llm-gateway"}, "tailnet.tag = 'llm-gateway'"),
        ({"tag_owners": ["group:big"]}, "tailnet.tag_owners[0] = 'group:big'; wanted a group of tailnet.groups"),
        ({"paths": [{"path": "/v1/", "tier": "fast"}]}, "tailnet.paths[0].path = '/v1/'; wanted a path that does not"),
        ({"paths": [{"path": "/", "tier": "fast", "port": 22}]}, "tailnet.paths[0].port = 22; wanted a port that ssh"),
        ({"paths": [{"path": "/", "tier": "fast", "capability": "example.com/cap/v1.0"}]}, "tailnet.paths[0].capab"),
        ({"access": [{"who": ["autogroup:members"], "tiers": ["fast"]}]}, "tailnet.access[0].who[0] = 'autogroup:m"),
        ({"service": "llm"}, "tailnet.service = 'llm'"),
        ({"tag_owners": ["admin"]}, "tailnet.tag_owners[0] = 'admin'"),
        ({"groups": {"ai": ["alice@example.com"]}}, "tailnet.groups[ai] = 'ai'"),
        ({"groups": {"group:ai": []}}, "tailnet.groups[group:ai] = []"),
        ({"groups": {"group:ai": None}}, "tailnet.groups[group:ai] = undefined"),
        ({"groups": {"group:ai": ["tag:ci"]}}, "tailnet.groups[group:ai][0] = 'tag:ci'"),
        ({"paths": None}, "tailnet.paths = undefined"),
        ({"paths": ["/"]}, "tailnet.paths[0] = '/'"),
        ({"paths": [{"path": "reasoning", "tier": "fast"}]}, "tailnet.paths[0].path = 'reasoning'"),
        ({"paths": [{"path": "/a/../", "tier": "fast"}]}, "tailnet.paths[0].path = '/a/../'"),
        ({"paths": [{"path": "/", "tier": "quick"}]}, "tailnet.paths[0].tier = 'quick'"),
        ({"paths": [{"path": "/", "tier": ["fast"]}]}, "tailnet.paths[0].tier = ['fast']"),
        ({"paths": [{"path": "/", "tier": "fast", "port": 0}]}, "tailnet.paths[0].port = 0"),
        ({"paths": [{"path": "/", "tier": "fast", "caps": 1}]}, "tailnet.paths[0].caps = 1"),
        ({"paths": [{"path": "/", "tier": "fast"}] * 2}, "tailnet.paths[1] = '/ on port 443'"),
        ({"paths": [{"path": "/", "tier": "fast", "capability": "reasoning"}]}, "tailnet.paths[0].capability"),
        (
            {"paths": [{"path": "/", "tier": "fast", "capability": "tailscale.com/cap/services"}]},
            "tailnet.paths[0].capability = 'tailscale.com/cap/services'; wanted one that is not Tailscale's own",
        ),
        (
            {"paths": [*CAPABLE, {"path": "/big/", "tier": "reasoning"}]},
            f"tailnet.paths[2].capability = undefined; wanted that of the tier's other path, {CAPABILITY}",
        ),
        ({"access": None}, "tailnet.access = undefined"),
        ({"access": [{"who": ["*"], "tiers": ["fast"]}]}, "tailnet.access[0].who[0] = '*'"),
        ({"access": [{"who": ["group:big"], "tiers": ["fast"]}]}, "tailnet.access[0].who[0] = 'group:big'"),
        ({"access": [{"who": ["group:ai"], "tiers": ["quick"]}]}, "tailnet.access[0].tiers[0] = 'quick'"),
        ({"access": [{"who": ["group:ai"], "tiers": [["fast"]]}]}, "tailnet.access[0].tiers[0] = ['fast']"),
        (
            {"outsiders": ["bob@example.com"]},
            "tailnet.outsiders[0] = 'bob@example.com'; wanted somebody whom no access",
        ),
        ({"outsiders": ["group:ai"]}, "tailnet.outsiders[0] = 'group:ai'"),
        ({"funnel": True}, "tailnet.funnel = True"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], named: str) -> None:
    found = problems(**changes)
    assert [one for one in found if one.startswith(named)], found


def test_a_site_has_it_checked_and_read() -> None:
    whole = sites.site()
    tier = whole["tiers"][0]["name"]
    whole["tailnet"] = value(paths=[{"path": "/", "tier": tier}], access=[{"who": ["group:ai"], "tiers": [tier]}])
    assert site.problems(whole, sites.headers()) == []
    read = site.read(whole, sites.headers()).tailnet
    assert read is not None
    assert read.paths[0].gateway_port == whole["tiers"][0]["gateway_port"]
    whole["tailnet"] = "yes"
    (problem,) = site.problems(whole, sites.headers())
    assert problem.variable == "tailnet"


@pytest.mark.parametrize(
    ("listen", "named"),
    [
        ("127.0.0.1", "gateway_listen = '127.0.0.1'"),
        ([], "gateway_listen = []"),
        (["127.0.0.1", "0.0.0.0"], "gateway_listen[1] = '0.0.0.0'; wanted single addresses"),
        (["127.0.0.1", "[::]"], "gateway_listen[1] = '[::]'; wanted single addresses"),
        (["127.0.0.1", "::1"], "gateway_listen[1] = '::1'; wanted it as [::1]"),
        (["127.0.0.1", "*"], "gateway_listen[1] = '*'"),
        (["127.0.0.1", "slurm-ctl"], "gateway_listen[1] = 'slurm-ctl'"),
        (["127.0.0.1", None], "gateway_listen[1] = undefined"),
    ],
)
def test_nginx_listens_on_single_addresses(listen: object, named: str) -> None:
    whole = sites.site()
    tier = whole["tiers"][0]["name"]
    whole["tailnet"] = value(paths=[{"path": "/", "tier": tier}], access=[{"who": ["group:ai"], "tiers": [tier]}])
    whole["gateway_listen"] = listen
    found = [str(problem) for problem in site.problems(whole, sites.headers())]
    assert [one for one in found if one.startswith(named)], found
    whole["gateway_listen"] = ["127.0.0.1", "10.0.0.5", "[fd00::5]"]
    assert site.problems(whole, sites.headers()) == []
