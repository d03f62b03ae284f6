#!/usr/bin/python3
"""A host of the lab: a booted systemd container with its own disk, network namespace and cables."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.lab import LabError, Process, run, wait_until

DOCUMENTATION = r"""
module: lab_machine
short_description: Power a lab host on or off, or take it away with all that belongs to it
description:
  - A lab host is a systemd-nspawn container on an overlay over the base image. It has a network namespace
    of its own, wired to the lab's bridges by veth pairs that are made and addressed before it boots.
  - Whatever a killed lab left behind (mounts, veths, namespaces, orphaned processes) is cleared first.
options:
  name: {description: Host name inside the lab., type: str, required: true}
  machine: {description: Name unique on this machine and of the network namespace., type: str, required: true}
  directory: {description: Folder of this host (disk, record of its process, log)., type: path, required: true}
  image: {description: Folder of the base image., type: path, default: /}
  interfaces:
    description: The host's cables.
    type: list
    elements: dict
    default: []
    suboptions:
      name: {description: Interface name in the host., type: str, required: true}
      cable: {description: Interface name on the machine (at most 15 characters)., type: str, required: true}
      bridge: {description: Bridge that it is plugged into., type: str, required: true}
      address: {description: Address with prefix length., type: str, required: true}
  files:
    description: What the installer of a bare host wrote, put on the disk when it is made.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path in the host., type: str, required: true}
      content: {description: Text., type: str, required: true}
      mode: {description: Octal mode., type: str, default: "0644"}
  binds: {description: "Folders to show in the host, C(source:target) each.", type: list, elements: str, default: []}
  read_only_binds: {description: The same, read only., type: list, elements: str, default: []}
  boot_program: {description: Program that boots the host and stays with it., type: path, default: /}
  state:
    description:
      - C(present) makes the disk, C(started) boots it, C(stopped) powers off, C(absent) takes all of it away.
    type: str
    choices: [present, started, stopped, absent]
    default: started
attributes:
  check_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: Boot vasp-01
  lab_machine:
    name: vasp-01
    machine: gl0-vasp-01
    directory: /var/lib/gleaner-lab/0/vasp-01
    image: /var/cache/gleaner/base/trixie
    boot_program: /var/lib/gleaner-lab/0/lab-boot
    interfaces:
      - {name: eth0, cable: gl0m11, bridge: gl0main, address: 10.213.0.11/24}
"""

RETURN = r"""
ssh_host_key: {description: Public key of the host, for the known-hosts file., type: str, returned: when it has a disk}
pid: {description: Process id of the running host., type: int, returned: when running}
"""

# Power off takes 2 to 5 seconds; a host that needs longer hangs in a unit's stop timeout.
_POWER_OFF_SECONDS = 30.0
# numactl needs SYS_NICE, locked memory IPC_LOCK, and a host's own firewall NET_ADMIN.
_CAPABILITIES = "CAP_SYS_NICE,CAP_IPC_LOCK,CAP_NET_ADMIN"


class Machine:
    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.machine: str = params["machine"]
        self.directory = Path(params["directory"])
        self.root = self.directory / "root"
        self.process = Process(self.directory / "process.json", f"gleaner-lab-{self.machine}")
        self.key = self.directory / "disk/etc/ssh/ssh_host_ed25519_key"
        self.namespace = Path("/run/netns") / self.machine

    def running(self) -> bool:
        return self.process.pid() is not None

    def leftovers(self) -> list[str]:
        """What a host that does not run should not have."""
        found = [str(self.root)] if os.path.ismount(self.root) else []
        return found + ([str(self.namespace)] if self.namespace.exists() else [])

    def make_disk(self) -> None:
        for part in ("disk", "work", "root"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        if not self.key.exists():
            for file in self.params["files"]:
                path = self.directory / "disk" / file["path"].lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)
                path.write_text(file["content"])
                path.chmod(int(file["mode"], 8))
            # The key comes last: a disk that has it is a whole one.
            self.key.parent.mkdir(parents=True, exist_ok=True)
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.params["name"], "-f", str(self.key))

    def start(self) -> None:
        self.clear()
        self.make_disk()
        run(
            "mount", "-t", "overlay", self.machine, "-o",
            f"lowerdir={self.params['image']},upperdir={self.directory / 'disk'},workdir={self.directory / 'work'}",
            str(self.root),
        )  # fmt: skip
        self.wire()
        self.process.start(
            [
                self.params["boot_program"],
                self.process.unit,
                "systemd-nspawn",
                "--boot",
                f"--directory={self.root}",
                f"--machine={self.machine}",
                f"--hostname={self.params['name']}",
                f"--network-namespace-path={self.namespace}",
                # With these a program gives up rights: what runs on nodes does.
                "--system-call-filter=landlock_create_ruleset landlock_add_rule landlock_restrict_self",
                f"--capability={_CAPABILITIES}",
                "--rlimit=MEMLOCK=infinity",
                "--register=no",
                "--keep-unit",
                "--console=pipe",
                "--link-journal=no",
                "--resolv-conf=off",
                "--timezone=off",
                *(f"--bind={bind}" for bind in self.params["binds"]),
                *(f"--bind-ro={bind}" for bind in self.params["read_only_binds"]),
            ],
            self.directory / "console.log",
        )

    def wire(self) -> None:
        run("ip", "netns", "add", self.machine)
        inside = ("ip", "-n", self.machine)
        run(*inside, "link", "set", "lo", "up")
        for wire in self.params["interfaces"]:
            cable = wire["cable"]
            run("ip", "link", "add", cable, "type", "veth", "peer", "name", wire["name"], "netns", self.machine)
            run("ip", "link", "set", cable, "master", wire["bridge"], "up")
            run(*inside, "address", "add", wire["address"], "dev", wire["name"])
            run(*inside, "link", "set", wire["name"], "up")

    def stop(self) -> None:
        self.process.stop(_POWER_OFF_SECONDS)
        self.clear()

    def clear(self) -> None:
        """Take away what is left of a host that is off or was killed; its disk stays."""
        if not wait_until(self._no_process_left, 10.0):
            raise LabError("some of its processes do not end, even by SIGKILL")
        if self.namespace.exists():
            run("ip", "netns", "delete", self.machine)
        cables = [Path("/sys/class/net", wire["cable"]) for wire in self.params["interfaces"]]
        # A namespace takes its cables along a moment later. One that stays is of a boot that was cut short.
        if not wait_until(lambda: not any(cable.exists() for cable in cables), 2.0):
            for cable in cables:
                run("ip", "link", "delete", cable.name, check=False)
        for folder in ("propagate", "unix-export"):
            remains = Path("/run/systemd/nspawn", folder, self.machine)
            if remains.is_mount():
                run("umount", str(remains))
            if remains.is_dir():
                remains.rmdir()
        # A process that is dying is in no list any more, and yet its group is busy until it is reaped.
        if not wait_until(self._cgroups_removed, 5.0):
            raise LabError(f"its cgroups cannot be removed: {', '.join(map(str, self._cgroups()))}")
        if os.path.ismount(self.root):
            run("umount", "--lazy", str(self.root))

    def _cgroups(self) -> list[Path]:
        """The host's groups, one in each hierarchy, which lab-boot made where no systemd did."""
        top = Path("/sys/fs/cgroup")
        groups = [folder / self.process.unit for folder in (top, *top.iterdir())]
        return sorted({group.resolve() for group in groups if group.is_dir()})

    def _cgroups_removed(self) -> bool:
        try:
            for group in self._cgroups():
                for folder, _, _ in os.walk(group, topdown=False):
                    os.rmdir(folder)
        except OSError:
            return False
        return True

    def _no_process_left(self) -> bool:
        """End every process in the host's own network namespace and cgroups, which tell them from all others."""
        # os.walk passes over a group that goes meanwhile, as they do one after the other while the host ends.
        folders = (Path(folder) for group in self._cgroups() for folder, _, _ in os.walk(group))
        pids = {int(pid) for folder in folders for pid in _lines(folder / "cgroup.procs")}
        if self.namespace.exists():
            pids |= {int(pid) for pid in run("ip", "netns", "pids", self.machine).split()}
        for pid in pids - {0}:  # 0 is how the kernel writes a process that this one cannot see
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not pids

    def remove(self) -> None:
        # Nothing of its disk is kept, so there is nothing to write back and no reason to wait for a power off.
        self.process.stop(0.0)
        self.clear()
        if self.directory.exists():
            shutil.rmtree(self.directory)


def _lines(file: Path) -> list[str]:
    """What the kernel lists in a cgroup file; a group that is just being removed has nothing in it."""
    try:
        return file.read_text().split()
    except OSError:
        return []


def main() -> None:
    file = {
        "path": {"type": "str", "required": True},
        "content": {"type": "str", "required": True},
        "mode": {"type": "str", "default": "0644"},
    }
    cable = {key: {"type": "str", "required": True} for key in ("name", "cable", "bridge", "address")}
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "machine": {"type": "str", "required": True},
            "directory": {"type": "path", "required": True},
            "image": {"type": "path", "default": "/"},
            "interfaces": {"type": "list", "elements": "dict", "options": cable, "default": []},
            "files": {"type": "list", "elements": "dict", "options": file, "default": []},
            "binds": {"type": "list", "elements": "str", "default": []},
            "read_only_binds": {"type": "list", "elements": "str", "default": []},
            "boot_program": {"type": "path", "default": "/"},
            "state": {"choices": ["present", "started", "stopped", "absent"], "default": "started"},
        },
        supports_check_mode=True,
    )
    machine = Machine(module.params)
    state = module.params["state"]
    running = machine.running()
    changed, act = {
        "present": (not machine.key.exists(), machine.make_disk),
        "started": (not running, machine.start),
        "stopped": (running or bool(machine.leftovers()), machine.stop),
        "absent": (machine.directory.exists() or bool(machine.leftovers()), machine.remove),
    }[state]
    before = "started" if running else "stopped" if machine.directory.exists() else "absent"
    result: dict[str, Any] = {
        "changed": changed,
        "diff": {"before": f"{before}\n", "after": f"{state if changed else before}\n"},
    }
    try:
        if changed and not module.check_mode:
            act()
    except (LabError, OSError) as error:
        module.fail_json(msg=f"Lab host {machine.machine}: {error}", **result)
    public = machine.key.with_suffix(".pub")
    if public.exists():
        result["ssh_host_key"] = public.read_text().strip()
    pid = machine.process.pid()
    module.exit_json(**result, **({"pid": pid} if pid else {}))


if __name__ == "__main__":
    main()
