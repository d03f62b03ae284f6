"""What a tier's job was made from, as a digest that Slurm keeps with the job.

The job script carries it as `#SBATCH --comment=gleaner:<digest>`, so that a job which a person submits has it, too.

A router's job takes one of several nodes, and need not end since the others are not the same any more. Its digest has
two parts: `<what it is made from>-<where it may run>`. The second begins with what Slurm is told of nodes and of the
queue, which counts for a job that waits, and goes on with one piece for each node of the plan, in the plan's order.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Of a plan: what people are told, what a running router learns without a restart, and Slurm's part, of which the
# job script has all that counts.
_WITHOUT_EFFECT = {"memory", "models", "priority", "slurm", "warnings"}
_PIECE = 8
_DIGEST = re.compile(rf"\bgleaner:([0-9a-f]{{16}}(?:-(?:[0-9a-f]{{{_PIECE}}})+)?)(?![0-9a-f-])")
_REPLACED = re.compile(r"\bgleaner:[0-9a-f-]* replaced\b")
_OUTRANKED = re.compile(r"\bgleaner:[0-9a-f-]* outranked\b")
# What Slurm reads while a job waits.
_WAITING_OPTIONS = re.compile(r"^#SBATCH --(?:nodelist|exclude|nice)=.*\n", re.MULTILINE)


def of(plan: Mapping[str, Any], script: str) -> str:
    """The digest of a plan and of the job script made from it.

    16 hexadecimal digits, with a second part for a router. Two plans have the same one when a job of the first need not
    end because of the second, nor be submitted anew while it waits.
    """
    effective = {key: value for key, value in plan.items() if key not in _WITHOUT_EFFECT}
    if plan["kind"] != "router":
        return _hash([effective, script])
    nodes = effective.pop("nodes")
    told = [nodes_of(plan), _WAITING_OPTIONS.findall(script)]
    pieces = [told, *([name, nodes[name]] for name in nodes_of(plan))]
    return (
        f"{_hash([effective, _WAITING_OPTIONS.sub('', script)])}-{''.join(_hash(piece)[:_PIECE] for piece in pieces)}"
    )


def nodes_of(plan: Mapping[str, Any]) -> list[str]:
    """The nodes on which the plan's job may run, in the order in which its digest has them."""
    return [str(name) for name in plan["slurm"]["nodes"]]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def may_run_on(made_from: str, current: str, candidates: Sequence[str], hosts: Sequence[str]) -> bool:
    """A job made from one digest, which runs on these hosts, is one that the current plan would have there, too.

    `candidates` are the nodes of the current plan, as `nodes_of` gives them.
    """
    if made_from == current:
        return True
    (what, _, was), (what_now, _, now) = made_from.partition("-"), current.partition("-")
    if what != what_now or not was or not now:
        return False
    _, *pieces = _pieces(now)
    wanted = dict(zip(candidates, pieces))
    return bool(hosts) and all(wanted.get(host, "") in _pieces(was)[1:] for host in hosts)


def _pieces(text: str) -> list[str]:
    return [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]


def read(text: str) -> str:
    """The digest in a job's comment or in a job script; empty when there is none."""
    found = _DIGEST.search(text)
    return found.group(1) if found else ""


def replaced(digest: str) -> str:
    """The comment by which the keeper tells the supervisor why its job has to end."""
    return f"gleaner:{digest} replaced"


def is_replaced(comment: str) -> bool:
    return _REPLACED.search(comment) is not None


def outranked(digest: str) -> str:
    """The same, for a job whose plan is the current one, but whose GPUs a tier of higher priority wants."""
    return f"gleaner:{digest} outranked"


def is_outranked(comment: str) -> bool:
    return _OUTRANKED.search(comment) is not None
