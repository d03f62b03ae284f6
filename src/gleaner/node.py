"""What only a node itself knows (`gleaner node`): its program, the build and models it sees, memory that is taken."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gleaner import bounded, engine, files, gpus, measured, slurm, stage

VERSION = 1
SHARED_SECONDS = 5.0
# Of timeout(1): by TERM, and by the KILL that follows.
TIMED_OUT = (124, 137)


def program() -> str:
    """The name of this very program, which has the hash of its sources."""
    return Path(files.own_file()).stem


def installed() -> str:
    """The program that this host's commands and next jobs use."""
    return files.PROGRAM.resolve().stem if files.PROGRAM.exists() else program()


def build_in_use(root: Path) -> dict[str, str]:
    """Name of the build that `current` leads to, and the sum of the manifest that this host sees of it.

    EngineError when there is none, TimeoutError when the shared file system hangs.
    """

    def look() -> dict[str, str]:
        build = (root / "current").resolve()
        return {"build": build.name, "manifest": engine.identity(build)}

    return bounded.ask(str(root), look, SHARED_SECONDS)


def process_kib(proc: Path, pid: int) -> int:
    """Memory of a process, pages that it shares counted in part; 0 for one that has ended."""
    for name, key in (("smaps_rollup", "Pss"), ("status", "VmRSS")):
        with contextlib.suppress(OSError):
            match = re.search(
                rf"^{key}:\s+(\d+) kB", (proc / str(pid) / name).read_text(errors="replace"), re.MULTILINE
            )
            if match:
                return int(match[1])
    return 0


def gpu_mib_by_process(smi: str) -> dict[int, dict[str, int]]:
    """Of each process on a GPU, how much it has of which; GpuError when nvidia-smi does not say."""
    found: dict[int, dict[str, int]] = {}
    for bus_id, pid, used in gpus.ask(smi, "compute-apps", ("gpu_bus_id", "pid", "used_gpu_memory")):
        if pid.isdigit() and used.isdigit():
            found.setdefault(int(pid), {})[bus_id] = int(used)
    return found


def gpu_memory(smi: str) -> list[dict[str, Any]]:
    """All that is taken of each GPU, by whomever."""
    rows = gpus.ask(smi, "gpu", ("index", "pci.bus_id", "memory.total", "memory.used"))
    return [
        {"index": int(index), "bus_id": bus_id, "memory_mib": int(total), "used_mib": int(used)}
        for index, bus_id, total, used in rows
        if index.isdigit() and total.isdigit() and used.isdigit()
    ]


def gpus_given(proc: Path, pids: Sequence[int]) -> set[int]:
    """Numbers of the GPUs that Slurm has given these processes of a job; empty when it is not known."""
    given: set[int] = set()
    for pid in pids:
        try:
            words = (proc / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            # It has ended.
            continue
        environment = dict(word.split("=", 1) for word in words if "=" in word)
        # The job's own are those of the node of its batch step, and are inherited on the others.
        numbers = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS") or ""
        given |= {int(number) for number in numbers.split(",") if number.isdigit()}
    return given


def memory_by_gpu(
    used: Mapping[str, int], given: Collection[int], there: Sequence[Mapping[str, Any]]
) -> list[int] | None:
    """MiB of each GPU that a job has, by their numbers, also of those on which it has nothing.

    None when it is not known which it has: some of them are then taken for others.
    """
    numbers = {one["bus_id"]: one["index"] for one in there}
    has = {numbers[bus_id]: mib for bus_id, mib in used.items() if bus_id in numbers}
    whose = set(given) or (set(has) if len(has) == len(numbers) else set())
    if not whose or len(has) < len(used) or not set(has) <= whose <= set(numbers.values()):
        return None
    return [has.get(number, 0) for number in sorted(whose)]


def jobs(
    processes: Mapping[int, list[int]],
    on_gpus: Mapping[int, Mapping[str, int]],
    there: Sequence[Mapping[str, Any]],
    proc: Path,
) -> list[dict[str, Any]]:
    """Memory of each job here, in MiB: of the host, and of each GPU that it has, if that is known."""
    found = []
    for job, pids in sorted(processes.items()):
        used: dict[str, int] = {}
        for pid in pids:
            for bus_id, mib in on_gpus.get(pid, {}).items():
                used[bus_id] = used.get(bus_id, 0) + mib
        host = sum(process_kib(proc, pid) for pid in pids) * 1024
        of_gpus = memory_by_gpu(used, gpus_given(proc, pids), there)
        found.append({"job": job, "host_mib": host // measured.MIB, "gpus_mib": of_gpus})
    return found


def facts(root: Path, spec: Path, smi: str, proc: Path) -> dict[str, Any]:
    """Everything; what could not be asked is None or empty, and in `problems`."""
    problems: list[str] = []
    told: dict[str, Any] = {"v": VERSION, "program": installed(), "engine": None, "models": {}, "gpus": [], "jobs": []}
    try:
        told["engine"] = build_in_use(root)
    except (engine.EngineError, OSError, RuntimeError) as error:
        problems.append(f"engine: {error}")
    try:
        told["models"] = stage.check(stage.Spec.load(spec))["models"]
    except (ValueError, OSError) as error:
        problems.append(f"models: {error}")
    on_gpus: dict[int, dict[str, int]] = {}
    # Of which is known who is on them.
    there: list[dict[str, Any]] = []
    try:
        if smi:
            told["gpus"] = gpu_memory(smi)
            on_gpus = gpu_mib_by_process(smi)
            there = told["gpus"]
    except gpus.GpuError as error:
        problems.append(f"gpus: {error}")
    try:
        told["jobs"] = jobs(slurm.job_processes(proc), on_gpus, there, proc)
    except slurm.SlurmError as error:
        problems.append(f"jobs: {error}")
    told["problems"] = problems
    return told


# What becomes of it on the controller


@dataclass(frozen=True)
class Answers:
    """Facts of the nodes that answered, and why the others did not."""

    facts: dict[str, dict[str, Any]]
    problems: tuple[str, ...]


def parse_answers(text: str) -> Answers:
    """From pairs of a node and Ansible's result of `gleaner node`; ValueError when it is nothing of the kind."""
    told: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    try:
        for name, result in json.loads(text):
            try:
                told[str(name)] = _answer(result)
            except ValueError as error:
                problems.append(f"{name}: {error}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--answers: got no list of nodes and results ({error!r})") from None
    return Answers(told, tuple(problems + [f"{name}: {one}" for name in told for one in told[name]["problems"]]))


def _answer(result: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in a result; ValueError, in words, when there are none."""
    if not result:
        raise ValueError("was not asked: run playbooks/status.yml without --limit")
    said = _first_line(result.get("msg"))
    if result.get("unreachable"):
        # Ansible's own words before those of ssh say the same at length.
        raise ValueError(f"cannot be reached: {said.rpartition('ssh: ')[2]}")
    if result.get("rc") in TIMED_OUT:
        raise ValueError("`gleaner node` did not end there in time: its GPUs' driver, Slurm or a file system hangs")
    if result.get("rc") != 0 or result.get("failed"):
        said = _first_line(result.get("stderr")) or said or "nothing was said"
        raise ValueError(f"`gleaner node` failed there: {said}: run site.yml")
    try:
        value = json.loads(result["stdout"])
        if value["v"] == VERSION and {"program", "engine", "models", "gpus", "jobs", "problems"} <= set(value):
            return dict(value)
    except (ValueError, KeyError, TypeError):
        # Said in the next line, as of one that can be read.
        pass
    raise ValueError("`gleaner node` there is of another version: run site.yml")


def _first_line(text: object) -> str:
    lines = str(text or "").strip().splitlines()
    return lines[0] if lines else ""


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", type=Path, required=True, metavar="FOLDER", help="folder of the builds of llama.cpp"
    )
    parser.add_argument("--spec", type=Path, default=Path("/etc/gleaner/models.json"), help="the node's list of models")
    parser.add_argument("--smi", default="nvidia-smi", help="program that knows the GPUs; empty: there are none")
    parser.add_argument("--proc", type=Path, default=Path("/proc"), help="where processes are seen")


def run(args: argparse.Namespace) -> int:
    json.dump(facts(args.engine, args.spec, args.smi, args.proc), sys.stdout)
    print()
    return 0
