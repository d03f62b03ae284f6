"""Every command of the day-two documents is run by a test, or said to be run by none; what they promise is there.

tests/full/day_two/test_documents.py types what has no mark.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
from pathlib import Path

import pytest

from benchmarks import day_two, report
from tests.docs import sessions
from tests.docs.readme import ROOT
from tests.docs.sessions import DOCUMENTS, HERE, Command

OPERATIONS, TROUBLESHOOTING = DOCUMENTS
COMMANDS = [command for document in DOCUMENTS for command in sessions.commands(document)]
ELSEWHERE = [command for command in COMMANDS if command.run_by]
BESIDE = ("How long it takes", "Every playbook")
ACTIONS = {title: body for title, body in sessions.sections(OPERATIONS.read_text()).items() if title not in BESIDE}
SYMPTOMS = sessions.sections(TROUBLESHOOTING.read_text())
# What the seed's document had, by words of the heading.
SEED = ("refused", "not found", "slow", "does not start", "worker", "memory", "tailnet")
DOCUMENT = """\
# Title
## One
<!-- run by: tests/x.py -->
```console
$ .venv/bin/ansible-playbook -i inventories/SITE site.yml --limit a,b -e c=d
```
## Two
```console
slurm-ctl# gleaner status
fast   serving …
…
$ curl -s http://x/
```
"""


def test_a_session_is_read(tmp_path: Path) -> None:
    file = tmp_path / "document.md"
    file.write_text(DOCUMENT)
    playbook, status, curl = sessions.commands(file)
    assert playbook.arguments == ["site.yml", "--limit", "a,b", "-e", "c=d"]
    assert playbook.run_by == "tests/x.py"
    assert status == Command("Two", "slurm-ctl", "gleaner status", ("fast   serving …", "…"))
    assert curl == Command("Two", HERE, "curl -s http://x/")


@pytest.mark.parametrize(
    "bad",
    [
        "```console\nprinted\n```",
        "```bash\n$ ls\n```",
        "<!-- neds: gpu -->\n```console\n$ ls\n```",
        "<!-- needs: gpu -->\n```text\n$ ls\n```",
        "```console\n$ ls\n",
    ],
)
def test_what_nobody_would_run_is_refused(tmp_path: Path, bad: str) -> None:
    file = tmp_path / "document.md"
    file.write_text(f"## One\n{bad}\n")
    with pytest.raises(ValueError, match=r"One|document\.md"):
        sessions.commands(file)


def test_marks_are_those_of_the_block_behind_them(tmp_path: Path) -> None:
    file = tmp_path / "document.md"
    block = "<!-- needs: gpu -->\n```console\n$ ls\n```\n"
    file.write_text(f"## One\n{block}between\n{block.replace('gpu', 'tailnet')}")
    assert [command.needs for command in sessions.commands(file)] == ["gpu", "tailnet"]
    file.write_text(f"# Title\n{block}## One\n")
    with pytest.raises(ValueError, match="before the first heading"):
        sessions.commands(file)


@pytest.mark.parametrize(
    ("well", "output", "same"),
    [
        (("a b", "…"), "a    b\n", True),
        (("a b", "…"), "a    b\nc\nd\n", True),
        (("a b",), "a b\nc\n", False),
        (("a …",), "a xyz\n", True),
        (("a …",), "b xyz\n", False),
        (("a.c",), "abc\n", False),
        (("…", "z"), "a\nb\n", False),
        ((sessions.NOTHING,), "", True),
        ((sessions.NOTHING,), "a\n", False),
    ],
)
def test_what_is_printed_is_compared(well: tuple[str, ...], output: str, same: bool) -> None:
    assert sessions.printed_as(well, output) is same


def named_texts(tree: ast.Module) -> dict[str, str]:
    """The texts to which a test gives names, and those that it has from its helpers."""
    known: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            helper = importlib.import_module(str(node.module))
            known |= {
                one.name: value for one in node.names if isinstance(value := getattr(helper, one.name, None), str)
            }
        elif isinstance(node, ast.Assign):
            with contextlib.suppress(ValueError):
                # A call, a text with names in it: no name of a plain text.
                value = ast.literal_eval(node.value)
                targets = [target for target in node.targets if isinstance(target, ast.Name)]
                known |= {target.id: value for target in targets if isinstance(value, str)}
    return known


def words(file: Path) -> set[str]:
    """The words of all texts in a test, named texts put in."""
    tree = ast.parse(file.read_text())
    known = named_texts(tree)
    texts: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            texts.append(str(node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = [
                one.value if isinstance(one, ast.Constant) else known.get(name_of(one), " ") for one in node.values
            ]
            texts.append("".join(str(part) for part in parts))
    return {word for text in texts for word in text.split()}


def name_of(node: ast.expr) -> str:
    return node.value.id if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) else ""


def has(found: set[str], argument: str) -> bool:
    """Whether a program has an argument, whole or as name= and value."""
    name, equals, value = argument.partition("=")
    return argument in found or bool(equals and f"{name}=" in found and value in found)


@pytest.mark.parametrize("command", ELSEWHERE, ids=lambda command: command.name)
def test_the_test_that_is_named_runs_it(command: Command) -> None:
    file = ROOT / command.run_by
    assert file.is_file(), f"{command.run_by} is not there"
    found = words(file)
    assert not [one for one in command.arguments if not has(found, one)]


def cures() -> list[str]:
    """Commands in the text of docs/troubleshooting.md that change something, or have others look."""
    text = re.sub(r"^```.*?^```$", "", TROUBLESHOOTING.read_text(), flags=re.MULTILINE | re.DOTALL)
    code = {" ".join(one.split()) for one in re.findall(r"`([^`]+)`", text)}
    return sorted(one for one in code if re.match(r"(systemctl|scontrol|journalctl|gleaner) |playbooks/", one))


@pytest.fixture(scope="module")
def run_somewhere() -> list[set[str]]:
    """The words of each test on a lab, and those of the README, whose commands are all run."""
    tests = [*(ROOT / "tests/full").rglob("test_*.py"), *(ROOT / "molecule").glob("*/tests/test_*.py")]
    return [set((ROOT / "README.md").read_text().replace("`", " ").split()), *map(words, tests)]


@pytest.mark.parametrize("cure", cures())
def test_a_cure_in_the_text_is_run_by_a_test(cure: str, run_somewhere: list[set[str]]) -> None:
    """But for words in capitals, which stand for something."""
    wanted = [word for word in cure.split() if not word.isupper()]
    assert any(all(has(found, word) for word in wanted) for found in run_somewhere)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_no_test_runs_is_counted(document: Path) -> None:
    needs = [command.needs for command in sessions.commands(document) if command.needs]
    assert not set(needs) - set(sessions.NEEDS)
    told = re.search(r"\*\*(\d+) need a GPU, (\d+) a tailnet\*\*", " ".join(document.read_text().split()))
    assert told, "the document does not say how many of its commands no test runs"
    assert [int(number) for number in told.groups()] == [needs.count(one) for one in sessions.NEEDS]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_playbook_of_a_command_is_there(command: Command) -> None:
    for word in re.findall(r"\S+\.yml", command.text):
        assert (ROOT / word).is_file()


def test_every_symptom_of_the_seed_is_there() -> None:
    assert not [words for words in SEED if not any(words in title.lower() for title in SYMPTOMS)]


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_a_symptom_has_a_command_what_is_well_and_a_cure(symptom: str) -> None:
    """After each session comes what to do about anything else that it prints."""
    blocks = re.split(r"^```console\n.*?^```$", SYMPTOMS[symptom], flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) > 1, "no command"
    assert not [after for after in blocks[1:] if "**Otherwise:**" not in after], "no cure"
    mine = [command for command in COMMANDS if command.section == symptom]
    assert not [command.text for command in mine if not command.well], (
        "it does not say what is printed when all is well"
    )


@pytest.mark.parametrize(
    "playbook", sorted(path.name for path in (ROOT / "playbooks").glob("*.yml")), ids=lambda name: name
)
def test_a_playbook_is_mentioned_where_people_look(playbook: str) -> None:
    texts = [(ROOT / "docs" / name).read_text() for name in ("operations.md", "lab.md")]
    assert any(f"playbooks/{playbook}" in text for text in texts)


def test_every_action_has_a_command_and_is_in_the_overview() -> None:
    before, _, _ = OPERATIONS.read_text().partition("\n## ")
    assert re.findall(r"\[(.+)\]\(#", before) == list(ACTIONS)
    assert not [title for title, body in ACTIONS.items() if "```console\n" not in body]


def test_every_time_is_measured_or_said_not_to_be() -> None:
    assert report.replace(OPERATIONS.read_text(), "day-two", "figures")
    times = sessions.sections(OPERATIONS.read_text())["How long it takes"]
    (table,) = re.findall(r"^\| action \|.*\n\| ---.*\n((?:\|.*\n)+)", times, re.MULTILINE)
    rows = [line.split("|")[1:-1] for line in table.splitlines()]
    assert tuple(row[0].strip() for row in rows) == day_two.ACTIONS
    assert not [row for row in rows if not re.search(r"\d|not measured yet", "".join(row[1:]))]


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_lead_to_headings_that_are_there(document: Path) -> None:
    links = re.findall(r"\]\(([\w./-]*\.md|)#([^)]+)\)", document.read_text())
    assert not [anchor for name, anchor in links if anchor not in anchors(document.parent / name if name else document)]
