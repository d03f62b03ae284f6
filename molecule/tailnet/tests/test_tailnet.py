"""The tiers as people on the tailnet meet them, and what the administrator's runs do to the controller's node."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import cluster, tailnet
from tests.lab.cluster import CONTROLLER, GEMMA3, PORT, SMOLLM2, SPLIT_PORT, THINKING, run
from tests.lab.guide import examples, run_program
from tests.lab.tailnet import HOST, LAPTOP, PEOPLE, Lab, ask, chat, serve_status

CAPABILITY = "example.com/cap/reasoning"
SOCKETS = "unix:/run/gleaner-tailnet"
BOTH = {"80/": f"{SOCKETS}/fast.sock", "80/reasoning/": f"{SOCKETS}/reasoning.sock"}
CAPABLE = [
    {"path": "/", "tier": "fast"},
    {"path": "/reasoning/", "tier": "reasoning", "capability": CAPABILITY},
]


# On a controller that was never on a tailnet


def test_a_dry_run_says_what_it_would_do_and_does_nothing(lab: Lab) -> None:
    dry = lab.play("playbooks/tailnet.yml", "--check", "--diff", key="not asked for")
    assert dry.code == 0, dry.output
    assert f"+http://(this node)/reasoning/ -> {SOCKETS}/reasoning.sock" in dry.output
    assert "not asked for" not in dry.output
    assert not cluster.host(CONTROLLER).exists("tailscale")
    assert not cluster.host(CONTROLLER).file("/etc/apt/sources.list.d/tailscale.sources").exists


def test_a_site_without_a_tailnet_is_left_alone(lab: Lab) -> None:
    none = lab.play("playbooks/tailnet.yml", tailnet=None)
    assert none.code == 0, none.output
    assert none.changed == {CONTROLLER: 0}
    assert not cluster.host(CONTROLLER).exists("tailscale")


def test_a_package_that_the_key_did_not_sign_is_not_installed(lab: Lab) -> None:
    refused = lab.play("playbooks/tailnet.yml", key="not asked for", tailscale_serve_key_sha256="0" * 64)
    assert refused.code != 0
    assert "checksum" in refused.text
    # Another key under its name, as of a repository that changed hands.
    keyring = "/usr/share/keyrings/tailscale-archive-keyring.gpg"
    run(CONTROLLER, f"cp /usr/share/keyrings/debian-archive-keyring.gpg {keyring}")
    refused = lab.play("playbooks/tailnet.yml", key="not asked for")
    assert refused.code != 0
    assert "is not signed" in refused.text
    assert not cluster.host(CONTROLLER).exists("tailscale")
    run(CONTROLLER, f"rm {keyring} /etc/apt/sources.list.d/tailscale.sources /etc/apt/preferences.d/tailscale")


def test_without_a_key_the_first_run_names_it(lab: Lab) -> None:
    refused = lab.play("playbooks/tailnet.yml")
    assert refused.code != 0
    assert "vault_tailscale_auth_key = undefined; wanted an auth key of the tailnet" in refused.text
    assert "is not on the tailnet (not running)" in refused.text
    assert not cluster.host(CONTROLLER).exists("tailscale")


def test_a_key_that_is_not_the_tailnets_is_refused_and_told_nowhere(lab: Lab) -> None:
    refused = lab.play("playbooks/tailnet.yml", key="hskey-auth-wrong-0123456789", tailscale_serve_join_seconds=10)
    assert refused.code != 0
    assert "wrong-0123456789" not in refused.output
    assert not cluster.host(CONTROLLER).file("/run/gleaner-tailscale-auth-key").exists


def test_a_key_without_the_tag_is_refused(lab: Lab) -> None:
    refused = lab.play("playbooks/tailnet.yml", key=lab.auth_key("admin"))
    assert refused.code != 0
    assert f"with the tags none; wanted {HOST}. with {tailnet.TAG}" in refused.text
    assert serve_status() == {}
    run(CONTROLLER, "tailscale logout")
    # Or the machine would keep what it was.
    (node,) = (one for one in lab.headscale("nodes", "list") if one["given_name"] == "slurm-ctl")
    lab.headscale("nodes", "delete", "--identifier", str(node["id"]), "--force")


# What people meet


def test_the_second_run_changes_nothing_and_asks_for_no_key(served: Lab) -> None:
    assert serve_status() == BOTH
    for arguments in ((), ("--check", "--diff")):
        again = served.play("playbooks/tailnet.yml", *arguments)
        assert again.code == 0, again.output
        assert again.changed == {CONTROLLER: 0}, again.output


def places_of(secret: str) -> set[str]:
    """Files of the controller that hold it, and its journal."""
    found = cluster.host(CONTROLLER).run(
        f"grep --recursive --files-with-matches --fixed-strings --no-messages {shlex.quote(secret)} "
        "/etc /run /root /tmp /var/lib/gleaner /var/log"
    )
    journal = cluster.host(CONTROLLER).run("journalctl --no-pager --output=cat")
    return {*found.stdout.split(), *(["journal"] if secret in journal.stdout else [])}


def test_the_key_stays_nowhere(served: Lab) -> None:
    for key in served.keys:
        assert places_of(key[-32:]) == set()
    planted = "0123456789-planted-0123456789"
    cluster.put(CONTROLLER, "/run/planted", planted)
    run(CONTROLLER, "logger --file=/run/planted")
    assert places_of(planted) >= {"/run/planted", "journal"}
    run(CONTROLLER, "rm /run/planted")


def test_a_run_limited_to_a_node_leaves_the_controller_alone(served: Lab) -> None:
    limited = served.play("playbooks/tailnet.yml", "--limit", "vasp-01")
    assert limited.code == 0, limited.output
    assert CONTROLLER not in limited.changed


@pytest.mark.parametrize(("path", "model"), [("/", SMOLLM2), ("/reasoning/", THINKING)])
def test_a_completion_and_a_stream_come_through(served: Lab, path: str, model: str) -> None:
    whole = ask("alice", f"{path}v1/chat/completions", chat(model))
    assert whole.status == 200, whole
    assert whole.json["usage"]["completion_tokens"] > 0
    stream = ask("alice", f"{path}v1/chat/completions", chat(model, stream=True))
    assert stream.status == 200, stream
    assert stream.body.count("\ndata: ") > 5
    assert stream.body.rstrip().endswith("data: [DONE]")


def test_the_path_is_stripped_and_leads_to_its_tier(served: Lab) -> None:
    mark = tailnet.log_mark("reasoning")
    assert {one["id"] for one in ask("alice", "/reasoning/v1/models").json["data"]} == {"OR1-Behemoth"}
    assert {one["id"] for one in ask("alice", "/v1/models").json["data"]} >= {SMOLLM2, GEMMA3}
    (line,) = (one for one in tailnet.log_since(mark, "reasoning") if "/v1/models" in one)
    assert '"GET /v1/models HTTP/1.1" 200' in line


def test_the_short_name_will_do(served: Lab) -> None:
    assert ask("alice", "/health", host=HOST.partition(".")[0]).status == 200


def test_who_asks_is_known_and_cannot_pretend(served: Lab) -> None:
    forged = ("Tailscale-User-Login: root@example.com", "Tailscale-User-Name: Root", "X-Forwarded-For: 9.9.9.9")
    mark = tailnet.log_mark("fast")
    assert ask("bob", "/v1/models?who=1", headers=forged).status == 403
    assert ask("alice", "/v1/models", headers=forged).status == 200
    gateway = f"http://{cluster.address(CONTROLLER)}:{PORT}/v1/models"
    headers = " ".join(f"--header {shlex.quote(one)}" for one in forged)
    run(LAPTOP, f"curl -sS --fail {headers} {gateway}")
    bob, alice, stranger = (one for one in tailnet.log_since(mark, "fast") if "/v1/models" in one)
    assert re.search(r" user=bob for=100\.64\.\d+\.\d+$", bob), bob
    assert re.search(r" user=alice for=100\.64\.\d+\.\d+$", alice), alice
    assert stranger.endswith(" user= for="), stranger


ECHO = r"""
import http.server, json
class Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(dict(self.headers)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", 19000), Echo).serve_forever()
"""


@pytest.fixture
def echoing(served: Lab) -> Iterator[None]:
    """A second nginx with the gateway's own configuration, ten thousand ports up, before a server that tells all."""
    place = "/run/echo-nginx"
    cluster.put(CONTROLLER, "/run/echo.py", ECHO)
    run(CONTROLLER, f"systemd-run --unit=echo python3 /run/echo.py && cp --archive /etc/nginx {place}")
    run(CONTROLLER, f"sed -i 's#/etc/nginx/#{place}/#; s#/run/nginx.pid#{place}/pid#' {place}/nginx.conf")
    site = f"{place}/sites-available/ai-inference"
    run(CONTROLLER, f"sed -i 's#/etc/nginx/#{place}/#; s/:\\(808[01]\\) backlog/:1\\1 backlog/' {site}")
    run(CONTROLLER, f"sed -i 's#/run/gleaner-tailnet/#{place}/#' {site}")
    run(CONTROLLER, f"ln -sfn {site} {place}/sites-enabled/ai-inference")
    run(CONTROLLER, f"sed -i 's/server [^ ;]*/server 127.0.0.1:19000/' {place}/ai-inference/upstream-fast.conf")
    run(CONTROLLER, f"systemd-run --unit=echo-nginx nginx -c {place}/nginx.conf -g 'daemon off;'")
    cluster.wait_until(
        "it answers", lambda: cluster.host(CONTROLLER).run("curl -sS --fail http://127.0.0.1:18080/health").rc == 0
    )
    yield
    run(CONTROLLER, f"systemctl stop echo-nginx echo; rm -r {place} /run/echo.py")


def test_llama_server_hears_of_nobody_who_pretends(echoing: None) -> None:
    headers = {
        "Tailscale-User-Login": "root@example.com",
        "Tailscale-User-Name": "Root",
        "Tailscale-User-Profile-Pic": "https://example.com/root.png",
        "Tailscale-App-Capabilities": "{}",
    }
    words = " ".join(f"--header {shlex.quote(f'{name}: {value}')}" for name, value in headers.items())
    ways = {
        "socket": "--unix-socket /run/echo-nginx/fast.sock http://gateway/health",
        "loopback": "http://127.0.0.1:18080/health",
        "cluster": f"http://{cluster.address(CONTROLLER)}:18080/health",
    }
    heard = {way: json.loads(run(CONTROLLER, f"curl -sS --fail {words} {where}")) for way, where in ways.items()}
    assert {name: heard["socket"].get(name) for name in headers} == headers
    for way in ("loopback", "cluster"):
        assert not [name for name in heard[way] if name.lower().startswith("tailscale")]


def test_nobody_but_root_reaches_the_sockets_and_the_loopback_address_believes_nobody(served: Lab) -> None:
    words = ["curl", "-sS", "--fail", "--header", "Tailscale-User-Login: root@example.com"]
    socket = SOCKETS.partition(":")[2]
    assert run(CONTROLLER, f"curl -sS --fail --unix-socket {socket}/fast.sock http://gateway/health")
    refused = cluster.run_as(
        "alice", CONTROLLER, *words, "--unix-socket", f"{socket}/fast.sock", "http://gateway/health"
    )
    assert refused.returncode == 7, refused
    mark = tailnet.log_mark("fast")
    # As tailscaled does for who has ssh forward a port: it is root, too.
    run(CONTROLLER, f"{shlex.join(words)} http://127.0.0.1:{PORT}/v1/models")
    (line,) = (one for one in tailnet.log_since(mark, "fast") if "/v1/models" in one)
    assert line.endswith(" user= for="), line


def test_without_a_grant_nothing_answers(served: Lab) -> None:
    assert served.answered_mallory_before, "the way from mallory's machine does not work at all"
    refused = ask("mallory", "/v1/models")
    assert refused.status == 0
    assert refused.error


def test_nobody_goes_around_serve(served: Lab) -> None:
    """By ports that the policy does not name. That something listens there, the cluster's own network shows."""
    for port in (PORT, SPLIT_PORT, 22):
        assert tailnet.connects("alice", port=port) is False
        run(LAPTOP, f"timeout 5 bash -c '</dev/tcp/{cluster.address(CONTROLLER)}/{port}'")
    assert tailnet.connects("alice", port=80) is True


def test_the_policy_says_what_it_refuses_and_headscale_believes_it_only_with_its_tests(served: Lab) -> None:
    file = served.folder / "policy.hujson"
    first = served.play("playbooks/tailnet_policy.yml", tailnet_policy_file=str(file))
    again = served.play("playbooks/tailnet_policy.yml", "--check", "--diff", tailnet_policy_file=str(file))
    assert first.code == again.code == 0
    assert set(again.changed.values()) == {0}
    text = file.read_text()
    assert '"grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]' in text.partition("{\n")[0]
    policy = json.loads("".join(line for line in text.splitlines() if not line.startswith("//")))
    for spoilt in (
        {**policy, "grants": [*policy["grants"], {"src": ["*"], "dst": ["*"], "ip": ["*"]}]},
        {**policy, "grants": policy["grants"][:1]},
    ):
        try:
            with pytest.raises(AssertionError, match="test"):
                served.set_policy(json.dumps(spoilt))
        finally:
            served.set_policy(text)
    assert ask("alice", "/health").status == 200


# What becomes of it


def test_a_restarted_tailscaled_still_serves(served: Lab) -> None:
    run(CONTROLLER, "systemctl restart tailscaled")
    cluster.wait_until("alice gets an answer", lambda: ask("alice", "/health").status == 200)
    assert serve_status() == BOTH


def test_what_an_upgrade_has_lost_is_restored(served: Lab) -> None:
    run(CONTROLLER, "apt-get install --yes --reinstall tailscale && systemctl restart tailscaled")
    cluster.wait_until("it is back", lambda: cluster.host(CONTROLLER).run("tailscale status").rc == 0)
    run(CONTROLLER, "tailscale serve reset")
    assert serve_status() == {}
    restored = served.play("playbooks/tailnet.yml")
    assert restored.changed == {CONTROLLER: 1}, restored.output
    assert serve_status() == BOTH
    cluster.wait_until("alice gets an answer", lambda: ask("alice", "/reasoning/health").status == 200)


def test_what_a_new_login_has_lost_is_restored(served: Lab) -> None:
    run(CONTROLLER, "tailscale logout")
    assert serve_status() == {}
    refused = served.play("playbooks/tailnet.yml")
    assert "vault_tailscale_auth_key = undefined" in refused.text
    restored = served.play("playbooks/tailnet.yml", key=served.auth_key("admin", tag=tailnet.TAG))
    assert restored.code == 0, restored.output
    assert serve_status() == BOTH
    cluster.wait_until("alice gets an answer", lambda: ask("alice", "/reasoning/health").status == 200)


def test_a_node_that_was_told_to_be_down_is_brought_up_without_a_key(served: Lab) -> None:
    run(CONTROLLER, "tailscale set --accept-dns=false && tailscale down")
    up = served.play("playbooks/tailnet.yml")
    assert up.code == 0, up.output
    cluster.wait_until("alice gets an answer", lambda: ask("alice", "/health").status == 200)


def test_lost_paths_are_noticed_and_restored(served: Lab) -> None:
    run(CONTROLLER, "tailscale serve --http=80 --set-path=/reasoning/ off")
    dry = served.play("playbooks/tailnet.yml", "--check", "--diff")
    assert f"+http://{HOST}/reasoning/ -> {SOCKETS}/reasoning.sock" in dry.output
    assert dry.changed == {CONTROLLER: 1}
    assert serve_status() == {"80/": BOTH["80/"]}
    run(CONTROLLER, f"tailscale serve --bg --http=80 --set-path=/ http://127.0.0.1:{PORT}")
    assert served.play("playbooks/tailnet.yml").changed == {CONTROLLER: 1}
    assert serve_status() == BOTH


def test_a_path_is_changed_and_taken_away_and_others_stay(served: Lab) -> None:
    run(CONTROLLER, "tailscale serve --bg --http=80 --set-path=/motd text:hello")
    think = [{"path": "/", "tier": "fast"}, {"path": "/think/", "tier": "reasoning"}]
    moved = served.play("playbooks/tailnet.yml", "--diff", tailnet_paths=think)
    assert moved.code == 0, moved.output
    assert f"-http://{HOST}/reasoning/" in moved.output
    assert f"http://{HOST}/motd -> hello" in moved.text.partition("left alone")[2]
    assert set(serve_status()) == {"80/", "80/think/", "80/motd"}
    assert {one["id"] for one in ask("alice", "/think/v1/models").json["data"]} == {"OR1-Behemoth"}
    assert ask("alice", "/reasoning/v1/models").status == 404

    fewer = served.play("playbooks/tailnet.yml", tailnet_paths=think[:1], tailnet_alice_may=["fast"])
    assert fewer.code == 0, fewer.output
    assert set(serve_status()) == {"80/", "80/motd"}

    back = served.play("playbooks/tailnet.yml", tailscale_serve_foreign="remove")
    assert back.code == 0, back.output
    assert serve_status() == BOTH


def test_the_same_paths_are_there_by_the_name_of_a_service(served: Lab) -> None:
    """As far as the host goes: headscale hands services out to nobody."""
    try:
        declared = served.play("playbooks/tailnet.yml", "--diff", tailnet_service="svc:llm")
        assert declared.code == 0, declared.output
        assert f"+http://llm.tailnet.lab/reasoning/ -> {SOCKETS}/reasoning.sock" in declared.output
        config = json.loads(run(CONTROLLER, "tailscale serve status --json"))
        assert set(config["Services"]["svc:llm"]["Web"]["llm.tailnet.lab:80"]["Handlers"]) == {"/", "/reasoning/"}
        assert json.loads(run(CONTROLLER, "tailscale debug prefs"))["AdvertiseServices"] == ["svc:llm"]
        assert served.play("playbooks/tailnet.yml", tailnet_service="svc:llm").changed == {CONTROLLER: 0}
        assert serve_status() == BOTH
        assert served.play("playbooks/tailnet.yml").changed == {CONTROLLER: 1}
        assert "Services" not in json.loads(run(CONTROLLER, "tailscale serve status --json"))
        assert not json.loads(run(CONTROLLER, "tailscale debug prefs"))["AdvertiseServices"]
    finally:
        cluster.host(CONTROLLER).run("tailscale serve clear svc:llm")
    assert served.play("playbooks/tailnet.yml").changed == {CONTROLLER: 0}


def test_https_that_the_tailnet_does_not_admit_is_an_error_and_no_hanging(served: Lab) -> None:
    tailnet_https = {
        "hostname": "slurm-ctl",
        "domain": "tailnet.lab",
        "tag": tailnet.TAG,
        "paths": [{"path": "/", "tier": "fast"}],
        "access": [{"who": ["alice@"], "tiers": ["fast"]}],
    }
    refused = served.play("playbooks/tailnet.yml", tailnet=tailnet_https)
    assert refused.code != 0
    assert f"the tailnet of {HOST} admits no HTTPS: enable HTTPS Certificates in the admin console" in refused.text
    assert served.play("playbooks/tailnet.yml").code == 0
    assert serve_status() == BOTH


def test_another_name_is_taken_back(served: Lab) -> None:
    run(CONTROLLER, "tailscale set --hostname=elsewhere")
    cluster.wait_until(
        "it has that name", lambda: "elsewhere" in run(CONTROLLER, "tailscale status --json --peers=false")
    )
    dry = served.play("playbooks/tailnet.yml", "--check")
    assert dry.code == 0, dry.output
    renamed = served.play("playbooks/tailnet.yml")
    assert renamed.code == 0, renamed.output
    cluster.wait_until("alice gets an answer", lambda: ask("alice", "/health").status == 200)
    assert serve_status() == BOTH


def test_a_name_that_another_machine_has_is_refused(served: Lab) -> None:
    refused = served.play("playbooks/tailnet.yml", tailnet_hostname="alice")
    assert refused.code != 0
    assert "wanted alice.tailnet.lab. with tag:llm-gateway; cure: for the name, remove the old machine" in refused.text
    assert served.play("playbooks/tailnet.yml").code == 0
    cluster.wait_until("alice gets an answer", lambda: ask("alice", "/health").status == 200)


def test_a_dry_run_while_tailscaled_does_not_run_asks_for_nothing(served: Lab) -> None:
    run(CONTROLLER, "systemctl stop tailscaled")
    dry = served.play("playbooks/tailnet.yml", "--check")
    assert dry.code == 0, dry.output
    back = served.play("playbooks/tailnet.yml")
    assert back.code == 0, back.output
    assert serve_status() == BOTH


def test_a_forward_and_a_half_done_run_are_noticed(served: Lab) -> None:
    run(CONTROLLER, "tailscale serve --bg --tcp=9000 tcp://127.0.0.1:22")
    cluster.put(CONTROLLER, "/run/gleaner-tailscale-auth-key", "left by a run that was killed")
    told = served.play("playbooks/tailnet.yml")
    run(CONTROLLER, "tailscale serve --tcp=9000 off")
    assert "port 9000 -> 127.0.0.1:22 (TCP)" in told.text
    assert not cluster.host(CONTROLLER).file("/run/gleaner-tailscale-auth-key").exists


# Tiers that not everybody may ask


def test_a_tier_with_a_capability_is_for_whom_it_was_granted(served: Lab) -> None:
    try:
        for name in ("playbooks/gateway.yml", "playbooks/tailnet.yml"):
            done = served.play(name, tailnet_paths=CAPABLE)
            assert done.code == 0, done.output
        served.enforce(tailnet_paths=CAPABLE)
        cluster.wait_until("alice's grant is known", lambda: ask("alice", "/reasoning/health").status == 200)
        assert ask("alice", "/v1/models").status == ask("bob", "/v1/models").status == 200
        refused = ask(
            "bob", "/reasoning/v1/models", headers=(f'Tailscale-App-Capabilities: {{"{CAPABILITY}":[{{}}]}}',)
        )
        assert refused.status == 403
        assert refused.json["error"]["message"].endswith(f"ask its administrator for the capability {CAPABILITY}")
        # On the cluster's own network nothing is asked.
        assert cluster.ask("/v1/models", port=SPLIT_PORT).status == 200
    finally:
        for name in ("playbooks/gateway.yml", "playbooks/tailnet.yml"):
            done = served.play(name)
            assert done.code == 0, done.output
        served.enforce()
    assert ask("bob", "/reasoning/v1/models").status == 200


# The guide


@pytest.fixture(scope="module")
def guide(served: Lab) -> str:
    file = served.folder / "using.md"
    written = served.play("playbooks/guide.yml", guide_file=str(file))
    assert written.code == 0, written.output
    return file.read_text()


def test_every_command_of_the_guide_works_at_the_laptop(guide: str) -> None:
    commands = examples(guide, "bash")
    assert len(commands) >= 5
    proxy = f"http://{tailnet.LAPTOP_ADDRESS}:{PEOPLE['alice'] + 1}"
    for command in commands:
        assert f"http://{HOST}/" in command
        done = cluster.host(LAPTOP).run(f"export http_proxy={proxy}\nset -e\n{command}")
        assert done.rc == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stdout.lstrip().startswith("{")


def test_every_program_of_the_guide_works_through_the_tailnet(guide: str, tmp_path: Path) -> None:
    programs = examples(guide, "python")
    assert len(programs) == 2
    proxy = f"http://{tailnet.LAPTOP_ADDRESS}:{PEOPLE['alice'] + 1}"
    for number, program in enumerate(programs):
        assert run_program(program, tmp_path / f"{number}.py", proxy).strip()


# Last: the controller leaves the tailnet


def test_a_site_without_a_tailnet_any_more_hands_nothing_on(served: Lab) -> None:
    """In the order of site.yml."""
    for name in ("playbooks/gateway.yml", "playbooks/tailnet.yml"):
        gone = served.play(name, tailnet=None)
        assert gone.code == 0, gone.output
        assert served.play(name, tailnet=None).changed == {CONTROLLER: 0}
    assert serve_status() == {}
    assert ask("alice", "/health").status == 0
    assert not cluster.host(CONTROLLER).file(SOCKETS.partition(":")[2]).exists
    assert cluster.ask("/health").status == 200
    refused = served.play("playbooks/tailnet.yml")
    assert "fast.sock is no socket: nginx does not listen there. Run playbooks/gateway.yml first" in refused.text
    for name in ("playbooks/gateway.yml", "playbooks/tailnet.yml"):
        assert served.play(name).code == 0
    assert ask("alice", "/health").status == 200
