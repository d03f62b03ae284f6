#!/usr/bin/python3
"""Ansible module: finish what a killed installation of Debian packages left half done."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: dpkg_repair
short_description: Finish an installation of packages that was broken off
description:
  - A kill, a lost connection or a power cut in the middle of an installation leaves packages unpacked or half
    configured, and apt refuses everything after that. This finishes it, as apt's own message tells a person to do.
  - Waits for whoever installs something at the moment, since that is no broken installation. Never removes a package.
options:
  wait_seconds: {description: How long others may take to finish., type: int, default: 300}
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: packages | No installation is half done
  dpkg_repair:
"""

RETURN = r"""
unfinished:
  description: What was half done, each with its state in dpkg's words.
  type: list
  elements: str
  returned: always
"""

# dpkg itself honours this variable.
ADMIN = Path(os.environ.get("DPKG_ADMINDIR") or "/var/lib/dpkg")
SETTLED = ("installed", "config-files", "not-installed")
KEEP_FILES = ("--force-confdef", "--force-confold")
LAST_LINES = 15


class RepairError(Exception):
    """The installation cannot be finished; the text says why."""


def unfinished() -> list[str]:
    """Packages in a state in which an installation does not leave them, and dpkg's journal when nobody closed it."""
    form = "${binary:Package} ${db:Status-Want} ${db:Status-Eflag} ${db:Status-Status}\n"
    shown = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={form}"], capture_output=True, text=True, check=False
    )
    found = []
    for line in shown.stdout.splitlines():
        name, want, flag, state = line.split()
        # A removal that was broken off is in nobody's way.
        if want in ("install", "hold") and (state not in SETTLED or flag != "ok"):
            found.append(f"{name} {state}" + (f", {flag}" if flag != "ok" else ""))
    journal = [entry.name for entry in (ADMIN / "updates").glob("[0-9]*")]
    return found + ([f"{len(journal)} entries in dpkg's journal"] if journal else [])


def wait_for_others(patience_seconds: float) -> None:
    """Return once nobody holds the lock that apt and dpkg take for all of their work.

    Raises RepairError when the patience is used up.
    """
    deadline = time.monotonic() + patience_seconds
    with (ADMIN / "lock-frontend").open("a") as lock:
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > deadline:
                    raise RepairError(
                        f"another program has been installing packages for {patience_seconds} s and holds {lock.name}. "
                        "Wait for it or end it, and run this again."
                    ) from None
                time.sleep(1)
            else:
                return


def finish() -> str:
    """Configure what is unpacked; fetch what that still lacks. Returns what the programs said."""
    commands = [
        ["dpkg", *KEEP_FILES, "--configure", "-a"],
        # A kill between two packages leaves one without those that it depends on.
        [
            *("apt-get", "--yes", "--fix-broken", "--no-remove"),
            *(f"--option=Dpkg::Options::={option}" for option in KEEP_FILES),
            "install",
        ],
    ]
    said = ""
    for command in commands:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
        )
        said += done.stdout
        if not unfinished():
            return said
    raise RepairError(
        f"it cannot be finished: {', '.join(unfinished())}. See to these packages by hand "
        "(apt-get install --reinstall NAME, or dpkg --purge NAME), and run this again. Last words:\n"
        + "\n".join(said.splitlines()[-LAST_LINES:])
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={"wait_seconds": {"type": "int", "default": 300}},
        supports_check_mode=True,
    )
    found, said = unfinished(), ""
    try:
        if found and not module.check_mode:
            wait_for_others(module.params["wait_seconds"])
            found = unfinished()
            said = finish() if found else ""
    except RepairError as error:
        module.fail_json(msg=f"An installation of packages was broken off: {error}", unfinished=found)
    module.exit_json(
        changed=bool(found),
        unfinished=found,
        stdout=said,
        diff={"before": "".join(f"{line}\n" for line in found), "after": ""},
    )


if __name__ == "__main__":
    main()
