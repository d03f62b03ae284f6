"""What the benchmarks write into docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks import bring_up, day_two, gateway, lab, provisioning, report


def test_only_the_section_is_replaced(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n<!-- y: begin -->\n<!-- y: end -->\n")
    report.write("x", "new", document)
    report.write("x", "newer", document)
    assert document.read_text() == (
        "a\n<!-- x: begin -->\n\nnewer\n\n<!-- x: end -->\nb\n<!-- y: begin -->\n<!-- y: end -->\n"
    )
    assert list(tmp_path.iterdir()) == [document]


def test_missing_markers_are_named() -> None:
    with pytest.raises(ValueError, match="<!-- x: begin -->"):
        report.replace("nothing here", "x", "new")


@pytest.mark.parametrize("section", ["gateway", "bring-up", "provisioning"])
def test_the_document_has_a_place_for_each_section(section: str) -> None:
    assert report.replace(report.DOCUMENT.read_text(), section, "figures")


def test_a_noisy_run_tells_nothing() -> None:
    figures = {"direct": [27.4, 27.4], "direct again": [18.0, 18.0], "gateway": [19.7, 19.7]}
    assert gateway.verdict(figures).startswith("untold")


@pytest.mark.parametrize(("gateway_ms", "verdict"), [([6.0, 5.9], "met"), ([6.1, 6.1], "missed")])
def test_the_gateway_may_add_a_millisecond_to_the_median(gateway_ms: list[float], verdict: str) -> None:
    figures = {"direct": [5.0, 5.0], "direct again": [5.0, 5.0], "gateway": gateway_ms}
    row = gateway.first_token_report({"kept alive": figures}).splitlines()[2]
    assert row.endswith(f"| {verdict} |")


@pytest.mark.parametrize(
    "bad",
    [
        gateway.Stream(1.0, gateway.TOKENS - 1, True),
        gateway.Stream(1.0, gateway.TOKENS, False),
        gateway.Stream(1.0, gateway.TOKENS, True, "reset"),
    ],
)
def test_one_bad_stream_misses_the_bar(bad: gateway.Stream) -> None:
    good = gateway.Stream(1.0, gateway.TOKENS, True)
    assert "met." in gateway.streams_report([good, good], 1.0)
    assert "1 of 2 streams complete" in (text := gateway.streams_report([good, bad], 1.0))
    assert "missed: " in text


def test_bring_up_says_which_bar_is_missed() -> None:
    figures = bring_up.Figures([9.0], [119.0, 121.0, 140.0], [200.0], [60.0], [(1.5, "role : file | A task")])
    text = bring_up.bring_up_report({"date": "today"}, figures, "Slurm")
    assert "| 3 | 121.0 | 119.0 121.0 140.0 | 120 s: missed |" in text
    assert "| 1 | 60.0 | 60.0 | 60 s: met |" in text
    assert "| role : file \\| A task | 1.5 |" in text


def test_the_nodes_that_the_lab_lacks_follow_its_own() -> None:
    assert yaml.safe_load(provisioning.more_nodes(4)) == {"all": {"children": {"slurm_nodes": {"hosts": {}}}}}
    nodes = yaml.safe_load(provisioning.more_nodes(16))["all"]["children"]["slurm_nodes"]["hosts"]
    assert list(nodes) == [f"vasp-{number:02}" for number in range(4, 16)]
    assert (nodes["vasp-04"], nodes["vasp-15"]) == ({"lab_octet": 14}, {"lab_octet": 25})
    with pytest.raises(ValueError, match="wanted at least 4"):
        provisioning.more_nodes(3)


@pytest.mark.parametrize("k", [0.0, 1.0, 2.0])
def test_growth_has_an_exponent(k: float) -> None:
    assert provisioning.exponent({hosts: 0.3 * hosts**k for hosts in (4, 8, 16)}) == pytest.approx(k)


def runs(k: float) -> dict[int, lab.Play]:
    return {
        hosts: lab.Play(10.0 * hosts, {}, [(0.1 * hosts**k, "role : task"), (0.01 * hosts**2, "short")], 3.0 * hosts)
        for hosts in (4, 8)
    }


@pytest.mark.parametrize(("k", "measured"), [(1.2, "none"), (2.0, "role : task")])
def test_a_task_that_grows_with_the_square_misses_its_bar(k: float, measured: str) -> None:
    bars = provisioning.verdicts(runs(1.0), runs(k))
    assert bars[-1] == ("second run: no task grows with the square of the hosts", measured, measured == "none")
    assert all(met for _, _, met in bars[:-1])
    assert "| role : task | " in provisioning.provisioning_report({}, runs(1.0), runs(k))


def test_more_time_for_each_host_misses_its_bar() -> None:
    slower = runs(1.0) | {8: lab.Play(100.0, {}, [], 40.0)}
    missed = [what for what, _, met in provisioning.verdicts(runs(1.0), slower) if not met]
    assert [what.partition(" for")[0] for what in missed] == ["second run: seconds", "second run: CPU seconds here"]


@pytest.mark.parametrize(("seconds", "verdict"), [([75.0, 180.0], "met"), ([75.0, 180.1], "missed")])
def test_a_node_is_replaced_within_three_minutes_each_time(seconds: list[float], verdict: str) -> None:
    found = {day_two.LOOK: [0.5], day_two.REPLACE: seconds}
    assert f"180 s: {verdict} |" in day_two.text_of(found, {"machine": "x"})
    assert day_two.missed(found) == ([day_two.REPLACE] if verdict == "missed" else [])
