"""What is asked of a CUDA toolkit, and what is read out of a program; the tools' answers are as 12.4.131 gives them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gleaner import cuda
from gleaner.cuda import Toolkit
from gleaner.engine import EngineError

APT = Path(__file__).with_name("apt")
VERSION = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {0}, V{0}.131\n"
STUB = """\t\tFunction : _Z18flash_attn_ext_f16ILi128EEvPKc
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x00000a00ff017624 */
        /*01d0*/                   CALL.ABS.NOINC R2 ;                       /* 0x0000000002007343 */
        /*01e0*/                   BPT.TRAP 0x1 ;                            /* 0x000000040000795c */
        /*01f0*/                   BRA 0x1f0;                                /* 0xfffffff000007947 */
"""
KERNEL = """\t\tFunction : _Z18flash_attn_ext_f16ILi64EEvPKc
        /*0000*/                   HMMA.884.F32.F32.STEP0 R8, R4.reuse.ROW, R6.reuse.COL, R8 ;  /* 0x00 */
        /*0010*/              @!P0 BPT.TRAP 0x1 ;                            /* 0x000000040000795c */
        /*0020*/                   EXIT ;                                    /* 0x000000000000794d */
"""
HELPER = """\t\tFunction : _Z26flash_attn_combine_resultsILi128EEvPKf
        /*0000*/              @P1  FFMA R8, R4, R6, R8 ;                     /* 0x0000000604087223 */
        /*0010*/                   EXIT ;                                    /* 0x000000000000794d */
"""
OTHER = """\t\tFunction : _Z9mul_mat_qILi8EEvPKc
        /*0000*/                   HMMA.884.F16.F16 R8, R4, R6, R8 ;         /* 0x0000000604087223 */
        /*0010*/                   EXIT ;                                    /* 0x000000000000794d */
"""


class Tools:
    """Stand-ins for nvcc and cuobjdump."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.codes = "sm_50\nsm_60\nsm_70\nsm_80\nsm_90\n"
        self.release, self.compile = "12.4", "exit 0"
        self.elf = "".join(f"ELF file    {number}: llama-server.{number}.sm_70.cubin\n" for number in (1, 2, 3))
        self.ptx, self.sass = "", STUB + HELPER + OTHER
        self.toolkit = Toolkit(str(root / "nvcc"), "g++-12", ("70-real",))

    def write(self) -> None:
        for name in ("codes", "elf", "ptx", "sass"):
            (self.root / name).write_text(getattr(self, name))
        (self.root / "version").write_text(VERSION.format(self.release))
        self._program(
            "nvcc",
            f"case $1 in --version) cat {self.root}/version;; --list-gpu-code) cat {self.root}/codes;;"
            f' *) echo "$@" >>{self.root}/compiled; {self.compile};; esac',
        )
        self._program(
            "cuobjdump",
            f"cd {self.root}; case $1 in --list-elf) cat elf;; --list-ptx) cat ptx;; *) cat sass;; esac",
        )

    def _program(self, name: str, text: str) -> None:
        (self.root / name).write_text(f"#!/bin/sh\n{text}\n")
        os.chmod(self.root / name, 0o755)

    def prove(self, flash_attention: bool = False) -> dict[str, object]:
        self.write()
        programs: dict[str, dict[str, object]] = cuda.prove(
            self.toolkit, [self.root / "llama-server"], flash_attention
        )["programs"]
        return programs["llama-server"]


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


@pytest.mark.parametrize(
    ("architectures", "machine", "ptx"),
    [(("70-real",), [70], []), (("70",), [70], [70]), (("70-real", "80-virtual", "90a"), [70, 90], [80, 90])],
)
def test_architectures_as_cmake_spells_them(architectures: tuple[str, ...], machine: list[int], ptx: list[int]) -> None:
    assert Toolkit("nvcc", "g++", architectures).wanted == {"sm": machine, "compute": ptx}


def test_a_toolkit_that_can_is_asked_with_its_host_compiler(tools: Tools) -> None:
    tools.write()
    tools.toolkit.require()
    (asked,) = (tools.root / "compiled").read_text().splitlines()
    assert asked.startswith("-ccbin g++-12 -arch=sm_70 ")


def test_a_toolkit_that_dropped_volta_is_refused_with_version_reason_and_cure(tools: Tools) -> None:
    tools.release, tools.codes = "13.0", "sm_75\nsm_80\nsm_120\n"
    tools.write()
    with pytest.raises(EngineError) as caught:
        tools.toolkit.require()
    said = str(caught.value)
    assert "nvcc 13.0.131" in said
    assert "not sm_70, since CUDA 13 dropped Volta" in said
    assert "cure: leave llama_cpp_cuda_toolkit empty for Debian 13's package (12.4)" in said
    assert not (tools.root / "compiled").exists()


def test_a_host_compiler_that_is_too_young_is_refused_by_name(tools: Tools) -> None:
    tools.compile = (
        "echo 'host_config.h(143): #error -- unsupported GNU version! gcc versions later than 13' >&2; exit 1"
    )
    tools.write()
    with pytest.raises(EngineError, match=r"llama_cpp_cxx: nvcc 12.4.131 .* with g\+\+-12: .*unsupported GNU version"):
        tools.toolkit.require()


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="llama_cpp_cuda_toolkit: /nonexistent/bin/nvcc does not run"):
        Toolkit("/nonexistent/bin/nvcc", "g++", ("70-real",)).require()


def test_proof_of_a_build_without_flash_attention(tools: Tools) -> None:
    assert tools.prove() == {
        "images": {"sm": {"70": 3}, "compute": {}},
        "functions": 3,
        "flash_attention_kernels": 1,
        "flash_attention_trap_stubs": 1,
        "flash_attention_helpers": 1,
    }


def test_a_kernel_that_computes_is_no_stub(tools: Tools) -> None:
    tools.sass += KERNEL
    with pytest.raises(EngineError, match="these compute: _Z18flash_attn_ext_f16ILi64EEvPKc"):
        tools.prove()
    assert tools.prove(flash_attention=True)["flash_attention_trap_stubs"] == 1


def test_a_kernel_that_nobody_knows_has_to_be_a_stub(tools: Tools) -> None:
    tools.sass += OTHER.replace("mul_mat_q", "flash_attn_new")
    with pytest.raises(EngineError, match="flash_attn_new"):
        tools.prove()


def test_names_that_are_gone_prove_nothing(tools: Tools) -> None:
    tools.sass = OTHER + HELPER
    with pytest.raises(EngineError, match="were they renamed"):
        tools.prove()


@pytest.mark.parametrize(
    ("elf", "ptx", "said"),
    [
        ("ELF file    1: x.1.sm_80.cubin\n", "", "sm_80 (1 times)"),
        ("", "", "device code of no architecture"),
        ("ELF file    1: x.1.sm_70.cubin\n", "PTX file    1: x.1.sm_70.ptx\n", "compute_70 (1 times)"),
    ],
    ids=["another", "none", "PTX"],
)
def test_an_image_that_was_not_ordered_is_named(tools: Tools, elf: str, ptx: str, said: str) -> None:
    tools.elf, tools.ptx = elf, ptx
    with pytest.raises(EngineError) as caught:
        tools.prove()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "line", ["ELF file    4: x.4.sm_70.o", "ELF file: x.sm_80.cubin", "PTX file    1: x.1.compute_70"]
)
def test_an_image_that_cannot_be_read_is_not_passed_over(tools: Tools, line: str) -> None:
    if line.startswith("ELF"):
        tools.elf += f"{line}\n"
    else:
        tools.ptx += f"{line}\n"
    with pytest.raises(EngineError) as caught:
        tools.prove()
    assert f"cannot read the line '{line}'" in str(caught.value)


def test_what_a_toolkit_says_of_a_program_without_ptx_is_no_image(tools: Tools) -> None:
    tools.ptx = "cuobjdump info    : No PTX file found to extract from 'llama-server'. You may try with -all option.\n"
    assert tools.prove()["images"] == {"sm": {"70": 3}, "compute": {}}


# What Debian's toolkit would do to a driver; the files are written in the form of Debian 13's apt.

DEBIANS = "installed bash\ninstalled nvidia-driver\ninstalled nvidia-kernel-dkms\ninstalled libcuda1\n"
NVIDIAS = "installed bash\ninstalled cuda-drivers\nhalf-configured nvidia-open\n"
LIBRARIES = "installed bash\ninstalled libcuda1\ninstalled libnvidia-ml1\ninstalled nvidia-alternative\n"
GONE = "config-files nvidia-kernel-dkms\nnot-installed nvidia-driver\n"
NEW = [
    "install nvidia-installer-cleanup 20240109+1",
    "install glx-alternative-nvidia 1.2.2",
    "install nvidia-legacy-check 550.163.01-2",
    "install nvidia-alternative 550.163.01-2",
    "install nvidia-support 20240109+1",
    "install libnvidia-ptxjitcompiler1 550.163.01-2",
    "install libnvidia-pkcs11-openssl3 550.163.01-2",
    "install libcuda1 550.163.01-2",
    "install libnvidia-ml1 550.163.01-2",
]


@pytest.mark.parametrize(
    ("file", "packages", "loaded", "changes"),
    [
        ("nothing_touched", DEBIANS, True, []),
        ("driver_new", "installed bash\n", False, []),
        # The toolkit's own dependencies, of a run that was interrupted.
        ("driver_new", LIBRARIES, False, []),
        ("driver_new", GONE, False, []),
        ("driver_new", "installed bash\n", True, NEW),
        ("driver_new", NVIDIAS, False, NEW),
        (
            "driver_removed",
            NVIDIAS,
            False,
            [
                "remove cuda-drivers 580.95.05-1",
                "remove nvidia-driver-cuda 580.95.05-1",
                "remove nvidia-kernel-dkms 580.95.05-1",
            ],
        ),
    ],
    ids=["untouched", "new", "resumed", "purged", "new beneath a loaded one", "new beside NVIDIA's", "removed"],
)
def test_what_apt_would_do_to_the_driver(file: str, packages: str, loaded: bool, changes: list[str]) -> None:
    assert cuda.driver_changes((APT / f"{file}.txt").read_text(), packages, loaded) == changes


@pytest.mark.parametrize(("packages", "loaded"), [(DEBIANS, True), (DEBIANS, False), (LIBRARIES, False)])
def test_a_driver_that_apt_would_upgrade_is_told_of_loaded_or_not(packages: str, loaded: bool) -> None:
    changes = cuda.driver_changes((APT / "driver_upgraded.txt").read_text(), packages, loaded)
    there = [change for change in changes if change.startswith("change ")]
    assert len(there) == 10
    assert "change nvidia-kernel-dkms from 535.247.01-1~deb12u1 to 550.163.01-2" in there
    assert [change for change in changes if change not in there] == (
        ["install libnvidia-pkcs11-openssl3 550.163.01-2"] if packages == DEBIANS else []
    )


def test_a_package_that_is_unpacked_again_is_not_changed() -> None:
    again = "Inst libcuda1 [550.163.01-2] (550.163.01-2 Debian:13.1/stable [amd64])\n"
    assert cuda.driver_changes(again, DEBIANS, loaded=True) == []


@pytest.mark.parametrize(
    ("package", "told"),
    [
        ("nvidia-cuda-mps", True),
        ("nvidia-tesla-535-kernel-dkms", True),
        ("libnvidia-compute-550", True),
        ("linux-modules-nvidia-550-server-6.8.0-49-generic", True),
        ("xserver-xorg-video-nvidia", True),
        ("firmware-nvidia-gsp", True),
        ("libcuda1-i386", True),
        ("nvidia-cuda-dev", False),
        ("nvidia-cuda-toolkit-doc", False),
        ("nvidia-visual-profiler", False),
        ("libnvidia-ml-dev", False),
        ("libcudart12", False),
        ("libnvrtc12", False),
    ],
)
def test_driver_and_toolkit_are_told_apart(package: str, told: bool) -> None:
    text = f"Inst {package} (1 Debian:13.1/stable [amd64])\n"
    assert (cuda.driver_changes(text, "", loaded=True) == [f"install {package} 1"]) is told


def test_lines_that_are_not_dpkgs_are_refused() -> None:
    with pytest.raises(ValueError, match="packages: got the line 'no packages found', want dpkg's status and name"):
        cuda.driver_changes("", "no packages found", loaded=False)
