"""Ansible module: a MariaDB database and the local account that owns it."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: mariadb_account
short_description: A MariaDB database and the local account that owns it
description:
  - Makes the database, the account C(user@localhost) with its password, and all privileges on the database.
  - Works through the C(mariadb) client as root over the local socket, so it needs root and no password.
  - The password is proved by logging in with it, and set anew only when that fails. It is never an argument,
    a variable of the environment, a file or a statement in a log of the server, which gets its hash.
author: Gleaner
options:
  database:
    description: Name of the database.
    type: str
    required: true
  user:
    description: Name of the account. Its host is always C(localhost).
    type: str
    required: true
  password:
    description: Password of the account.
    type: str
    required: true
attributes:
  check_mode:
    description: Names what the real run would make. Without a MariaDB, as on a virgin host, everything.
    support: full
  diff_mode:
    description: Shows what is there and what is not, and never a password.
    support: full
"""

EXAMPLES = r"""
- name: Database | Give slurmdbd its database
  mariadb_account:
    database: slurm_acct_db
    user: slurm
    password: "{{ vault_slurmdbd_password }}"
"""

RETURN = r"""
msg:
  description: Why everything counts as still to be made.
  returned: in check mode without a MariaDB
  type: str
"""

CLIENT_SECONDS = 60


class MariadbError(Exception):
    """The client is missing or the server refused."""


@dataclass(frozen=True)
class State:
    """What the server holds; each field is true when it is as declared."""

    database: bool = False
    account: bool = False
    password: bool = False
    privileges: bool = False

    def as_text(self) -> str:
        return "".join(f"{name}: {'as declared' if value else 'to be made'}\n" for name, value in vars(self).items())


AS_DECLARED = State(database=True, account=True, password=True, privileges=True)


def literal(text: str) -> str:
    """Quote a string for SQL, for a session that takes backslashes as escapes."""
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


def identifier(name: str) -> str:
    escaped = name.replace("`", "``")
    return f"`{escaped}`"


def account_name(user: str) -> str:
    return f"{literal(user)}@'localhost'"


def grant_pattern(database: str) -> str:
    """Quote a database for GRANT, where ``_`` and ``%`` would stand for any character."""
    return identifier(database.replace("\\", "\\\\").replace("_", "\\_").replace("%", "\\%"))


def native_hash(password: str) -> str:
    """Return the hash of mysql_native_password: SHA-1 twice, in hexadecimal after a star.

    >>> native_hash("secret")
    '*14E65567ABDB5135D0CFD9A70B3032C179A49EE7'
    """
    once = hashlib.sha1(password.encode()).digest()
    return f"*{hashlib.sha1(once).hexdigest().upper()}"


def login_options(user: str, password: str) -> str:
    """Return an option file of the client; inside double quotes it knows these escapes."""

    def quoted(text: str) -> str:
        for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
            text = text.replace(plain, escaped)
        return f'"{text}"'

    return f"[client]\nuser={quoted(user)}\npassword={quoted(password)}\n"


def statements(state: State, database: str, user: str, password: str) -> list[str]:
    """Return the SQL that turns ``state`` into the declared one."""
    account = account_name(user)
    proof = f"IDENTIFIED VIA mysql_native_password USING {literal(native_hash(password))}"
    result = []
    if not state.database:
        result.append(f"CREATE DATABASE IF NOT EXISTS {identifier(database)}")
    if not state.account:
        result.append(f"CREATE USER {account} {proof}")
    elif not state.password:
        result.append(f"ALTER USER {account} {proof}")
    if not state.privileges:
        result.append(f"GRANT ALL PRIVILEGES ON {grant_pattern(database)}.* TO {account}")
    return result


def client(arguments: list[str], text: str) -> str:
    """Run the client with ``text`` on its standard input and return what it printed.

    Raises MariadbError with the server's words.
    """
    command = ["mariadb", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "MYSQL_PWD"}
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=CLIENT_SECONDS,
        )
    except FileNotFoundError as error:
        raise MariadbError(
            "The program mariadb is not on this host. Install mariadb-server and mariadb-client first."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise MariadbError(f"MariaDB gave no answer within {CLIENT_SECONDS} s.") from error
    if done.returncode != 0:
        raise MariadbError(done.stderr.strip() or f"mariadb exited with {done.returncode}")
    return done.stdout


def as_root(*sql: str) -> list[str]:
    """Run statements as root over the local socket and return the rows, columns parted by tabs."""
    text = ";\n".join(["SET SESSION sql_mode = ''", *sql]) + ";\n"
    options = ["--protocol=socket", "--user=root", "--default-character-set=utf8mb4"]
    return client([*options, "--batch", "--raw", "--skip-column-names"], text).splitlines()


def can_log_in(user: str, password: str) -> bool:
    try:
        client(
            ["--defaults-file=/dev/stdin", "--protocol=socket", "--execute=DO 0"],
            login_options(user, password),
        )
    except MariadbError as error:
        if "ERROR 1045" in str(error):
            return False
        raise
    return True


def live_state(database: str, user: str, password: str) -> State:
    databases, accounts = (
        int(row)
        for row in as_root(
            f"SELECT COUNT(*) FROM information_schema.SCHEMATA WHERE SCHEMA_NAME = {literal(database)}",
            f"SELECT COUNT(*) FROM mysql.user WHERE User = {literal(user)} AND Host = 'localhost'",
        )
    )
    if not accounts:
        return State(database=bool(databases))
    grants = as_root(f"SHOW GRANTS FOR {account_name(user)}")
    enough = tuple(
        f"GRANT ALL PRIVILEGES ON {name}.* TO " for name in (grant_pattern(database), identifier(database), "*")
    )
    return State(
        database=bool(databases),
        account=True,
        password=can_log_in(user, password),
        privileges=any(grant.startswith(enough) for grant in grants),
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "database": {"type": "str", "required": True},
            "user": {"type": "str", "required": True},
            "password": {"type": "str", "required": True, "no_log": True},
        },
        supports_check_mode=True,
    )
    wanted = (module.params["database"], module.params["user"], module.params["password"])
    result: dict[str, Any] = {}
    if not wanted[2]:
        module.fail_json(msg=f"password: account {wanted[1]} needs one, got an empty text. Set its vault_* variable.")
    try:
        try:
            state = live_state(*wanted)
        except MariadbError as error:
            if not module.check_mode:
                raise
            state = State()
            result["msg"] = f"MariaDB cannot be asked yet, so all of it is still to be made: {error}"
        todo = statements(state, *wanted)
        result.update(changed=bool(todo), diff={"before": state.as_text(), "after": AS_DECLARED.as_text()})
        if todo and not module.check_mode:
            as_root(*todo)
            after = live_state(*wanted)
            if after != AS_DECLARED:
                raise MariadbError(f"MariaDB took the statements, and still is not as declared: {after}")
    except MariadbError as error:
        module.fail_json(msg=f"Account {wanted[1]}@localhost of database {wanted[0]}: {error}", **result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
