"""tailscale_serve: what is declared and what is there become the fewest commands; what others set is left alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.tailscale_serve import Plan, Served, ServeError, plan

MODULE = Path(__file__).parents[2] / "library" / "tailscale_serve.py"
HOST = "slurm-ctl.example.ts.net"
FAST = Served(443, True, "/", "http://127.0.0.1:8080")
REASONING = Served(443, True, "/reasoning/", "http://127.0.0.1:8081")
BOTH = [FAST, REASONING]


def config(*paths: Served, host: str = HOST, **more: Any) -> dict[str, Any]:
    """A serve configuration as `tailscale serve status --json` prints it."""
    value: dict[str, Any] = {"TCP": {}, "Web": {}}
    for one in paths:
        value["TCP"][str(one.port)] = {"HTTPS" if one.https else "HTTP": True}
        handler: dict[str, Any] = {"Proxy": one.target}
        if one.app_capabilities:
            handler["AcceptAppCaps"] = list(one.app_capabilities)
        value["Web"].setdefault(f"{host}:{one.port}", {"Handlers": {}})["Handlers"][one.mount] = handler
    return {**value, **more}


def planned(wanted: list[Served], there: dict[str, Any], ours: list[Served] | None = None, **more: bool) -> Plan:
    return plan(wanted, there, HOST, ours or [], more.get("remove_foreign", False))


def commands(wanted: list[Served], there: dict[str, Any], ours: list[Served] | None = None, **more: bool) -> list[str]:
    return [" ".join(words) for words in planned(wanted, there, ours, **more).commands]


@pytest.mark.parametrize("empty", [{}, {"TCP": None, "Web": None}])
def test_an_empty_node_gets_each_path_by_a_command_of_its_own(empty: dict[str, Any]) -> None:
    assert commands(BOTH, empty) == [
        "--bg --yes --https=443 --set-path=/ http://127.0.0.1:8080",
        "--bg --yes --https=443 --set-path=/reasoning/ http://127.0.0.1:8081",
    ]


def test_what_is_there_needs_no_command() -> None:
    assert planned(BOTH, config(*BOTH)) == Plan((), ())


def test_a_path_with_another_target_or_slash_is_set_again() -> None:
    elsewhere = Served(443, True, "/reasoning", "http://127.0.0.1:9000")
    assert commands(BOTH, config(FAST, elsewhere)) == [
        "--bg --yes --https=443 --set-path=/reasoning/ http://127.0.0.1:8081"
    ]


def test_a_capability_that_the_target_is_to_be_told_is_set_again() -> None:
    told = Served(443, True, "/reasoning/", "http://127.0.0.1:8081", ("example.com/cap/reasoning",))
    assert commands([FAST, told], config(*BOTH)) == [
        "--bg --yes --https=443 --set-path=/reasoning/ --accept-app-caps=example.com/cap/reasoning "
        "http://127.0.0.1:8081"
    ]
    assert commands([FAST, told], config(FAST, told)) == []


def test_a_path_that_is_declared_no_more_goes_if_it_was_ours() -> None:
    assert commands([FAST], config(*BOTH), ours=BOTH) == ["--yes --https=443 --set-path=/reasoning/ off"]


def test_a_path_of_somebody_else_stays_and_is_told() -> None:
    blog = Served(443, True, "/blog", "http://127.0.0.1:4000")
    found = planned(BOTH, config(*BOTH, blog))
    assert found == Plan((), (f"https://{HOST}/blog -> http://127.0.0.1:4000",))
    assert commands(BOTH, config(*BOTH, blog), remove_foreign=True) == ["--yes --https=443 --set-path=/blog off"]


def test_a_path_of_ours_that_somebody_has_led_elsewhere_is_theirs() -> None:
    theirs = Served(443, True, "/reasoning/", "http://127.0.0.1:9000")
    assert planned([FAST], config(FAST, theirs), ours=BOTH) == Plan(
        (), (f"https://{HOST}/reasoning/ -> http://127.0.0.1:9000",)
    )


def test_from_http_to_https_the_old_path_goes_first() -> None:
    old = Served(443, False, "/", "http://127.0.0.1:8080")
    assert commands([FAST], config(old), ours=[old]) == [
        "--yes --http=443 --set-path=/ off",
        "--bg --yes --https=443 --set-path=/ http://127.0.0.1:8080",
    ]


def test_a_name_that_the_node_had_before_is_told() -> None:
    there = config(*BOTH, host="old.example.ts.net")
    found = planned(BOTH, there, ours=BOTH)
    assert len(found.commands) == 2
    assert found.foreign == ("old.example.ts.net:443 (a name that this node does not have any more)",)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"AllowFunnel": {f"{HOST}:443": True}, "Web": config(*BOTH)["Web"]}, "open to the internet by `tailscale"),
        ({"AllowFunnel": {f"{HOST}:443": True}}, "open to the internet by `tailscale funnel`"),
        ({"TCP": {"443": {"TCPForward": "127.0.0.1:22"}}}, "forwarded to 127.0.0.1:22 by somebody else"),
    ],
)
def test_what_a_command_would_destroy_silently_is_refused(more: dict[str, Any], told: str) -> None:
    with pytest.raises(ServeError, match=told):
        planned(BOTH, {**config(), **more})


def test_http_and_https_on_one_port_are_refused() -> None:
    with pytest.raises(ServeError, match="HTTP and HTTPS cannot share it"):
        planned([FAST, Served(443, False, "/x", "http://127.0.0.1:1")], {})


def test_a_path_that_led_there_before_by_hand_is_led_elsewhere_or_goes() -> None:
    by_hand = [Served(443, True, "/", "http://127.0.0.1:8080"), Served(443, True, "/old/", "http://127.0.0.1:8081")]
    new = Served(443, True, "/", "unix:/run/x/fast.sock")
    there = config(*by_hand)
    found = plan([new], there, HOST, [], False, ["http://127.0.0.1:8080", "http://127.0.0.1:8081"])
    assert [" ".join(words) for words in found.commands] == [
        "--yes --https=443 --set-path=/old/ off",
        "--bg --yes --https=443 --set-path=/ unix:/run/x/fast.sock",
    ]
    assert found.foreign == ()
    forward = {**there, "TCP": {**there["TCP"], "9000": {"TCPForward": "127.0.0.1:8081"}}}
    with pytest.raises(ServeError, match=r"port 9000: forwarded to 127\.0\.0\.1:8081 as it is"):
        plan([new], forward, HOST, [], False, ["http://127.0.0.1:8081"])


# The module, with a stand-in for the command line


PROGRAM = """#!{python}
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
state = json.loads((folder / "state.json").read_text())
words = sys.argv[1:]
print("Warning: client version is not that of tailscaled", file=sys.stderr)
if words == ["status", "--json", "--peers=false"]:
    print(json.dumps({{"BackendState": state["backend"], "Self": {{"DNSName": "{host}."}},
                      "CertDomains": ["{host}"] if state["certificates"] else None}}))
elif words == ["serve", "status", "--json"]:
    print(json.dumps(state["config"]))
else:
    with open(folder / "calls", "a") as calls:
        calls.write(" ".join(words) + "\\n")
    if state["busy"]:
        state["busy"] -= 1
        (folder / "state.json").write_text(json.dumps(state))
        sys.exit("error: Another client is changing the serve config; please try again.")
    if not state["deaf"]:
        handlers = state["config"].setdefault("Web", {{}}).setdefault("{host}:443", {{"Handlers": {{}}}})["Handlers"]
        state["config"]["TCP"] = {{"443": {{"HTTPS": True}}}}
        mount = next(word for word in words if word.startswith("--set-path=")).partition("=")[2]
        if words[-1] == "off":
            del handlers[mount]
        else:
            handlers[mount] = {{"Proxy": words[-1]}}
    else:
        print("Serve is not enabled on your tailnet. To enable, visit: https://login.example/f/serve")
    (folder / "state.json").write_text(json.dumps(state))
"""


class Node:
    def __init__(self, folder: Path) -> None:
        self.folder, self.memory = folder, folder / "memory.json"
        self.program = folder / "tailscale"
        self.program.write_text(PROGRAM.format(python=sys.executable, host=HOST))
        self.program.chmod(0o755)
        self.set()

    def set(self, **changes: Any) -> None:
        value = {"backend": "Running", "config": {}, "deaf": False, "busy": 0, "certificates": True, **changes}
        (self.folder / "state.json").write_text(json.dumps(value))

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def run(self, paths: list[Served], check: bool = False, **more: Any) -> dict[str, Any]:
        wanted = [{"mount": one.mount, "target": one.target, "port": one.port, "https": one.https} for one in paths]
        arguments = {"paths": wanted, "program": str(self.program), "memory": str(self.memory), **more}
        arguments |= {"_ansible_check_mode": check, "_ansible_diff": True}
        text = json.dumps({"ANSIBLE_MODULE_ARGS": arguments})
        done = subprocess.run([sys.executable, str(MODULE)], input=text, capture_output=True, text=True, check=False)
        result: dict[str, Any] = json.loads(done.stdout)
        return result


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_paths_are_set_once_and_taken_away_again(node: Node) -> None:
    done = node.run(BOTH)
    assert done["changed"], done
    assert done["urls"] == [f"https://{HOST}/", f"https://{HOST}/reasoning/"]
    assert done["diff"] == {
        "before": "",
        "after": f"https://{HOST}/ -> http://127.0.0.1:8080\nhttps://{HOST}/reasoning/ -> http://127.0.0.1:8081\n",
    }
    assert not node.run(BOTH)["changed"]
    assert len(node.calls) == 2
    assert node.run([FAST])["changed"]
    assert node.calls[-1] == "serve --yes --https=443 --set-path=/reasoning/ off"


def test_a_dry_run_changes_nothing(node: Node) -> None:
    assert node.run(BOTH, check=True)["changed"]
    assert (node.calls, node.memory.exists()) == ([], False)


def test_a_node_that_is_on_no_tailnet_yet(node: Node) -> None:
    node.set(backend="NeedsLogin")
    assert node.run(BOTH, check=True)["changed"]
    assert "tailscale is NeedsLogin: have the node join" in node.run(BOTH)["msg"]


def test_a_command_that_ends_well_and_does_nothing_is_a_failure(node: Node) -> None:
    node.set(deaf=True)
    done = node.run(BOTH)
    assert done["failed"]
    assert "Serve is not enabled on your tailnet" in done["msg"]


@pytest.mark.parametrize("check", [True, False])
def test_a_tailnet_that_admits_no_https_is_refused_before_anything_waits_for_it(node: Node, check: bool) -> None:
    node.set(certificates=False)
    done = node.run(BOTH, check=check)
    assert done["failed"]
    assert f"the tailnet of {HOST} admits no HTTPS: enable HTTPS Certificates" in done["msg"]
    assert node.calls == []
    assert node.run([Served(80, False, "/", FAST.target)], check=True)["changed"]


def test_somebody_else_s_change_in_the_same_moment_is_waited_for(node: Node) -> None:
    node.set(busy=1)
    assert node.run([FAST])["changed"]
    assert len(node.calls) == 2


def test_a_host_without_tailscale_says_so(node: Node) -> None:
    assert "is not on this host: install tailscale first" in node.run(BOTH, program=str(node.folder / "none"))["msg"]


def test_a_socket_that_nobody_listens_on_is_refused(node: Node) -> None:
    target = f"unix:{node.folder}/fast.sock"
    assert node.run([Served(443, True, "/", target)], check=True)["changed"]
    done = node.run([Served(443, True, "/", target)])
    assert "fast.sock is no socket: nginx does not listen there" in done["msg"]
    assert node.calls == []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{node.folder}/fast.sock")
        assert node.run([Served(443, True, "/", target)])["changed"]


def test_nothing_is_asked_where_nothing_was_set_and_nothing_fails_where_it_went(node: Node) -> None:
    assert not node.run([], program=str(node.folder / "none"))["changed"]
    node.run([FAST])
    done = node.run([], program=str(node.folder / "none"))
    assert (done["changed"], done.get("failed")) == (False, None)
    assert node.run([])["changed"]
    assert not node.memory.exists()
