"""Ansible module: the accounting policy of a Slurm cluster as one declaration."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: sacctmgr_policy
short_description: Declare the accounting policy of a Slurm cluster
description:
  - Reads what slurmdbd holds, compares it with the declaration as data, and changes only what differs.
  - QoS, accounts and users that are not named here, and attributes that are not given, are left alone.
  - Nothing is ever deleted.
  - Needs C(sacctmgr) on the host, and a user whom slurmdbd takes for an administrator (root or SlurmUser).
author: Gleaner
options:
  cluster:
    description: The cluster, as in C(ClusterName) of slurm.conf. Registered when slurmdbd does not know it.
    type: str
    required: true
  qos:
    description: Qualities of service.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the QoS.
        type: str
        required: true
      priority:
        description: Added to the priority of its jobs. It preempts nothing by itself.
        type: int
      grace_time_seconds:
        description: Time between the signal to a preempted job of this QoS and its end.
        type: int
      preempt:
        description: The QoS whose jobs this one may preempt. An empty list takes every such right away.
        type: list
        elements: str
      preempt_mode:
        description: What happens to a preempted job of this QoS. V(cluster) means as slurm.conf says.
        type: str
        choices: [cancel, cluster, requeue, suspend]
      flags:
        description: Flags of the QoS, all of them. An empty list clears them.
        type: list
        elements: str
      widen:
        description: >-
          For one that others manage. Where it exists, its lists only gain what is named here, and nothing else of it
          changes.
        type: bool
        default: false
  accounts:
    description: Accounts and their association with O(cluster).
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the account.
        type: str
        required: true
      description:
        description: What it is for. Slurm keeps it in lower case.
        type: str
      organization:
        description: Whose it is. Slurm keeps it in lower case.
        type: str
      parent:
        description: The account above it. Slurm's own answer for a new account is C(root).
        type: str
      qos:
        description: Every QoS that its jobs may use.
        type: list
        elements: str
      default_qos:
        description: The QoS of its jobs when they name none. Must be one of O(accounts[].qos).
        type: str
      widen:
        description: >-
          For one that others manage. Where it exists, its lists only gain what is named here, and nothing else of it
          changes.
        type: bool
        default: false
  users:
    description: Users and the accounts in which they may run jobs.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the user, as on the hosts.
        type: str
        required: true
      accounts:
        description: Accounts of the user on O(cluster). Others that the user has already are left alone.
        type: list
        elements: str
        required: true
      default_account:
        description: The account of the user's jobs when they name none. Must be one of O(users[].accounts).
        type: str
      admin_level:
        description: What the user may change in the accounting.
        type: str
        choices: [none, operator, administrator]
      widen:
        description: For one that others manage. Where the user exists, only accounts are added.
        type: bool
        default: false
  wait_seconds:
    description: How long to wait for slurmdbd, which answers some seconds after its start.
    type: int
    default: 60
attributes:
  check_mode:
    description: >-
      Names every command that the real run would use. Where slurmdbd cannot be asked yet,
      as on a virgin host, everything counts as still to be made.
    support: full
  diff_mode:
    description: Shows what is declared here, before and after.
    support: full
"""

EXAMPLES = r"""
- name: Policy | Let paying jobs preempt the opportunistic ones
  sacctmgr_policy:
    cluster: beefcake2
    qos:
      - name: ai_opportunistic
        priority: 100
        grace_time_seconds: 30
        preempt_mode: requeue
      - name: vasp_priority
        priority: 1000
        preempt: [ai_opportunistic]
    accounts:
      - name: ai
        qos: [ai_opportunistic]
        default_qos: ai_opportunistic
      - name: vasp
        qos: [vasp_priority]
        default_qos: vasp_priority
    users:
      - name: ai-inference
        accounts: [ai]
        default_account: ai
"""

RETURN = r"""
commands:
  description: The commands that were run, or would be.
  returned: always
  type: list
  elements: str
  sample: ["sacctmgr -i modify qos name=ai_opportunistic set GraceTime=30"]
"""

UNREACHABLE = re.compile(r"persistent connection|PersistInit|Connection (refused|reset|timed out)", re.I)
RETRY_SECONDS = 1.0
SACCTMGR_SECONDS = 120
WORDS_SHOWN = 600

# Values are str, int or frozenset[str]: the one form in which declared and live ones are compared.
Attributes = dict[str, Any]
# Column of `sacctmgr show` -> (option of this module, reader of the column's text).
Columns = Mapping[str, tuple[str, Callable[[str], Any]]]


class SlurmdbdUnreachableError(Exception):
    """sacctmgr ran, and slurmdbd did not answer."""


class SacctmgrError(Exception):
    """sacctmgr is missing or refused."""


@dataclass
class Accounting:
    """What slurmdbd holds of one cluster, or what is declared for it.

    ``associations`` maps an account to the attributes of its association with the cluster,
    ``memberships`` a user to the accounts in which the user has an association, ``widened`` has the names of QoS,
    accounts and users, by their kind, that only gain what they lack.
    Names are lower case, as Slurm keeps them, but for users: those are spelt as on the hosts.
    """

    clusters: set[str] = field(default_factory=set)
    qos: dict[str, Attributes] = field(default_factory=dict)
    accounts: dict[str, Attributes] = field(default_factory=dict)
    associations: dict[str, Attributes] = field(default_factory=dict)
    users: dict[str, Attributes] = field(default_factory=dict)
    memberships: dict[str, set[str]] = field(default_factory=dict)
    widened: set[tuple[str, str]] = field(default_factory=set)


def seconds(text: str) -> int:
    """Convert Slurm's ``[days-]hours:minutes:seconds`` to seconds; the empty text is 0.

    >>> seconds("1-01:01:01")
    90061
    """
    days, _, clock = text.rpartition("-")
    total = 0
    for part in (clock or "0").split(":"):
        total = total * 60 + int(part)
    return int(days or 0) * 86400 + total


def names(values: Iterable[str]) -> frozenset[str]:
    """Return names as Slurm keeps them: lower case, without order."""
    return frozenset(value.strip().lower() for value in values if value.strip())


def listed(text: str) -> frozenset[str]:
    return names(text.split(","))


QOS_COLUMNS: Columns = {
    "Priority": ("priority", int),
    "GraceTime": ("grace_time_seconds", seconds),
    "Preempt": ("preempt", listed),
    "PreemptMode": ("preempt_mode", str.lower),
    "Flags": ("flags", listed),
}
ACCOUNT_COLUMNS: Columns = {
    "Description": ("description", str.lower),
    "Organization": ("organization", str.lower),
}
ASSOCIATION_COLUMNS: Columns = {
    "ParentName": ("parent", str.lower),
    "QOS": ("qos", listed),
    "DefaultQOS": ("default_qos", str.lower),
}
USER_COLUMNS: Columns = {
    "DefaultAccount": ("default_account", str.lower),
    "AdminLevel": ("admin_level", str.lower),
}

# sacctmgr's word for an attribute where it is set; flags alone are cleared by -1 instead of an empty value.
SETTERS = {
    "priority": "Priority",
    "grace_time_seconds": "GraceTime",
    "preempt": "Preempt",
    "preempt_mode": "PreemptMode",
    "flags": "Flags",
    "description": "Description",
    "organization": "Organization",
    "parent": "Parent",
    "qos": "QOS",
    "default_qos": "DefaultQOS",
    "default_account": "DefaultAccount",
    "admin_level": "AdminLevel",
}


def declared(entry: Mapping[str, Any], columns: Columns) -> Attributes:
    """Return the attributes that an entry of the declaration gives, in the form of comparison."""
    result: Attributes = {}
    for attribute, _ in columns.values():
        value = entry.get(attribute)
        if isinstance(value, list):
            result[attribute] = names(value)
        elif isinstance(value, str):
            result[attribute] = value.lower()
        elif value is not None:
            result[attribute] = value
    return result


def wanted_accounting(params: Mapping[str, Any]) -> Accounting:
    """Return the declaration as data.

    Raises ValueError when it contradicts itself.
    """
    wanted = Accounting(clusters={params["cluster"].lower()})
    for kind in ("qos", "accounts", "users"):
        wanted.widened |= {
            (kind, entry["name"] if kind == "users" else entry["name"].lower())
            for entry in params[kind]
            if entry.get("widen")
        }
    for entry in params["qos"]:
        wanted.qos[entry["name"].lower()] = declared(entry, QOS_COLUMNS)
    for entry in params["accounts"]:
        name = entry["name"].lower()
        wanted.accounts[name] = declared(entry, ACCOUNT_COLUMNS)
        association = wanted.associations[name] = declared(entry, ASSOCIATION_COLUMNS)
        if "qos" in association and association.get("default_qos", "") not in association["qos"] | {""}:
            raise ValueError(
                f"accounts: the default_qos of account {name} is {association['default_qos']!r}, which is "
                f"not in its qos {sorted(association['qos'])}. Add it there, or choose one of them."
            )
    for entry in params["users"]:
        name = entry["name"]
        user = wanted.users[name] = declared(entry, USER_COLUMNS)
        memberships = wanted.memberships[name] = set(names(entry["accounts"]))
        if not memberships:
            raise ValueError(f"users: user {name} has no accounts. Name at least one.")
        if user.get("default_account") not in memberships | {None}:
            raise ValueError(
                f"users: the default_account of user {name} is {user['default_account']!r}, which is not in "
                f"the user's accounts {sorted(memberships)}. Add it there, or choose one of them."
            )
    return wanted


def in_order(dependencies: Mapping[str, Iterable[str]], what: str) -> list[str]:
    """Return the keys so that each comes after those it depends on; names that are no keys are foreign.

    Raises ValueError when they depend on each other in a circle.
    """
    try:
        order = list(TopologicalSorter(dependencies).static_order())
    except CycleError as error:
        raise ValueError(f"{what}: {' -> '.join(error.args[1])} is a circle. Take one of them out.") from error
    return [name for name in order if name in dependencies]


def setting(attributes: Attributes) -> list[str]:
    """Return attributes as ``Key=value`` words of sacctmgr."""
    words = []
    for attribute, value in attributes.items():
        text = ",".join(sorted(value)) if isinstance(value, frozenset) else str(value)
        if attribute == "flags" and not text:
            text = "-1"
        words.append(f"{SETTERS[attribute]}={text}")
    return words


def differing(wanted: Attributes, live: Attributes) -> Attributes:
    return {attribute: value for attribute, value in wanted.items() if live.get(attribute) != value}


def gained(wanted: Attributes, live: Attributes) -> Attributes:
    """Return ``live`` where only the lists have grown, by what ``wanted`` names."""
    return {
        attribute: live.get(attribute, frozenset()) | value
        if isinstance(value, frozenset)
        else live.get(attribute, value)
        for attribute, value in wanted.items()
    }


def settled(wanted: Accounting, live: Accounting) -> Accounting:
    """Return the declaration in which things that others manage are as they will be."""
    result = copy.copy(wanted)
    for kind, names_of in (("qos", ("qos",)), ("accounts", ("accounts", "associations")), ("users", ("users",))):
        for name_of in names_of:
            have = getattr(live, name_of)
            entries = {
                name: gained(entry, have[name]) if (kind, name) in wanted.widened and name in have else entry
                for name, entry in getattr(wanted, name_of).items()
            }
            setattr(result, name_of, entries)
    return result


def changing(wanted: Attributes, live: Attributes, widened: bool) -> list[str]:
    """Return the differences as words of sacctmgr; those of others' lists as what is added, not as whole lists.

    An account that has no list of its own shows that of its parent, and would be cut off from it by a whole one.
    """
    words = []
    for attribute, value in differing(wanted, live).items():
        if widened and isinstance(value, frozenset):
            added = value - live.get(attribute, frozenset())
            words.append(f"{SETTERS[attribute]}+={','.join(sorted(added))}")
        else:
            words += setting({attribute: value})
    return words


def commands(cluster: str, wanted: Accounting, live: Accounting) -> list[list[str]]:
    """Return the sacctmgr commands that turn ``live`` into ``wanted``, in an order in which each can succeed.

    Raises ValueError when the declaration has no such order.
    """
    result: list[list[str]] = []
    wanted = settled(wanted, live)
    on_cluster = f"cluster={cluster}"
    if cluster.lower() not in live.clusters:
        result.append(["add", "cluster", f"name={cluster}"])

    preempted = {name: entry.get("preempt", ()) for name, entry in wanted.qos.items()}
    for name in in_order(preempted, "qos.preempt"):
        entry = wanted.qos[name]
        if name not in live.qos:
            # An empty list is what a new QoS has anyway, and "flags=-1" is refused there.
            given = {attribute: value for attribute, value in entry.items() if value != frozenset()}
            result.append(["add", "qos", f"name={name}", *setting(given)])
        elif words := changing(entry, live.qos[name], ("qos", name) in wanted.widened):
            result.append(["modify", "qos", f"name={name}", "set", *words])

    parents = {name: {entry.get("parent", "root")} for name, entry in wanted.associations.items()}
    for name in in_order(parents, "accounts.parent"):
        entry = wanted.accounts[name]
        association = wanted.associations[name]
        if name not in live.associations:
            new = {**({} if name in live.accounts else entry), **association}
            result.append(["add", "account", f"name={name}", on_cluster, *setting(new)])
        elif words := changing(association, live.associations[name], ("accounts", name) in wanted.widened):
            result.append(["modify", "account", f"name={name}", on_cluster, "set", *words])
        if name in live.accounts and (changes := differing(entry, live.accounts[name])):
            result.append(["modify", "account", f"name={name}", "set", *setting(changes)])

    for name, entry in wanted.users.items():
        known = live.users.get(name)
        changes = dict(entry) if known is None else differing(entry, known)
        missing = wanted.memberships[name] - live.memberships.get(name, set())
        if missing:
            # Of a user who is known already, "add" takes the first default account on a cluster, no more.
            first = {"default_account"} if known and name not in live.memberships else set()
            new = {key: changes.pop(key) for key in list(changes) if known is None or key in first}
            joined = [on_cluster, f"account={','.join(sorted(missing))}"]
            result.append(["add", "user", f"name={name}", *joined, *setting(new)])
        for key, value in changes.items():
            where = [on_cluster] if key == "default_account" else []
            result.append(["modify", "user", f"name={name}", *where, "set", *setting({key: value})])
    return result


def as_text(cluster: str, shown: Accounting, wanted: Accounting) -> str:
    """Return what ``shown`` says about the things and attributes that ``wanted`` names, for the diff."""
    lines = [f"cluster: {cluster if cluster.lower() in shown.clusters else ''}".rstrip()]

    def section(title: str, entries: dict[str, Attributes]) -> None:
        lines.append(f"{title}:")
        for name, attributes in entries.items():
            lines.append(f"  {name}:")
            for attribute, value in sorted(attributes.items()):
                text = ", ".join(sorted(value)) if isinstance(value, (set, frozenset)) else value
                lines.append(f"    {attribute}: {text}".rstrip())

    def named(entries: dict[str, Attributes], asked: dict[str, Attributes]) -> dict[str, Attributes]:
        return {
            name: {attribute: entries[name].get(attribute, "") for attribute in attributes}
            for name, attributes in asked.items()
            if name in entries
        }

    section("qos", named(shown.qos, wanted.qos))
    # An account without an association with this cluster is not there, as far as the cluster is concerned.
    accounts = named(shown.associations, wanted.associations)
    for name, attributes in named(shown.accounts, wanted.accounts).items():
        if name in accounts:
            accounts[name].update(attributes)
    section("accounts", accounts)
    users = named(shown.users, wanted.users)
    for name, attributes in users.items():
        attributes["accounts"] = wanted.memberships[name] & shown.memberships.get(name, set())
    section("users", users)
    return "\n".join(lines) + "\n"


def sacctmgr(*arguments: str) -> str:
    """Run sacctmgr and return what it printed.

    Raises SlurmdbdUnreachableError or SacctmgrError with its words.
    """
    try:
        done = subprocess.run(
            ["sacctmgr", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
            timeout=SACCTMGR_SECONDS,
        )
    except FileNotFoundError as error:
        raise SacctmgrError(
            "The program sacctmgr is not on this host. Install the package slurm-client first."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmdbdUnreachableError(f"sacctmgr got no answer from slurmdbd within {SACCTMGR_SECONDS} s.") from error
    if done.returncode != 0:
        words = f"{done.stderr}\n{done.stdout}"
        kind = SlurmdbdUnreachableError if UNREACHABLE.search(words) else SacctmgrError
        # 22.05 repeats itself for a screenful; what failed in the end stands at the end.
        raise kind(" ".join(words.split())[-WORDS_SHOWN:])
    return done.stdout


def show(entity: str, keys: list[str], columns: Columns, *where: str) -> list[list[str]]:
    """Return the rows of ``sacctmgr show``, key columns first, then the attribute columns."""
    fields = [*keys, *columns]
    condition = ["where", *where] if where else []
    text = sacctmgr("-nP", "show", entity, *condition, f"format={','.join(fields)}")
    return [line.split("|") for line in text.splitlines() if line.count("|") == len(fields) - 1]


def attributes_of(row: list[str], columns: Columns) -> Attributes:
    return {attribute: read(text) for text, (attribute, read) in zip(row, columns.values())}


def live_accounting(cluster: str) -> Accounting:
    """Return what slurmdbd holds."""
    live = Accounting(clusters={row[0].lower() for row in show("cluster", ["Cluster"], {})})
    for name, *row in show("qos", ["Name"], QOS_COLUMNS):
        live.qos[name.lower()] = attributes_of(row, QOS_COLUMNS)
    for name, *row in show("account", ["Account"], ACCOUNT_COLUMNS):
        live.accounts[name.lower()] = attributes_of(row, ACCOUNT_COLUMNS)
    for name, user, partition, *row in show(
        "assoc", ["Account", "User", "Partition"], ASSOCIATION_COLUMNS, f"cluster={cluster}"
    ):
        if not user:
            live.associations[name.lower()] = attributes_of(row, ASSOCIATION_COLUMNS)
        elif not partition:
            live.memberships.setdefault(user, set()).add(name.lower())
    # Without the condition DefaultAccount is that of the cluster on which sacctmgr runs.
    for name, *row in show("user", ["User"], USER_COLUMNS, f"cluster={cluster}"):
        live.users[name] = attributes_of(row, USER_COLUMNS)
    return live


def live_accounting_within(cluster: str, wait_seconds: float) -> Accounting:
    """Return what slurmdbd holds, as soon as it answers.

    Raises SlurmdbdUnreachableError after ``wait_seconds`` without an answer.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            return live_accounting(cluster)
        except SlurmdbdUnreachableError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_SECONDS)


def spoken(command: list[str]) -> str:
    return shlex.join(["sacctmgr", "-i", *command])


def argument_spec() -> dict[str, Any]:
    def texts(**more: Any) -> dict[str, Any]:
        return {"type": "list", "elements": "str", **more}

    return {
        "cluster": {"type": "str", "required": True},
        "qos": {
            "type": "list",
            "elements": "dict",
            "default": [],
            "options": {
                "name": {"type": "str", "required": True},
                "priority": {"type": "int"},
                "grace_time_seconds": {"type": "int"},
                "preempt": texts(),
                "preempt_mode": {"type": "str", "choices": ["cancel", "cluster", "requeue", "suspend"]},
                "flags": texts(),
                "widen": {"type": "bool", "default": False},
            },
        },
        "accounts": {
            "type": "list",
            "elements": "dict",
            "default": [],
            "options": {
                "name": {"type": "str", "required": True},
                "description": {"type": "str"},
                "organization": {"type": "str"},
                "parent": {"type": "str"},
                "qos": texts(),
                "default_qos": {"type": "str"},
                "widen": {"type": "bool", "default": False},
            },
        },
        "users": {
            "type": "list",
            "elements": "dict",
            "default": [],
            "options": {
                "name": {"type": "str", "required": True},
                "accounts": texts(required=True),
                "default_account": {"type": "str"},
                "admin_level": {"type": "str", "choices": ["none", "operator", "administrator"]},
                "widen": {"type": "bool", "default": False},
            },
        },
        "wait_seconds": {"type": "int", "default": 60},
    }


def main() -> None:
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    cluster: str = module.params["cluster"]
    result: dict[str, Any] = {}
    try:
        wanted = wanted_accounting(module.params)
        try:
            live = live_accounting_within(cluster, 0 if module.check_mode else module.params["wait_seconds"])
        except (SlurmdbdUnreachableError, SacctmgrError) as error:
            if not module.check_mode:
                raise
            live = Accounting()
            result["msg"] = f"The accounting does not answer, so all of it counts as still to be made: {error}"
        todo = commands(cluster, wanted, live)
        result.update(
            changed=bool(todo),
            commands=[spoken(command) for command in todo],
            diff={"before": as_text(cluster, live, wanted), "after": as_text(cluster, settled(wanted, live), wanted)},
        )
        if todo and not module.check_mode:
            apply(cluster, wanted, todo)
    except SlurmdbdUnreachableError as error:
        module.fail_json(
            msg=f"slurmdbd did not answer within wait_seconds={module.params['wait_seconds']}: {error} "
            "Read its journal (journalctl -u slurmdbd) and AccountingStorageHost in slurm.conf.",
            **result,
        )
    except (SacctmgrError, ValueError) as error:
        module.fail_json(msg=str(error), **result)
    module.exit_json(**result)


def apply(cluster: str, wanted: Accounting, todo: list[list[str]]) -> None:
    """Run the commands, then read back: some refusals of sacctmgr exit 0, and some failures are no matter.

    Raises SacctmgrError with the words of the refusal when slurmdbd then does not hold what is wanted.
    """
    refusals = []
    for command in todo:
        try:
            sacctmgr("-i", *command)
        except SacctmgrError as error:
            # Somebody else may have been faster: slurmctld registers its own cluster, for one.
            refusals.append(f"{spoken(command)}: {error}")
            break
    left = commands(cluster, wanted, live_accounting(cluster))
    if left:
        raise SacctmgrError(
            f"slurmdbd does not hold what is declared. Still to be done: {'; '.join(map(spoken, left))}. "
            f"Refused: {'; '.join(refusals) or 'nothing, the commands exited with 0'}."
        )


if __name__ == "__main__":
    main()
