"""Ansible module: what `tailscale serve` of a node hands on, as declared."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: tailscale_serve
short_description: The paths that tailscale serve hands on to local servers
description:
  - Compares what is declared with C(tailscale serve status --json), and sets or removes single paths by the command
    line, since C(tailscale serve set-config) knows services only and no paths.
  - What it has set it remembers in a file on the host. Paths that others have set are left alone, unless O(foreign)
    says otherwise; they are named in the result.
  - Reads the configuration back, since the command can end well without having written it.
author: Gleaner
options:
  paths:
    description: What is to be handed on.
    type: list
    elements: dict
    required: true
    suboptions:
      mount:
        description: Path on the tailnet, for example C(/reasoning/). It is stripped from requests.
        type: str
        required: true
      target:
        description: Where it leads, for example C(http://127.0.0.1:8081).
        type: str
        required: true
      port:
        description: Port on the tailnet.
        type: int
        default: 443
      https:
        description: Whether it is served with a certificate of the tailnet.
        type: bool
        default: true
      app_capabilities:
        description: Capabilities that the target is told in the header C(Tailscale-App-Capabilities).
        type: list
        elements: str
        default: []
  foreign:
    description:
      - Whether paths that are not declared, and were not set by this module, stay.
      - TCP forwards and what C(tailscale funnel) opens to the internet stay in any case, and are named.
    type: str
    choices: [keep, remove]
    default: keep
  superseded:
    description:
      - Targets that the declared ones stand in for, for example C(http://127.0.0.1:8080). Paths of whomever that lead
        there are led elsewhere, or taken away; a TCP forward to one is refused.
    type: list
    elements: str
    default: []
  service:
    description:
      - The tailnet's service, for example C(svc:llm), as a host of which the node hands the paths on, in place of its
        own name. The node needs a tag.
      - A service is defined in the admin console, and approves its hosts there or by C(autoApprovers) of the policy.
      - Setting a path advertises it, taking the last one away ends that. A service that was drained by
        C(tailscale serve drain) stays so.
    type: str
  program:
    description: The command line of tailscale.
    type: str
    default: tailscale
  socket:
    description: Socket of a tailscaled that is not the system's own.
    type: path
  memory:
    description: File on the host that remembers what was set. A service has one of its own.
    type: path
    default: /var/lib/gleaner/tailscale-serve.json
attributes:
  check_mode:
    description: Names what would be set. On a host without a node of a tailnet, everything.
    support: full
  diff_mode:
    description: Shows the paths as they are and as they are to be.
    support: full
"""

EXAMPLES = r"""
- name: Serve both tiers on the tailnet
  tailscale_serve:
    paths:
      - {mount: /, target: "http://127.0.0.1:8080"}
      - {mount: /reasoning/, target: "http://127.0.0.1:8081"}
"""

RETURN = r"""
urls:
  description: The declared paths as a client writes them.
  returned: when the node is on a tailnet
  type: list
  elements: str
  sample: ["https://slurm-ctl.example.ts.net/reasoning/"]
foreign:
  description: What others have set on this node and what is left alone, in words.
  returned: always
  type: list
  elements: str
"""

# `tailscale serve` waits for ever where the tailnet has to admit HTTPS first.
COMMAND_SECONDS = 30.0
ATTEMPTS = 4
NO_DAEMON = "failed to connect to local"
BUSY = "Another client is changing the serve config"


class ServeError(Exception):
    """What is declared cannot be reached; the text says why and what cures it."""


class NotThere(ServeError):
    """There is no node of a tailnet here."""


@dataclass(frozen=True)
class Served:
    """One path, as declared or as found."""

    port: int
    https: bool
    mount: str
    target: str
    app_capabilities: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[int, str]:
        """Where it is: with and without a slash at its end is the same to tailscale."""
        return self.port, self.mount.rstrip("/")

    def url(self, host: str) -> str:
        scheme, usual = ("https", 443) if self.https else ("http", 80)
        return f"{scheme}://{host}{'' if self.port == usual else f':{self.port}'}{self.mount}"

    def in_words(self, host: str) -> str:
        capabilities = f" with {', '.join(self.app_capabilities)}" if self.app_capabilities else ""
        return f"{self.url(host)} -> {self.target}{capabilities}"

    def set_words(self) -> list[str]:
        """Arguments of `tailscale serve` that set it."""
        capabilities = [f"--accept-app-caps={','.join(self.app_capabilities)}"] if self.app_capabilities else []
        return ["--bg", "--yes", *self._where(), *capabilities, self.target]

    def off_words(self) -> list[str]:
        return ["--yes", *self._where(), "off"]

    def _where(self) -> list[str]:
        return [f"--{'https' if self.https else 'http'}={self.port}", f"--set-path={self.mount}"]


def found(config: Mapping[str, Any], host: str) -> list[Served]:
    """The paths of a serve configuration that belong to this name of the node, and proxy."""
    paths = []
    for key, web in (config.get("Web") or {}).items():
        name, _, port = key.rpartition(":")
        if name == host:
            https = bool((config.get("TCP") or {}).get(port, {}).get("HTTPS"))
            for mount, handler in (web.get("Handlers") or {}).items():
                target = (
                    handler.get("Proxy") or handler.get("Path") or handler.get("Redirect") or handler.get("Text", "")
                )
                capabilities = tuple(handler.get("AcceptAppCaps") or ())
                paths.append(Served(int(port), https, mount, target, capabilities))
    return sorted(paths, key=lambda one: one.place)


@dataclass(frozen=True)
class Plan:
    """What to do: arguments of `tailscale serve`, one command after the other; and what is left alone."""

    commands: tuple[tuple[str, ...], ...]
    foreign: tuple[str, ...]


def plan(
    wanted: Sequence[Served],
    config: Mapping[str, Any],
    host: str,
    ours: Iterable[Served],
    remove_foreign: bool,
    superseded: Collection[str] = (),
) -> Plan:
    """How to come from a configuration to the wanted paths. ServeError where something of others is in the way."""
    ours = [*ours, *(one for one in found(config, host) if one.target in superseded)]
    refuse_conflicts(wanted, config, host, ours, remove_foreign)
    there, want = {one.place: one for one in found(config, host)}, {one.place: one for one in wanted}
    mine = {(one.place, one.target) for one in ours}
    refuse_forwards(config, superseded)
    commands: list[list[str]] = []
    foreign = []
    for place, one in there.items():
        other_kind = place in want and want[place].https != one.https
        if place in want and not other_kind:
            continue
        if other_kind or remove_foreign or (place, one.target) in mine:
            commands.append(one.off_words())
        else:
            foreign.append(one.in_words(host))
    commands += [one.set_words() for place, one in want.items() if there.get(place) != one]
    foreign += [f"{key} (a name that this node does not have any more)" for key in stale(config, host)]
    tcp = config.get("TCP") or {}
    foreign += [f"port {port} -> {one['TCPForward']} (TCP)" for port, one in tcp.items() if one.get("TCPForward")]
    foreign += [
        f"{key} is open to the internet (funnel)" for key, on in (config.get("AllowFunnel") or {}).items() if on
    ]
    return Plan(tuple(map(tuple, commands)), tuple(foreign))


def refuse_forwards(config: Mapping[str, Any], superseded: Collection[str]) -> None:
    for port, one in (config.get("TCP") or {}).items():
        if f"http://{one.get('TCPForward', '')}" in superseded:
            raise ServeError(
                f"port {port}: forwarded to {one['TCPForward']} as it is, past all that is declared: "
                f"`tailscale serve --tcp={port} off` (or --tls-terminated-tcp)"
            )


def refuse_missing(wanted: Iterable[Served]) -> None:
    """tailscale takes any path for a socket, and answers 502 while nobody listens there."""
    for path in sorted({one.target.partition(":")[2] for one in wanted if one.target.startswith("unix:")}):
        if not Path(path).is_socket():
            raise ServeError(
                f"{path} is no socket: nginx does not listen there. Run playbooks/gateway.yml first; after a run that "
                "was broken off, `systemctl restart nginx`"
            )


def stale(config: Mapping[str, Any], host: str) -> list[str]:
    """Names and ports of which the command line cannot take anything away: it knows the present name alone."""
    return sorted(key for key in config.get("Web") or {} if key.rpartition(":")[0] != host)


def refuse_conflicts(
    wanted: Sequence[Served], config: Mapping[str, Any], host: str, ours: Iterable[Served], remove_foreign: bool
) -> None:
    going = {(one.place, one.target) for one in ours} | {(one.place, one.target) for one in wanted}
    for port in sorted({one.port for one in wanted}):
        tcp = (config.get("TCP") or {}).get(str(port), {})
        if tcp.get("TCPForward"):
            raise ServeError(
                f"port {port}: forwarded to {tcp['TCPForward']} by somebody else: declare another port, or "
                f"`tailscale serve --tcp={port} off`"
            )
        key = f"{host}:{port}"
        if (config.get("AllowFunnel") or {}).get(key):
            raise ServeError(
                f"{key}: open to the internet by `tailscale funnel`, and what is declared there would be, too: "
                f"end it (`tailscale funnel --https={port} off`), or declare another port"
            )
        places = {one.place for one in wanted}
        others = [
            one
            for one in found(config, host)
            if one.port == port and one.place not in places and (one.place, one.target) not in going
        ]
        kinds = {one.https for one in wanted if one.port == port}
        if len(kinds) > 1 or (others and {one.https for one in others} != kinds and not remove_foreign):
            raise ServeError(f"port {port}: HTTP and HTTPS cannot share it: declare another port")


class Client:
    """The command line of tailscale."""

    def __init__(self, program: str, socket: str | None, service: str | None = None) -> None:
        self._argv = [program, *([f"--socket={socket}"] if socket else [])]
        self._service = service

    def run(self, *words: str) -> tuple[str, str]:
        """What it printed, and what it warned of. ServeError when it fails, or does not end."""
        argv = [*self._argv, *words]
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
            )
        except FileNotFoundError:
            raise NotThere(f"{argv[0]} is not on this host: install tailscale first") from None
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace").strip()
            raise ServeError(f"`{' '.join(argv)}` did not end within {COMMAND_SECONDS:g} s: {said}") from None
        if done.returncode and NO_DAEMON in done.stderr:
            raise NotThere(f"tailscaled does not run: {done.stderr.strip()}")
        if done.returncode:
            raise ServeError(f"`{' '.join(argv)}`: {(done.stderr or done.stdout).strip()}")
        return done.stdout, done.stderr

    def ask(self, *words: str) -> Any:
        """What it tells as JSON; warnings (of versions, of the tailnet's health) go beside that."""
        told, warned = self.run(*words)
        try:
            return json.loads(told)
        except ValueError as error:
            raise ServeError(f"`{' '.join([*self._argv, *words])}`: no JSON ({error}): {told}{warned}") from None

    def change(self, words: Sequence[str]) -> str:
        """Change the serve configuration; once more when somebody else did in the same moment."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                service = [f"--service={self._service}"] if self._service and words[0] != "clear" else []
                return "".join(self.run("serve", *service, *words))
            except ServeError as error:
                if BUSY not in str(error) or attempt == ATTEMPTS:
                    raise
                time.sleep(attempt)
        raise AssertionError("unreachable")

    def host(self, wanted: Iterable[Served] = ()) -> str:
        """The name on the tailnet: this node's, or that of the service.

        NotThere when it is on none, ServeError when that one gives no name, or admits no HTTPS though it is wanted.
        """
        state = self.ask("status", "--json", "--peers=false")
        if state.get("BackendState") != "Running":
            raise NotThere(f"tailscale is {state.get('BackendState')}: have the node join its tailnet first")
        name = str((state.get("Self") or {}).get("DNSName") or "").rstrip(".")
        if not name:
            raise ServeError("the tailnet gives this node no name: turn MagicDNS on")
        # Without it the command waits until somebody admits it, for ever.
        if any(one.https for one in wanted) and not state.get("CertDomains"):
            raise ServeError(
                f"the tailnet of {name} admits no HTTPS: enable HTTPS Certificates in the admin console, under DNS; "
                "or declare the paths without https"
            )
        return f"{self._service.partition(':')[2]}.{name.partition('.')[2]}" if self._service else name

    def config(self) -> dict[str, Any]:
        whole: dict[str, Any] = self.ask("serve", "status", "--json") or {}
        return (whole.get("Services") or {}).get(self._service) or {} if self._service else whole


def remembered(path: Path) -> list[Served]:
    try:
        return [
            Served(**{**one, "app_capabilities": tuple(one["app_capabilities"])})
            for one in json.loads(path.read_text())
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def remember(path: Path, paths: Collection[Served]) -> None:
    if not paths:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        json.dump([asdict(one) for one in paths], file)
    os.replace(file.name, path)


def apply(client: Client, wanted: Sequence[Served], todo: Plan, memory: Path, remove_foreign: bool) -> None:
    """Change what differs, and look whether that is what is there now."""
    ours = remembered(memory)
    # Whatever becomes of this run, what it sets is known to be ours.
    remember(memory, dict.fromkeys([*ours, *wanted]))
    said = [client.change(words) for words in todo.commands]
    left = plan(wanted, client.config(), client.host(), ours, remove_foreign).commands
    if left:
        words = " ".join(" ".join(said).split())
        raise ServeError(f"tailscale took `serve {' '.join(left[0])}` and did not do it: {words or 'it said nothing'}")
    remember(memory, wanted)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "paths": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "mount": {"type": "str", "required": True},
                    "target": {"type": "str", "required": True},
                    "port": {"type": "int", "default": 443},
                    "https": {"type": "bool", "default": True},
                    "app_capabilities": {"type": "list", "elements": "str", "default": []},
                },
            },
            "foreign": {"type": "str", "choices": ["keep", "remove"], "default": "keep"},
            "superseded": {"type": "list", "elements": "str", "default": []},
            "service": {"type": "str"},
            "program": {"type": "str", "default": "tailscale"},
            "socket": {"type": "path"},
            "memory": {"type": "path", "default": "/var/lib/gleaner/tailscale-serve.json"},
        },
        supports_check_mode=True,
    )
    params = module.params
    wanted = [
        Served(one["port"], one["https"], one["mount"], one["target"], tuple(one["app_capabilities"]))
        for one in params["paths"]
    ]
    client, memory, remove_foreign = (
        Client(params["program"], params["socket"], params["service"]),
        Path(params["memory"]),
        params["foreign"] == "remove",
    )
    # Nothing was ever set, and nothing is to be: tailscale need not even be there.
    if not wanted and not memory.exists():
        module.exit_json(changed=False, foreign=[])
    try:
        host = client.host(wanted)
    except NotThere as error:
        # What was set went with the login, or leads nowhere while the node is down.
        if not wanted:
            module.exit_json(changed=False, foreign=[], msg=str(error))
        # In a dry run it may be about to join.
        if not module.check_mode:
            module.fail_json(msg=str(error))
        after = "".join(f"{one.in_words('(this node)')}\n" for one in wanted)
        module.exit_json(changed=True, foreign=[], msg=str(error), diff={"before": "", "after": after})
    except ServeError as error:
        module.fail_json(msg=str(error))
    try:
        config, ours = client.config(), remembered(memory)
        if not module.check_mode:
            refuse_missing(wanted)
        todo = plan(wanted, config, host, ours, remove_foreign, params["superseded"])
        if params["service"] and not wanted and config and not todo.foreign:
            # The service, too: its last path alone would leave the node advertised as its host.
            todo = Plan((("clear", params["service"]),), ())
        before = [one.in_words(host) for one in found(config, host)]
        kept = [*todo.foreign, *(one.in_words(host) for one in wanted)]
        if todo.commands and not module.check_mode:
            apply(client, wanted, todo, memory, remove_foreign)
        elif ours != wanted and not module.check_mode:
            remember(memory, wanted)
    except ServeError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=bool(todo.commands),
        urls=[one.url(host) for one in wanted],
        foreign=list(todo.foreign),
        diff={
            "before": "".join(f"{one}\n" for one in sorted(before)),
            "after": "".join(f"{one}\n" for one in sorted(kept)),
        },
    )


if __name__ == "__main__":
    main()
