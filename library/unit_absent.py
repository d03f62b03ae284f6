#!/usr/bin/python3
"""Ansible module: systemd units of ours are gone: stopped, not enabled, without a file, unknown to systemd."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: unit_absent
short_description: Take systemd units away
description:
  - Stops a unit, takes its links and its file in /etc/systemd/system away, and has systemd forget it.
  - A run that was broken off at any point is finished by the next one.
options:
  names:
    description: Units with their suffix, in the order in which they are stopped. Transient ones are stopped.
    type: list
    elements: str
    default: []
  drop_ins:
    description: Files of ours in the folders of other units, for example C(nginx.service.d/gleaner.conf).
    type: list
    elements: str
    default: []
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: absent | The keeper is gone
  unit_absent:
    names: [gleaner-keeper.service]
"""

RETURN = r"""
done: {description: "What was done, or would be, in words.", type: list, elements: str, returned: always}
"""

UNITS = Path("/etc/systemd/system")
RUNNING = ("active", "reloading", "activating", "deactivating")


class UnitError(Exception):
    """A unit does not go; the text says why."""


@dataclass(frozen=True)
class Unit:
    """What systemd knows of a unit."""

    name: str
    state: str
    known: bool
    file_gone: bool
    """It was read from a file that is not there any more."""
    drop_ins: tuple[str, ...]


def systemctl(*words: str) -> str:
    """What it printed; UnitError with its words when it fails."""
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UnitError(f"systemctl {' '.join(words)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def look(name: str) -> Unit:
    shown = systemctl("show", "--property=LoadState,ActiveState,FragmentPath,DropInPaths", "--", name)
    fields = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    path = fields.get("FragmentPath", "")
    return Unit(
        name=name,
        state=fields.get("ActiveState", "inactive"),
        known=fields.get("LoadState") not in ("not-found", None),
        file_gone=bool(path) and not Path(path).exists(),
        drop_ins=tuple(fields.get("DropInPaths", "").split()),
    )


def links(name: str) -> list[Path]:
    """By which it is started at boot, whether or not they lead to anything."""
    found = (folder / name for kind in ("wants", "requires") for folder in UNITS.glob(f"*.{kind}"))
    return sorted(path for path in found if path.is_symlink())


def todo(names: list[str], drop_ins: list[str]) -> list[tuple[str, str]]:
    """What is to be done, as pairs of a verb and what it is done to; nothing when all are gone."""
    work: list[tuple[str, str]] = []
    units = [look(name) for name in names]
    work += [("stop", unit.name) for unit in units if unit.state in RUNNING]
    files = [path for name in names for path in (*links(name), UNITS / name)]
    files += [UNITS / path for path in drop_ins]
    work += [("remove", str(path)) for path in files if path.is_symlink() or path.exists()]
    forgotten = any(unit.file_gone for unit in units) or any(
        str(UNITS / path) in look(path.partition(".d/")[0]).drop_ins for path in drop_ins
    )
    if forgotten or any(verb == "remove" for verb, _ in work):
        work.append(("reload", "systemd"))
    return work + [("forget the failure of", unit.name) for unit in units if unit.state == "failed"]


def act(verb: str, what: str) -> None:
    if verb == "stop":
        systemctl("stop", "--", what)
    elif verb == "remove":
        Path(what).unlink(missing_ok=True)
    elif verb == "reload":
        systemctl("daemon-reload")
    elif look(what).state == "failed":
        # It may have been forgotten with its file.
        systemctl("reset-failed", "--", what)


def main() -> None:
    names = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(argument_spec={"names": names, "drop_ins": names}, supports_check_mode=True)
    try:
        work = todo(module.params["names"], module.params["drop_ins"])
        if not module.check_mode:
            for verb, what in work:
                act(verb, what)
            for path in module.params["drop_ins"]:
                folder = (UNITS / path).parent
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            # A unit whose end failed is seen to have ended all the same.
            left = [step for step in todo(module.params["names"], module.params["drop_ins"]) if step[0] == "stop"]
            if left:
                raise UnitError(f"{', '.join(name for _, name in left)}: told to stop, and still runs")
    except (UnitError, OSError) as error:
        module.fail_json(msg=str(error))
    said = [f"{verb} {what}" for verb, what in work]
    module.exit_json(
        changed=bool(said),
        done=said,
        diff={"before": "".join(f"{one}\n" for one in names_there(work)), "after": ""} if said else {},
    )


def names_there(work: list[tuple[str, str]]) -> list[str]:
    """What is there and will not be, for the diff."""
    return [f"{what} (runs)" if verb == "stop" else what for verb, what in work if verb in ("stop", "remove")]


if __name__ == "__main__":
    main()
