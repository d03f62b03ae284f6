#!/usr/bin/python3
"""Ansible module: elements are added to the sets of an nftables table, and to the file that it is loaded from."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: nft_elements
short_description: Add elements to sets of an nftables table and of its file
description:
  - Adds to what the running table has, then to the C(add element) line of each set in the file. Nothing is loaded anew
    and nothing is taken away, so that connections do not notice.
  - A file that has the elements is believed, since the running table gets them first.
options:
  path: {description: The file that the table is loaded from., type: path, required: true}
  family: {description: Family of the table., type: str, default: inet}
  table: {description: Name of the table., type: str, required: true}
  elements:
    description: For each set its elements. Those of the file are kept in the order of their text.
    type: dict
    required: true
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: A new node may ask this one's RPC servers
  nft_elements:
    path: /etc/gleaner/firewall.nft
    table: gleaner
    elements: {rpc_peers: ["10.0.1.14"]}
"""

RETURN = r"""
added: {description: For each set what it lacked., type: dict, returned: success}
"""


def lacking(text: str, table: str, name: str, elements: Iterable[str]) -> list[str]:
    """Which of the elements a set does not have in a file's text. `table` is the family and the name.

    Raises ValueError when the text fills no such set.
    """
    there = _line(text, table, name).group(2)
    return sorted({*elements} - {element.strip() for element in there.split(",")})


def with_elements(text: str, table: str, name: str, elements: Iterable[str]) -> str:
    """The text of the file with more elements in a set, all in the order of their text."""
    found = _line(text, table, name)
    there = {element.strip() for element in found.group(2).split(",")}
    return f"{text[: found.start(2)]}{', '.join(sorted({*there, *elements}))}{text[found.end(2) :]}"


def _line(text: str, table: str, name: str) -> re.Match[str]:
    start = re.escape(f"add element {table} {name} {{ ")
    found = re.search(rf"^({start})([^}}\n]*)( }})$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"fills no set {name} of the table {table}")
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "family": {"type": "str", "default": "inet"},
            "table": {"type": "str", "required": True},
            "elements": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    path, table = Path(module.params["path"]), f"{module.params['family']} {module.params['table']}"
    try:
        before = after = path.read_text()
        added = {
            name: more
            for name, wanted in module.params["elements"].items()
            if (more := lacking(before, table, name, map(str, wanted)))
        }
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"{path}: {getattr(error, 'strerror', None) or error}")
    for name, more in added.items():
        after = with_elements(after, table, name, more)
        if not module.check_mode:
            # A braced list is one argument of nft's own language.
            module.run_command(["nft", f"add element {table} {name} {{ {', '.join(more)} }}"], check_rc=True)
    if added and not module.check_mode:
        times = path.stat()
        with tempfile.NamedTemporaryFile("w", dir=module.tmpdir, delete=False) as file:
            file.write(after)
        # With owner and mode of the file that it replaces.
        module.atomic_move(file.name, str(path))
        # The running table has them already: a file that is not newer is one that its unit has read.
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    diff = {"before": before, "after": after, "before_header": str(path), "after_header": str(path)} if added else {}
    module.exit_json(changed=bool(added), added=added, diff=diff)


if __name__ == "__main__":
    main()
