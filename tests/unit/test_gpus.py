"""What `nvidia-smi` answers against what the inventory declares; the answers are as a V100S gives them."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest

from gleaner import gpus

V100S = ["0", "Tesla V100S-PCIE-32GB", "32768", "00000000:3B:00.0", "550.163.01", "7.0", "0", "No"]
DECLARED = gpus.Declared("v100s", 32768, 1)


class Node:
    """A stand-in for `nvidia-smi` with its answers, a sysfs, and the driver's own file."""

    def __init__(self, root: Path) -> None:
        self.root, self.smi = root, root / "nvidia-smi"
        self.smi.write_text(f"#!/bin/sh\ncase $1 in\n*query-gpu=*) cat {root}/gpus;;\n*) cat {root}/apps;;\nesac\n")
        self.smi.chmod(0o755)
        self.module = root / "version"
        self.module.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue Apr  8\n")
        (root / "scontrol").write_text("#!/bin/sh\nprintf 'PID JOBID STEPID LOCALID GLOBALID\\n41 7 batch 0 0\\n'\n")
        (root / "scontrol").chmod(0o755)
        self.answers(V100S)
        self.apps()
        self.numa("0000:3b:00.0", 1)
        self.numa("0000:d8:00.0", 0)

    def answers(self, *rows: list[str]) -> None:
        (self.root / "gpus").write_text("".join(", ".join(row) + "\n" for row in rows) or "No devices were found\n")

    def apps(self, *rows: str) -> None:
        (self.root / "apps").write_text("".join(f"{row}\n" for row in rows))

    def numa(self, bus_id: str, node: int) -> None:
        place = self.root / "sys/bus/pci/devices" / bus_id
        place.mkdir(parents=True, exist_ok=True)
        (place / "numa_node").write_text(f"{node}\n")

    def check(self, *declared: gpus.Declared) -> int:
        parser = argparse.ArgumentParser()
        gpus.add_arguments(parser)
        text = json.dumps([gpu.__dict__ for gpu in declared])
        where = ["--smi", str(self.smi), "--sysfs", str(self.root / "sys"), "--module", str(self.module)]
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
    place = node.root / "sys/bus/pci/devices/0000:3b:00.0/numa_node"
    place.unlink() if numa is None else place.write_text(f"{numa}\n")
    assert node.check(DECLARED) == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (changed(errors="3"), "3 uncorrected ECC error(s)"),
        (changed(pending="Yes"), "pages of its memory wait to be retired"),
        (changed(driver="590.48.01"), "driver of vasp-01: got 590.48.01, want branch 580 or older"),
        (changed(driver="515.105.01"), "driver of vasp-01: got 515.105.01, want branch 525 or later"),
    ],
    ids=["ECC", "pending", "too new", "too old"],
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


def test_a_slurm_that_cannot_be_asked_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.apps("00000000:3B:00.0, 42, python3")
    (node.root / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    assert node.check(DECLARED) == 0
    assert "Slurm cannot be asked whose processes" in capsys.readouterr().out


def test_a_driver_that_is_too_old_to_be_asked_is_named(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.smi.write_text(
        "#!/bin/sh\ncase $1 in *compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2;;\n"
        "*) echo 470.256.02;; esac\n"
    )
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert "got 470.256.02, want branch 525 or later" in capsys.readouterr().err


def test_no_gpu_at_all_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers()
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert "got 1 GPU(s), the driver on vasp-01 has none" in capsys.readouterr().err


def test_the_open_kernel_module_is_named_as_the_reason(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers()
    node.module.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06\n")
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert "the open kernel module is loaded, which serves no Volta" in capsys.readouterr().err


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


def test_a_driver_that_does_not_answer_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate'\nexit 9\n")
    assert node.check(DECLARED) == gpus.EXIT_FAILED
    assert "ended with 9: NVIDIA-SMI has failed" in capsys.readouterr().err


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
