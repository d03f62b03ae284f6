"""mariadb_account: quoting that nothing slips through, and a password that nobody else sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.mariadb_account import (
    State,
    account_name,
    grant_pattern,
    identifier,
    literal,
    login_options,
    native_hash,
    statements,
)

MODULE = Path(__file__).parents[2] / "library" / "mariadb_account.py"
PASSWORD = "s3cret'\"\\pass"
WANTED = {"database": "slurm_acct_db", "user": "slurm", "password": PASSWORD}


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("slurm", "'slurm'"),
        ("o'brien", "'o''brien'"),
        ("\\", "'\\\\'"),
        ("'; DROP TABLE x; -- ", "'''; DROP TABLE x; -- '"),
        ("\\'", "'\\\\'''"),
    ],
)
def test_literals_end_where_the_text_ends(text: str, quoted: str) -> None:
    assert literal(text) == quoted


def test_identifiers_end_where_the_name_ends() -> None:
    assert identifier("a`b") == "`a``b`"
    assert account_name("o'b") == "'o''b'@'localhost'"


def test_a_grant_does_not_reach_databases_of_a_similar_name() -> None:
    assert grant_pattern("slurm_acct%db") == "`slurm\\_acct\\%db`"


def test_the_hash_is_that_of_the_server() -> None:
    # SELECT PASSWORD('secret') of MariaDB 11.8.
    assert native_hash("secret") == "*14E65567ABDB5135D0CFD9A70B3032C179A49EE7"


def test_option_file_keeps_every_character_on_its_line() -> None:
    assert login_options("slurm", 'a"b\\c #\nd') == ('[client]\nuser="slurm"\npassword="a\\"b\\\\c #\\nd"\n')


def test_statements_are_only_what_is_missing() -> None:
    everything = statements(State(), **WANTED)
    assert [sql.split()[0] for sql in everything] == ["CREATE", "CREATE", "GRANT"]
    assert statements(State(True, True, True, True), **WANTED) == []
    (changed,) = statements(State(True, True, False, True), **WANTED)
    assert changed.startswith("ALTER USER 'slurm'@'localhost' IDENTIFIED VIA mysql_native_password USING '*")
    assert PASSWORD not in " ".join([*everything, changed])


FAKE = """#!{python}
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
text = sys.stdin.read()
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([sys.argv[1:], dict(os.environ), text]) + chr(10))
if (folder / "down").exists():
    print("ERROR 2002 (HY000): Can't connect to local server", file=sys.stderr)
    sys.exit(1)
made = (folder / "made").exists()
if "--defaults-file=/dev/stdin" in sys.argv:
    if not made:
        print("ERROR 1045 (28000): Access denied for user", file=sys.stderr)
        sys.exit(1)
elif "COUNT" in text:
    print(int(made), int(made), sep=chr(10))
elif "SHOW GRANTS" in text:
    print("GRANT ALL PRIVILEGES ON `slurm" + chr(92) + "_acct" + chr(92) + "_db`.* TO `slurm`@`localhost`")
else:
    (folder / "made").touch()
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    program = tmp_path / "mariadb"
    program.write_text(FAKE.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    return tmp_path


def run_module(path: Path, **more: Any) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, str(MODULE)],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": {**WANTED, "_ansible_remote_tmp": str(path), **more}}),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(path)},
    )
    return json.loads(done.stdout), done.stdout


def calls(host: Path) -> list[tuple[list[str], dict[str, str], str]]:
    return [tuple(json.loads(line)) for line in (host / "calls").read_text().splitlines()]


def test_first_run_makes_everything_and_second_nothing(host: Path) -> None:
    result, _ = run_module(host)
    assert result["changed"] is True
    assert not result.get("failed"), result
    result, _ = run_module(host)
    assert result["changed"] is False


def test_nobody_else_sees_the_password(host: Path) -> None:
    _, printed = run_module(host, _ansible_diff=True)
    run_module(host)
    assert "s3cret" not in printed
    logins = 0
    for arguments, environment, text in calls(host):
        assert "s3cret" not in " ".join([*arguments, *environment.values()])
        if "--defaults-file=/dev/stdin" in arguments:
            logins += 1
            assert "s3cret" in text
        else:
            assert "s3cret" not in text
    assert logins == 2


def test_check_mode_changes_nothing(host: Path) -> None:
    result, _ = run_module(host, _ansible_check_mode=True)
    assert result["changed"] is True
    assert not (host / "made").exists()


@pytest.mark.parametrize("virgin", ["no program", "no server"])
def test_check_mode_on_a_virgin_host_names_everything(host: Path, virgin: str) -> None:
    if virgin == "no program":
        (host / "mariadb").unlink()
    (host / "down").touch()
    result, _ = run_module(host, _ansible_check_mode=True)
    assert result["changed"] is True
    assert result["diff"]["before"].count("to be made") == 4


def test_real_run_without_a_server_fails_with_its_words(host: Path) -> None:
    (host / "down").touch()
    result, _ = run_module(host)
    assert result["failed"] is True
    assert "Account slurm@localhost of database slurm_acct_db: ERROR 2002" in result["msg"]


def test_an_empty_password_is_refused(host: Path) -> None:
    result, _ = run_module(host, password="")
    assert result["failed"] is True
    assert "Set its vault_* variable" in result["msg"]
