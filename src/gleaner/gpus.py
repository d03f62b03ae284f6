"""The GPUs of a node: what the inventory declares, and what `nvidia-smi` finds (`gleaner gpus`).

The inventory's word goes into plans, so that a GPU with less memory, or beside another NUMA node, must be told before a
job is spent on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gleaner import slurm

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
VOLTA_DRIVER = f"the proprietary flavour of branch {LAST_VOLTA_BRANCH} or older"
# Debian renames the module; `nvidia` is a command for modprobe there, which modinfo does not follow.
_MODULES = ("nvidia", "nvidia-current", "nvidia-current-open", "nvidia-tesla", "nvidia-tesla-535")
_VERSION = re.compile(r"\b\d{3}\.\d+(?:\.\d+)?\b")
# An ordinary user has no sbin in PATH.
_SBIN = ":/usr/sbin:/sbin"
# As PCI numbers them: the vendor, display controllers, and TU102, with which the cards after Volta begin.
_NVIDIA, _DISPLAY, _FIRST_TURING = 0x10DE, 0x03, 0x1E00
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


class SmiError(GpuError):
    """`nvidia-smi` ran and failed: the text has its own words, which seldom name the reason."""


@dataclass(frozen=True)
class Declared:
    """One entry of the host variable `gpus`."""

    model: str
    memory_mib: int
    numa_node: int
    memory_used_mib: int = 0
    """What others hold of it, with the site's consent."""
    cores: str = ""
    device: str = ""
    """Of gres.conf; not compared."""


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


@dataclass(frozen=True)
class Card:
    """A GPU on the PCI bus, whether the driver serves it or not."""

    pci_bus_id: str
    volta: bool
    """Of Volta or before: no open kernel module and no branch after 580 serves it."""


@dataclass(frozen=True)
class Driver:
    """The kernel module of the driver: the one that is loaded, else the one that would be."""

    version: str
    open: bool
    loaded: bool

    def __str__(self) -> str:
        return f"{self.version}, {'open' if self.open else 'proprietary'}, {'' if self.loaded else 'not '}loaded"


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
        raise SmiError(f"{smi} ended with {done.returncode}: {said[0]}")
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
    except SmiError as error:
        # An old driver does not know every field.
        if "not a valid field" not in str(error):
            raise
        old = [row[0] for row in ask(smi, "gpu", ("driver_version",)) if _number(row[0]) < FIRST_CUDA_12_BRANCH]
        if not old:
            raise GpuError(str(error)) from None
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


def numa_nodes(sysfs: Path) -> set[int]:
    """The NUMA nodes that the machine has; empty when it does not say."""
    names = (path.name[len("node") :] for path in (sysfs / "devices/system/node").glob("node*"))
    return {int(name) for name in names if name.isdigit()}


def cards(sysfs: Path) -> list[Card] | None:
    """The cards of NVIDIA on the PCI bus; None when the machine does not tell what is on it."""
    seen, told = [], False
    for place in sorted((sysfs / "bus/pci/devices").glob("*")):
        try:
            vendor, device, kind = (int((place / name).read_text(), 16) for name in ("vendor", "device", "class"))
        except (OSError, ValueError):
            continue
        told = True
        if (vendor, kind >> 16) == (_NVIDIA, _DISPLAY):
            seen.append(Card(place.name, device < _FIRST_TURING))
    return seen if told else None


def driver(proc: Path) -> Driver | None:
    """The driver's kernel module; None when there is none for the kernel that runs."""
    try:
        text = (proc / "driver/nvidia/version").read_text(errors="replace")
    except OSError:
        text = ""
    if match := _VERSION.search(text):
        return Driver(match[0], "Open Kernel Module" in text, loaded=True)
    for name in _MODULES:
        if version := _modinfo("version", name):
            # NVIDIA's own licence is called "NVIDIA", that of the open flavour "Dual MIT/GPL".
            return Driver(version, "GPL" in _modinfo("license", name), loaded=False)
    return None


def _modinfo(field: str, module: str) -> str:
    """A field of a kernel module; empty when there is no such module."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath) + _SBIN}
    argv = ["modinfo", "-F", field, module]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()


# Declared and found


def line_of(gpus: Sequence[Declared]) -> str:
    """The inventory line that declares these GPUs."""
    entries = []
    for gpu in gpus:
        more = f", memory_used_mib: {gpu.memory_used_mib}" if gpu.memory_used_mib else ""
        more += f', cores: "{gpu.cores}"' if gpu.cores else ""
        more += f", device: {gpu.device}" if gpu.device else ""
        entries.append(f"{{model: {gpu.model}, memory_mib: {gpu.memory_mib}, numa_node: {gpu.numa_node}{more}}}")
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
    node: str,
    declared: Sequence[Declared],
    there: Sequence[Found],
    numa: Mapping[str, int | None],
    nodes: Collection[int],
) -> list[str]:
    """Where the inventory does not say what the node has; each with the line to write instead.

    `numa` says beside which NUMA node a card sits, by its place on the PCI bus; `nodes` which the machine has.
    """
    if not there:
        return [
            f"hostvars[{node}].gpus: got {len(declared)} GPU(s), the driver on {node} has none: "
            "look at `dmesg` and the power cables, or declare gpus: []"
        ]
    real = []
    for gpu, want in itertools.zip_longest(there, declared[: len(there)]):
        place = numa.get(gpu.pci_bus_id)
        if place is None:
            # A machine that does not tell is believed what is declared, unless it has no such NUMA node.
            place = want.numa_node if want else 0
            if nodes and place not in nodes:
                place = min(nodes)
        model = want.model if want else "MODEL"
        if model_of(gpu.name) and (want is None or want.model in CUDA_ARCHITECTURES):
            # What the planner does not know by name, it cannot mistake for another.
            model = model_of(gpu.name)
        kept = want or Declared(model, 0, 0)
        real.append(dataclasses.replace(kept, model=model, memory_mib=gpu.memory_mib, numa_node=place))
    wrong = [] if len(there) == len(declared) else [f"{len(declared)} GPU(s), {node} has {len(there)}"]
    for index, (want, have) in enumerate(zip(declared, real)):
        where = f"gpus[{index}] ({there[index].pci_bus_id})"
        if want.model != have.model:
            wrong.append(f"{where}: model {want.model}, {node} has {there[index].name}")
        if want.memory_mib != have.memory_mib:
            wrong.append(f"{where}: memory_mib {want.memory_mib}, {node} has {have.memory_mib}")
        if want.numa_node != have.numa_node:
            told = f"on {node} it sits beside {have.numa_node}"
            if numa.get(there[index].pci_bus_id) is None:
                told = f"{node} has {', '.join(f'node{number}' for number in sorted(nodes))}"
            wrong.append(f"{where}: numa_node {want.numa_node}, {told}")
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


def unserved(
    node: str,
    declared: Sequence[Declared],
    there: Sequence[Found],
    on_bus: Sequence[Card] | None,
    module: Driver | None,
    said: str,
) -> list[str]:
    """Why the driver serves less than is declared; empty when it answers, and its module explains nothing.

    A driver that does not serve a card tells the kernel's log only: `nvidia-smi` leaves the card out, or fails when
    there is no other. `said` are the words with which it failed.
    """
    if on_bus is not None and not on_bus:
        return [
            f"hostvars[{node}].gpus: got {len(declared)} GPU(s), on the PCI bus of {node} is none: "
            "look at the power cables and `lspci -d 10de:`, or declare gpus: []"
        ]
    where, symptom = f"driver of {node}", said or f"nvidia-smi lists {len(there)} of {len(declared)} GPU(s)"
    unchanged = "Gleaner changes no driver"
    if module is not None and _misses_volta(declared, there, on_bus):
        branch = _number(module.version)
        if module.open or branch > LAST_VOLTA_BRANCH:
            reason = "the open flavour serves" if module.open else f"branches after {LAST_VOLTA_BRANCH} serve"
            return [f"{where}: got {module}: {reason} no Volta ({symptom}): install {VOLTA_DRIVER}; {unchanged}"]
    if not said:
        return []
    if module is None:
        return [
            f"{where}: got no kernel module for Linux {os.uname().release} ({said}): "
            f"install a driver and load it, for Volta {VOLTA_DRIVER}; {unchanged}"
        ]
    cure = "`dmesg` says why (NVRM, Xid); reboot the node when the driver was changed since it started"
    if not module.loaded:
        cure = "load it with `modprobe nvidia`; when that fails, `dmesg` says why (NVRM)"
    return [f"{where}: got {module} ({said}): {cure}"]


def _misses_volta(declared: Sequence[Declared], there: Sequence[Found], on_bus: Sequence[Card] | None) -> bool:
    """Whether a card of Volta is not served."""
    if on_bus is not None:
        served = {gpu.pci_bus_id for gpu in there}
        return any(card.volta and card.pci_bus_id not in served for card in on_bus)
    wanted = sum(CUDA_ARCHITECTURES.get(gpu.model) == VOLTA for gpu in declared)
    return wanted > sum(gpu.compute_capability == VOLTA for gpu in there)


def outdated(node: str, there: Sequence[Found]) -> list[str]:
    """Drivers that serve their GPUs, and are too old for CUDA 12."""
    versions = sorted({gpu.driver for gpu in there})
    return [_too_old(node, version) for version in versions if _number(version) < FIRST_CUDA_12_BRANCH]


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


def check(node: str, declared: Sequence[Declared], smi: str, sysfs: Path, proc: Path) -> list[str]:
    """Everything that is wrong with the GPUs of this node."""
    there: list[Found] = []
    said = ""
    try:
        there = found(smi)
    except SmiError as error:
        said = str(error)
    if said or len(there) < len(declared):
        problems = unserved(node, declared, there, cards(sysfs), driver(proc), said)
        if problems:
            return problems
    if problems := outdated(node, there):
        return problems
    numa = {gpu.pci_bus_id: numa_node(sysfs, gpu.pci_bus_id) for gpu in there}
    problems = [*mismatches(node, declared, there, numa, numa_nodes(sysfs)), *faults(node, there)]
    if any(gpu.memory_used_mib for gpu in declared):
        print(f"{node}: others may use its GPUs (memory_used_mib): their processes are not looked at")
        return problems
    try:
        return [*problems, *strangers(node, smi, proc)]
    except GpuError as error:
        return [*problems, str(error)]


def strangers(node: str, smi: str, proc: Path) -> list[str]:
    """Processes on GPUs that are no job's, seen twice: one may begin or end while it is looked for."""
    there = _of_no_job(node, smi, proc)
    if there:
        time.sleep(AGAIN_SECONDS)
        before = {process.pid for process in there}
        there = [process for process in _of_no_job(node, smi, proc) if process.pid in before]
    return foreign(node, there)


def _of_no_job(node: str, smi: str, proc: Path) -> list[Process]:
    """What is on the GPUs and no job's. GpuError where only Slurm could tell, and it does not."""
    there = processes(smi)
    if not there:
        return []
    try:
        # Asked afterwards, so that a job that began meanwhile is known.
        known = {pid for pids in slurm.job_processes(proc).values() for pid in pids}
    except slurm.SlurmError:
        if runs_slurm(proc):
            held = ", ".join(str(process.pid) for process in there)
            raise GpuError(
                f"{node}: Slurm cannot be asked whose processes are on its GPUs (pid {held}): "
                "`scontrol listpids` fails: start slurmd, and run again"
            ) from None
        known = set()
    return [process for process in there if process.pid not in known]


def runs_slurm(proc: Path) -> bool:
    """Whether a process may be a job's: each job has a slurmstepd, also while slurmd is away."""
    return any(_name_of(place) in ("slurmd", "slurmstepd") for place in proc.glob("[0-9]*"))


def _name_of(process: Path) -> str:
    """As the kernel calls a process; empty when it has ended."""
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    summary = f"compare this node's GPUs with what the inventory declares; exit code {EXIT_FAILED} when they differ"
    action = actions.add_parser("check", help=summary, description=summary)
    action.add_argument("declared", metavar="JSON", help="the host variable gpus")
    action.add_argument("--node", default=os.uname().nodename, help="name of this host in the inventory")
    action.add_argument("--smi", default="nvidia-smi", help="program to ask")
    action.add_argument("--sysfs", type=Path, default=Path("/sys"), help="where PCI devices tell their NUMA node")
    action.add_argument("--proc", type=Path, default=Path("/proc"), help="where the driver and processes are seen")


def _declared(text: str) -> list[Declared]:
    try:
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise TypeError(type(entries).__name__)
        return [
            Declared(
                str(e["model"]), int(e["memory_mib"]), int(e["numa_node"]), int(e.get("memory_used_mib", 0)),
                str(e.get("cores", "")), str(e.get("device", "")),
            )
            for e in entries
        ]  # fmt: skip
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"gpus: got {text!r} ({error!r}), want a list of model, memory_mib and numa_node") from None


def run(args: argparse.Namespace) -> int:
    try:
        declared = _declared(args.declared)
        problems = check(args.node, declared, args.smi, args.sysfs, args.proc)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except GpuError as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_FAILED if problems else 0
