"""Whether the planner is right: what it computes against what llama.cpp's own programs say and take.

Needs a lab that serves (`make up`): `PYTHONPATH=src python -m benchmarks.sizing`. Runs the programs of its build on
one of its hosts; `--quick` is the short version that `make test` has. Writes docs/sizing.md (not with --quick); exits
with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import lab, report, sizing_job
from gleaner import architectures, gguf, memory, placement
from gleaner.architectures import Batch, Device
from tests.unit import gguf_files

DOCUMENT = lab.ROOT / "docs" / "sizing.md"
HOST = "vasp-01"
FOLDER = "/var/tmp/gleaner-sizing"
SOURCES = "/srv/sources"
MIB = 2**20
# Logs print hundredths of a MiB.
ROUNDING_MIB = 0.005
COMPUTE_BAR = (0.99, 1.07)
WEIGHTS_BAR = 0.01
SPLITS = 320
KV_TYPES = tuple(architectures.KV_BLOCKS)
MINIATURE = "tiny-random-72b-f16"
REAL_MODELS = ("tiny-random-llama-f16", "smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m", MINIATURE)
SEED = 20261125


@dataclass(frozen=True)
class Case:
    """One run of a program: a model, how it is loaded, and over how many RPC devices it is split."""

    model: str
    batch: Batch
    shares: tuple[float, ...] = ()
    real: bool = False
    # Loaded for real, but never asked to compute: a head of three RPC servers and more can wait for them for ever.
    idle: bool = False

    @property
    def arguments(self) -> list[str]:
        batch = self.batch
        args = [
            "-m",
            f"{FOLDER}/{self.model}.gguf",
            "-c",
            str(batch.cells * batch.parallel),
            "-np",
            str(batch.parallel),
        ]
        args += ["-b", str(max(batch.ubatch_tokens, 512)), "-ub", str(batch.ubatch_tokens)]
        args += ["-ctk", batch.type_k, "-ctv", batch.type_v, "-fa", "on" if batch.flash_attention else "off"]
        if self.shares:
            args += ["--rpc", "RPC", "-sm", "layer", "-ts", ",".join(map(repr, self.shares)), "-ngl", "999"]
        if self.real:
            args += ["--load-mode", "mlock", "--no-repack", "--fit", "off", "--cache-ram", "0", "-t", "2"]
            args += ["--offline", "--no-ui"]
            return [*args, "--no-warmup"] if self.idle else args
        return [*args, "--no-repack", "-fitp", "on"]

    def planned(self, facts: Mapping[str, Any]) -> list[memory.Use]:
        """What the planner says for each RPC device and, last, for the CPU."""
        layers = facts["n_layers"]
        places = placement.device_of_each_layer(layers, self.shares) if self.shares else [0] * (layers + 1)
        return memory.uses(facts, self.batch, places, [*(Device() for _ in self.shares), Device()])

    def __str__(self) -> str:
        batch = self.batch
        words = [f"{self.model}", f"context {batch.context_tokens}", f"ubatch {batch.ubatch_tokens}"]
        words += [f"K {batch.type_k}, V {batch.type_v}", f"flash attention {'on' if batch.flash_attention else 'off'}"]
        words += [f"parallel {batch.parallel}", f"split {','.join(map(str, self.shares)) or 'none'}"]
        return "; ".join(words)


@dataclass
class Result:
    """What was compared, and each difference in words."""

    splits: int = 0
    compute: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    kv: int = 0
    totals: list[float] = field(default_factory=list)
    loads: int = 0
    host: list[tuple[str, float, float]] = field(default_factory=list)
    wrong: dict[str, list[str]] = field(
        default_factory=lambda: {
            kind: [] for kind in ("runs", "placement", "kv", "compute", "cautious", "weights", "total", "host")
        }
    )

    @property
    def differences(self) -> list[str]:
        return [line for lines in self.wrong.values() for line in lines]


def shapes(folder: Path) -> list[str]:
    """The published shapes of larger models, as files whose data are holes: headers are real, nothing is loaded."""
    gguf_files.write_qwen25_72b_q4_k_m(folder / "qwen2.5-72b-q4_k_m.gguf")
    gguf_files.write_qwen25_14b_q8_0(folder / "qwen2.5-14b-q8_0.gguf")
    gguf_files.write_model(
        folder / "llama-3.1-8b-q8_0.gguf",
        architecture="llama",
        layers=32,
        n_embd=4096,
        n_ff=14336,
        n_head=32,
        n_head_kv=8,
        n_vocab=128256,
        types=gguf_files.q8_0,
        bias=False,
    )
    gguf_files.write_model(
        folder / "qwen3-8b-q8_0.gguf",
        architecture="qwen3",
        layers=36,
        n_embd=4096,
        n_ff=12288,
        n_head=32,
        n_head_kv=8,
        n_vocab=151936,
        head_dim=128,
        types=gguf_files.q8_0,
        bias=False,
    )
    gguf_files.write_model(
        folder / "gemma-3-12b-q8_0.gguf",
        architecture="gemma3",
        layers=48,
        n_embd=3840,
        n_ff=15360,
        n_head=16,
        n_head_kv=8,
        n_vocab=262208,
        head_dim=256,
        sliding_window=1024,
        types=gguf_files.q8_0,
        bias=False,
        tied=True,
    )
    return sorted(path.stem for path in folder.glob("*.gguf"))


def small(folder: Path, layers: int) -> str:
    name = f"llama-{layers}-layers"
    if not (folder / f"{name}.gguf").exists():
        gguf_files.write_model(
            folder / f"{name}.gguf",
            architecture="llama",
            layers=layers,
            n_ff=64,
            n_head=2,
            n_head_kv=1,
            n_vocab=16,
            bias=False,
        )
    return name


def random_shares(choose: random.Random, layers: int) -> tuple[float, ...]:
    """Shares of two to four devices: anything, slots as the planner writes them, or all but ties."""
    devices = choose.randint(2, 4)
    kind = choose.choice(["uneven", "slots", "near", "memory"])
    if kind == "uneven":
        return tuple(round(choose.uniform(0.05, 10), 3) for _ in range(devices))
    if kind == "memory":
        return tuple(float(choose.choice([16384, 24576, 32768, 40960])) for _ in range(devices))
    slots = [float(choose.randint(0, layers)) for _ in range(devices)]
    if not any(slots):
        slots[0] = 1.0
    if kind == "slots":
        return tuple(slots)
    return tuple(slot * (1 + choose.choice([-1, 0, 1]) * 2.0 ** -choose.randint(18, 26)) for slot in slots)


def random_batch(choose: random.Random, facts: Mapping[str, Any]) -> Batch:
    flash = choose.random() < 0.5
    whole = facts["head_dim_k"] % 32 == 0
    type_k = choose.choice(KV_TYPES) if whole else "f16"
    type_v = choose.choice(KV_TYPES) if whole and flash else "f16"
    return Batch(
        context_tokens=choose.choice([512, 1000, 4096, 16384, 32768, 65536, 131072]),
        parallel=choose.choice([1, 1, 1, 2, 4]),
        ubatch_tokens=choose.choice([16, 64, 100, 128, 256, 512, 1024]),
        type_k=type_k,
        type_v=type_v,
        flash_attention=flash,
        dry_run=True,
    )


def cases(folder: Path, *, quick: bool, models: Sequence[str] = REAL_MODELS) -> tuple[list[Case], ...]:
    """Splits to be placed, memory to be told, and models to be loaded for real.

    `models` are those of the lab, to be told of beside the shapes that are made in the folder.
    """
    choose = random.Random(SEED)
    layers = [choose.randint(1, 128) for _ in range(12 if quick else 64)]
    splits = []
    for count in itertools.islice(itertools.cycle(layers), 40 if quick else SPLITS):
        batch = Batch(256, ubatch_tokens=16, dry_run=True)
        splits.append(Case(small(folder, count), batch, random_shares(choose, count)))

    names = [*shapes(folder), *models]
    names = [name for name in names if not name.endswith("-layers")]
    told: list[Case] = []
    for name in names:
        facts = facts_of(folder, name)
        for _ in range(4 if quick else 16):
            devices = choose.randint(0, 3)
            shares = tuple(float(choose.randint(1, 5)) for _ in range(devices))
            told.append(Case(name, random_batch(choose, facts), shares))
    # Each pair of types at the whole context, on the exact shape of the seed's model.
    for type_k, type_v in itertools.product(KV_TYPES, KV_TYPES):
        flash = type_v != "f16"
        batch = Batch(131072, 1, 64, type_k, type_v, flash, dry_run=True)
        told.append(Case("qwen2.5-72b-q4_k_m", batch, (27.0, 27.0, 27.0)))

    loads = [
        Case(name, Batch(context, parallel, ubatch, flash_attention=flash), shares, real=True)
        for name, context, parallel, ubatch, flash, shares in [
            ("smollm2-135m-instruct-q4_1", 2048, 1, 512, False, (3.0, 2.0)),
            ("gemma-3-270m-q4_k_m", 2048, 1, 512, False, ()),
            ("tiny-random-llama-f16", 8192, 2, 256, True, (1.0, 1.0)),
            ("gemma-3-270m-q4_k_m", 1024, 1, 1024, False, (2.0, 1.0)),
            ("smollm2-135m-instruct-q4_1", 4096, 2, 128, True, ()),
            ("gemma-3-270m-q4_k_m", 4096, 1, 256, True, (1.0, 1.0)),
            ("smollm2-135m-instruct-q4_1", 4096, 1, 1024, False, ()),
        ][: 2 if quick else None]
    ]
    return splits, told, loads


def facts_of(folder: Path, name: str) -> dict[str, Any]:
    """Header facts: recorded ones of the lab's own models, those of the file for the shapes made here."""
    if name in REAL_MODELS:
        recorded = lab.ROOT / "inventories/lab/models" / f"{name}.json"
        value: dict[str, Any] = json.loads(recorded.read_text())
        return value
    return gguf.inspect(str(folder / f"{name}.gguf"))


def task_of(engine: str, wanted: Sequence[Case]) -> bytes:
    """What the program on the host reads."""
    runs = [
        {
            "id": index,
            "program": "llama-server" if case.real else "llama-fit-params",
            "devices": len(case.shares),
            "arguments": case.arguments,
            "prompt_words": 0 if case.idle else case.batch.context_tokens * 3 // 4 // 3,
        }
        for index, case in enumerate(wanted)
    ]
    return json.dumps({"bin": f"{engine}/bin", "runs": runs}).encode()


def on_host(ssh: Sequence[str], folder: Path, engine: str, wanted: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Run the cases on the host, one after the other, and give what each said."""
    with subprocess.Popen(
        [*ssh, f"python3 {FOLDER}/sizing_host.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(task_of(engine, wanted))
        process.stdin.close()
        for number, line in enumerate(process.stdout, 1):
            progress(number, len(wanted))
            yield json.loads(line)
    if process.returncode or number != len(wanted):
        raise RuntimeError(f"{number} of {len(wanted)} runs on {HOST} ended; its ssh ended with {process.returncode}")


def progress(number: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{number} of {total} runs", end="\n" if number == total else "", file=sys.stderr, flush=True)
    elif number == total or number % 50 == 0:
        print(f"{number} of {total} runs", file=sys.stderr, flush=True)


def send(ssh: Sequence[str], folder: Path) -> None:
    """Bring the files to the host as they are, holes as holes."""
    program = Path(__file__).with_name("sizing_host.py")
    links = " && ".join(f"ln -sf {SOURCES}/{name}.gguf {FOLDER}/" for name in REAL_MODELS)
    pack = ["tar", "--create", "--sparse", "-C", str(folder), ".", "-C", str(program.parent), program.name]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as tar:
        unpack = f"rm -rf {FOLDER} && mkdir {FOLDER} && tar --extract --sparse -C {FOLDER} && {links}"
        subprocess.run([*ssh, unpack], stdin=tar.stdout, check=True)
    if tar.returncode:
        raise RuntimeError(f"tar ended with {tar.returncode}")


def compare(case: Case, facts: Mapping[str, Any], found: Mapping[str, Any], result: Result) -> None:
    """Compare one run with the plan; what differs is put into words."""
    if "failed" in found:
        result.wrong["runs"].append(f"{case}: {found['failed']}")
        return
    layers = facts["n_layers"]
    if case.shares:
        result.splits += 1
        wanted = placement.device_of_each_layer(layers, case.shares)
        if found["layers"] != wanted:
            result.wrong["placement"].append(f"{case}: llama.cpp places {found['layers']}, the planner {wanted}")
            return
    uses = case.planned(facts)
    named = dict(zip([*(f"rpc{index}" for index in range(len(case.shares))), "cpu"], uses))
    compare_compute(case, named, found["buffers"]["compute"], result)
    kv = sum(use.kv for use in uses) / MIB
    result.kv += 1
    if abs(kv - found["kv_mib"]) > 2 * ROUNDING_MIB:
        result.wrong["kv"].append(f"{case}: KV cache of {found['kv_mib']:.2f} MiB, planned {kv:.2f}")
    if case.real:
        compare_load(case, facts, named, found, result)
        return
    if len(found["breakdown"]) != len(named):
        result.wrong["runs"].append(f"{case}: {len(found['breakdown'])} devices were told of; wanted {len(named)}")
    for (name, use), (weights, context, compute) in zip(named.items(), found["breakdown"]):
        # Whole MiB, cut off: each may be almost one more.
        if not context - ROUNDING_MIB <= use.kv / MIB < context + 1 + ROUNDING_MIB:
            result.wrong["kv"].append(f"{case}: KV cache of {name} is {context} MiB, planned {use.kv / MIB:.2f}")
        within_weights(case, name, use.weights / MIB, weights, 1.0, result)
        within_total(case, name, use, weights + context + compute, result)


def compare_compute(case: Case, named: Mapping[str, memory.Use], real: Mapping[str, float], result: Result) -> None:
    for name, use in named.items():
        planned = use.compute / MIB
        if name not in real:
            # A buffer of less than the log can show has no line.
            if planned > ROUNDING_MIB:
                result.wrong["compute"].append(f"{case}: no compute buffer of {name} was told, planned {planned:.2f}")
            continue
        mib = real[name]
        if mib >= 1:
            result.compute.append(planned / mib)
        words = f"{case}: compute buffer of {name} is {mib:.2f} MiB, planned {planned:.2f}"
        if planned < COMPUTE_BAR[0] * (mib - ROUNDING_MIB):
            result.wrong["compute"].append(words)
        elif planned > COMPUTE_BAR[1] * (mib + ROUNDING_MIB):
            result.wrong["cautious"].append(words)


def within_weights(case: Case, name: str, planned: float, real: float, rounding: float, result: Result) -> None:
    if real < 20 * rounding:
        return
    if real >= 200 * rounding:
        result.weights.append(planned / real)
    if not (1 - WEIGHTS_BAR) * real - rounding <= planned <= (1 + WEIGHTS_BAR) * (real + rounding):
        result.wrong["weights"].append(f"{case}: weights of {name} are {real:.2f} MiB, planned {planned:.2f}")


def within_total(case: Case, name: str, use: memory.Use, real: float, result: Result) -> None:
    planned = (use.weights + use.kv + use.compute) / MIB
    if real >= 200:
        result.totals.append(planned / real)
    if planned < real - 3 * ROUNDING_MIB:
        result.wrong["total"].append(f"{case}: {name} takes {real:.2f} MiB in all, planned {planned:.2f}")


def compare_load(
    case: Case, facts: Mapping[str, Any], named: Mapping[str, memory.Use], found: Mapping[str, Any], result: Result
) -> None:
    """A model that was really loaded: each buffer, and the host memory of each process after a long prompt."""
    result.loads += 1
    buffers = found["buffers"]
    for name, use in named.items():
        real = {kind: buffers[kind].get(name, 0.0) for kind in ("model", "KV", "compute")}
        within_weights(case, name, use.weights / MIB, real["model"], ROUNDING_MIB, result)
        within_total(case, name, use, sum(real.values()), result)
        if abs(use.kv / MIB - real["KV"]) > 2 * ROUNDING_MIB:
            result.wrong["kv"].append(f"{case}: KV cache of {name} is {real['KV']:.2f} MiB, planned {use.kv / MIB:.2f}")
    server = memory.server_bytes(facts, case.batch, cuda=False) + named["cpu"].total
    if case.shares:
        server += memory.staging_bytes(facts)
    wanted = {"server": server}
    for name in found["peak_mib"].keys() - {"server"}:
        wanted[name] = memory.rpc_server_bytes(facts, cuda=False) + named[name].total
    for name, peak in sorted(found["peak_mib"].items()):
        result.host.append((f"{case.model}, {name}", peak, wanted[name] / MIB))
        if peak > wanted[name] / MIB:
            result.wrong["host"].append(
                f"{case}: {name} took {peak:.0f} MiB of the host, planned {wanted[name] / MIB:.0f}"
            )


def range_of(values: Sequence[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{100 * low:.2f} % to {100 * high:.2f} %, median {100 * middle:.2f} %"


def rows(result: Result) -> Iterable[tuple[str, str, str, str]]:
    def verdict(*kinds: str) -> str:
        count = sum(len(result.wrong[kind]) for kind in (*kinds, "runs"))
        return "met" if not count else f"missed: {count} differences"

    loads = f"{result.loads} of them loaded for real"
    yield (
        "layers on the device that llama.cpp's log names",
        f"{result.splits} splits",
        "all equal",
        verdict("placement"),
    )
    yield "KV cache", f"{result.kv} contexts, {loads}", "exact to the printed digit", verdict("kv")
    yield (
        "compute buffers",
        f"{len(result.compute)} buffers",
        f"99 to 107 %: {range_of(result.compute)}",
        verdict("compute", "cautious"),
    )
    yield (
        "weights of a device",
        f"{len(result.weights)} devices",
        f"± 1 %: {range_of(result.weights)}",
        verdict("weights"),
    )
    yield (
        "all of a device",
        f"{len(result.totals)} devices",
        f"never under: {range_of(result.totals)}",
        verdict("total"),
    )
    yield "host memory of a process", f"{len(result.host)} processes", "never under", verdict("host")


def answers(here: lab.Lab, folder: Path, wanted: Sequence[Case]) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Run cases on the lab, whose files lie in a folder, and give what the programs said of each."""
    ssh = here.ssh(HOST)
    engine = lab.output(ssh, "readlink", "-f", f"{here.variable(HOST, 'shared_dir')}/ai/llama.cpp/current")
    try:
        send(ssh, folder)
        for found in on_host(ssh, folder, engine, wanted):
            yield wanted[found["id"]], found
    finally:
        subprocess.run([*ssh, shlex.join(["rm", "-rf", FOLDER])], check=True)


def run(here: lab.Lab, *, quick: bool) -> Result:
    """Compare all cases on the lab; what differs is in the result."""
    result = Result()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        splits, told, loads = cases(folder, quick=quick)
        wanted = [*splits, *told, *loads]
        known = {name: facts_of(folder, name) for name in {case.model for case in wanted}}
        for case, found in answers(here, folder, wanted):
            compare(case, known[case.model], found, result)
    return result


def body(result: Result, job: sizing_job.Figures, about: Mapping[str, str]) -> str:
    host = [(what, f"{peak:.0f}", f"{wanted:.0f}") for what, peak, wanted in result.host]
    return "\n\n".join(
        [
            report.facts(about),
            report.table(("what", "compared", "bar, and planned of real", ""), rows(result)),
            "Host memory of each process after a prompt of about the whole context, in MiB:",
            report.table(("model and process", "peak", "planned"), host),
            job.text(),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short version, which writes nothing")
    arguments = parser.parse_args()
    here = lab.lab_from_environment()
    about = lab.machine()
    result = run(here, quick=arguments.quick)
    for line in result.differences:
        print(line, file=sys.stderr)
    for row in rows(result):
        print("; ".join(row))
    if arguments.quick:
        return int(bool(result.differences))
    job = sizing_job.run(here)
    print(job.text())
    report.write("sizing", body(result, job, about), DOCUMENT)
    return int(bool(result.differences) or not job.bar_met)


if __name__ == "__main__":
    sys.exit(main())
