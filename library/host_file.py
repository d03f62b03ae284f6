"""Documentation of the action plugin host_file; the work is done in action_plugins/host_file.py."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: host_file
short_description: Copy a file or a text to a host, after a look whether it is there
description:
  - The same options and the same work as M(ansible.builtin.copy), for one file.
  - A file that is as it should be, by content, owner, group and mode, is found so by one command of a shell, and no
    module runs for it.
author: Gleaner
extends_documentation_fragment:
  - ansible.builtin.files
  - ansible.builtin.validate
options:
  src:
    description: A file here. One with an absolute path can be compared by the look.
    type: path
  content:
    description: The text of the file.
    type: str
  dest:
    description: The file on the host.
    type: path
    required: true
  force:
    description: Whether a file that is there already is replaced when its content is another.
    type: bool
    default: true
attributes:
  check_mode:
    description: As M(ansible.builtin.copy).
    support: full
  diff_mode:
    description: As M(ansible.builtin.copy).
    support: full
seealso:
  - module: ansible.builtin.copy
"""

EXAMPLES = r"""
- name: Munge has the cluster's key
  host_file:
    content: "{{ munge_key }}"
    dest: /etc/munge/munge.key
    owner: munge
    group: munge
    mode: "0400"
  no_log: true
"""

RETURN = r"""
dest:
  description: The file on the host.
  returned: always
  type: str
  sample: /etc/munge/munge.key
"""
