"""dpkg_repair: what a kill left half installed is finished; the packages are real, on a disk of their own."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULE = Path(__file__).parents[2] / "library" / "dpkg_repair.py"

# The first time it kills dpkg, whose child it is, as `kill -9` would in the middle of an installation.
KILLER = """#!/bin/sh
[ -e {mark} ] || {{ : >{mark}; kill -9 $PPID; }}
"""


class Disk:
    """The packages of a machine in a folder, which dpkg and apt are led to by their own settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.admin = folder / "root/var/lib/dpkg"
        for part in ("updates", "info"):
            (self.admin / part).mkdir(parents=True)
        (self.admin / "status").touch()
        for part in ("state/lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        (folder / "apt.conf").write_text(
            f'Dir::State "{folder}/state";\nDir::State::status "{self.admin}/status";\nDir::Cache "{folder}/cache";\n'
            f'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "/dev/null";\nDir::Log "{folder}";\n'
        )
        self.environment = {
            **os.environ,
            # Where an ordinary user has the tools to unpack a package, too.
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "DPKG_ROOT": str(folder / "root"),
            "DPKG_ADMINDIR": str(self.admin),
            "DPKG_FORCE": "not-root,script-chrootless",
            "APT_CONFIG": str(folder / "apt.conf"),
        }

    def install(self, name: str, *options: str, script: str = "", depends: str = "") -> int:
        """Make a package and give it to dpkg; gives dpkg's exit code."""
        tree = self.folder / "tree" / name
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\n"
            f"Description: for a test\n{depends}"
        )
        if script:
            (tree / "DEBIAN/postinst").write_text(script)
            (tree / "DEBIAN/postinst").chmod(0o755)
        built = self.folder / f"{name}.deb"
        subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, built], check=True, capture_output=True)
        return self._run("dpkg", *(options or ("--install",)), str(built)).returncode

    def repair(self, **arguments: Any) -> dict[str, Any]:
        done = self._run(sys.executable, str(MODULE), given=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}))
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def states(self) -> list[str]:
        form = "--showformat=${Package} ${db:Status-Status}\n"
        return self._run("dpkg-query", "--show", form).stdout.splitlines()

    def _run(self, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, input=given, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
def killed(disk: Disk) -> Disk:
    """A disk on which dpkg was killed while it configured a package."""
    assert disk.install("killer", script=KILLER.format(mark=disk.folder / "killed")) == -9
    assert disk.states() == ["killer half-configured"]
    assert list((disk.admin / "updates").iterdir())
    return disk


def test_a_settled_disk_is_left_alone(disk: Disk) -> None:
    assert disk.install("calm") == 0
    result = disk.repair()
    assert (result["changed"], result["unfinished"], result["stdout"]) == (False, [], "")


def test_a_killed_installation_is_finished(killed: Disk) -> None:
    result = killed.repair(_ansible_diff=True)
    assert result["changed"] is True
    assert result["unfinished"][0] == "killer half-configured"
    assert result["unfinished"][1].endswith("entries in dpkg's journal")
    assert result["diff"]["before"].splitlines() == result["unfinished"]
    assert killed.states() == ["killer installed"]
    assert killed.repair()["changed"] is False


def test_a_journal_alone_is_closed(killed: Disk) -> None:
    # apt refuses all work while there is one, whatever the states of the packages.
    status = (killed.admin / "status").read_text()
    killed.repair()
    (killed.admin / "updates/0001").write_text(status.replace("half-configured", "installed"))
    assert killed.repair()["changed"] is True
    assert not list((killed.admin / "updates").iterdir())


def test_check_mode_tells_and_does_nothing(killed: Disk) -> None:
    result = killed.repair(_ansible_check_mode=True)
    assert result["changed"] is True
    assert killed.states() == ["killer half-configured"]


def test_what_cannot_be_finished_is_named_with_the_cure(disk: Disk) -> None:
    assert disk.install("needy", "--unpack", depends="Depends: nowhere-to-be-found\n") == 0
    result = disk.repair()
    assert result["failed"] is True
    assert "it cannot be finished: needy unpacked." in result["msg"]
    assert "dpkg --purge NAME" in result["msg"]
    assert "nowhere-to-be-found" in result["msg"]
    assert disk.states() == ["needy unpacked"]


def test_whoever_installs_at_the_moment_is_waited_for(killed: Disk) -> None:
    with (killed.admin / "lock-frontend").open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        result = killed.repair(wait_seconds=1)
    assert result["failed"] is True
    assert "holds" in result["msg"]
    assert killed.states() == ["killer half-configured"]
    assert killed.repair()["changed"] is True


def test_a_removal_that_was_broken_off_is_in_nobodys_way(killed: Disk) -> None:
    status = killed.admin / "status"
    killed.repair()
    status.write_text(status.read_text().replace("install ok installed", "deinstall ok half-configured"))
    assert killed.repair()["changed"] is False
