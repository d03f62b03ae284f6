#!/usr/bin/python3
"""Ansible module: the host key of a machine that may be another one is the one that ssh expects."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: known_host
short_description: Expect the host key that a machine shows now
description:
  - Runs where ansible runs, and asks the machine by C(ssh-keyscan). Which file keeps the key, and under which name, is
    asked of C(ssh -G), so that the site's own configuration of ssh decides.
  - Keys of a machine that was there before are forgotten. A machine that shows what is known already changes nothing.
options:
  address: {description: Where the machine is reached by ssh., type: str, required: true}
  port: {description: The port, where it is not that of ssh's configuration., type: int}
  ssh_args: {description: 'Arguments with which ansible calls ssh, as one text.', type: str, default: ''}
  key:
    description:
      - The key that it has to show, for example C(ssh-ed25519 AAAA…), as the console of the machine has it in
        C(/etc/ssh/ssh_host_ed25519_key.pub). Another one is refused, and only this one is believed from then on.
    type: str
    default: ''
  wait_seconds: {description: How long the machine may take to answer., type: int, default: 30}
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: The new machine is the one that ssh expects
  known_host:
    address: 10.0.0.12
  delegate_to: localhost
"""

RETURN = r"""
fingerprints: {description: 'Of the keys that are believed now.', type: list, elements: str, returned: always}
file: {description: Where they are kept., type: str, returned: always}
"""

SCAN_SECONDS = 5
POLL_SECONDS = 1.0


class KeyRefused(Exception):
    """The machine is not believed; the text says why and what cures it."""


@dataclass(frozen=True)
class Key:
    """A public host key."""

    kind: str
    text: str

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(base64.b64decode(self.text)).digest()
        return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')} ({self.kind})"

    def __str__(self) -> str:
        return f"{self.kind} {self.text}"


@dataclass(frozen=True)
class Place:
    """Where ssh looks for the key of a machine."""

    file: Path
    name: str
    host: str
    port: int
    jumps: bool
    """It is reached through another host, which ssh-keyscan cannot do."""


def parse_key(text: str) -> Key:
    """`ssh-ed25519 AAAA… comment`; ValueError when it is none."""
    words = text.split()
    if len(words) < 2:
        raise ValueError(f"key: got {text!r}, want a type and a key, as in ssh-ed25519 AAAA…")
    try:
        base64.b64decode(words[1], validate=True)
    except binascii.Error:
        raise ValueError(f"key: got {text!r}, want the key in base64 as its second word") from None
    return Key(words[0], words[1])


def parse_scan(text: str) -> list[Key]:
    """Keys of `ssh-keyscan`, in an order that is always the same."""
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return sorted({parse_key(line.partition(" ")[2]) for line in lines}, key=str)


def parse_place(text: str, address: str) -> Place:
    """What `ssh -G` prints."""
    said = dict(line.partition(" ")[::2] for line in reversed(text.splitlines()))
    host, port = said.get("hostname", address), int(said.get("port", "22"))
    name = said.get("hostkeyalias") or (host if port == 22 else f"[{host}]:{port}")
    file = (said.get("userknownhostsfile") or "~/.ssh/known_hosts").split()[0]
    jumps = any(said.get(option, "none") != "none" for option in ("proxyjump", "proxycommand"))
    return Place(Path(file).expanduser(), name, host, port, jumps)


def believed(known: Sequence[Key], shown: Sequence[Key], wanted: Key | None) -> list[Key]:
    """The keys to expect from now on; KeyRefused when the machine does not show the wanted one."""
    if wanted is not None:
        if wanted not in shown:
            raise KeyRefused(
                f"node_host_key = {wanted}; the machine shows {', '.join(key.fingerprint for key in shown)}, wanted "
                f"{wanted.fingerprint}; cure: look at /etc/ssh/ssh_host_*_key.pub on its console: either the key given "
                "is another machine's, or another machine answers at its address"
            )
        return [wanted]
    # What is known need not be all that the machine has.
    return list(known) if known and set(known) <= set(shown) else list(shown)


def without(lines: Sequence[str], numbers: Sequence[int], name: str) -> list[str]:
    """The file's lines without those of a machine; one that names others, too, keeps them."""
    kept = []
    for number, line in enumerate(lines, 1):
        if number not in numbers or line.startswith("@"):
            kept.append(line)
            continue
        names, _, rest = line.partition(" ")
        others = [one for one in names.split(",") if one != name] if "," in names else []
        if others:
            kept.append(f"{','.join(others)} {rest}")
    return kept


def ask(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)


def place_of(address: str, port: int | None, ssh_args: str) -> Place:
    argv = ["ssh", "-G", *shlex.split(ssh_args), *(["-p", str(port)] if port else []), address]
    done = ask(*argv)
    if done.returncode != 0:
        raise KeyRefused(f"{' '.join(argv)}: {done.stderr.strip()}")
    return parse_place(done.stdout, address)


def known_of(place: Place) -> tuple[list[Key], list[int]]:
    """Keys that the file has of the machine, and their lines."""
    if not place.file.exists():
        return [], []
    found = ask("ssh-keygen", "-F", place.name, "-f", str(place.file))
    # 1: there is none.
    if found.returncode not in (0, 1):
        raise KeyRefused(f"{place.file}: {found.stderr.strip()}")
    lines = [line for line in found.stdout.splitlines() if not line.startswith("@")]
    numbers = [int(number) for number in re.findall(r"found: line (\d+)", found.stdout)]
    return parse_scan("\n".join(lines)), numbers


def shown_by(place: Place, seconds: float) -> list[Key]:
    deadline = time.monotonic() + seconds
    while True:
        done = ask("ssh-keyscan", "-T", str(SCAN_SECONDS), "-p", str(place.port), place.host)
        if keys := parse_scan(done.stdout):
            return keys
        if time.monotonic() >= deadline:
            cure = "is it switched on, and does its sshd run?"
            if place.jumps:
                cure = (
                    "it is reached through another host, which ssh-keyscan cannot do: forget the old key "
                    f"(ssh-keygen -R {place.name} -f {place.file}) and log in once by ssh; then run this again"
                )
            raise KeyRefused(f"{place.host} port {place.port}: shows no host key within {seconds:g} s; {cure}")
        time.sleep(POLL_SECONDS)


def write(place: Place, lines: Sequence[str]) -> None:
    """Whoever connects meanwhile sees the file as it was, or as it is to be."""
    place.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=place.file.parent, prefix=".known_hosts-")
    with os.fdopen(fd, "w") as stream:
        stream.write("".join(f"{line}\n" for line in lines))
    if place.file.exists():
        os.chmod(temporary, place.file.stat().st_mode & 0o777)
    os.replace(temporary, place.file)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "required": True},
            "port": {"type": "int"},
            "ssh_args": {"type": "str", "default": ""},
            "key": {"type": "str", "default": "", "no_log": False},
            "wait_seconds": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    wanted = module.params["key"]
    try:
        place = place_of(module.params["address"], module.params["port"], module.params["ssh_args"])
        known, numbers = known_of(place)
        shown = shown_by(place, module.params["wait_seconds"])
        keys = believed(known, shown, parse_key(wanted) if wanted else None)
        changed = set(keys) != set(known)
        if changed and not module.check_mode:
            lines = place.file.read_text().splitlines() if place.file.exists() else []
            write(place, [*without(lines, numbers, place.name), *(f"{place.name} {key}" for key in keys)])
    except (KeyRefused, ValueError, OSError, subprocess.TimeoutExpired) as error:
        module.fail_json(msg=str(error))
    before, after = ("".join(f"{place.name} {key}\n" for key in some) for some in (known, keys))
    module.exit_json(
        changed=changed,
        file=str(place.file),
        fingerprints=[key.fingerprint for key in keys],
        diff={"before": before, "after": after} if changed else {},
    )


if __name__ == "__main__":
    main()
