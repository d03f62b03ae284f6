"""What this service needs of slurm.conf, for the version that is installed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from gleaner.site import Problem
from gleaner.slurm import gpus_in, hosts

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
        elif key == "PreemptMode":
            # The QoS of the tiers has a mode of its own: whichever the site chose for the others stays.
            kept = [option for option in _options(live.get(key, "")) if option.lower() != "off"]
            if all(option.lower() in ("gang", "within") for option in kept):
                lines.append(f"{key}={','.join([*kept, wanted])}")
        else:
            lines += _lacking(live, key, wanted, f"{key}={wanted}")
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


def by_hand(lines: Iterable[str], show_config: str) -> list[str]:
    """Those of these lines of slurm.conf that nobody is to write unasked, each with the reason.

    slurm.conf(5) says of SelectType that slurmctld loses its jobs, as each plugin has a format of its own for saved
    jobs, and excepts only the way from cons_res to cons_tres. 24.11.5 kept them when tried, which nothing promises.
    Where memory becomes a consumable without a default, each job that names none is given its nodes whole. By the
    other keys that ``policy_gap`` and ``partition_gap`` name, jobs wait at worst.
    """
    live = parse_show_config(show_config)
    defaults = [live.get(key, "") for key in ("DefMemPerCPU", "DefMemPerNode")]
    bounded = any(value.isdigit() and int(value) > 0 for value in defaults)
    found = []
    for line in lines:
        key = line.partition("=")[0].lower()
        if key == "selecttype":
            found.append(f"{line}: in a drained cluster, as all jobs are lost, running and pending, says slurm.conf(5)")
        if key == "selecttypeparameters" and not bounded:
            found.append(
                f"{line}: with DefMemPerCPU or DefMemPerNode beside it, which is not set, as each job without --mem "
                "would get all memory of its nodes, and others wait for it"
            )
    return found


def _entries(text: str, key: str, what: str) -> list[dict[str, str]]:
    """The lines of a ``scontrol --oneliner show`` as their words by key, the first of each.

    Raises ValueError for a line without ``key``.
    """
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if re.match(rf"No {what}s? in the system", line, re.IGNORECASE):
            continue
        fields: dict[str, str] = {}
        for word in line.split():
            name, _, value = word.partition("=")
            # Later words may belong to a remark that somebody left.
            fields.setdefault(name, "" if value in ("(null)", "N/A") else value)
        if key not in fields:
            raise ValueError(f"this is not the output of `scontrol --oneliner show {what}`: {line!r}")
        found.append(fields)
    return found


def _partitions(show_partition: str) -> dict[str, dict[str, str]]:
    return {entry["PartitionName"]: entry for entry in _entries(show_partition, "PartitionName", "partition")}


def _widened(live: Mapping[str, str], option: str, wanted: Iterable[str]) -> list[str]:
    """The option of a partition with what it lacks; empty where it admits all of that, as one that names none does."""
    have = _options(live.get(option, "")) or ["ALL"]
    known = [one.lower() for one in have]
    lacking = [one for one in wanted if one.lower() not in known]
    return [] if "all" in known or not lacking else [f"{option}={','.join([*have, *lacking])}"]


def partition_gap(
    show_partition: str, wanted: Iterable[Mapping[str, Any]], site: Iterable[str], groups: Iterable[str] = ()
) -> list[str]:
    """The partition lines that slurm.conf lacks, as they must read; empty for none.

    ``show_partition`` is the output of ``scontrol --oneliner show partition``, ``site`` the nodes of the inventory.
    ``wanted`` has ``name`` and ``qos`` (a list) of each partition that is needed, and may have the ``account`` and the
    ``user`` of its jobs. ``groups`` are that user's, the primary one first; without any, its group will be named like
    it. One of them is enough. A partition that exists is others', too: its lists only gain what they lack, and one
    that admits everybody stays as it is. Raises ValueError when a line of ``show_partition`` is no partition.
    """
    live = _partitions(show_partition)
    groups = list(groups)
    lines: list[str] = []
    for partition in wanted:
        name, qos = str(partition["name"]), [str(one) for one in partition["qos"]]
        if name not in live:
            new = f"Nodes={','.join(site)} AllowQos={','.join(qos)} MaxTime=INFINITE State=UP"
            lines.append(f"PartitionName={name} {new}")
            continue
        changes = _widened(live[name], "AllowQos", qos)
        if partition.get("account"):
            changes += _widened(live[name], "AllowAccounts", [str(partition["account"])])
        if partition.get("user"):
            primary, *more = groups or [str(partition["user"])]
            admitted = set(_options(live[name].get("AllowGroups", "")))
            changes += [] if admitted.intersection(more) else _widened(live[name], "AllowGroups", [primary])
        if changes:
            lines.append(f"PartitionName={name} {' '.join(changes)}")
    return lines


def nodes(text: str) -> list[str]:
    """The nodes that a slurm.conf defines, in its order; those of files that it includes are not seen."""
    whole = re.sub(r"\\\n", " ", text)
    names = re.findall(r"^[ \t]*NodeName[ \t]*=[ \t]*(\S+)", whole, flags=re.MULTILINE | re.IGNORECASE)
    return [host for name in names if name.upper() != "DEFAULT" for host in hosts(name)]


def _node_problems(
    name: str, node: Mapping[str, str], partition: str | None, plan: Mapping[str, Any]
) -> Iterable[Problem]:
    """What of a plan's job this node of Slurm cannot bear; ``partition`` is None where it is not there yet."""
    tier, slurm = plan["tier"], plan["slurm"]
    if partition is not None and partition not in _options(node.get("Partitions", "")):
        yield Problem(
            "slurm_ai_partition",
            f"{partition}, which lacks {name}",
            f"a partition with every node that the tier {tier} may use",
            f"add {name} to the Nodes of partition {partition}, take it out of the tier, or name another partition "
            "(one that is not there yet is made)",
        )
    gpus = gpus_in(node.get("Gres", ""))
    if gpus < slurm["gpus_per_node"]:
        yield Problem(
            f"gpus of {name}",
            f"{slurm['gpus_per_node']} for the tier {tier}, where Slurm knows {gpus} (Gres={node.get('Gres', '')})",
            "GPUs that Slurm hands out",
            f"GresTypes=gpu and Gres=gpu:{slurm['gpus_per_node']} at NodeName={name} in slurm.conf, the devices in "
            "gres.conf, then restart slurmctld and the slurmd of that node; or correct gpus",
        )
    # What the system keeps for itself is not handed out; not every version tells.
    cpus = int(node.get("CPUEfctv") or node.get("CPUTot") or 0)
    if cpus < slurm["cpus_per_node"]:
        yield Problem(
            f"cpus of {name}",
            f"{slurm['cpus_per_node']} for the tier {tier}, where Slurm hands out {cpus}",
            f"at most {cpus}",
            f"correct cpus, or the CPUs at NodeName={name} in slurm.conf",
        )
    memory = int(node.get("RealMemory") or 0) - int(node.get("MemSpecLimit") or 0)
    if memory < slurm["mem_mib"]:
        yield Problem(
            f"memory_mib of {name}",
            f"{slurm['mem_mib']} MiB for the tier {tier}, where Slurm hands out {memory}",
            f"at most {memory} MiB",
            f"correct RealMemory at NodeName={name} in slurm.conf (slurmd -C prints it), or memory_mib",
        )


def _denials(wanted: Mapping[str, Any], live: Mapping[str, str]) -> Iterable[Problem]:
    """What of a partition's jobs it refuses by name; ``live`` is empty where it is not there yet."""
    account = [str(wanted["account"])] if wanted.get("account") else []
    for option, what, names in (("DenyQos", "QoS", list(wanted["qos"])), ("DenyAccounts", "account", account)):
        denied = _options(live.get(option, ""))
        for name in names:
            if name.lower() in map(str.lower, denied):
                yield Problem(
                    f"{what} of partition {wanted['name']}",
                    name,
                    f"{'a QoS' if what == 'QoS' else 'an account'} that its {option} does not name "
                    f"({', '.join(denied)})",
                    f"take it out there, or name another partition or {what}",
                )


def _preemption_problems(config: Mapping[str, str], ai_qos: str) -> Iterable[Problem]:
    """What the site has decided of its own preemption, by which ours cannot be."""
    plugin = config.get("PreemptType", "")
    if plugin.lower() not in ("", "none", "preempt/none", "preempt/qos"):
        yield Problem(
            "PreemptType",
            plugin,
            "preempt/qos, or none yet: with another one here the site's own preemption would end",
            "whoever manages Slurm moves it to QoS first (sacctmgr modify qos NAME set Preempt=OTHERS), then sets "
            "PreemptType=preempt/qos in slurm.conf and restarts slurmctld",
        )
    exempt = config.get("PreemptExemptTime", "")
    if exempt.lower() not in ("", "none", "-1", "0", "00:00:00"):
        yield Problem(
            "PreemptExemptTime",
            exempt,
            f"00:00:00, as QoS {ai_qos} would inherit it, and paying jobs wait so long for a tier that has just begun",
            "whoever manages Slurm gives it to the QoS that are to have it (sacctmgr modify qos NAME set "
            "PreemptExemptTime=TIME), then takes it out of slurm.conf and restarts slurmctld",
        )


def cluster_problems(
    show_config: str,
    show_partition: str,
    show_node: str,
    wanted: Mapping[str, Any],
    plans: Iterable[Mapping[str, Any]],
) -> list[Problem]:
    """What contradicts the inventory in a Slurm that others manage, and is theirs to decide; empty for nothing.

    The first three are the outputs of ``scontrol show config``, ``scontrol --oneliner show partition`` and
    ``scontrol --oneliner show node``. ``wanted`` has ``cluster`` (the name), ``partitions`` (as for ``partition_gap``),
    ``ai_qos`` and ``nodes`` (all of the inventory); ``plans`` are those of the tiers. A node that Slurm does not know
    comes first and alone, since Slurm refuses each job that names it, if only to exclude it. Raises ValueError when a
    text is not the output of its command.
    """
    problems: list[Problem] = []
    config = parse_show_config(show_config)
    cluster = config.get("ClusterName", "")
    if cluster.lower() != str(wanted["cluster"]).lower():
        problems.append(
            Problem(
                "cluster_name",
                str(wanted["cluster"]),
                f"{cluster}, which is the ClusterName of the Slurm that is there",
                "correct cluster_name; another one would be a second cluster in its accounting",
            )
        )
    # Whoever has no association could submit nothing from then on.
    if config.get("AccountingStorageEnforce", "associations").lower() in ("", "0", "none"):
        problems.append(
            Problem(
                "AccountingStorageEnforce",
                "none",
                "associations at least, as QoS and accounts bind nobody without",
                "see that each user of this Slurm has an association (sacctmgr show assoc), then set "
                "AccountingStorageEnforce=associations,qos in slurm.conf and restart slurmctld",
            )
        )
    problems += _preemption_problems(config, str(wanted["ai_qos"]))
    live = {entry["NodeName"]: entry for entry in _entries(show_node, "NodeName", "node")}
    unknown = [name for name in wanted["nodes"] if name not in live]
    if unknown:
        problems.append(
            Problem(
                "groups['slurm_nodes']",
                ", ".join(unknown),
                f"nodes that Slurm knows ({', '.join(sorted(live)) or 'none'})",
                "add their NodeName lines to slurm.conf and restart slurmctld, or take them out of the inventory",
            )
        )
        return problems
    partitions = _partitions(show_partition)
    for partition in wanted["partitions"]:
        problems += _denials(partition, partitions.get(partition["name"], {}))
    ours = next((one["name"] for one in wanted["partitions"] if wanted["ai_qos"] in one["qos"]), None)
    there = ours if ours in partitions else None
    foreign = [
        name
        for name, node in live.items()
        if there in _options(node.get("Partitions", "")) and name not in wanted["nodes"]
    ]
    for plan in plans:
        slurm = plan["slurm"]
        for name in slurm["nodes"]:
            problems += _node_problems(name, live[name], there, plan)
        # Where its job does not name all its nodes, Slurm may start it on any that it does not exclude.
        if foreign and len(slurm["nodes"]) != slurm["node_count"]:
            problems.append(
                Problem(
                    "slurm_ai_partition",
                    f"{there}, which holds {', '.join(sorted(foreign))}",
                    f"a partition of nodes of the inventory: the tier {plan['tier']} could start on others, where "
                    "nothing was installed",
                    "name another partition (one that is not there yet is made), or add these nodes to the inventory",
                )
            )
    return problems


def waiting_qos(show_qos: str, ai_qos: str, paying: Iterable[str]) -> list[str]:
    """QoS whose jobs do not take the GPUs back and so wait for a tier, sorted.

    ``show_qos`` is the output of ``sacctmgr -nP show qos format=Name,Preempt``; those of ``paying`` preempt ``ai_qos``
    as soon as the policy holds.
    """
    spared = {one.lower() for one in (*paying, ai_qos)}
    rows = (line.partition("|")[::2] for line in show_qos.splitlines() if line.strip())
    return sorted(name for name, preempts in rows if name not in spared and ai_qos.lower() not in _options(preempts))


_ABOVE_NODES = re.compile(r"\s*(NodeName|NodeSet|PartitionName|DownNodes|Include)\b", re.IGNORECASE)


def included(text: str, path: str) -> list[str]:
    """The files that a slurm.conf at ``path`` includes, as absolute paths; those of its own folder by their names."""
    found = re.findall(r"^[ \t]*include[ \t]+(\S+)", text, re.IGNORECASE | re.MULTILINE)
    return [str(PurePosixPath(path).parent / name) for name in found]


# Comments are cut off before slurmctld looks for a backslash at the end.
_REMARK = re.compile(r"(?<!\\)#.*")
_BREAK = r"\\[ \t\r]*\n"
_ASSIGNMENT = re.compile(rf'(\w+)(?:[ \t]|{_BREAK})*[-+*/]?=(?:[ \t]|{_BREAK})*("[^"\n]*"|(?:{_BREAK}|\S)+)')


def _end(rows: list[str], start: int) -> int:
    """The row at which the line of this row ends, which goes on behind a backslash."""
    end = start
    while _REMARK.sub("", rows[end]).rstrip().endswith("\\") and end + 1 < len(rows):
        end += 1
    return end


def _starts(rows: list[str]) -> list[int]:
    """The rows at which lines begin."""
    found, number = [], 0
    while number < len(rows):
        found.append(number)
        number = _end(rows, number) + 1
    return found


def _assignments(text: str, key: str) -> list[re.Match[str]]:
    """Where a line, of one or more rows, sets this key of the whole cluster."""
    # Of the same length, so that places hold.
    code = _REMARK.sub(lambda remark: " " * len(remark.group()), text)
    if _ABOVE_NODES.match(code):
        return []
    return [found for found in _ASSIGNMENT.finditer(code) if found.group(1).lower() == key.lower()]


def _with_key(rows: list[str], line: str) -> bool:
    """Have the last line of its key read so, and no other line set it, in place; False when there is none."""
    held = False
    for start in reversed(_starts(rows)):
        end = _end(rows, start) + 1
        text = "\n".join(rows[start:end])
        for found in reversed(_assignments(text, line.partition("=")[0])):
            # slurmctld takes the last of several.
            text = text[: found.start()] + ("" if held else line) + text[found.end() :]
            rest = _REMARK.sub("", text)
            rows[start:end] = text.split("\n") if rest.strip(" \t\r\n\\") else []
            end = start + len(text.split("\n"))
            held = True
    return held


def _with_partition(rows: list[str], name: str, options: Iterable[str]) -> bool:
    """Have the partition's line hold these options, in place; False when there is none."""
    mine = re.compile(rf"\s*PartitionName\s*=\s*{re.escape(name)}(\s|$)", re.IGNORECASE)
    start = next((number for number in _starts(rows) if mine.match(rows[number])), None)
    if start is None:
        return False
    end = _end(rows, start)
    for option in options:
        found = re.compile(rf"(?<=\s){re.escape(option.partition('=')[0])}\s*=\s*[^\s\\#]+", re.IGNORECASE)
        for number in range(start, end + 1):
            code, mark, remark = rows[number].partition("#")
            if found.search(f" {code}"):
                # Nothing in a value of slurm.conf is a group of a pattern, but it may hold backslashes.
                escaped = option.replace("\\", r"\\")
                rows[number] = found.sub(escaped, f" {code}")[1:] + mark + remark
                break
        else:
            code, mark, remark = rows[end].partition("#")
            rows[end] = f"{code.rstrip()} {option}{' ' if mark else ''}{mark}{remark}"
    return True


def with_lines(files: Mapping[str, str], lines: Iterable[str], live_partitions: Iterable[str] = ()) -> dict[str, str]:
    """The texts of a slurm.conf and of the files that it includes, by path, in which these lines hold.

    slurm.conf itself comes first; all other lines stay as they are. A line replaces those of its key, and the options
    of a partition's line replace the same options of its partition, in the file that has it. A new key stands before
    the first node or Include of slurm.conf, a new partition at its end. Raises ValueError for a partition that Slurm
    knows (``live_partitions``) and no file does.
    """
    texts = {path: text.split("\n") for path, text in files.items()}
    main = texts[next(iter(texts))]
    if main[-1]:
        main.append("")
    known = [name.lower() for name in live_partitions]
    for line in lines:
        key, _, value = line.partition("=")
        if key != "PartitionName":
            held = [_with_key(rows, line) for rows in texts.values()]
            if not any(held):
                first = (number for number in _starts(main) if _ABOVE_NODES.match(main[number]))
                main.insert(next(first, len(main) - 1), line)
            continue
        name, *options = value.split()
        if any(_with_partition(rows, name, options) for rows in texts.values()):
            continue
        if name.lower() in known:
            raise ValueError(f"partition {name} is defined in none of {', '.join(texts)}; wanted where it is: {line}")
        main.insert(len(main) - 1, line)
    return {path: "\n".join(rows) for path, rows in texts.items()}


def accounting_policy(
    ai: Mapping[str, Any], paying: Mapping[str, Any], grace_seconds: int, managed: bool = True
) -> dict[str, list[dict[str, Any]]]:
    """QoS, accounts and users by which paying jobs take the GPUs back.

    ``ai`` has ``qos``, ``account`` and ``user``; ``paying`` has ``qos`` (a list, the first is the default of the
    account), ``account`` and ``users``. QoS priority alone preempts nothing: each paying QoS names whom it preempts,
    and is the default of its account, because Slurm looks at the job's QoS and users forget ``--qos``.

    In an accounting that others manage (not ``managed``) whatever is there already only gains what it lacks, but for
    the QoS of the tiers; that one has no priority, as theirs may have none either.
    """
    widen = {} if managed else {"widen": True}
    first = {"priority": 100} if managed else {}
    return {
        "qos": [
            {"name": ai["qos"], **first, "grace_time_seconds": grace_seconds, "preempt_mode": "requeue"},
            *({"name": qos, "priority": 1000, "preempt": [ai["qos"]], **widen} for qos in paying["qos"]),
        ],
        "accounts": [
            {"name": ai["account"], "qos": [ai["qos"]], "default_qos": ai["qos"], **widen},
            {"name": paying["account"], "qos": list(paying["qos"]), "default_qos": paying["qos"][0], **widen},
        ],
        "users": [
            {"name": user, "accounts": [account], "default_account": account, **widen}
            for account, users in ((ai["account"], [ai["user"]]), (paying["account"], paying["users"]))
            for user in users
        ],
    }
