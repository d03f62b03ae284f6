"""The one file that every host runs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import build_zipapp

PACKAGE = build_zipapp.SOURCE / "gleaner"


def test_same_sources_same_bytes(tmp_path: Path) -> None:
    one, two = build_zipapp.build(tmp_path / "a"), build_zipapp.build(tmp_path / "b")
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()


def test_other_sources_other_name(tmp_path: Path) -> None:
    (tmp_path / "src" / "gleaner").mkdir(parents=True)
    (tmp_path / "src" / "gleaner" / "cli.py").write_text("def main(argv): return 0\n")
    one = build_zipapp.build(tmp_path / "out", tmp_path / "src")
    (tmp_path / "src" / "gleaner" / "cli.py").write_text("def main(argv): return 1\n")
    two = build_zipapp.build(tmp_path / "out", tmp_path / "src")
    assert one != two
    assert one.exists(), "a running program's file was taken away"


def test_second_build_leaves_the_file_alone(tmp_path: Path) -> None:
    before = build_zipapp.build(tmp_path).stat()
    after = build_zipapp.build(tmp_path).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_every_module_is_inside(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_zipapp.build(tmp_path)) as bundle:
        names = set(bundle.namelist())
    assert names == {"__main__.py"} | {str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*.py")}


def test_runs_by_itself(tmp_path: Path) -> None:
    path = build_zipapp.build(tmp_path)
    done = subprocess.run(
        [path, "states"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=True
    )
    assert done.stdout.startswith("# States")
    assert sys.version_info >= (3, 9)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.name))
def test_module_is_old_python_and_standard_library(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported <= sys.stdlib_module_names | {"gleaner"}


def test_command_prints_the_path(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, build_zipapp.__file__, tmp_path], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == tmp_path
    assert Path(done.stdout.strip()).stat().st_mode & 0o777 == 0o755
