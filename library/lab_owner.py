#!/usr/bin/python3
"""Whose lab it is, and whether its hosts are of any use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.lab import Lab

DOCUMENTATION = r"""
module: lab_owner
short_description: Claim a lab for a checkout, or refuse when it is in use
description:
  - A lab of which something runs belongs to the checkout that started it. A dead lab is nobody's.
  - Says what makes the hosts of a lab useless for the one who wants it. In check mode it asks only, and claims nothing.
options:
  directory: {description: Folder of the lab., type: path, required: true}
  lab: {description: Id of the lab., type: str, required: true}
  checkout: {description: Folder of the checkout that wants it., type: path, required: true}
  suite: {description: Debian release of its hosts. Without it only the checkout is asked about., type: str}
  image: {description: Folder of the base image on which its hosts' disks lie., type: path}
  login_key: {description: Public key that its hosts admit., type: path}
  cache: {description: Folder of what the lab lives on and others may share., type: path}
attributes:
  check_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: This checkout owns lab 0
  lab_owner:
    directory: /var/lib/gleaner-lab/0
    lab: "0"
    checkout: /home/me/gleaner
    suite: trixie
    image: /var/cache/gleaner/base/trixie
    login_key: /home/me/gleaner/.lab/id_ed25519.pub
    cache: /var/cache/gleaner
"""

RETURN = r"""
outdated:
  description: Why the lab's hosts are useless for the one who wants it, in words; empty when they are not.
  type: list
  elements: str
  returned: always
hosts: {description: Names of the hosts that the lab has., type: list, elements: str, returned: always}
"""


def wanted_owner(params: dict[str, Any]) -> dict[str, str]:
    """What the lab is claimed with; an image or a key that is not there is empty text."""
    try:
        # A base image is never written to after it was made.
        made = str(Path(params["image"]).stat().st_mtime_ns) if params["image"] else None
    except OSError:
        made = ""
    try:
        key = Path(params["login_key"]).read_text().strip() if params["login_key"] else None
    except OSError:
        key = ""
    known = {name: params[name] for name in ("checkout", "suite", "cache")} | {"image_made": made, "login_key": key}
    return {name: value for name, value in known.items() if value is not None}


def refusal(lab: str, owner: dict[str, str], wanted: dict[str, str]) -> str:
    """Why a living lab is not to be touched, and the cure; empty when it may be."""
    other = f"have a second lab here: GLEANER_LAB_ID=<0..9 but {lab}>."
    checkout = owner.get("checkout", wanted["checkout"])
    if checkout != wanted["checkout"]:
        return (
            f"Lab {lab} runs for the checkout {checkout}, not for {wanted['checkout']}. "
            f"Take it down there (make -C {checkout} down GLEANER_LAB_ID={lab}), or {other}"
        )
    suite = owner.get("suite", wanted.get("suite"))
    if "suite" in wanted and suite != wanted["suite"]:
        return (
            f"Lab {lab} runs with GLEANER_LAB_SUITE={suite}, wanted {wanted['suite']}. "
            f"Take it down (make down GLEANER_LAB_ID={lab}), or {other}"
        )
    return ""


def outdated(lab: Lab, wanted: dict[str, str]) -> list[str]:
    """Why the lab's hosts are useless for the one who wants it; what is not known of them is taken to be right."""
    owner = lab.owner()
    if not owner:
        return ["nothing says whose it is"] if lab.hosts() else []
    if owner.get("checkout") != wanted["checkout"]:
        return [f"it belonged to the checkout {owner.get('checkout')}"]
    reasons = {
        "suite": f"its hosts have GLEANER_LAB_SUITE={owner.get('suite')}, wanted {wanted.get('suite')}",
        "image_made": "the base image below its hosts' disks is gone or was made anew",
        "login_key": "the login key that its hosts admit is gone or was made anew",
    }
    return [text for name, text in reasons.items() if name in wanted and owner.get(name, wanted[name]) != wanted[name]]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "lab": {"type": "str", "required": True},
            "checkout": {"type": "path", "required": True},
            "suite": {"type": "str"},
            "image": {"type": "path"},
            "login_key": {"type": "path", "no_log": False},
            "cache": {"type": "path"},
        },
        supports_check_mode=True,
    )
    lab, wanted = Lab(Path(module.params["directory"])), wanted_owner(module.params)
    owner = lab.owner()
    refused = refusal(module.params["lab"], owner, wanted) if lab.alive() else ""
    if refused:
        module.fail_json(msg=refused)
    reasons = outdated(lab, wanted)
    changed = owner != wanted
    if changed and not module.check_mode:
        lab.claim(wanted)
    module.exit_json(changed=changed, outdated=reasons, hosts=lab.hosts())


if __name__ == "__main__":
    main()
