"""A run that fails says in which step, and what is to be done; also where a host is not reached."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.ansible import ROOT, surroundings

IMPORTED = """
- hosts: "{{ who }}"
  gather_facts: false
  max_fail_percentage: 0
  tasks:
    - ansible.builtin.raw: "exit {{ code }}"
"""
PLAYBOOK = """
- name: First
  ansible.builtin.import_playbook: imported.yml
  vars:
    who: localhost
    code: 0
    step: "1 of 2: {{ node }} is drained"
    step_cure: Nothing is to be done.
- name: Second
  ansible.builtin.import_playbook: imported.yml
  vars:
    who: "{{ second_who }}"
    code: "{{ second_code }}"
    step: "2 of 2: {{ node }} is back"
    step_cure: "{{ node }} stays drained."
- name: Third
  hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.debug: {msg: what builds on the second}
"""
INVENTORY = """
localhost ansible_connection=local
gone ansible_host=127.0.0.1 ansible_port=1
"""


def run(folder: Path, who: str, code: int) -> tuple[int, str]:
    for name, text in (("imported.yml", IMPORTED), ("book.yml", PLAYBOOK), ("hosts", INVENTORY)):
        (folder / name).write_text(text)
    extra = f"node=vasp-02 second_who={who} second_code={code}"
    argv = ["-i", str(folder / "hosts"), str(folder / "book.yml"), "-e", extra]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), *argv],
        cwd=ROOT,
        env=surroundings(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, " ".join(done.stdout.split())


@pytest.mark.parametrize(("who", "code"), [("localhost", 3), ("gone", 0)])
def test_the_step_of_an_imported_play_is_named_with_its_cure(tmp_path: Path, who: str, code: int) -> None:
    returned, said = run(tmp_path, who, code)
    assert returned != 0, said
    assert "step 2 of 2: vasp-02 is back: failed. vasp-02 stays drained." in said
    assert "STEP 1 of 2: vasp-02 is drained" in said
    assert "what builds on the second" not in said


def test_a_run_that_ends_well_says_nothing(tmp_path: Path) -> None:
    returned, said = run(tmp_path, "localhost", 0)
    assert returned == 0, said
    assert "STEP 2 of 2: vasp-02 is back" in said
    assert "what builds on the second" in said
    assert "failed." not in said
