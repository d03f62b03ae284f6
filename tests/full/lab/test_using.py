"""The guide for clients of a site without a tailnet: every example works as it stands there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.lab import cluster
from tests.lab.ansible import succeed
from tests.lab.cluster import SPLIT_PORT
from tests.lab.guide import examples, run_program


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("guide") / "using.md"
    succeed("playbooks/guide.yml", "-e", f"guide_file={file}")
    for port in (cluster.PORT, SPLIT_PORT):
        cluster.wait_served(port=port)
    return file.read_text()


def test_every_command_works(guide: str) -> None:
    commands = examples(guide, "bash")
    assert len(commands) >= 5
    for command in commands:
        done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stdout.lstrip().startswith("{")


def test_every_program_works(guide: str, tmp_path: Path) -> None:
    programs = examples(guide, "python")
    assert len(programs) == 2
    for number, program in enumerate(programs):
        assert run_program(program, tmp_path / f"{number}.py").strip()
