"""Filters through Ansible itself: assertions in real Jinja, and documentation where users look for it."""

from __future__ import annotations

import pytest

from tests.filters.ansible import FILTERS, run


def test_every_claim_of_the_assertion_playbook_holds() -> None:
    result = run("ansible-playbook", "tests/filters/filters.yml", "-i", "localhost,")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "failed=0" in result.stdout


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_is_documented_where_ansible_doc_looks(name: str) -> None:
    result = run("ansible-doc", "-t", "filter", name)
    assert result.returncode == 0, result.stderr
    for heading in ("FILTER", "EXAMPLES", "RETURN VALUES"):
        assert heading in result.stdout
    assert "Missing documentation" not in result.stdout + result.stderr
