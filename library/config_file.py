"""Documentation of the action plugin config_file; the work is done in action_plugins/config_file.py."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: config_file
short_description: Render a template to a file of a host
description:
  - The same options and the same work as M(ansible.builtin.template).
  - In check mode an O(owner) or O(group) that does not exist on the host yet is a change, not a failure,
    because on a virgin host an earlier task would have created it.
  - A file that is as it should be is found so by one command of a shell, see M(host_file).
  - The diff names the destination on both sides, so that two check runs print the same text.
author: Gleaner
options:
  follow:
    description: Whether a symbolic link at O(dest) is followed.
    type: bool
    default: false
extends_documentation_fragment:
  - ansible.builtin.backup
  - ansible.builtin.files
  - ansible.builtin.template_common
  - ansible.builtin.validate
attributes:
  check_mode:
    description: Names every file that the real run would write, also into folders that a package brings.
    support: full
  diff_mode:
    description: Shows the text that would be written.
    support: full
seealso:
  - module: ansible.builtin.template
"""

EXAMPLES = r"""
- name: Configure | Render slurm.conf
  config_file:
    src: etc/slurm/slurm.conf.j2
    dest: /etc/slurm/slurm.conf
    owner: slurm
    group: slurm
    mode: "0644"
"""

RETURN = r"""
dest:
  description: The file on the host.
  returned: always
  type: str
  sample: /etc/slurm/slurm.conf
"""
