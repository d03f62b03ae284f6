#!/usr/bin/python3
"""A daemon of the lab on this machine, known by its recorded process id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.lab import LabError, Process

DOCUMENTATION = r"""
module: lab_process
short_description: Keep a daemon running for as long as the lab lives
description:
  - Starts a program in the foreground, detached from Ansible, and ends it by its recorded process id.
options:
  name: {description: Name that is unique on this machine., type: str, required: true}
  argv: {description: The program and its arguments. Needed to start it., type: list, elements: str, default: []}
  directory: {description: Folder for its record and log., type: path, required: true}
  state: {description: Wanted state., type: str, choices: [started, stopped], default: started}
attributes:
  check_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: The package proxy runs
  lab_process:
    name: gl0-packages
    directory: /var/lib/gleaner-lab/0
    argv: [apt-cacher-ng, ForeGround=1]
"""

RETURN = r"""
pid: {description: Process id., type: int, returned: when running}
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "argv": {"type": "list", "elements": "str", "default": []},
            "directory": {"type": "path", "required": True},
            "state": {"choices": ["started", "stopped"], "default": "started"},
        },
        supports_check_mode=True,
    )
    name = module.params["name"]
    directory = Path(module.params["directory"])
    process = Process(directory / f"{name}.json", f"gleaner-lab-{name}")
    wanted = module.params["state"] == "started"
    changed = wanted is (process.pid() is None)
    try:
        if changed and not module.check_mode:
            if wanted:
                process.start(module.params["argv"], directory / f"{name}.log")
            else:
                process.stop(10.0)
    except (LabError, OSError) as error:
        module.fail_json(msg=f"Lab process {name}: {error}")
    pid = process.pid()
    result: dict[str, Any] = {"changed": changed, **({"pid": pid} if pid else {})}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
