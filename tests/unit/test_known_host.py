"""known_host: the machine is believed that shows what was said of it, and nobody else's lines are touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.known_host import Key, KeyRefused, believed, parse_key, parse_place, parse_scan, without

MODULE = Path(__file__).parents[2] / "library" / "known_host.py"
OLD, NEW, RSA = Key("ssh-ed25519", "b2xk"), Key("ssh-ed25519", "bmV3"), Key("ssh-rsa", "cnNh")

# ssh and ssh-keyscan as they answer here; ssh-keygen is the real one.
SSH = r"""#!/bin/sh
echo "$*" >>"$FAKE/calls"
printf 'hostname 10.0.0.12\nport 22\nuserknownhostsfile %s\n' "$FAKE/known_hosts"
"""
KEYSCAN = """#!/bin/sh
sed 's/^/10.0.0.12 /' "$FAKE/shown"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("ssh", SSH), ("ssh-keyscan", KEYSCAN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("old", "new"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    show(tmp_path, "new")
    return tmp_path


def public(place: Path, name: str) -> str:
    return " ".join((place / f"{name}.pub").read_text().split()[:2])


def show(place: Path, name: str) -> None:
    (place / "shown").write_text(public(place, name) + "\n")


def know(place: Path, *lines: str) -> None:
    (place / "known_hosts").write_text("".join(f"{line}\n" for line in lines))


def known(place: Path) -> list[str]:
    return (place / "known_hosts").read_text().splitlines()


def module(check: bool = False, **arguments: Any) -> dict[str, Any]:
    more = {"_ansible_check_mode": check, "_ansible_remote_tmp": "/tmp", "_ansible_keep_remote_files": False}
    done = subprocess.run(
        [sys.executable, str(MODULE)],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": {"address": "10.0.0.12", "wait_seconds": 0, **arguments, **more}}),
        capture_output=True,
        text=True,
        check=False,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_another_machine_takes_the_place_of_the_old_one(place: Path) -> None:
    know(place, f"10.0.0.11 {public(place, 'old')}", f"10.0.0.12 {public(place, 'old')}")
    done = module()
    assert done["changed"]
    assert len(done["fingerprints"]) == 1
    assert known(place) == [f"10.0.0.11 {public(place, 'old')}", f"10.0.0.12 {public(place, 'new')}"]
    assert not module()["changed"]


def test_a_machine_that_nobody_knew_is_known(place: Path) -> None:
    assert module(check=True)["changed"]
    assert not (place / "known_hosts").exists()
    assert module()["changed"]
    assert known(place) == [f"10.0.0.12 {public(place, 'new')}"]


def test_a_name_hidden_by_a_hash_is_found(place: Path) -> None:
    know(place, f"10.0.0.12 {public(place, 'old')}")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(place / "known_hosts")], check=True, capture_output=True)
    assert module()["changed"]
    assert known(place) == [f"10.0.0.12 {public(place, 'new')}"]


def test_another_key_than_the_given_one_is_refused_and_nothing_changes(place: Path) -> None:
    know(place, f"10.0.0.12 {public(place, 'old')}")
    done = module(key=public(place, "old"))
    assert done["failed"]
    assert f"node_host_key = {public(place, 'old')}; the machine shows SHA256:" in done["msg"]
    assert known(place) == [f"10.0.0.12 {public(place, 'old')}"]


def test_the_given_key_is_the_only_one_that_is_believed() -> None:
    assert believed([OLD], [NEW, RSA], NEW) == [NEW]
    with pytest.raises(KeyRefused, match="wanted SHA256:"):
        believed([], [RSA], NEW)


def test_what_is_known_need_not_be_all_that_a_machine_has() -> None:
    assert believed([NEW], [NEW, RSA], None) == [NEW]
    assert believed([OLD, RSA], [NEW, RSA], None) == [NEW, RSA]
    assert believed([], [NEW, RSA], None) == [NEW, RSA]


def test_a_machine_that_shows_nothing_is_told(place: Path) -> None:
    (place / "shown").write_text("")
    assert "10.0.0.12 port 22: shows no host key within 0 s; is it switched on" in module()["msg"]


@pytest.mark.parametrize("text", ["ssh-ed25519", "ssh-ed25519 what?"])
def test_a_key_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^key: got "):
        parse_key(text)


def test_lines_that_name_others_keep_them() -> None:
    lines = ["vasp-02,10.0.0.12 ssh-rsa cnNh", "@revoked 10.0.0.12 ssh-rsa cnNh", "10.0.0.12 ssh-rsa cnNh"]
    assert without(lines, [1, 2, 3], "10.0.0.12") == ["vasp-02 ssh-rsa cnNh", "@revoked 10.0.0.12 ssh-rsa cnNh"]


def test_ssh_says_where_and_under_which_name() -> None:
    place = parse_place("hostname 10.0.0.12\nport 2222\nuserknownhostsfile /etc/keys /other\nproxyjump gate\n", "x")
    assert (str(place.file), place.name, place.jumps) == ("/etc/keys", "[10.0.0.12]:2222", True)
    assert parse_scan("# 10.0.0.12:22 SSH-2.0\n10.0.0.12 ssh-rsa cnNh\n") == [RSA]
