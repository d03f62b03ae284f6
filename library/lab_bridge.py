#!/usr/bin/python3
"""A bridge of the lab."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.lab import LabError, run

DOCUMENTATION = r"""
module: lab_bridge
short_description: A bridge with one address, for the lab's hosts only
description:
  - Makes a bridge that has no way out; what is on it reaches this machine and the other hosts on it.
options:
  name: {description: Interface name., type: str, required: true}
  address: {description: Address with prefix length. Needed to make it., type: str, default: ""}
  state: {description: Wanted state., type: str, choices: [present, absent], default: present}
attributes:
  check_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: The lab's first network
  lab_bridge:
    name: gl0main
    address: 10.213.0.1/24
"""

RETURN = r""" # """


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "address": {"type": "str", "default": ""},
            "state": {"choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    name, address = module.params["name"], module.params["address"]
    wanted = module.params["state"] == "present"
    there = Path("/sys/class/net", name).exists()
    changed = wanted is not there
    try:
        if wanted and there and address not in run("ip", "-o", "address", "show", "dev", name):
            module.fail_json(
                msg=f"Interface {name} exists without the lab's address {address}: it is not this lab's bridge. "
                f"Take it away (ip link delete {name}) or choose another lab with GLEANER_LAB_ID."
            )
        if changed and not module.check_mode:
            if wanted:
                run("ip", "link", "add", name, "type", "bridge")
                run("ip", "address", "add", address, "dev", name)
                run("ip", "link", "set", name, "up")
            else:
                run("ip", "link", "delete", name)
    except LabError as error:
        module.fail_json(msg=f"Lab bridge {name}: {error}")
    module.exit_json(changed=changed)


if __name__ == "__main__":
    main()
