"""The GPUs of a node: what the inventory declares, and what `nvidia-smi` finds (`gleaner gpus`).

The inventory's word goes into plans, so that a GPU with less memory, or beside another NUMA node, must be told before a
job is spent on it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EXIT_FAILED = 1
EXIT_REFUSED = 2

# Compute capability of the GPUs that inventories name; others are a doubt, not an error.
CUDA_ARCHITECTURES = {
    "v100": 70,
    "v100s": 70,
    "t4": 75,
    "rtx6000": 75,
    "a100": 80,
    "a40": 86,
    "l40": 89,
    "l40s": 89,
    "h100": 90,
    "h200": 90,
}

# Without a daemon that keeps it loaded, the driver is loaded anew for each question.
ASK_SECONDS = 60.0
# A process that was killed a moment ago has the memory of its GPU until the driver has cleaned up.
LINGER_SECONDS = 5.0
AGAIN_SECONDS = 1.0
VOLTA = 70
# Branch 580 is the last that serves Volta; CUDA 12 runs from 525.60 on (NVIDIA, CUDA Compatibility, minor versions).
LAST_VOLTA_BRANCH = 580
FIRST_CUDA_12_BRANCH = 525
_FIELDS = (
    "index",
    "name",
    "memory.total",
    "pci.bus_id",
    "driver_version",
    "compute_cap",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
)


class GpuError(Exception):
    """`nvidia-smi` cannot be asked; the text says why and what cures it."""


@dataclass(frozen=True)
class Declared:
    """One entry of the host variable `gpus`."""

    model: str
    memory_mib: int
    numa_node: int
    memory_used_mib: int = 0
    """What others hold of it, with the site's consent."""


@dataclass(frozen=True)
class Found:
    """A GPU as `nvidia-smi` lists it."""

    index: int
    name: str
    memory_mib: int
    pci_bus_id: str
    """As sysfs spells it, for example ``0000:3b:00.0``."""
    driver: str
    compute_capability: int
    """70 for SM70; 0 when the driver does not say."""
    uncorrected_errors: int
    pages_pending: bool
    """Pages of its memory are to be retired, which takes a reset."""


@dataclass(frozen=True)
class Process:
    """A process that has a context on a GPU."""

    pci_bus_id: str
    pid: int
    name: str


def ask(smi: str, query: str, fields: Sequence[str]) -> list[list[str]]:
    """Rows of an `nvidia-smi` query."""
    argv = [smi, f"--query-{query}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=ASK_SECONDS,
            check=False, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except FileNotFoundError:
        cure = f"install the NVIDIA driver, branch {LAST_VOLTA_BRANCH} or older for Volta"
        raise GpuError(f"{smi} is not there: {cure}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GpuError(f"{smi} does not answer ({error}): look at `dmesg` for Xid messages of the driver") from None
    if "No devices were found" in done.stdout + done.stderr:
        return []
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or [""]
        raise GpuError(f"{smi} ended with {done.returncode}: {said[0]}")
    # The last field may hold the separator: a name of a process.
    rows = [
        [cell.strip() for cell in line.split(",", len(fields) - 1)] for line in done.stdout.splitlines() if line.strip()
    ]
    for row in rows:
        if len(row) != len(fields):
            raise GpuError(f"{smi}: cannot read the line {', '.join(row)!r}: want {', '.join(fields)}")
    return rows


def found(smi: str) -> list[Found]:
    """The GPUs that the driver of this host serves. GpuError also when one of them is in no state to be used."""
    try:
        rows = ask(smi, "gpu", _FIELDS)
    except GpuError as error:
        # An old driver does not know every field.
        if "not a valid field" not in str(error):
            raise
        old = [row[0] for row in ask(smi, "gpu", ("driver_version",)) if _number(row[0]) < FIRST_CUDA_12_BRANCH]
        if not old:
            raise
        raise GpuError(_too_old(os.uname().nodename, old[0])) from None
    return [
        Found(
            index=_number(index),
            name=name,
            memory_mib=_number(memory),
            pci_bus_id=_bus_id(bus_id),
            driver=driver,
            compute_capability=_number(capability.replace(".", "")),
            uncorrected_errors=_number(errors),
            pages_pending=_answer(pending).lower() == "yes",
        )
        for index, name, memory, bus_id, driver, capability, errors, pending in rows
    ]


def processes(smi: str) -> list[Process]:
    rows = ask(smi, "compute-apps", ("gpu_bus_id", "pid", "process_name"))
    return [Process(_bus_id(bus_id), int(pid), name) for bus_id, pid, name in rows if pid.isdigit()]


def _answer(text: str) -> str:
    """A cell, empty for what the GPU does not count. GpuError for ``[GPU requires reset]`` and the like."""
    if text.strip("[]") in ("N/A", "Not Supported", "Disabled", ""):
        return ""
    if text.startswith("["):
        raise GpuError(
            f"{os.uname().nodename}: a GPU answers {text}: drain the node, `nvidia-smi -r`, and reboot it if that fails"
        )
    return text


def _number(text: str) -> int:
    """0 for what the GPU does not count."""
    match = re.match(r"\d+", _answer(text))
    return int(match[0]) if match else 0


def _bus_id(text: str) -> str:
    """nvidia-smi writes the PCI domain with eight digits, sysfs with four."""
    return text.lower()[-len("0000:00:00.0") :]


def numa_node(sysfs: Path, bus_id: str) -> int | None:
    """The NUMA node beside which the device sits; None when the machine does not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / bus_id / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    # A machine without NUMA says -1.
    return node if node >= 0 else None


# Declared and found


def line_of(gpus: Sequence[Declared]) -> str:
    """The inventory line that declares these GPUs."""
    entries = []
    for gpu in gpus:
        used = f", memory_used_mib: {gpu.memory_used_mib}" if gpu.memory_used_mib else ""
        entries.append(f"{{model: {gpu.model}, memory_mib: {gpu.memory_mib}, numa_node: {gpu.numa_node}{used}}}")
    return f"gpus: [{', '.join(entries)}]"


def model_of(name: str) -> str:
    """What an inventory calls the GPU of which the driver says, for example, ``Tesla V100S-PCIE-32GB``.

    Empty for one that the planner does not know.
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    # The Quadro of 2018 is meant, not its successors of the same number.
    if "ada" not in words and "blackwell" not in words:
        words += [first + second for first, second in zip(words, words[1:])]
    return next((model for model in CUDA_ARCHITECTURES if model in words), "")


def mismatches(
    node: str, declared: Sequence[Declared], there: Sequence[Found], numa: Mapping[str, int | None]
) -> list[str]:
    """Where the inventory does not say what the node has; each with the line to write instead."""
    if not there:
        return [
            f"hostvars[{node}].gpus: got {len(declared)} GPU(s), the driver on {node} has none: "
            "look at `dmesg` and the power cables, or declare gpus: []"
        ]
    real = []
    for gpu, want in itertools.zip_longest(there, declared[: len(there)]):
        place = numa.get(gpu.pci_bus_id)
        if place is None:
            # A machine that does not tell is believed what is declared.
            place = want.numa_node if want else 0
        model, used = (want.model, want.memory_used_mib) if want else ("MODEL", 0)
        if model_of(gpu.name) and (want is None or want.model in CUDA_ARCHITECTURES):
            # What the planner does not know by name, it cannot mistake for another.
            model = model_of(gpu.name)
        real.append(Declared(model, gpu.memory_mib, place, used))
    wrong = [] if len(there) == len(declared) else [f"{len(declared)} GPU(s), {node} has {len(there)}"]
    for index, (want, have) in enumerate(zip(declared, real)):
        where = f"gpus[{index}] ({there[index].pci_bus_id})"
        if want.model != have.model:
            wrong.append(f"{where}: model {want.model}, {node} has {there[index].name}")
        if want.memory_mib != have.memory_mib:
            wrong.append(f"{where}: memory_mib {want.memory_mib}, {node} has {have.memory_mib}")
        if want.numa_node != have.numa_node:
            wrong.append(f"{where}: numa_node {want.numa_node}, on {node} it sits beside {have.numa_node}")
    return [f"hostvars[{node}].gpus: got {text}: write {line_of(real)}" for text in wrong]


def faults(node: str, there: Sequence[Found]) -> list[str]:
    """GPUs on which no answer can be trusted."""
    problems = []
    for gpu in there:
        where, cure = f"GPU {gpu.index} ({gpu.pci_bus_id}) of {node}", f"drain the node, `nvidia-smi -r -i {gpu.index}`"
        if gpu.uncorrected_errors:
            count = f"{gpu.uncorrected_errors} uncorrected ECC error(s) since the driver was loaded"
            problems.append(f"{where}: {count}: {cure}, and replace a card that has them again")
        if gpu.pages_pending:
            problems.append(f"{where}: pages of its memory wait to be retired: {cure}")
    return problems


def driver_problems(node: str, there: Sequence[Found], kernel_module: str) -> list[str]:
    """Whether the driver serves what is there. It is looked at, never changed.

    `kernel_module` is the text of `/proc/driver/nvidia/version`, empty when no module is loaded.
    """
    if "Open Kernel Module" in kernel_module and (not there or any(gpu.compute_capability <= VOLTA for gpu in there)):
        return [
            f"driver of {node}: the open kernel module is loaded, which serves no Volta: "
            f"install the proprietary flavour of branch {LAST_VOLTA_BRANCH} or older"
        ]
    problems = []
    for version in sorted({gpu.driver for gpu in there}):
        branch = _number(version)
        volta = any(0 < gpu.compute_capability <= VOLTA for gpu in there if gpu.driver == version)
        if volta and branch > LAST_VOLTA_BRANCH:
            problems.append(
                f"driver of {node}: got {version}, want branch {LAST_VOLTA_BRANCH} or older: "
                "later ones do not serve Volta"
            )
        elif branch < FIRST_CUDA_12_BRANCH:
            problems.append(_too_old(node, version))
    return problems


def _too_old(node: str, version: str) -> str:
    return (
        f"driver of {node}: got {version}, want branch {FIRST_CUDA_12_BRANCH} or later: older ones do not run CUDA 12"
    )


def foreign(node: str, there: Sequence[Process]) -> list[str]:
    """What is wrong with processes on GPUs that belong to no job: they take memory that plans count on."""
    return [
        f"GPU {process.pci_bus_id} of {node} is held by pid {process.pid} ({process.name}), which is no job of Slurm: "
        "end it, or have its owner run it as a job"
        for process in there
    ]


def job_processes() -> set[int] | None:
    """Every process on this node that belongs to a job; None when slurmd cannot be asked."""
    try:
        done = subprocess.run(["scontrol", "listpids"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    if not lines or lines[0].split()[:1] != ["PID"]:
        # A node without a job says so on stderr.
        return set() if "No job steps" in done.stderr else None
    return {int(line.split()[0]) for line in lines[1:] if line.split()[0].isdigit()}


# At the start of a tier


def allotted(there: Sequence[Found], environment: Mapping[str, str]) -> list[Found]:
    """Those of the GPUs that Slurm gave this job; all, where cgroups hide the others."""
    given = environment.get("CUDA_VISIBLE_DEVICES", "")
    numbers = {int(word) for word in given.split(",") if word.isdigit()}
    ours = [gpu for gpu in there if gpu.index in numbers]
    return ours if len(ours) < len(there) and ours else list(there)


def wait_until_usable(smi: str, node: str, environment: Mapping[str, str], count: int, shared: bool) -> None:
    """GpuError unless the GPUs of this job are there and sound, and nobody's if they are not `shared`."""
    ours = allotted(found(smi), environment)
    if len(ours) < count:
        cure = "look at `nvidia-smi` and `dmesg` there"
        raise GpuError(f"{node}: got {len(ours)} GPU(s) that answer, want {count}: {cure}")
    if problems := faults(node, ours):
        raise GpuError("; ".join(problems))
    places = {gpu.pci_bus_id for gpu in ours}
    deadline = time.monotonic() + LINGER_SECONDS
    while not shared and (
        held := foreign(node, [process for process in processes(smi) if process.pci_bus_id in places])
    ):
        if time.monotonic() >= deadline:
            raise GpuError("; ".join(held))
        time.sleep(0.2)


# Commands


def check(node: str, declared: Sequence[Declared], smi: str, sysfs: Path, module: Path) -> list[str]:
    """Everything that is wrong with the GPUs of this node."""
    there = found(smi)
    try:
        kernel_module = module.read_text(errors="replace")
    except OSError:
        kernel_module = ""
    if problems := driver_problems(node, there, kernel_module):
        return problems
    numa = {gpu.pci_bus_id: numa_node(sysfs, gpu.pci_bus_id) for gpu in there}
    problems = [*mismatches(node, declared, there, numa), *faults(node, there)]
    if any(gpu.memory_used_mib for gpu in declared):
        print(f"{node}: others may use its GPUs (memory_used_mib): their processes are not looked at")
        return problems
    return [*problems, *strangers(node, smi)]


def strangers(node: str, smi: str) -> list[str]:
    """Processes on GPUs that are no job's, seen twice: one may begin or end while it is looked for."""
    there = _of_no_job(node, smi)
    if there:
        time.sleep(AGAIN_SECONDS)
        before = {process.pid for process in there}
        there = [process for process in _of_no_job(node, smi) if process.pid in before]
    return foreign(node, there)


def _of_no_job(node: str, smi: str) -> list[Process]:
    """What is on the GPUs and no job's; nothing, and a word about it, where Slurm cannot be asked."""
    there = processes(smi)
    # Asked afterwards, so that a job that began meanwhile is known.
    known = job_processes() if there else set()
    if known is None:
        print(f"{node}: Slurm cannot be asked whose processes are on its GPUs: `scontrol listpids`")
        return []
    return [process for process in there if process.pid not in known]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    summary = f"compare this node's GPUs with what the inventory declares; exit code {EXIT_FAILED} when they differ"
    action = actions.add_parser("check", help=summary, description=summary)
    action.add_argument("declared", metavar="JSON", help="the host variable gpus")
    action.add_argument("--node", default=os.uname().nodename, help="name of this host in the inventory")
    action.add_argument("--smi", default="nvidia-smi", help="program to ask")
    action.add_argument("--sysfs", type=Path, default=Path("/sys"), help="where PCI devices tell their NUMA node")
    action.add_argument("--module", type=Path, default=Path("/proc/driver/nvidia/version"), help="what is loaded")


def _declared(text: str) -> list[Declared]:
    try:
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise TypeError(type(entries).__name__)
        return [
            Declared(str(e["model"]), int(e["memory_mib"]), int(e["numa_node"]), int(e.get("memory_used_mib", 0)))
            for e in entries
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"gpus: got {text!r} ({error!r}), want a list of model, memory_mib and numa_node") from None


def run(args: argparse.Namespace) -> int:
    try:
        declared = _declared(args.declared)
        problems = check(args.node, declared, args.smi, args.sysfs, args.module)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except GpuError as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_FAILED if problems else 0
