#!/usr/bin/python3
"""Ansible module: a tier is held, started, or restarted."""

from __future__ import annotations

import json

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: tier_state
short_description: Hold, start or restart a tier
description:
  - Runs on the controller, where the keeper is, and says the wish by C(gleaner tier).
  - Streams in flight get the tier's drain budget before its job ends.
options:
  name: {description: The tier's name in the inventory., type: str, required: true}
  state:
    description:
      - V(held) keeps the tier away until somebody starts it, over restarts of everything.
      - V(started) ends a hold or the pause after a failure. A tier that has a job is left as it is.
      - V(restarted) always acts where the tier has a job that runs, which is drained and followed by another.
    type: str
    choices: [held, started, restarted]
    required: true
  wait_seconds: {description: How long it may take., type: int, default: 120}
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: The reasoning tier leaves its GPUs alone
  tier_state:
    name: reasoning
    state: held
"""

RETURN = r"""
before: {description: What C(gleaner status) said of the tier., type: str, returned: always}
after: {description: The same afterwards. In check mode the state that is wished., type: str, returned: always}
"""


# Of `gleaner status`: Slurm does not answer, which the tier's state says, too.
STATUS_UNSEEN = 3


class TierError(Exception):
    """The tier cannot be told; the text says why."""


def status_of(module: AnsibleModule, name: str) -> dict[str, object]:
    """The tier's line of `gleaner status`; TierError when there is none."""
    code, out, err = module.run_command(["gleaner", "status", "--json", "--tiers"])
    if code not in (0, STATUS_UNSEEN):
        raise TierError(err.strip() or f"gleaner status: exit code {code}")
    lines: list[dict[str, object]] = json.loads(out)["tiers"]
    for line in lines:
        if line["tier"] == name:
            return line
    raise TierError(f"name: got {name!r}, want one of {', '.join(str(line['tier']) for line in lines)}")


def is_so(line: dict[str, object], state: str) -> bool:
    """Nothing has to be done."""
    if state == "held":
        return bool(line["held"]) and line["job"] is None and line["state"] != "unknown"
    if state == "started":
        return line["state"] not in ("held", "paused", "absent", "unknown") and not line["held"]
    # A job that has not started yet has nothing that a restart would renew.
    return line["state"] == "queued" and not line["held"]


def in_words(line: dict[str, object]) -> str:
    why = line["reason"] or line["why"]
    return f"{line['state']}" + (f" ({why})" if why else "")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "required": True, "choices": ["held", "started", "restarted"]},
            "wait_seconds": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    name, state, seconds = (module.params[key] for key in ("name", "state", "wait_seconds"))
    try:
        line = status_of(module, name)
        before = after = in_words(line)
        changed = not is_so(line, state)
        if changed and module.check_mode:
            after = state
        elif changed:
            code, out, err = module.run_command(["gleaner", "tier", name, state, "--wait", str(seconds)])
            if code != 0:
                raise TierError(f"{out.strip()}\n{err.strip()}".strip())
            after = in_words(status_of(module, name))
    except TierError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=changed,
        before=before,
        after=after,
        diff={"before": f"{name}: {before}\n", "after": f"{name}: {after}\n"} if changed else {},
    )


if __name__ == "__main__":
    main()
