"""Documentation of the action plugin packages; the work is done in action_plugins/packages.py."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: packages
short_description: Install Debian packages
description:
  - M(ansible.builtin.apt), without recommended packages and with an index that is no older than a day, which is read
    anew only where something is to be installed.
  - Packages that are installed, and marked as asked for, are found so by one command of a shell, and no module runs
    for them.
author: Gleaner
options:
  name:
    description: Names, without versions.
    type: list
    elements: str
    required: true
  policy_rc_d:
    description: Exit code of a policy-rc.d for the time of the installation; 101 starts no service.
    type: int
attributes:
  check_mode:
    description: Names what would be installed.
    support: full
  diff_mode:
    description: Shows what apt would do.
    support: full
seealso:
  - module: ansible.builtin.apt
"""

EXAMPLES = r"""
- name: Slurmd and the client commands are installed
  packages:
    name: [slurmd, slurm-client]
    policy_rc_d: 101
"""

RETURN = r"""# """
