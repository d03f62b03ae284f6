"""What this service needs of slurm.conf, for the version that is installed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gleaner import slurm

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
            # These stand beside a mode. Jobs that gang scheduling has suspended would stay so without it.
            kept = [option for option in _options(live.get(key, "")) if option.lower() in ("gang", "within")]
            lines += _lacking(live, key, wanted, f"{key}={','.join([*kept, wanted])}")
    # Memory must be a consumable, or a job's --mem bounds nothing.
    select = live.get("SelectTypeParameters", "")
    if "memory" not in select.lower():
        counted, units = re.subn(r"(?i)\bCR_(Core|CPU|Socket)\b", r"\g<0>_Memory", select)
        others = [option for option in _options(select) if option.lower() != "none"]
        lines.append(f"SelectTypeParameters={counted if units else ','.join(['CR_Core_Memory', *others])}")
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


def losing_jobs(lines: Iterable[str]) -> list[str]:
    """Those of these lines of slurm.conf by which slurmctld loses the jobs that it has, running and pending.

    slurm.conf(5) says so of SelectType, as each plugin has a format of its own for saved jobs, and excepts only the
    way from cons_res to cons_tres. 24.11.5 kept them when tried, which nothing promises. By the other keys that
    ``policy_gap`` and ``partition_gap`` name, jobs wait at worst.
    """
    return [line for line in lines if line.partition("=")[0].lower() == "selecttype"]


def partition_gap(
    show_partition: str,
    nodes_of: Mapping[str, Iterable[str]],
    wanted: Iterable[Mapping[str, Any]],
    site: Iterable[str],
    ai_qos: str,
) -> list[str]:
    """The partition lines that slurm.conf lacks, as they must read; empty for none.

    ``show_partition`` is the output of ``scontrol --oneliner show partition``, ``nodes_of`` the node names of each
    partition, ``wanted`` has ``name`` and ``qos`` (a list) of each partition that is needed, ``site`` the nodes of
    the inventory. Of a partition that exists only what must change is named: ``AllowQos`` where it admits others, and
    ``Nodes`` where a tier's job (``ai_qos``) could start on nodes that nothing was installed on. Raises ValueError when
    a line of ``show_partition`` is no partition.
    """
    live: dict[str, dict[str, str]] = {}
    for line in filter(None, map(str.strip, show_partition.splitlines())):
        if line.startswith("No partitions"):
            continue
        fields = dict(word.partition("=")[::2] for word in line.split())
        if "PartitionName" not in fields:
            raise ValueError(f"this is not the output of `scontrol --oneliner show partition`: {line!r}")
        live[fields["PartitionName"]] = fields
    ours = list(site)
    lines: list[str] = []
    for partition in wanted:
        name, qos = str(partition["name"]), [str(one) for one in partition["qos"]]
        allowed = f"AllowQos={','.join(qos)}"
        if name not in live:
            lines.append(f"PartitionName={name} Nodes={','.join(ours)} {allowed} MaxTime=INFINITE State=UP")
            continue
        changes = []
        if ai_qos in qos and set(nodes_of.get(name, ())) - set(ours):
            changes.append(f"Nodes={','.join(ours)}")
        if set(_options(live[name].get("AllowQos", "ALL"))) != set(qos):
            changes.append(allowed)
        if changes:
            lines.append(f"PartitionName={name} {' '.join(changes)}")
    return lines


def nodes(text: str) -> list[str]:
    """The nodes that a slurm.conf defines, in its order; those of files that it includes are not seen."""
    whole = re.sub(r"\\\n", " ", text)
    names = re.findall(r"^[ \t]*NodeName[ \t]*=[ \t]*(\S+)", whole, flags=re.MULTILINE | re.IGNORECASE)
    return [host for name in names if name.upper() != "DEFAULT" for host in slurm.hosts(name)]


def with_lines(text: str, lines: Iterable[str], live_partitions: Iterable[str] = ()) -> str:
    """The text of a slurm.conf in which these lines hold; all others stay as they are.

    A line replaces those of its key; the options of a partition's line replace the same options of its partition. A
    new key stands before the first node, a new partition at the end. Raises ValueError for a partition that Slurm
    knows (``live_partitions``) but this file does not: it is defined in a file that this one includes.
    """
    rows = text.splitlines()
    known = [name.lower() for name in live_partitions]
    for line in lines:
        key, _, value = line.partition("=")
        if key != "PartitionName":
            mine = re.compile(rf"\s*{re.escape(key)}\s*=", re.IGNORECASE)
            at = next((number for number, row in enumerate(rows) if mine.match(row)), None)
            rows = [row for number, row in enumerate(rows) if number == at or not mine.match(row)]
            if at is None:
                first = re.compile(r"\s*(NodeName|NodeSet|PartitionName|DownNodes|Include)\b", re.IGNORECASE)
                at = next((number for number, row in enumerate(rows) if first.match(row)), len(rows))
                rows.insert(at, line)
            rows[at] = line
            continue
        name, *options = value.split()
        mine = re.compile(rf"\s*PartitionName\s*=\s*{re.escape(name)}(\s|$)", re.IGNORECASE)
        start = next((number for number, row in enumerate(rows) if mine.match(row)), None)
        if start is None:
            if name.lower() in known:
                raise ValueError(
                    f"partition {name} is not defined in this file but in one that it includes; wanted there: {line}"
                )
            rows.append(line)
            continue
        end = start
        while rows[end].endswith("\\") and end + 1 < len(rows):
            end += 1
        whole = " ".join(row.rstrip("\\").strip() for row in rows[start : end + 1])
        for option in options:
            found = re.compile(rf"(?<=\s){re.escape(option.partition('=')[0])}=\S+", re.IGNORECASE)
            # Nothing in a value of slurm.conf is a group of a pattern, but it may hold backslashes.
            escaped = option.replace("\\", r"\\")
            whole = found.sub(escaped, whole) if found.search(whole) else f"{whole} {option}"
        rows[start : end + 1] = [whole]
    return "\n".join(rows) + "\n"


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
