#!/usr/bin/python3
"""Ansible module: files and folders are gone, and folders that this leaves empty."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: files_absent
short_description: Take files and folders away
description:
  - One task for all that a role has left on a host. A link goes, and what it leads to stays.
  - In check mode a folder goes, too, when nothing is in it but what goes.
options:
  paths: {description: Files and folders; folders with all that is in them., type: list, elements: path, default: []}
  patterns:
    description: The same, by patterns of the shell.
    type: list
    elements: path
    default: []
  folders:
    description: Folders that go when nothing is left in them, in this order; one with anything else in it stays.
    type: list
    elements: path
    default: []
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: absent | The records of the tiers are gone
  files_absent:
    paths: [/cluster/shared/ai/endpoints]
    folders: [/cluster/shared/ai]
"""

RETURN = r"""
paths: {description: What is gone., type: list, elements: str, returned: always}
"""


# How file systems say that a folder is not empty.
FILLED = (errno.ENOTEMPTY, errno.EEXIST)


def doomed(paths: Iterable[str], patterns: Iterable[str]) -> list[Path]:
    """What is there of them. ValueError for a path that nobody means to lose."""
    named = [Path(path) for path in [*paths, *patterns]]
    for path in named:
        # /cluster/shared with an empty variable before it, for example.
        if not path.is_absolute() or len(path.parts) < 3 or ".." in path.parts:
            raise ValueError(f"paths: got {str(path)!r}, want an absolute path at least two folders deep")
    found = {Path(path) for path in paths if os.path.lexists(path)}
    found |= {Path(path) for pattern in patterns for path in glob.glob(pattern)}
    return sorted(path for path in found if found.isdisjoint(path.parents))


def emptied(folders: Iterable[str], going: Iterable[Path]) -> list[Path]:
    """The folders in which nothing is but what goes, or folders of this kind before them."""
    gone = set(going)
    found = []
    for folder in map(Path, folders):
        if folder in gone or folder.is_symlink() or not folder.is_dir():
            continue
        if all(entry in gone for entry in folder.iterdir()):
            gone.add(folder)
            found.append(folder)
    return found


def remove(path: Path) -> None:
    """A file, a link or a whole folder; whatever is gone already is as wished."""
    with contextlib.suppress(FileNotFoundError):
        if not path.is_dir() or path.is_symlink():
            path.unlink()
            return
        try:
            shutil.rmtree(path)
        except OSError as error:
            # The last words of a job that has just ended came into its logs meanwhile; what goes on writing is named.
            if error.errno not in FILLED:
                raise
            shutil.rmtree(path)


def remove_empty(folder: Path) -> None:
    """A folder that is empty, as far as was seen. It stays when somebody has put a file there in this moment."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in FILLED:
            raise


def main() -> None:
    paths = {"type": "list", "elements": "path", "default": []}
    module = AnsibleModule(
        argument_spec={"paths": paths, "patterns": paths, "folders": paths}, supports_check_mode=True
    )
    try:
        going = doomed(module.params["paths"], module.params["patterns"])
        empty = emptied(module.params["folders"], going)
        shown = [f"{path}/" if path.is_dir() and not path.is_symlink() else str(path) for path in [*going, *empty]]
        if not module.check_mode:
            for path in going:
                remove(path)
            for path in empty:
                remove_empty(path)
    except (OSError, ValueError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=bool(shown),
        paths=shown,
        diff={"before": "".join(f"{path}\n" for path in shown), "after": ""} if shown else {},
    )


if __name__ == "__main__":
    main()
