"""tools/fresh_machine, broken off in the middle, leaves nothing on the machine whose network it shares.

Has a lab id of its own, 8 unless GLEANER_LAB_ID names one.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.lab import processes

ROOT = Path(__file__).resolve().parents[2]
LAB = os.environ.get("GLEANER_LAB_ID") or "8"
SUDO = [] if os.geteuid() == 0 else ["sudo"]
BOOT_SECONDS = 15 * 60
CLEAN_SECONDS = 3 * 60


def links() -> set[str]:
    """The lab's interfaces on this machine."""
    shown = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    return {name for line in shown.splitlines() if (name := line.split()[0].partition("@")[0]).startswith(f"gl{LAB}")}


def test_a_fresh_machine_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    assert not links()
    log = tmp_path / "log"
    with log.open("wb") as sink:
        machine = subprocess.Popen(
            [*SUDO, "tools/fresh_machine", LAB], cwd=ROOT, stdout=sink, stderr=sink, start_new_session=True
        )
    deadline = time.monotonic() + BOOT_SECONDS
    # Bridges, and the cables of the first hosts.
    while len(links()) < 4:
        assert machine.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    started = processes.with_descendants({machine.pid})
    assert len(started) > 10

    # As a person's Ctrl-C does: to all that belongs to the terminal.
    subprocess.run([*SUDO, "kill", "-INT", "--", f"-{machine.pid}"], check=True)
    assert machine.wait(CLEAN_SECONDS) != 0
    assert not links(), log.read_text()
    assert not processes.with_descendants(started)
    assert f"gleaner-fresh-{LAB}" not in Path("/proc/mounts").read_text()
    assert not list(Path("/var/tmp").glob(f"gleaner-fresh-{LAB}.*")), log.read_text()
