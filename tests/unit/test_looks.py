"""Actions that look first: what is as it should be needs no module, and each way of being otherwise does."""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from action_plugins import folders, host_file, packages

ROOT = Path(__file__).parents[2]
# A host without Python can be looked at, and runs no module.
NO_PYTHON = "/no/python"
UID, GID = os.getuid(), os.getgid()
USER, GROUP = pwd.getpwuid(UID).pw_name, grp.getgrgid(GID).gr_name


def play(
    folder: Path, task: str, *options: str, python: str = sys.executable, **more: str
) -> subprocess.CompletedProcess[str]:
    (folder / "play.yml").write_text(f"- hosts: localhost\n  gather_facts: false\n  tasks:\n    - {task}\n")
    return subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local",
         "play.yml", *options],
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_PYTHON_INTERPRETER": python, **more},
    )  # fmt: skip


def succeed(folder: Path, task: str, *options: str, python: str = sys.executable) -> str:
    done = play(folder, task, *options, python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a b"
    path.write_text("text\n")
    path.chmod(0o640)
    return path


def file_task(file: Path, content: str = "text\\n", mode: str = "0640", more: str = "") -> str:
    return f'host_file: {{dest: "{file}", content: "{content}", mode: "{mode}", owner: {USER}, group: {GID}{more}}}'


def test_a_file_that_is_there_needs_no_python(tmp_path: Path, file: Path) -> None:
    for options in ((), ("--check", "--diff")):
        assert "changed=0" in succeed(tmp_path, file_task(file), *options, python=NO_PYTHON)


@pytest.mark.parametrize(
    ("content", "mode", "before", "after"),
    [("other\\n", "0640", "-text", "+other"), ("text\\n", "0600", '"mode": "0640"', '"mode": "0600"')],
)
def test_a_file_that_differs_is_shown_and_written(
    tmp_path: Path, file: Path, content: str, mode: str, before: str, after: str
) -> None:
    task = file_task(file, content, mode)
    dry = succeed(tmp_path, task, "--check", "--diff")
    assert "changed=1" in dry
    assert before in dry
    assert after in dry
    assert (file.read_text(), file.stat().st_mode & 0o7777) == ("text\n", 0o640)
    assert "changed=1" in succeed(tmp_path, task)
    assert (file.read_text(), file.stat().st_mode & 0o7777) == (content.replace("\\n", "\n"), int(mode, 8))
    assert "changed=0" in succeed(tmp_path, task, python=NO_PYTHON)


def test_a_link_is_replaced_by_a_file(tmp_path: Path, file: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    assert "changed=1" in succeed(tmp_path, file_task(link))
    assert not link.is_symlink()
    assert link.read_text() == file.read_text() == "text\n"


def test_without_force_any_content_will_do(tmp_path: Path, file: Path) -> None:
    assert "changed=0" in succeed(tmp_path, file_task(file, "x", more=", force: false"), python=NO_PYTHON)
    assert file.read_text() == "text\n"


def test_a_template_that_is_there_needs_no_python(tmp_path: Path, file: Path) -> None:
    (tmp_path / "text.j2").write_text("{{ 'text' }}\n")
    task = f'config_file: {{src: text.j2, dest: "{file}", mode: "0640"}}'
    assert "changed=0" in succeed(tmp_path, task, python=NO_PYTHON)
    file.write_text("old\n")
    assert "changed=1" in succeed(tmp_path, task)
    assert file.read_text() == "text\n"


def answer(kind: str = "regular file", content: str = "text\n", mode: str = "640", user: str = f"{UID}|{USER}") -> str:
    head = f"{kind}|{user}|{GID}|{GROUP}|{mode}"
    digest = hashlib.sha256(content.encode()).hexdigest()
    return f"{head}\n{digest}  -\n"


@pytest.mark.parametrize(
    ("told", "is_so"),
    [
        (answer(), True),
        (answer().replace("\n", "\r\n"), True),
        (f"sudo: unable to resolve host\n{answer()}", True),
        ("", False),
        ("sudo: unable to resolve host\n", False),
        (answer(kind="symbolic link"), False),
        (answer(kind="directory"), False),
        (answer(content="other"), False),
        (answer(mode="4640"), False),
        (answer(user="4711|other"), False),
        (answer().splitlines()[0], False),
    ],
)
def test_a_file_is_judged_by_all_that_was_asked(told: str, is_so: bool) -> None:
    args = {"dest": "/x", "owner": USER, "group": str(GID), "mode": "0640"}
    assert host_file.is_as_wanted(args, b"text\n", told) == is_so


@pytest.mark.parametrize(
    "more",
    [{"mode": "u=rw"}, {"mode": 0o640}, {"mode": "preserve"}, {"follow": True}, {"backup": True}, {"remote_src": True},
     {"attributes": "+i"}, {"setype": "etc_t"}, {"dest": None}],
)  # fmt: skip
def test_what_a_look_cannot_judge_is_left_to_core(more: dict[str, object]) -> None:
    args = {"dest": "/x", "content": "", "mode": "0640", "follow": False}
    assert host_file.can_look(args)
    assert not host_file.can_look({**args, **more})


def test_only_text_and_plain_files_of_this_machine_are_compared(tmp_path: Path, file: Path) -> None:
    vault = tmp_path / "vault"
    vault.write_text("$ANSIBLE_VAULT;1.1;AES256\n00\n")
    assert host_file.wanted_bytes({"content": ""}) == b""
    assert host_file.wanted_bytes({"src": str(file)}) == b"text\n"
    for args in ({"content": {"a": 1}}, {"src": "a b"}, {"src": str(tmp_path)}, {"src": str(vault)}, {}):
        assert host_file.wanted_bytes(args) is None


def folders_task(*paths: Path, mode: str = "0750") -> str:
    wanted = ", ".join(f'{{path: "{path}", owner: {UID}, mode: "{mode}"}}' for path in paths)
    return f"folders: {{folders: [{wanted}]}}"


def test_folders_are_made_from_the_outer_to_the_inner_and_then_left_alone(tmp_path: Path) -> None:
    outer, inner = tmp_path / "a b", tmp_path / "a b" / "c"
    dry = succeed(tmp_path, folders_task(outer, inner), "--check", "--diff")
    assert "changed=1" in dry
    assert dry.count('+    "state": "directory"') == 2
    assert not outer.exists()
    assert "changed=1" in succeed(tmp_path, folders_task(outer, inner))
    assert inner.stat().st_mode & 0o7777 == 0o750
    assert "changed=0" in succeed(tmp_path, folders_task(outer, inner), python=NO_PYTHON)
    inner.chmod(0o700)
    assert "changed=1" in succeed(tmp_path, folders_task(outer, inner))
    assert inner.stat().st_mode & 0o7777 == 0o750


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, file: Path) -> None:
    done = play(tmp_path, folders_task(file))
    assert done.returncode != 0
    assert f"{file}: " in done.stdout
    assert file.read_text() == "text\n"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "folders = None; wanted a list"),
        ([], "folders = []; wanted a list"),
        ("/x", "folders = '/x'; wanted a list"),
        ([{"mode": "0755"}], "wanted a path"),
        ([{"path": "/x", "mode": "0755", "state": "absent"}], "wanted a path"),
        ([{"path": "/x"}], "mode of /x = None; wanted octal digits"),
        ([{"path": "/x", "mode": 420}], "mode of /x = 420; wanted octal digits"),
        ([{"path": "/x", "mode": "u=rwx"}], "mode of /x = 'u=rwx'; wanted octal digits"),
    ],
)
def test_other_folders_are_refused(value: object, says: str) -> None:
    with pytest.raises(ValueError, match="folders") as refused:
        folders.wanted_folders(value)
    assert says in str(refused.value)


def test_a_link_to_a_folder_is_left_to_the_module() -> None:
    wanted = [{"path": "/a|b", "owner": "root", "group": 0, "mode": "0755"}]
    assert folders.to_make(wanted, "directory|0|root|0|root|755|/a|b\n") == []
    for told in ("symbolic link|0|root|0|root|777|/a|b\n", "directory|0|root|0|root|1755|/a|b\n", ""):
        assert folders.to_make(wanted, told) == wanted


# dpkg-query of a host: `half` was unpacked and never configured.
DPKG = """#!/bin/sh
printf 'ii |%s|whole\\n' "$(dpkg --print-architecture)"
printf 'hi |all|held\\niU |all|half\\n'
exit 1
"""


def test_packages_that_are_installed_need_no_python(tmp_path: Path) -> None:
    (tmp_path / "dpkg-query").write_text(DPKG)
    (tmp_path / "dpkg-query").chmod(0o755)
    for names, code in (("[whole, held]", 0), ("[whole, half]", 2)):
        path = f"{tmp_path}:{os.environ['PATH']}"
        assert play(tmp_path, f"packages: {{name: {names}}}", python=NO_PYTHON, PATH=path).returncode == code, names


@pytest.mark.parametrize("line", ["iU |all|half", "rc |all|half", "iiR|all|half", "un |all|half", "ii |i386|half"])
def test_a_package_that_is_not_whole_is_to_be_installed(line: str) -> None:
    assert packages.installed(f"ii |all|whole\n{line}\nnative|amd64|\n") == {"whole"}


def test_a_package_that_nobody_asked_for_is_to_be_marked() -> None:
    answer = "a login says | this\nii |amd64|munge\r\nii |amd64|numactl\nautomatic||numactl\nnative|amd64|\n"
    assert packages.installed(answer) == {"munge"}
    assert packages.installed("ii |amd64|munge\n") == set()


def test_apts_own_notes_are_read(tmp_path: Path) -> None:
    notes = tmp_path / "extended_states"
    notes.write_text(
        "Package: numactl\nArchitecture: amd64\nAuto-Installed: 1\n\n"
        "Package: munge\nArchitecture: amd64\nAuto-Installed: 0\n\n"
    )
    command = packages.AUTOMATIC.replace("/var/lib/apt/extended_states", str(notes))
    assert subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout == (
        "automatic||numactl\n"
    )


@pytest.mark.parametrize("value", [None, [], "", "nginx=1.2", ["nginx", 1], ["-o"]])
def test_other_names_of_packages_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="wanted names of Debian packages"):
        packages.wanted_names(value)
