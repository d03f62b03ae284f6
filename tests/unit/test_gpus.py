"""What `nvidia-smi` answers against what the inventory declares; the answers are as a V100S gives them."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest

from gleaner import gpus

FAILED = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running."
)
V100S = ["0", "Tesla V100S-PCIE-32GB", "32768", "00000000:3B:00.0", "550.163.01", "7.0", "0", "No"]
DECLARED = gpus.Declared("v100s", 32768, 1)


class Node:
    """Stand-ins for `nvidia-smi`, `modinfo` and `scontrol` with their answers, a sysfs, and a folder as /proc."""

    def __init__(self, root: Path) -> None:
        self.root, self.smi, self.proc = root, root / "nvidia-smi", root / "proc"
        asked = f"*query-gpu=*) cat {root}/gpus; exit $(cat {root}/code);;\n*) cat {root}/apps;;"
        self.program("nvidia-smi", f"case $1 in\n{asked}\nesac")
        self.program("scontrol", "printf 'PID JOBID STEPID LOCALID GLOBALID\\n41 7 batch 0 0\\n'")
        self.loaded("NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue Apr  8 12:41:17 UTC 2025")
        self.installed()
        self.runs(900, "slurmd")
        self.answers(V100S)
        self.apps()
        self.numa("0000:3b:00.0", 1)
        self.numa("0000:d8:00.0", 0)

    def program(self, name: str, text: str) -> None:
        (self.root / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.root / name).chmod(0o755)

    def answers(self, *rows: list[str]) -> None:
        self.says("".join(", ".join(row) + "\n" for row in rows) or "No devices were found\n", 0 if rows else 6)

    def says(self, text: str, code: int) -> None:
        (self.root / "gpus").write_text(text)
        (self.root / "code").write_text(f"{code}\n")

    def apps(self, *rows: str) -> None:
        (self.root / "apps").write_text("".join(f"{row}\n" for row in rows))

    def loaded(self, module: str) -> None:
        """What the kernel says of the driver's module; nothing when none is loaded."""
        file = self.proc / "driver/nvidia/version"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        if module:
            file.write_text(f"NVRM version: {module}\nGCC version:  gcc version 14.2.0 (Debian 14.2.0-19)\n")

    def installed(self, version: str = "", licence: str = "", name: str = "nvidia-current") -> None:
        """A module that `modinfo` knows, by Debian's name for it."""
        asked = f"'-F version {name}') echo {version};;\n'-F license {name}') echo '{licence}'"
        self.program(
            "modinfo",
            f"case $* in\n{asked if version else 'nothing) :'};;\n"
            '*) echo "modinfo: ERROR: Module $3 not found." >&2; exit 1;;\nesac',
        )

    def runs(self, pid: int, name: str) -> None:
        (self.proc / str(pid)).mkdir(parents=True, exist_ok=True)
        (self.proc / str(pid) / "comm").write_text(f"{name}\n")

    def numa(self, bus_id: str, node: int) -> None:
        self._device(bus_id, numa_node=str(node))

    def card(self, bus_id: str, device: str, kind: str = "0x030200") -> None:
        """A device of NVIDIA on the PCI bus."""
        self._device(bus_id, **{"vendor": "0x10de", "device": device, "class": kind})

    def bridge(self) -> None:
        """What any machine has on its PCI bus."""
        self._device("0000:00:00.0", **{"vendor": "0x8086", "device": "0x2020", "class": "0x060000"})

    def _device(self, bus_id: str, **files: str) -> None:
        place = self.root / "sys/bus/pci/devices" / bus_id
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name).write_text(f"{text}\n")

    def numa_nodes(self, *nodes: int) -> None:
        for node in nodes:
            (self.root / f"sys/devices/system/node/node{node}").mkdir(parents=True)

    def check(self, *declared: gpus.Declared) -> int:
        parser = argparse.ArgumentParser()
        gpus.add_arguments(parser)
        text = json.dumps([gpu.__dict__ for gpu in declared])
        where = ["--smi", str(self.smi), "--sysfs", str(self.root / "sys"), "--proc", str(self.proc)]
        return gpus.run(parser.parse_args(["check", text, "--node", "vasp-01", *where]))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(gpus, "AGAIN_SECONDS", 0.0)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Node(tmp_path)


def changed(**fields: str) -> list[str]:
    names = ("index", "name", "memory", "bus", "driver", "capability", "errors", "pending")
    return [fields.get(name, value) for name, value in zip(names, V100S, strict=True)]


def test_a_node_that_is_as_declared_passes(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    assert node.check(DECLARED) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("rows", "numa", "wrong", "line"),
    [
        ([changed(memory="16384")], 1, "memory_mib 32768, vasp-01 has 16384", "memory_mib: 16384, numa_node: 1"),
        ([changed(name="Tesla V100-SXM2-32GB")], 1, "model v100s, vasp-01 has Tesla V100-SXM2", "{model: v100, "),
        ([V100S], 0, "numa_node 1, on vasp-01 it sits beside 0", "memory_mib: 32768, numa_node: 0"),
        ([changed(name="NVIDIA A100-PCIE-40GB")], 1, "model v100s, vasp-01 has NVIDIA A100", "{model: a100,"),
        (
            [V100S, changed(index="1", bus="00000000:D8:00.0")],
            1,
            "1 GPU(s), vasp-01 has 2",
            "[{model: v100s, memory_mib: 32768, numa_node: 1}, {model: v100s, memory_mib: 32768, numa_node: 0}]",
        ),
    ],
    ids=["memory", "sxm2", "numa", "model", "count"],
)
def test_a_mismatch_prints_the_line_to_write(
    node: Node, rows: list[list[str]], numa: int, wrong: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    node.answers(*rows)
    node.numa("0000:3b:00.0", numa)
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    said = capsys.readouterr().err
    assert "hostvars[vasp-01].gpus: got " in said
    assert wrong in said
    assert line in said.partition("write gpus: ")[2]


@pytest.mark.parametrize("numa", [-1, None], ids=["no NUMA", "not told"])
def test_a_machine_that_does_not_tell_its_numa_node_is_believed_what_is_declared(node: Node, numa: int | None) -> None:
    untold(node, numa)
    assert node.check(DECLARED) == 0
    node.numa_nodes(0, 1)
    assert node.check(DECLARED) == 0


def untold(node: Node, numa: int | None) -> None:
    place = node.root / "sys/bus/pci/devices/0000:3b:00.0/numa_node"
    place.unlink() if numa is None else place.write_text(f"{numa}\n")


@pytest.mark.parametrize("numa", [-1, None], ids=["no NUMA", "not told"])
@pytest.mark.parametrize(("nodes", "has"), [((0,), "node0"), ((0, 2, 10), "node0, node2, node10")])
def test_a_numa_node_that_the_machine_does_not_have_is_not_believed(
    node: Node, numa: int | None, nodes: tuple[int, ...], has: str, capsys: pytest.CaptureFixture[str]
) -> None:
    untold(node, numa)
    node.numa_nodes(*nodes)
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert (
        f"got gpus[0] (0000:3b:00.0): numa_node 1, vasp-01 has {has}: "
        "write gpus: [{model: v100s, memory_mib: 32768, numa_node: 0}]"
    ) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (changed(errors="3"), "3 uncorrected ECC error(s)"),
        (changed(pending="Yes"), "pages of its memory wait to be retired"),
        (changed(driver="515.105.01"), "driver of vasp-01: got 515.105.01, want branch 525 or later"),
    ],
    ids=["ECC", "pending", "too old"],
)
def test_a_fault_is_told_with_its_cure(
    node: Node, row: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    node.answers(row)
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert said in capsys.readouterr().err


def test_what_a_gpu_does_not_count_is_no_fault(node: Node) -> None:
    node.answers(changed(errors="[N/A]", pending="[N/A]"))
    assert node.check(DECLARED) == 0


def test_a_younger_driver_serves_younger_gpus(node: Node) -> None:
    node.answers(changed(name="NVIDIA A100-PCIE-40GB", driver="590.48.01", capability="8.0"))
    assert node.check(gpus.Declared("a100", 32768, 1)) == 0


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Tesla V100S-PCIE-32GB", "v100s"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla T4", "t4"),
        ("NVIDIA T400 4GB", ""),
        ("Quadro RTX 6000", "rtx6000"),
        ("NVIDIA RTX 6000 Ada Generation", ""),
        ("NVIDIA RTX A4000", ""),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", ""),
        ("Tesla P100-PCIE-16GB", ""),
    ],
)
def test_a_card_is_called_by_its_own_name_only(name: str, model: str) -> None:
    assert gpus.model_of(name) == model


def test_a_model_that_the_planner_does_not_know_is_not_compared(node: Node) -> None:
    node.answers(changed(name="Tesla P100-PCIE-16GB", memory="16384", capability="6.0"))
    assert node.check(gpus.Declared("p100", 16384, 1)) == 0


@pytest.mark.parametrize("field", ["index", "memory", "errors", "pending"])
@pytest.mark.parametrize("text", ["[GPU requires reset]", "[Unknown Error]", "[GPU is lost]"])
def test_a_gpu_in_a_bad_state_is_never_sound(
    node: Node, field: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    node.answers(changed(**{field: text}))
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert f"a GPU answers {text}: drain the node" in capsys.readouterr().err


def test_a_line_that_cannot_be_read_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers(["0", "Tesla V100S-PCIE-32GB"])
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert "cannot read the line" in capsys.readouterr().err


def test_a_process_with_a_comma_in_its_name_is_seen(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.apps("00000000:3B:00.0, 42, ray::Worker(a, b)")
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert "held by pid 42 (ray::Worker(a, b))" in capsys.readouterr().err


def test_a_process_that_ends_meanwhile_is_no_stranger(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.apps("00000000:3B:00.0, 42, vasp_gpu")
    monkeypatch.setattr(time, "sleep", lambda _: node.apps())
    assert node.check(DECLARED) == 0


def test_a_gpu_that_others_may_use_has_no_strangers(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.apps("00000000:3B:00.0, 42, python3")
    assert node.check(gpus.Declared("v100s", 32768, 1, 2048)) == 0
    assert "memory_used_mib" in capsys.readouterr().out
    node.answers(changed(memory="16384"))
    assert node.check(gpus.Declared("v100s", 32768, 1, 2048)) == gpus.EXIT_FAILED
    assert "numa_node: 1, memory_used_mib: 2048}]" in capsys.readouterr().err


def test_what_is_not_compared_stays_in_the_line(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers(changed(memory="16384"))
    declared = gpus.Declared("v100s", 32768, 1, cores="0-19", device="/dev/nvidia0")
    assert node.check(declared) == gpus.EXIT_FAILED
    assert 'memory_mib: 16384, numa_node: 1, cores: "0-19", device: /dev/nvidia0}]' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["slurmd", "slurmstepd"])
@pytest.mark.parametrize("asked", ["exit 1", None], ids=["fails", "not there"])
def test_a_slurm_that_cannot_be_asked_is_refused(
    node: Node, name: str, asked: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    node.runs(900, name)
    node.answers(changed(errors="3"))
    node.apps("00000000:3B:00.0, 42, python3", "00000000:3B:00.0, 43, vasp_gpu")
    node.program("scontrol", asked) if asked else (node.root / "scontrol").unlink()
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    said = capsys.readouterr().err
    assert "vasp-01: Slurm cannot be asked whose processes are on its GPUs (pid 42, 43)" in said
    assert "start slurmd, and run again" in said
    assert "3 uncorrected ECC error(s)" in said


def test_a_slurm_that_cannot_be_asked_is_none_of_our_business_while_nobody_has_the_gpus(node: Node) -> None:
    node.program("scontrol", "exit 1")
    assert node.check(DECLARED) == 0


@pytest.mark.parametrize("asked", ["exit 1", None], ids=["fails", "not there"])
def test_where_no_slurm_runs_no_process_is_a_job(
    node: Node, asked: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    node.runs(900, "sshd")
    node.apps("00000000:3B:00.0, 42, python3")
    node.program("scontrol", asked) if asked else (node.root / "scontrol").unlink()
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert "held by pid 42 (python3), which is no job of Slurm" in capsys.readouterr().err


def test_a_driver_that_is_too_old_to_be_asked_is_named(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.program(
        "nvidia-smi",
        "case $1 in *compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2;;\n"
        "*) echo 470.256.02;; esac",
    )
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert "got 470.256.02, want branch 525 or later" in capsys.readouterr().err


def test_a_field_that_a_young_driver_does_not_know_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.program(
        "nvidia-smi",
        "case $1 in *pages*) echo 'Field \"retired_pages.pending\" is not a valid field to query.'; exit 2;;\n"
        "*) echo 610.43.02;; esac",
    )
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    said = capsys.readouterr().err
    assert said.endswith('ended with 2: Field "retired_pages.pending" is not a valid field to query.\n')


def test_no_gpu_at_all_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers()
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    said = capsys.readouterr().err
    assert "got 1 GPU(s), the driver on vasp-01 has none: look at `dmesg` and the power cables" in said


# A driver that does not serve what is there: nvidia-smi does not say so

OPEN = "NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@vasp-01)"
VOLTA_CURE = "install the proprietary flavour of branch 580 or older; Gleaner changes no driver"


def refusal(node: Node, capsys: pytest.CaptureFixture[str], *declared: gpus.Declared) -> str:
    """The one thing that is wrong with the node."""
    assert node.check(*declared or (DECLARED,)) == gpus.EXIT_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_branch_that_ignores_volta_is_named_as_the_reason(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.says(FAILED, 9)
    node.loaded("")
    node.installed("590.48.01", "NVIDIA")
    assert refusal(node, capsys) == (
        "error: driver of vasp-01: got 590.48.01, proprietary, not loaded: branches after 580 serve no Volta "
        f"({node.smi} ended with 9: {FAILED}): {VOLTA_CURE}"
    )


@pytest.mark.parametrize("name", ["nvidia", "nvidia-current-open"])
def test_the_open_flavour_is_named_as_the_reason(node: Node, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    node.says(FAILED, 9)
    node.loaded("")
    node.installed("580.65.06", "Dual MIT/GPL", name)
    said = refusal(node, capsys)
    assert "driver of vasp-01: got 580.65.06, open, not loaded: the open flavour serves no Volta (" in said
    assert said.endswith(VOLTA_CURE)


def test_the_open_flavour_that_finds_no_device_is_named_as_the_reason(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    node.answers()
    node.loaded(OPEN)
    assert refusal(node, capsys) == (
        "error: driver of vasp-01: got 580.65.06, open, loaded: the open flavour serves no Volta "
        f"(nvidia-smi lists 0 of 1 GPU(s)): {VOLTA_CURE}"
    )


def test_a_node_without_a_driver_is_told_which_to_install(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.says(FAILED, 9)
    node.loaded("")
    said = refusal(node, capsys)
    assert "driver of vasp-01: got no kernel module for Linux " in said
    assert "install a driver and load it, for Volta the proprietary flavour of branch 580 or older" in said


@pytest.mark.parametrize(
    ("module", "got", "cure"),
    [
        ("", "got 550.163.01, proprietary, not loaded (", "load it with `modprobe nvidia`"),
        ("NVIDIA UNIX x86_64 Kernel Module  550.163.01", "got 550.163.01, proprietary, loaded (", "`dmesg` says why"),
    ],
    ids=["not loaded", "loaded"],
)
def test_a_driver_that_serves_volta_is_not_the_reason(
    node: Node, module: str, got: str, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    node.says("Failed to initialize NVML: Driver/library version mismatch", 18)
    node.loaded(module)
    if not module:
        node.installed("550.163.01", "NVIDIA")
    said = refusal(node, capsys)
    assert got in said
    assert "ended with 18: Failed to initialize NVML" in said
    assert cure in said


def test_volta_beside_a_younger_card_is_missed(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    both = (gpus.Declared("a100", 40960, 1), gpus.Declared("v100s", 32768, 0))
    node.answers(changed(name="NVIDIA A100-PCIE-40GB", memory="40960", driver="590.48.01", capability="8.0"))
    node.loaded("NVIDIA UNIX x86_64 Kernel Module  590.48.01")
    assert "branches after 580 serve no Volta (nvidia-smi lists 1 of 2 GPU(s))" in refusal(node, capsys, *both)
    node.card("0000:3b:00.0", "0x20f1")
    node.card("0000:d8:00.0", "0x1df6")
    assert "branches after 580 serve no Volta (nvidia-smi lists 1 of 2 GPU(s))" in refusal(node, capsys, *both)


def test_the_pci_bus_knows_better_than_the_inventory_what_is_there(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    node.says(FAILED, 9)
    node.loaded("")
    node.installed("590.48.01", "NVIDIA")
    node.bridge()
    node.card("0000:3b:00.1", "0x10fa", kind="0x040300")
    assert "got 1 GPU(s), on the PCI bus of vasp-01 is none: look at the power cables" in refusal(node, capsys)
    node.card("0000:3b:00.0", "0x20f1")
    assert "load it with `modprobe nvidia`" in refusal(node, capsys)
    node.card("0000:3b:00.0", "0x1db6")
    assert "serve no Volta" in refusal(node, capsys, gpus.Declared("p100", 16384, 1))


@pytest.mark.parametrize(("pid", "known"), [(41, True), (42, False)])
def test_a_process_that_is_no_job_of_slurm_is_named(
    node: Node, pid: int, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    node.apps(f"00000000:3B:00.0, {pid}, python3")
    assert node.check(DECLARED) == (0 if known else gpus.EXIT_FAILED)
    assert (f"held by pid {pid} (python3)" in capsys.readouterr().err) != known


def test_a_missing_nvidia_smi_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.smi.unlink()
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert "install the NVIDIA driver, branch 580 or older" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", "[{}]", '[{"model": 1, "memory_mib": "x", "numa_node": 0}]'])
def test_what_is_no_declaration_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    gpus.add_arguments(parser)
    assert gpus.run(parser.parse_args(["check", text])) == gpus.EXIT_REFUSED
    assert "want a list of model, memory_mib and numa_node" in capsys.readouterr().err


# At the start of a tier

TWO = [V100S, changed(index="1", bus="00000000:D8:00.0")]


def usable(node: Node, wanted: int = 1, **environment: Any) -> None:
    gpus.wait_until_usable(str(node.smi), "vasp-01", environment, wanted, shared=False)


def test_a_gpu_that_nobody_has_is_usable_at_once(node: Node) -> None:
    usable(node)


def test_a_process_that_is_ending_is_waited_for(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.apps("00000000:3B:00.0, 42, llama-server")
    monkeypatch.setattr(time, "sleep", lambda _: node.apps())
    usable(node)


def test_a_process_that_stays_is_named(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.apps("00000000:3B:00.0, 42, python3")
    monkeypatch.setattr(gpus, "LINGER_SECONDS", 0.0)
    with pytest.raises(gpus.GpuError, match=r"held by pid 42 \(python3\)"):
        usable(node)


def test_the_gpu_of_another_job_is_none_of_ours(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LINGER_SECONDS", 0.0)
    node.answers(*TWO)
    node.apps("00000000:3B:00.0, 42, vasp_gpu")
    usable(node, CUDA_VISIBLE_DEVICES="1")
    with pytest.raises(gpus.GpuError, match="held by pid 42"):
        usable(node, CUDA_VISIBLE_DEVICES="0")


def test_a_gpu_that_fell_off_the_bus_is_missed(node: Node) -> None:
    node.answers()
    with pytest.raises(gpus.GpuError, match=r"got 0 GPU\(s\) that answer, want 1"):
        usable(node)


def test_a_gpu_with_errors_is_refused_unless_it_is_another_jobs(node: Node) -> None:
    node.answers(V100S, changed(index="1", bus="00000000:D8:00.0", errors="1"))
    usable(node, CUDA_VISIBLE_DEVICES="0")
    with pytest.raises(gpus.GpuError, match="uncorrected ECC"):
        usable(node, CUDA_VISIBLE_DEVICES="1")
