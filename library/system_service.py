"""Documentation of the action plugin system_service; the work is done in action_plugins/system_service.py."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: system_service
short_description: Manage a systemd unit
description:
  - The same options and the same work as M(ansible.builtin.systemd_service).
  - In check mode a unit that does not exist on the host yet is a change, not a failure,
    because on a virgin host an earlier task would have installed its package or written its unit file.
  - A unit that systemd skips since one of its conditions is not met is a failure, where core counts it as started.
  - When the real run fails, the message ends with the last lines of the unit's journal.
author: Gleaner
options:
  name:
    description: The unit; C(.service) is implied.
    type: str
    aliases: [service, unit]
  state:
    description: The state to reach. V(restarted) and V(reloaded) always act, the others only where needed.
    type: str
    choices: [reloaded, restarted, started, stopped]
  enabled:
    description: Whether the unit starts at boot.
    type: bool
  force:
    description: Whether existing symbolic links are overwritten.
    type: bool
  masked:
    description: Whether the unit is masked.
    type: bool
  daemon_reload:
    description: Whether systemd reads its unit files again before anything else.
    type: bool
    default: false
    aliases: [daemon-reload]
  daemon_reexec:
    description: Whether systemd is executed anew before anything else.
    type: bool
    default: false
    aliases: [daemon-reexec]
  scope:
    description: The service manager that is meant.
    type: str
    choices: [system, user, global]
    default: system
  no_block:
    description: Whether to return before the unit has reached its state.
    type: bool
    default: false
attributes:
  check_mode:
    description: Names every unit that the real run would start, stop, enable or restart.
    support: full
  diff_mode:
    description: A unit has no text to compare.
    support: none
seealso:
  - module: ansible.builtin.systemd_service
"""

EXAMPLES = r"""
- name: Service | Run munge
  system_service:
    name: munge
    state: started
    enabled: true
"""

RETURN = r"""
name:
  description: The unit.
  returned: always
  type: str
  sample: munge
status:
  description: The unit's properties as systemd shows them.
  returned: when the unit exists
  type: dict
"""
