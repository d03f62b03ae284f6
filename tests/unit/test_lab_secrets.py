"""The lab's secrets are made once, and completed when a new one is wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from tools import lab_secrets


def make(target: Path) -> dict[str, str]:
    subprocess.run([sys.executable, lab_secrets.__file__, str(target)], check=True, stdout=subprocess.DEVNULL)
    assert target.stat().st_mode & 0o777 == 0o600
    made: dict[str, str] = yaml.safe_load(target.read_text())
    return made


def test_secrets_are_made_once(tmp_path: Path) -> None:
    first = make(tmp_path / "vault.yml")
    assert set(first) == set(lab_secrets.NAMES)
    assert len(set(first.values())) == len(first)
    assert make(tmp_path / "vault.yml") == first


def test_a_missing_secret_is_added_and_the_others_stay(tmp_path: Path) -> None:
    (tmp_path / "vault.yml").write_text("---\nvault_munge_key: what it was\n")
    made = make(tmp_path / "vault.yml")
    assert set(made) == set(lab_secrets.NAMES)
    assert made["vault_munge_key"] == "what it was"
