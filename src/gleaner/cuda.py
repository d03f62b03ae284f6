"""What a CUDA toolkit brings to a host, what it can compile, and what its compiler has put into a program.

The device code of a program is a set of images. A real architecture (`70-real`) gives one of machine code for each
source file, a virtual one PTX that the driver compiles when the program starts, and a plain number both.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gleaner.engine import EngineError

ASK_SECONDS = 120.0
_ARCHITECTURE = re.compile(r"(\d+)[af]?(-real|-virtual)?")
_IMAGE = re.compile(r"^(ELF|PTX) file\s+\d+:\s+\S+\.sm_(\d+)[af]?\.(?:cubin|ptx)$")
# Without PTX it says `cuobjdump info    : No PTX file found to extract from …`, which is no image.
_NAMES_IMAGE = re.compile(r"^(?:ELF|PTX) file\b")
_FUNCTION = re.compile(r"^\s*Function : (\S+)$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)")
_FLASH_ATTENTION = "flash_attn"
# These prepare or put together what attention kernels compute (fattn-common.cuh), and are compiled in any case: without
# the kernels nothing launches them.
_HELPERS = re.compile(r"flash_attn_(?:mask_to_|combine_results|stream_k_fixup)")
# What a stub of llama.cpp holds that was compiled without flash attention: it prints a line and traps.
_TRAP = "BPT.TRAP"
_RETURNS = "EXIT"
# Products of matrices, by tensor cores or without.
_TENSOR_CORES = re.compile(r"[HIDB]MMA\b")
_COMPUTES = re.compile(r"(?:[HIDB]MMA|H(?:ADD|MUL|FMA)2|F(?:ADD|MUL|FMA)|D(?:ADD|MUL|FMA)|MUFU)\b")
# `Inst name[:arch] [version that is there] (version that comes source …)`, and `Remv name [version that is there]`.
_STEP = re.compile(r"^(Inst|Remv|Purg) ([^\s:]+)\S*(?: \[([^]]*)\])?(?: \((\S+))?", re.MULTILINE)
# Debian names parts of the toolkit after NVIDIA, too.
_DRIVER = re.compile(r".*nvidia|libcuda1\b|libcudadebugger1\b|libnvcuvid1\b|libnvoptix1\b|cuda-drivers\b")
_TOOLKIT = re.compile(r"nvidia-(?:cuda-(?!mps\b)|profiler\b|visual-profiler\b)|.*-(?:dev|doc)$")
# Packages that bring a kernel module or stand for a whole driver; the others may be there without any.
_WHOLE_DRIVER = {"dkms", "driver", "drivers", "kernel", "modules", "open"}
_GONE = ("not-installed", "config-files")


@dataclass(frozen=True)
class Toolkit:
    """A compiler of CUDA and its host compiler, as the inventory names them."""

    nvcc: str
    cxx: str
    architectures: tuple[str, ...]
    """As CMake spells them."""

    @property
    def wanted(self) -> dict[str, list[int]]:
        """Numbers of the architectures of which a program has machine code (`sm`), and PTX (`compute`)."""
        pairs = [(int(match[1]), match[2]) for match in map(_ARCHITECTURE.fullmatch, self.architectures) if match]
        return {
            "sm": sorted(number for number, kind in pairs if kind != "-virtual"),
            "compute": sorted(number for number, kind in pairs if kind != "-real"),
        }

    def version(self) -> str:
        """Such as ``12.4.131``; EngineError when the compiler does not run."""
        text = _ask(
            [self.nvcc, "--version"],
            f"llama_cpp_cuda_toolkit: {self.nvcc} does not run",
            "install Debian's nvidia-cuda-toolkit, or name the folder of an installed toolkit",
        )
        found = re.search(r"\bV(\d+(?:\.\d+)+)", text)
        if not found:
            raise EngineError(f"llama_cpp_cuda_toolkit: {self.nvcc} --version names no version: {text.strip()[:200]!r}")
        return found[1]

    def require(self) -> None:
        """EngineError unless it compiles for each architecture that the inventory names."""
        version = self.version()
        codes = {
            int(number)
            for number in re.findall(
                r"\bsm_(\d+)", _ask([self.nvcc, "--list-gpu-code"], f"{self.nvcc} {version} lists no architectures", "")
            )
        }
        for number in sorted({*self.wanted["sm"], *self.wanted["compute"]} - codes):
            dropped = number == 70 and int(version.partition(".")[0]) >= 13
            raise EngineError(
                f"llama_cpp_cuda_architectures: got {list(self.architectures)}; nvcc {version} ({self.nvcc}) knows "
                f"{', '.join(f'sm_{code}' for code in sorted(codes))}, and not sm_{number}"
                f"{', since CUDA 13 dropped Volta' if dropped else ''}; "
                "cure: leave llama_cpp_cuda_toolkit empty for Debian 13's package (12.4), or name the folder of an "
                "installed toolkit 12.x"
            )
        for number in self.wanted["sm"] or self.wanted["compute"]:
            self._try(version, number)

    def _try(self, version: str, number: int) -> None:
        """Compile a kernel: a toolkit refuses host compilers that are younger than itself."""
        with tempfile.TemporaryDirectory(prefix="gleaner-nvcc-") as folder:
            source = Path(folder, "probe.cu")
            source.write_text("#include <vector>\n__global__ void probe(float *x) { x[threadIdx.x] *= 2.0f; }\n")
            argv = [self.nvcc, "-ccbin", self.cxx, f"-arch=sm_{number}", "-c", "-o", f"{folder}/probe.o", str(source)]
            try:
                done = subprocess.run(argv, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                raise EngineError(f"{self.nvcc} {version}: does not end: {' '.join(argv)}") from None
        if done.returncode:
            lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
            raise EngineError(
                f"llama_cpp_cxx: nvcc {version} does not compile for sm_{number} with {self.cxx}: "
                f"{(lines or ['it gives no reason'])[0][:300]}; "
                "cure: name a host compiler that this toolkit takes (for 12.4: g++-12), and install it"
            )


def driver_changes(simulated: str, packages: str, loaded: bool) -> list[str]:
    """What an installation would do to a host's NVIDIA driver, in words such as ``remove nvidia-driver 550.163.01-2``.

    `simulated` is what `apt-get --simulate` prints, `packages` lines of dpkg's ``status name``; `loaded`: the driver's
    kernel module is. What is there and would be another is told of in any case, what is new only where it would come
    beneath a driver. ValueError when dpkg's lines are others.
    """
    there = {name for status, name in map(_status, packages.splitlines()) if status not in _GONE}
    whole = loaded or any(_of_driver(name) and _WHOLE_DRIVER & set(name.split("-")) for name in there)
    words = []
    for step, name, before, after in _STEP.findall(simulated):
        if not _of_driver(name):
            continue
        if step != "Inst":
            words.append(f"remove {name} {before}")
        elif before and before != after:
            words.append(f"change {name} from {before} to {after}")
        elif whole and not before:
            words.append(f"install {name} {after}")
    # What is there for two architectures is told of once.
    return list(dict.fromkeys(words))


def _status(line: str) -> tuple[str, str]:
    words = line.split()
    if len(words) != 2:
        raise ValueError(f"packages: got the line {line!r}, want dpkg's status and name of a package")
    return words[0], words[1]


def _of_driver(package: str) -> bool:
    return bool(_DRIVER.match(package)) and not _TOOLKIT.match(package)


def images(cuobjdump: str, program: Path) -> dict[str, dict[str, int]]:
    """How many images of machine code (`sm`) and PTX (`compute`) a program has, by architecture."""
    found: dict[str, dict[str, int]] = {"sm": {}, "compute": {}}
    for option in ("--list-elf", "--list-ptx"):
        for line in _ask([cuobjdump, option, str(program)], f"{cuobjdump} cannot read {program}", "").splitlines():
            if match := _IMAGE.match(line.strip()):
                kind = found["sm" if match[1] == "ELF" else "compute"]
                kind[match[2]] = kind.get(match[2], 0) + 1
            elif _NAMES_IMAGE.match(line.strip()):
                raise EngineError(
                    f"{cuobjdump} {option} {program}: cannot read the line {line.strip()!r}: "
                    "want `ELF file N: name.N.sm_70.cubin` or its like with PTX; was its format changed?"
                )
    return found


@dataclass
class Function:
    """A function of the device code."""

    name: str
    traps: int = 0
    returns: int = 0
    computes: int = 0
    tensor_cores: int = 0

    @property
    def stub(self) -> bool:
        """It can do nothing but trap."""
        return self.traps > 0 and self.returns == 0 and self.computes == 0

    def count(self, instruction: str) -> None:
        self.traps += instruction.startswith(_TRAP)
        self.returns += instruction.startswith(_RETURNS)
        self.computes += _COMPUTES.match(instruction) is not None
        self.tensor_cores += _TENSOR_CORES.match(instruction) is not None


def functions(lines: Iterable[str]) -> Iterator[Function]:
    """The functions in what `cuobjdump -sass` prints."""
    current: Function | None = None
    for line in lines:
        if match := _FUNCTION.match(line):
            if current is not None:
                yield current
            current = Function(match[1])
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.count(match[1])
    if current is not None:
        yield current


def disassembled(cuobjdump: str, program: Path) -> Iterator[str]:
    """Lines of the machine code of a program; gigabytes of them, so they are not kept."""
    with subprocess.Popen(
        [cuobjdump, "-sass", str(program)], stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise EngineError(f"{cuobjdump} -sass {program}: ended with {process.returncode}")


def prove(toolkit: Toolkit, programs: list[Path], flash_attention: bool) -> dict[str, Any]:
    """What the device code of the programs is; EngineError when it is not what was asked for.

    Every image must be of a declared architecture. Without `flash_attention`, every kernel of it must be a stub that
    traps: its name alone proves nothing, since llama.cpp compiles the names in any case.
    """
    cuobjdump = str(Path(toolkit.nvcc).with_name("cuobjdump"))
    proof: dict[str, Any] = {"toolkit": toolkit.version(), "flash_attention": flash_attention, "programs": {}}
    for program in programs:
        print(f"reading the device code of {program.name}", flush=True)
        found = images(cuobjdump, program)
        for kind, numbers in toolkit.wanted.items():
            if sorted(map(int, found[kind])) != numbers:
                raise EngineError(
                    f"{program}: has device code of {_words(found)}; "
                    f"want just what llama_cpp_cuda_architectures={list(toolkit.architectures)} names"
                )
        attention = attention_of(functions(disassembled(cuobjdump, program)))
        if not attention["kernels"]:
            raise EngineError(f"{program}: no device function is a flash-attention kernel: were they renamed?")
        if not flash_attention and (attention["computing"] or attention["helpers_with_tensor_cores"]):
            raise EngineError(
                f"{program}: llama_cpp_flash_attention is false, but these compute: "
                f"{', '.join(attention['computing'] or attention['helpers_with_tensor_cores'])}"
            )
        proof["programs"][program.name] = {
            "images": found,
            "functions": attention["functions"],
            "flash_attention_kernels": attention["kernels"],
            "flash_attention_trap_stubs": attention["kernels"] - len(attention["computing"]),
            "flash_attention_helpers": attention["helpers"],
        }
    return proof


def attention_of(code: Iterable[Function]) -> dict[str, Any]:
    """How many of the functions are flash attention, and the names of those that compute it."""
    found: dict[str, Any] = {
        "functions": 0, "kernels": 0, "helpers": 0, "computing": [], "helpers_with_tensor_cores": [],
    }  # fmt: skip
    for function in code:
        found["functions"] += 1
        if _HELPERS.search(function.name):
            found["helpers"] += 1
            found["helpers_with_tensor_cores"] += [function.name] if function.tensor_cores else []
        elif _FLASH_ATTENTION in function.name:
            found["kernels"] += 1
            found["computing"] += [] if function.stub else [function.name]
    return found


def _words(found: dict[str, dict[str, int]]) -> str:
    parts = [f"{kind}_{number} ({count} times)" for kind in found for number, count in sorted(found[kind].items())]
    return ", ".join(parts) or "no architecture"


def _ask(argv: list[str], problem: str, cure: str) -> str:
    """What a tool of the toolkit prints."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=ASK_SECONDS, check=True, env=environment
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()[-1:] or [f"it ended with {error.returncode}"]
        raise EngineError("; ".join(filter(None, [f"{problem}: {said[0]}", cure and f"cure: {cure}"]))) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError("; ".join(filter(None, [f"{problem}: {error}", cure and f"cure: {cure}"]))) from None
    return done.stdout
