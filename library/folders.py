"""Documentation of the action plugin folders; the work is done in action_plugins/folders.py."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: folders
short_description: Make folders of a host
description:
  - The same work as M(ansible.builtin.file) with O(ansible.builtin.file#module:state=directory), for each in turn.
  - Those that are as they should be, by owner, group and mode, are found so by one command of a shell, and no module
    runs for them. A link is left to the module.
author: Gleaner
options:
  folders:
    description: From the outer to the inner.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: The folder.
        type: path
        required: true
      owner:
        description: By name or id. Whoever it is, where there is none.
        type: raw
      group:
        description: By name or id. Whichever it is, where there is none.
        type: raw
      mode:
        description: Octal digits, in quotes.
        type: str
        required: true
attributes:
  check_mode:
    description: Names what the real run would make or change.
    support: full
  diff_mode:
    description: Shows kind, owner, group and mode, before and after.
    support: full
seealso:
  - module: ansible.builtin.file
"""

EXAMPLES = r"""
- name: Make the folders of the models
  folders:
    folders:
      - {path: /scratch/ai/models, owner: root, group: root, mode: "0755"}
      - {path: /scratch/ai/models/.staging, owner: root, group: root, mode: "0755"}
"""

RETURN = r"""# """
