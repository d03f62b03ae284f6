#!/usr/bin/python3
"""Whose lab it is."""

from __future__ import annotations

import json
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.lab import Process

DOCUMENTATION = r"""
module: lab_owner
short_description: Claim a lab for a checkout, or refuse when another checkout runs it
description:
  - A lab of which something runs belongs to the checkout that started it. A dead lab is nobody's.
options:
  directory: {description: Folder of the lab., type: path, required: true}
  checkout: {description: Folder of the checkout that wants it., type: path, required: true}
  lab: {description: Id of the lab., type: str, required: true}
attributes:
  check_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: This checkout owns lab 0
  lab_owner:
    directory: /var/lib/gleaner-lab/0
    checkout: /home/me/gleaner
    lab: "0"
"""

RETURN = r"""
taken_over: {description: The checkout that a dead lab belonged to, or empty., type: str, returned: always}
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "checkout": {"type": "path", "required": True},
            "lab": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    directory, checkout = Path(module.params["directory"]), module.params["checkout"]
    record = directory / "owner.json"
    try:
        owner = json.loads(record.read_text())["checkout"]
    except (OSError, ValueError, KeyError):
        owner = ""
    records = [*directory.glob("hosts/*/process.json"), *directory.glob("packages-*.json")]
    alive = any(Process(file, "").pid() is not None for file in records)
    lab = module.params["lab"]
    if alive and owner and owner != checkout:
        module.fail_json(
            msg=f"Lab {lab} runs for the checkout {owner}, not for {checkout}. "
            f"Take it down there (make -C {owner} down), or have a second lab here: GLEANER_LAB_ID=<0..9 but {lab}>."
        )
    changed = owner != checkout
    if changed and not module.check_mode:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps({"checkout": checkout}))
        temporary.rename(record)
    module.exit_json(changed=changed, taken_over=owner if changed else "")


if __name__ == "__main__":
    main()
