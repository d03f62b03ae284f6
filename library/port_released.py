#!/usr/bin/python3
"""Ansible module: a port is no longer kept from the kernel's outgoing connections."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: port_released
short_description: Take back the reservation of a port
description:
  - Takes a port out of C(net.ipv4.ip_local_reserved_ports) of the running kernel, and leaves all others.
  - One that a file of the host's own reserves stays. At boot nobody else would reserve it.
options:
  port: {description: The port., type: int, required: true}
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: absent | The port of RPC servers is anybody's
  port_released:
    port: 50052
"""

RETURN = r"""
kept_by: {description: "The file that reserves it, too; empty for none.", type: str, returned: always}
"""

LIVE = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
KEY = "net.ipv4.ip_local_reserved_ports"
# As sysctl --system reads them.
FOLDERS = ("etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d", "lib/sysctl.d")


def ranges(text: str) -> list[tuple[int, int]]:
    """`7,50-60` as pairs of first and last port; ValueError for anything else."""
    pairs = [part.strip().partition("-") for part in text.split(",") if part.strip()]
    return [(int(first), int(last or first)) for first, _, last in pairs]


def without(text: str, port: int) -> str:
    """The same reservations but for this port."""
    kept = []
    for first, last in ranges(text):
        around = [(first, port - 1), (port + 1, last)] if first <= port <= last else [(first, last)]
        kept += [f"{low}" if low == high else f"{low}-{high}" for low, high in around if low <= high]
    return ",".join(kept)


def reserves(line: str, port: int) -> bool:
    """A line of a file for sysctl that reserves the port."""
    key, _, value = line.partition("=")
    if key.strip().lstrip("-").strip().replace("/", ".") != KEY:
        return False
    try:
        return any(first <= port <= last for first, last in ranges(value))
    except ValueError:
        return False


def keeper_of(port: int, root: Path = Path("/")) -> str:
    """The file of the host that reserves the port; empty for none."""
    files = [root / "etc/sysctl.conf", *(file for name in FOLDERS for file in sorted((root / name).glob("*.conf")))]
    for file in files:
        if file.is_file() and any(reserves(line, port) for line in file.read_text(errors="replace").splitlines()):
            return str(file)
    return ""


def main() -> None:
    module = AnsibleModule(argument_spec={"port": {"type": "int", "required": True}}, supports_check_mode=True)
    port: int = module.params["port"]
    try:
        before = LIVE.read_text().strip()
        kept_by = keeper_of(port)
        after = before if kept_by else without(before, port)
        changed = ranges(after) != ranges(before)
        if changed and not module.check_mode:
            LIVE.write_text(f"{after}\n")
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"{LIVE}: {error}")
    module.exit_json(
        changed=changed,
        kept_by=kept_by,
        diff={"before": f"{KEY} = {before}\n", "after": f"{KEY} = {after}\n"} if changed else {},
    )


if __name__ == "__main__":
    main()
