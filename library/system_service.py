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
  - A unit that runs since before one of the files that it O(reads) was changed is a change, which the task's handler
    answers. A run that ended between a file and its handler would leave the unit with the old file otherwise, and the
    next run would find nothing to do.
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
  reads:
    description:
      - Files that the unit reads when it starts, and folders whose entries it reads. All have to be there.
      - Compared is the last change of their content with what O(reads_when) says, by the host's own clock. Where that
        has been set back in between, the unit counts as one that has not read them, once.
      - Nothing is restarted by this task. It says that it changed something, and notifies the handler that restarts.
    type: list
    elements: path
  reads_when:
    description: Whether the unit reads them at its start alone, or also when it is reloaded.
    type: str
    choices: [restarted, reloaded]
    default: restarted
attributes:
  check_mode:
    description: Names every unit that the real run would start, stop, enable or restart.
    support: full
  diff_mode:
    description: Shows which files a unit has not read; a unit itself has no text to compare.
    support: partial
seealso:
  - module: ansible.builtin.systemd_service
"""

EXAMPLES = r"""
- name: Service | Run munge
  system_service:
    name: munge
    state: started
    enabled: true
    reads: [/etc/munge/munge.key]
  notify: Restart munge
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
stale:
  description: Files that the running unit has not read as they are now.
  returned: when there are some
  type: list
  elements: str
"""
