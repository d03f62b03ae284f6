"""Machines of the lab that are lost, and bare ones in their place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.lab import cluster
from tests.lab.ansible import LAB_ID, ROOT, playbook

KNOWN_HOSTS = ROOT / f".lab/known_hosts-{LAB_ID}"


@dataclass(frozen=True)
class Keys:
    """Public host keys of a machine: of the one that was there, and of the one that is."""

    old: str
    new: str


def key_of(name: str) -> str:
    """What ssh expects of a host now."""
    (line,) = (line for line in KNOWN_HOSTS.read_text().splitlines() if line.startswith(f"{cluster.address(name)} "))
    return " ".join(line.split()[1:3])


def replace(name: str) -> Keys:
    """The machine loses power, disk and cables; a bare one is booted, whose host key nobody knows."""
    known, old = KNOWN_HOSTS.read_text(), key_of(name)
    cluster.forget(name)
    done = playbook(str(ROOT / "molecule/idempotence/replace_machine.yml"), "-e", f"machine={name}")
    assert done.code == 0, done.output
    cluster.forget(name)
    new = key_of(name)
    assert new != old, "the bare machine has the host key of the old one"
    # The lab had noted it; a real machine tells nobody.
    KNOWN_HOSTS.write_text(known)
    return Keys(old, new)


def take_away(folder: Path, name: str, *arguments: str) -> None:
    """The machine loses power, disk and cables, and nothing takes its place; arguments name its inventory."""
    text = (ROOT / "molecule/idempotence/replace_machine.yml").read_text().splitlines(keepends=True)
    lost = folder / "lost.yml"
    # Without the play that boots a bare one.
    lost.write_text("".join(text[: next(n for n, line in enumerate(text) if line.startswith("- name: A bare one"))]))
    cluster.forget(name)
    done = playbook(str(lost), *arguments, "-e", f"machine={name}")
    assert done.code == 0, done.output
