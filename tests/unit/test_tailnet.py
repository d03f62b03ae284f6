"""The tailnet's policy: grants and their tests from the inventory."""

from __future__ import annotations

import json

from gleaner import tailnet
from gleaner.tailnet import Access, Path

TAG = "tag:ai-gateway"
FAST = Path("fast", "/", 443, "http://127.0.0.1:8080", "")
REASONING = Path("reasoning", "/reasoning/", 443, "http://127.0.0.1:8081", "")
ALL = Access(("group:ai",), ("fast", "reasoning"), ("alice@example.com",))


def test_one_port_is_one_grant() -> None:
    assert tailnet.grants(TAG, [FAST, REASONING], [ALL]) == [{"src": ["group:ai"], "dst": [TAG], "ip": ["tcp:443"]}]


def test_tiers_differ_by_a_port_of_their_own() -> None:
    apart = Path("reasoning", "/", 8443, "http://127.0.0.1:8081", "")
    few = Access(("group:big",), ("reasoning",), ("bob@example.com",))
    paths = [FAST, apart]
    assert tailnet.grants(TAG, paths, [few]) == [{"src": ["group:big"], "dst": [TAG], "ip": ["tcp:8443"]}]
    (test,) = tailnet.tests(TAG, paths, [few], [])
    assert test == {
        "src": "bob@example.com",
        "proto": "tcp",
        "accept": [f"{TAG}:8443"],
        "deny": [f"{TAG}:22", f"{TAG}:443"],
    }


def test_tiers_differ_by_a_capability_on_the_same_port() -> None:
    capable = Path("reasoning", "/reasoning/", 443, "http://127.0.0.1:8081", "example.com/cap/reasoning")
    few = Access(("group:ai",), ("fast",), ())
    grants = tailnet.grants(TAG, [FAST, capable], [few, Access(("group:big",), ("reasoning",), ())])
    assert [grant.get("app") for grant in grants] == [None, {"example.com/cap/reasoning": [{}]}]
    assert {tuple(grant["ip"]) for grant in grants} == {("tcp:443",)}


def test_strangers_reach_nothing_and_nobody_ssh() -> None:
    alice, mallory = tailnet.tests(TAG, [FAST, REASONING], [ALL], ["mallory@example.com"])
    assert (alice["accept"], alice["deny"]) == ([f"{TAG}:443"], [f"{TAG}:22"])
    assert mallory == {"src": "mallory@example.com", "proto": "tcp", "deny": [f"{TAG}:22", f"{TAG}:443"]}


def test_the_file_is_whole() -> None:
    value = tailnet.policy(TAG, ["autogroup:admin"], {"group:ai": ["alice@example.com"]}, [FAST, REASONING], [ALL])
    assert json.loads(tailnet.text(value)) == value
    assert list(value) == ["groups", "tagOwners", "grants", "tests"]
    assert not any(tailnet.is_allow_all(grant) for grant in value["grants"])


def test_the_default_of_a_new_tailnet_is_known_in_both_forms() -> None:
    assert tailnet.is_allow_all({"src": ["*"], "dst": ["*"], "ip": ["*"]})
    assert tailnet.is_allow_all({"action": "accept", "src": ["*"], "dst": ["*:*"]})
    assert not tailnet.is_allow_all({"src": ["group:ai"], "dst": ["*"], "ip": ["*"]})
