"""A lab whose hosts could not boot is refused before anything of it is made."""

from __future__ import annotations

import os
from pathlib import Path

from tests.lab.ansible import playbook


def test_a_lab_without_sources_is_refused_with_the_cure(tmp_path: Path) -> None:
    done = playbook("playbooks/lab_up.yml", lab="9", GLEANER_CACHE=str(tmp_path / "cache"))
    assert done.code == 2, done.output
    assert f"There is no folder {tmp_path}/cache/sources" in done.text, done.output
    assert "`make sources` fills it" in done.text, done.output
    assert os.listdir(tmp_path) == []
