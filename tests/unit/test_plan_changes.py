"""plan_changes: what a person wants to see of two plans, and nothing else."""

from __future__ import annotations

from typing import Any

from gleaner.plan_changes import changes


def plan(tier: str = "fast", **more: Any) -> dict[str, Any]:
    memory = [{"device": "vasp-02 CUDA0", "weights": 14000, "limit": 32768}]
    return {"v": 1, "tier": tier, "memory": memory, "slurm": {"mem_mib": 2000, "nodes": ["vasp-02"]}, **more}


def test_the_same_plans_have_no_changes() -> None:
    assert changes([plan(), plan("reasoning")], [plan("reasoning"), plan()]) == []


def test_a_smaller_gpu_is_told_by_its_numbers() -> None:
    smaller = [{"device": "vasp-02 CUDA0", "weights": 14000, "limit": 16384}]
    slurm = {"mem_mib": 2100, "nodes": ["vasp-02", "vasp-03"]}
    assert changes([plan()], [plan(memory=smaller, slurm=slurm)]) == [
        "fast: memory[vasp-02 CUDA0].limit: 32768 -> 16384",
        "fast: slurm.mem_mib: 2000 -> 2100",
        "fast: slurm.nodes: vasp-02 -> vasp-02,vasp-03",
    ]


def test_a_device_that_comes_and_one_that_goes_are_told() -> None:
    other = [{"device": "vasp-02 CUDA1", "weights": 1}]
    assert changes([plan(memory=[{"device": "vasp-02 CUDA0", "weights": 2}])], [plan(memory=other)]) == [
        "fast: memory[vasp-02 CUDA1].device: nothing -> vasp-02 CUDA1",
        "fast: memory[vasp-02 CUDA1].weights: nothing -> 1",
        "fast: memory[vasp-02 CUDA0].device: vasp-02 CUDA0 -> nothing",
        "fast: memory[vasp-02 CUDA0].weights: 2 -> nothing",
    ]


def test_tiers_that_come_and_go_are_named_and_long_texts_left_out() -> None:
    assert changes([plan("old"), plan()], [plan(warnings=["much"], chat_template="{{ long }}"), plan("new")]) == [
        "new: planned for the first time",
        "old: not planned any more",
    ]
