"""The planner judged by a build's own words, wherever they were said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sizing, truth
from gleaner import placement


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("truth")
    truth.prepare(made, "/engine", quick=True)
    return made


def right_answers(folder: Path) -> list[dict[str, Any]]:
    """What a build says of which the planner is right."""
    said = []
    for index, case in enumerate(truth.wanted(folder, quick=True)):
        facts = truth.facts_of(folder, case.model)
        uses = case.planned(facts)
        names = [*(f"rpc{number}" for number in range(len(case.shares))), "cpu"]
        parts = [(use.weights / sizing.MIB, use.kv / sizing.MIB, use.compute / sizing.MIB) for use in uses]
        said.append(
            {
                "id": index,
                "layers": placement.device_of_each_layer(facts["n_layers"], case.shares) if case.shares else [],
                "buffers": {"compute": {name: compute for name, (_, _, compute) in zip(names, parts)}},
                "kv_mib": sum(kv for _, kv, _ in parts),
                "breakdown": [[int(weights), int(kv), int(compute)] for weights, kv, compute in parts],
            }
        )
    return said


def lines(answers: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(one) for one in answers]


def test_what_is_brought_to_the_host_is_whole(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text())
    assert task["bin"] == "/engine/bin"
    assert {run["program"] for run in task["runs"]} == {"llama-fit-params"}
    for run in task["runs"]:
        (model,) = (word for word in run["arguments"] if word.endswith(".gguf"))
        assert model.startswith(f"{sizing.FOLDER}/")
        assert (folder / Path(model).name).exists()
    assert (folder / "sizing_host.py").exists()


def test_a_build_of_which_the_planner_is_right_passes(folder: Path) -> None:
    result = truth.judge(folder, lines(right_answers(folder)), quick=True)
    assert result.differences == []
    assert result.splits > 20
    assert result.kv > 20


def test_a_build_that_takes_less_is_told_of_and_passes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = right_answers(folder)
    for one in answers:
        one["buffers"]["compute"] = {name: mib / 2 for name, mib in one["buffers"]["compute"].items()}
        one["breakdown"] = [[weights, kv, compute // 2] for weights, kv, compute in one["breakdown"]]
    results = folder / "cautious.jsonl"
    results.write_text("\n".join(lines(answers)))
    monkeypatch.setattr(sys, "argv", ["truth", "--quick", "judge", str(folder), str(results)])
    assert truth.main() == 0
    assert "planned too large, those of a MiB and more by up to 2.0" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["layers", "compute", "kv", "weights"])
def test_a_build_that_takes_more_is_told_of(folder: Path, what: str) -> None:
    answers = right_answers(folder)
    one = next(one for one in answers if one["layers"] and one["buffers"]["compute"]["rpc0"] > 10)
    if what == "layers":
        one["layers"] = [1 - layer if layer < 2 else layer for layer in one["layers"]]
    elif what == "compute":
        one["buffers"]["compute"]["rpc0"] *= 1.2
    elif what == "kv":
        one["kv_mib"] += 1
    else:
        one["breakdown"][0][0] += 1000
    assert truth.judge(folder, lines(answers), quick=True).differences


def test_cases_that_were_not_run_are_no_proof(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cases were run"):
        truth.judge(folder, lines(right_answers(folder)[:-1]), quick=True)


def test_its_command_says_how_it_went(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = folder / "results.jsonl"
    answers = right_answers(folder)
    answers[0]["failed"] = "llama-fit-params: error"
    results.write_text("\n".join(lines(answers)))
    monkeypatch.setattr(sys, "argv", ["truth", "--quick", "judge", str(folder), str(results)])
    assert truth.main() == 1
    assert "llama-fit-params: error" in capsys.readouterr().err
