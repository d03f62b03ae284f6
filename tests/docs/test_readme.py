"""The README's commands are run: make's by what is named here, all others on the lab by molecule/readme."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs import readme
from tests.docs.readme import ROOT

# Which program runs a target, and the words with which it does.
RUN_BY = {
    "up": ("tools/fresh_machine", "make up"),
    "test": (".ci/run", "make test"),
    "down": ("tools/fresh_machine", "make down"),
    "distclean": ("benchmarks/bring_up.py", 'make("distclean")'),
}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_first_screen_has_the_two_commands() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:24])
    assert "```console\nmake up\nmake test\n```" in first_screen


def test_second_screen_has_the_cluster_as_a_picture_that_fits_a_terminal() -> None:
    (picture,) = [text for language, text in readme.blocks() if language == "text"]
    lines = picture.splitlines()
    assert picture in "\n".join((ROOT / "README.md").read_text().splitlines()[24:50])
    assert max(map(len, lines)) <= 80
    assert len({len(line) for line in lines if line[0] in "┌│└"}) == 1, "the boxes have one width"


def test_every_block_says_where_its_lines_are_typed() -> None:
    assert {language for language, _ in readme.blocks()} == readme.LANGUAGES


@pytest.mark.parametrize("target", readme.make_targets())
def test_make_target_exists_and_is_run(target: str) -> None:
    dry = subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=False, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    program, words = RUN_BY[target]
    assert words in (ROOT / program).read_text()


def test_molecule_runs_all_other_commands() -> None:
    test = (ROOT / "molecule/readme/tests/test_commands.py").read_text()
    for source in ("readme.on_this_machine()", "readme.on_the_controller()"):
        assert f'parametrize("command", {source})' in test


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing, f"{document.name} links to {missing}"


def test_every_document_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [path.name for path in DOCUMENTS[1:] if f"(docs/{path.name})" not in text]
