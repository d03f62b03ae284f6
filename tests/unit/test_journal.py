"""One line per change, whatever its text holds."""

from __future__ import annotations

import os
import re
import sys

import pytest

from gleaner import journal


def test_one_line_with_utc_milliseconds(capfd: pytest.CaptureFixture[str]) -> None:
    journal.say("a\nb\r\tc")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z a b c\n", capfd.readouterr().err)


def test_stamp_is_left_to_the_journal_only_when_it_is_the_journal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stat = os.fstat(2)
    monkeypatch.setattr("sys.stderr", os.fdopen(os.dup(2), "w"))
    monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
    journal.say("plain")
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    journal.say("stamped")
    plain, stamped = capfd.readouterr().err.splitlines()
    assert plain == "plain"
    assert re.match(r"\d{4}-.*Z stamped", stamped)
    sys.stderr.close()


def test_full_log_disk_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        journal.say("lost")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()


def test_said_once_per_key_until_it_changes(capfd: pytest.CaptureFixture[str]) -> None:
    changes = journal.OnChange()
    assert changes.say("a", "one")
    assert not changes.say("a", "one")
    assert changes.say("b", "one")
    assert changes.say("a", "two")
    assert changes.clear("a")
    assert not changes.clear("a")
    assert len(capfd.readouterr().err.splitlines()) == 3
