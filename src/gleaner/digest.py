"""What a tier's job was made from, as a digest that Slurm keeps with the job.

The job script carries it as `#SBATCH --comment=gleaner:<digest>`, so that a job which a person submits has it, too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

# Of a plan: what people are told, what a running router learns without a restart, and Slurm's part, of which the
# job script has all that counts.
_WITHOUT_EFFECT = {"memory", "models", "priority", "slurm", "warnings"}
_DIGEST = re.compile(r"\bgleaner:([0-9a-f]{16})\b")
_REPLACED = re.compile(r"\bgleaner:[0-9a-f]* replaced\b")
_OUTRANKED = re.compile(r"\bgleaner:[0-9a-f]* outranked\b")


def of(plan: Mapping[str, Any], script: str) -> str:
    """The digest of a plan and of the job script made from it, 16 hexadecimal digits.

    Two plans have the same one when a job of the first need not end because of the second.
    """
    effective = {key: value for key, value in plan.items() if key not in _WITHOUT_EFFECT}
    return hashlib.sha256(json.dumps([effective, script], sort_keys=True).encode()).hexdigest()[:16]


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
