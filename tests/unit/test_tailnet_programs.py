"""When the scenario tailnet is skipped, and when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import tailnet_programs
from tools.tailnet_programs import PROGRAMS, NotHere, failure, find_go


def go(folder: Path, version: str) -> str:
    """A stand-in for go that says which one it is."""
    folder.mkdir()
    (folder / "go").write_text(f"#!/bin/sh\necho {version}\n")
    (folder / "go").chmod(0o755)
    return str(folder / "go")


def test_no_go_and_an_old_one_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tailnet_programs, "GO_PLACES", (str(tmp_path / "none"),))
    with pytest.raises(NotHere, match=r"neither PATH nor /usr/local/go has one; wanted 1\.26\.6 or newer"):
        find_go()
    old = go(tmp_path / "old", "go1.24.4")
    monkeypatch.setattr(tailnet_programs, "GO_PLACES", (old,))
    with pytest.raises(NotHere, match=r"go is go1\.24\.4; wanted 1\.26\.6 or newer"):
        find_go()
    new = go(tmp_path / "new", "go1.27.0")
    monkeypatch.setattr(tailnet_programs, "GO_PLACES", (old, new))
    assert find_go() == new


def test_the_programs_name_it_when_they_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tailnet_programs, "GO_PLACES", (str(tmp_path / "none"),))
    monkeypatch.setattr("sys.argv", ["tailnet_programs.py", str(tmp_path)])
    assert tailnet_programs.main() == tailnet_programs.NOT_HERE
    assert "not built: no Go that is new enough" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ('go: example.com/a@v1.0.0: Get "https://proxy/a": dial tcp: lookup proxy: no such host\n', NotHere),
        ("go: example.com/a@v1.0.0: reading https://proxy/a.zip: 403 Forbidden\n", NotHere),
        ("cmd/a/main.go:404:2: undefined: nothing\n", RuntimeError),
        ("go: writing the output: no space left on device\n", RuntimeError),
    ],
)
def test_a_build_that_breaks_is_not_skipped(line: str, kind: type[Exception]) -> None:
    assert type(failure(PROGRAMS[0], ["tailscale.com/types\n", line])) is kind
