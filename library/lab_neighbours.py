#!/usr/bin/python3
"""The other labs of this machine."""

from __future__ import annotations

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.lab import Lab

DOCUMENTATION = r"""
module: lab_neighbours
short_description: Refuse while other labs live on a cache or a checkout that is to go
description:
  - The disks of a lab's hosts lie on a base image in the cache, and the keys to them are in the checkout.
options:
  directory: {description: Folder of all labs of this machine., type: path, required: true}
  lab: {description: Id of the lab that goes with the cache., type: str, required: true}
  checkout: {description: Folder of the checkout whose keys and environment go., type: path, required: true}
  cache: {description: Folder of the cache that goes., type: path, required: true}
attributes:
  check_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: Nobody else needs the cache
  lab_neighbours:
    directory: /var/lib/gleaner-lab
    lab: "0"
    checkout: /home/me/gleaner
    cache: /var/cache/gleaner
"""

RETURN = r""" # """


def neighbours(labs: Path, lab: str, checkout: str, cache: str) -> list[str]:
    """Living labs but this one that would lose something, each with the command that takes it down."""
    found = []
    for folder in sorted(labs.glob("[0-9]")):
        other = Lab(folder)
        if folder.name == lab or not other.alive():
            continue
        owner = other.owner()
        # What an older record does not say is taken to be the same.
        needs_cache = os.path.realpath(owner.get("cache", cache)) == os.path.realpath(cache)
        home = owner.get("checkout", checkout)
        if needs_cache or home == checkout:
            found.append(f"lab {folder.name} of {home} (make -C {home} down GLEANER_LAB_ID={folder.name})")
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "lab": {"type": "str", "required": True},
            "checkout": {"type": "path", "required": True},
            "cache": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    alive = neighbours(Path(params["directory"]), params["lab"], params["checkout"], params["cache"])
    if alive:
        module.fail_json(
            msg=f"GLEANER_CACHE={params['cache']} and the keys in {params['checkout']} are in use by "
            f"{', '.join(alive)}. Take them down, and run this again; nothing was removed."
        )
    module.exit_json(changed=False)


if __name__ == "__main__":
    main()
