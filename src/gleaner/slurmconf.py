"""What this service needs of slurm.conf, for the version that is installed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Since 23.02 the preempt_* options of other keys live in PreemptParameters, without their prefix; the old
# spelling still counts. In 22.05 PreemptParameters is a parse error.
PREEMPT_PARAMETERS_SINCE = (23, 2)


def version_of(text: str) -> str:
    """The upstream version in what Slurm or Debian prints.

    "slurm-wlm 24.11.5", "slurm 24.11.5", "24.11.5-4+deb13u1" and "1:24.11.5-4" all give "24.11.5".
    Raises ValueError when there is none.
    """
    match = re.search(r"(?:^|[\s:v])(\d{2}\.\d{2})\.(\d+)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} holds no Slurm version; wanted for example 'slurm-wlm 24.11.5'")
    return f"{match.group(1)}.{match.group(2)}"


def _release(version: str) -> tuple[int, int]:
    year, month, _ = version_of(version).split(".")
    return int(year), int(month)


def preemption_settings(version: str) -> dict[str, str]:
    """Keys of slurm.conf that make preemption reach our jobs: requeue by QoS, with the signal sent at once.

    Without the signal option only the steps of a preempted job hear of it; the batch script, where the
    supervisor runs, learns nothing until the grace is over. Raises ValueError for text without a version.
    """
    settings = {"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE"}
    if _release(version) >= PREEMPT_PARAMETERS_SINCE:
        settings["PreemptParameters"] = "send_user_signal"
    else:
        settings["SlurmctldParameters"] = "preempt_send_user_signal"
    return settings


def parse_show_config(text: str) -> dict[str, str]:
    """``scontrol show config`` as a dict of its ``key = value`` lines; "(null)" and "N/A" are empty."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.match(r"\s*([A-Za-z][A-Za-z0-9]*)\s*=\s?(.*)$", line)
        if match is not None:
            value = match.group(2).strip()
            found.setdefault(match.group(1), "" if value in ("(null)", "N/A") else value)
    return found


def _options(value: str) -> list[str]:
    return [option.strip() for option in value.split(",") if option.strip()]


def _lacking(live: Mapping[str, str], key: str, wanted: str, line: str) -> list[str]:
    """The line when ``key`` lacks an option of ``wanted``, whatever their order and case."""
    have = [option.lower() for option in _options(live.get(key, ""))]
    return [] if all(option.lower() in have for option in _options(wanted)) else [line]


def policy_gap(show_config: str, version: str) -> list[str]:
    """The lines that slurm.conf lacks, as they must read, given ``scontrol show config``; empty for none.

    What a comma list already holds is kept in the line. Raises ValueError for text without a version, or when
    ``show_config`` is not the output of that command.
    """
    live = parse_show_config(show_config)
    if "SlurmctldParameters" not in live and "PreemptMode" not in live:
        raise ValueError("this is not the output of `scontrol show config`: it has no PreemptMode")
    lines: list[str] = []
    for key, wanted in preemption_settings(version).items():
        if key in ("PreemptParameters", "SlurmctldParameters"):
            options = _options(live.get(key, ""))
            old = _lacking(live, "SlurmctldParameters", "preempt_send_user_signal", "old")
            if old:
                lines += _lacking(live, key, wanted, f"{key}={','.join([*options, wanted])}")
        else:
            lines += _lacking(live, key, wanted, f"{key}={wanted}")
    # Memory must be a consumable, or a job's --mem bounds nothing.
    if "memory" not in live.get("SelectTypeParameters", "").lower():
        lines.append("SelectTypeParameters=CR_Core_Memory")
    if "cons_tres" not in live.get("SelectType", "").lower():
        lines.append("SelectType=select/cons_tres")
    lines += _lacking(live, "GresTypes", "gpu", f"GresTypes={','.join([*_options(live.get('GresTypes', '')), 'gpu'])}")
    # QoS and accounts bind only where associations are enforced; "limits" and "qos" imply "associations".
    enforced = [option.lower() for option in _options(live.get("AccountingStorageEnforce", ""))]
    if "qos" not in enforced:
        kept = [option for option in enforced if option != "none"]
        lines.append(f"AccountingStorageEnforce={','.join([*kept, 'qos'])}")
    if live.get("JobRequeue", "1") in ("0", "no"):
        lines.append("JobRequeue=1")
    return lines


def accounting_policy(
    ai: Mapping[str, Any], paying: Mapping[str, Any], grace_seconds: int
) -> dict[str, list[dict[str, Any]]]:
    """QoS, accounts and users by which paying jobs take the GPUs back.

    ``ai`` has ``qos``, ``account`` and ``user``; ``paying`` has ``qos`` (a list, the first is the default of the
    account), ``account`` and ``users``. QoS priority alone preempts nothing: each paying QoS names whom it preempts,
    and is the default of its account, because Slurm looks at the job's QoS and users forget ``--qos``.
    """
    return {
        "qos": [
            {
                "name": ai["qos"],
                "priority": 100,
                "grace_time_seconds": grace_seconds,
                "preempt_mode": "requeue",
            },
            *({"name": qos, "priority": 1000, "preempt": [ai["qos"]]} for qos in paying["qos"]),
        ],
        "accounts": [
            {"name": ai["account"], "qos": [ai["qos"]], "default_qos": ai["qos"]},
            {"name": paying["account"], "qos": list(paying["qos"]), "default_qos": paying["qos"][0]},
        ],
        "users": [
            {"name": user, "accounts": [account], "default_account": account}
            for account, users in ((ai["account"], [ai["user"]]), (paying["account"], paying["users"]))
            for user in users
        ],
    }
