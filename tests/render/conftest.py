"""The production inventory's files, rendered once for all tests of a process."""

from __future__ import annotations

import pytest

from tests.render.beefcake2 import Rendered, render


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """As the inventory has it: Slurm is there already."""
    return render(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """The same with a Slurm of our own."""
    return render(tmp_path_factory.mktemp("managed"), slurm_manage_cluster=True)
