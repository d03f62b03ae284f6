"""The production inventory's files, rendered once for all processes of a run."""

from __future__ import annotations

import fcntl
import os

import pytest

from tests.render.beefcake2 import Rendered, render


def once(factory: pytest.TempPathFactory, name: str, **variables: object) -> Rendered:
    """Rendered by the first process that asks; the others wait for it."""
    base = factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Rendered.read(folder) if (folder / "whole").exists() else render(folder, **variables)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """As the inventory has it: Slurm is there already."""
    return once(tmp_path_factory, "site")


@pytest.fixture(scope="session")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """The same with a Slurm of our own."""
    return once(tmp_path_factory, "managed", slurm_manage_cluster=True)
