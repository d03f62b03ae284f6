"""Filters for what a compiler brings along, through Ansible itself."""

from __future__ import annotations

from tests.filters.ansible import run


def test_every_claim_of_the_toolkits_playbook_holds() -> None:
    result = run("ansible-playbook", "tests/filters/toolkit.yml", "-i", "localhost,")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "failed=0" in result.stdout
