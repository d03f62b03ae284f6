"""unit_absent: what is still to be done for a unit to be gone, wherever an earlier run was broken off."""

from __future__ import annotations

from pathlib import Path

import pytest

from library import unit_absent
from library.unit_absent import todo

# systemctl of a host, of which a file for each unit says what systemd knows.
SYSTEMCTL = """#!/bin/sh
[ "$1" = show ] || exit 1
for name; do :; done
cat "{folder}/$name" 2>/dev/null || printf 'LoadState=not-found\\nActiveState=inactive\\nFragmentPath=\\n'
"""
KEEPER = "gleaner-keeper.service"


class Host:
    def __init__(self, folder: Path) -> None:
        self.known = folder / "known"
        self.units = folder / "system"
        for part in (self.known, self.units / "multi-user.target.wants", folder / "bin"):
            part.mkdir(parents=True)
        (folder / "bin/systemctl").write_text(SYSTEMCTL.format(folder=self.known))
        (folder / "bin/systemctl").chmod(0o755)

    def knows(self, name: str, state: str = "inactive", drop_ins: str = "", file: bool = True) -> None:
        path = self.units / name if file else ""
        (self.known / name).write_text(
            f"LoadState=loaded\nActiveState={state}\nFragmentPath={path}\nDropInPaths={drop_ins}\n"
        )


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(unit_absent, "UNITS", tmp_path / "system")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return Host(tmp_path)


def test_a_running_unit_is_stopped_and_its_link_and_file_go(host: Host) -> None:
    host.knows(KEEPER, "active")
    (host.units / KEEPER).touch()
    link = host.units / "multi-user.target.wants" / KEEPER
    link.symlink_to(host.units / KEEPER)
    assert todo([KEEPER], []) == [
        ("stop", KEEPER),
        ("remove", str(link)),
        ("remove", str(host.units / KEEPER)),
        ("reload", "systemd"),
    ]


def test_nothing_is_to_be_done_where_it_never_was(host: Host) -> None:
    assert todo([KEEPER], ["nginx.service.d/gleaner.conf"]) == []


def test_after_a_run_that_ended_behind_the_file_systemd_still_has_to_forget_it(host: Host) -> None:
    host.knows(KEEPER)
    assert todo([KEEPER], []) == [("reload", "systemd")]


def test_a_link_that_leads_nowhere_goes(host: Host) -> None:
    link = host.units / "multi-user.target.wants" / KEEPER
    link.symlink_to(host.units / KEEPER)
    assert ("remove", str(link)) in todo([KEEPER], [])


def test_a_failure_is_forgotten(host: Host) -> None:
    host.knows("gleaner-models-stage.service", "failed", file=False)
    assert todo(["gleaner-models-stage.service"], []) == [("forget the failure of", "gleaner-models-stage.service")]


def test_a_drop_in_goes_and_the_unit_of_others_stays(host: Host) -> None:
    drop_in = host.units / "nginx.service.d/gleaner.conf"
    drop_in.parent.mkdir()
    drop_in.touch()
    host.knows("nginx.service", "active", str(drop_in))
    assert todo([], ["nginx.service.d/gleaner.conf"]) == [("remove", str(drop_in)), ("reload", "systemd")]
    drop_in.unlink()
    assert todo([], ["nginx.service.d/gleaner.conf"]) == [("reload", "systemd")]
