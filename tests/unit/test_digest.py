"""What a job is made from: what counts, and where it is read."""

from __future__ import annotations

from typing import Any

import pytest

from gleaner import digest

PLAN: dict[str, Any] = {
    "v": 1,
    "tier": "fast",
    "kind": "layer_split",
    "priority": 10,
    "slurm": {"nodes": ["vasp-02"], "exclude": ["vasp-01"]},
    "engine": {"prefix": "/cluster/shared/ai/llama.cpp/0.5.0-cpu"},
    "nodes": {"vasp-02": {"address": "10.0.0.12"}},
    "server": {"node_port": 8080, "args": ["--models-max", "2"]},
    "models": ["one"],
    "drain_seconds": 5,
    "memory": [{"device": "vasp-02 host"}],
    "warnings": [],
}
SCRIPT = "#!/bin/sh\n#SBATCH --mem=100M\n"


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {"prefix": "/cluster/shared/ai/llama.cpp/0.6.0-cpu"}},
        {"nodes": {"vasp-03": {"address": "10.0.0.13"}}},
        {"server": {"node_port": 8081, "args": ["--models-max", "2"]}},
        {"server": {"node_port": 8080, "args": ["--models-max", "3"]}},
        {"drain_seconds": 6},
        {"a part that a later version adds": 1},
    ],
)
def test_what_a_running_job_would_do_otherwise_counts(change: dict[str, Any]) -> None:
    assert digest.of({**PLAN, **change}, SCRIPT) != digest.of(PLAN, SCRIPT)


def test_the_script_counts() -> None:
    assert digest.of(PLAN, SCRIPT.replace("100M", "200M")) != digest.of(PLAN, SCRIPT)


@pytest.mark.parametrize(
    "change",
    [
        {"models": ["one", "two"]},
        {"memory": []},
        {"warnings": ["competes"]},
        {"priority": 20},
        {"slurm": {"nodes": ["vasp-02"], "exclude": ["vasp-01", "vasp-04"]}},
    ],
)
def test_what_changes_nothing_for_a_running_job_does_not(change: dict[str, Any]) -> None:
    assert digest.of({**PLAN, **change}, SCRIPT) == digest.of(PLAN, SCRIPT)


def test_it_does_not_depend_on_the_order_of_keys() -> None:
    assert digest.of(dict(reversed(PLAN.items())), SCRIPT) == digest.of(PLAN, SCRIPT)


def test_it_is_read_from_scripts_and_comments() -> None:
    made = digest.of(PLAN, SCRIPT)
    assert digest.read(f"#!/bin/sh\n#SBATCH --comment=gleaner:{made}\n") == made
    assert digest.read(digest.replaced(made)) == digest.read(digest.outranked(made)) == made
    assert [digest.read(text) for text in ("", "(null)", "gleaner:", f"gleaner:{made}0")] == [""] * 4


def test_a_job_that_has_to_end_is_marked_even_if_it_had_no_digest() -> None:
    assert all(digest.is_replaced(digest.replaced(made)) for made in ("", digest.of(PLAN, SCRIPT)))
    assert not any(digest.is_replaced(text) for text in ("", "replaced", f"gleaner:{digest.of(PLAN, SCRIPT)}"))


def test_an_outranked_job_is_no_replaced_one() -> None:
    for made in ("", digest.of(PLAN, SCRIPT)):
        assert digest.is_outranked(digest.outranked(made))
        assert not digest.is_replaced(digest.outranked(made))
        assert not digest.is_outranked(digest.replaced(made))


# A router takes one of its nodes


def entry(number: int) -> dict[str, Any]:
    return {"address": f"10.0.0.{number}", "numa_node": 0}


def router(*numbers: int, site: int = 4, **change: Any) -> tuple[dict[str, Any], str]:
    """Plan and script of a router tier that may use these of a site's nodes."""
    names = [f"vasp-0{number}" for number in numbers]
    exclude = [name for name in (f"vasp-0{number}" for number in range(1, site + 1)) if name not in names]
    told = f"nodelist={names[0]}" if len(names) == 1 else f"exclude={','.join(exclude)}"
    nodes = {f"vasp-0{number}": entry(number) for number in numbers}
    plan = {**PLAN, "kind": "router", "nodes": nodes, "slurm": {"nodes": names, "exclude": exclude}, **change}
    return plan, SCRIPT + f"#SBATCH --{told}\n#SBATCH --requeue\n"


def stays(was: tuple[dict[str, Any], str], now: tuple[dict[str, Any], str], host: str = "vasp-02") -> bool:
    """A job that was made from one plan and runs on this host is left alone when the other is in force."""
    return digest.may_run_on(digest.of(*was), digest.of(*now), digest.nodes_of(now[0]), [host])


@pytest.mark.parametrize(
    "now",
    [
        pytest.param(router(2, 3, 4), id="another candidate"),
        pytest.param(router(2), id="a candidate that is not used is gone"),
        pytest.param(router(2, 1), id="other candidates"),
        pytest.param(router(3, 2), id="another order"),
        pytest.param(router(2, 3, site=5), id="a node joined the site"),
        pytest.param(router(2, 3, nodes={"vasp-02": entry(2), "vasp-03": entry(9)}), id="another's address"),
    ],
)
def test_a_router_s_job_that_runs_outlives_changes_of_nodes_that_it_does_not_use(now: tuple[Any, str]) -> None:
    was = router(2, 3)
    assert stays(was, now)
    assert digest.of(*was) != digest.of(*now), "one that waits has to be told"


@pytest.mark.parametrize(
    "now",
    [
        pytest.param(router(3, 4), id="its node is no candidate any more"),
        pytest.param(router(2, 3, nodes={"vasp-02": entry(9), "vasp-03": entry(3)}), id="its node's address"),
        pytest.param(router(2, 3, drain_seconds=6), id="another plan"),
        pytest.param(({**router(2, 3)[0], "kind": "layer_split"}, router(2, 3)[1]), id="another kind"),
    ],
)
def test_a_router_s_job_ends_for_what_it_would_do_otherwise(now: tuple[Any, str]) -> None:
    assert not stays(router(2, 3), now)


def test_a_router_s_job_may_not_stay_on_a_node_of_which_its_plan_did_not_know() -> None:
    assert not stays(router(2, 3), router(2, 3, 4), "vasp-04")


def test_nothing_is_said_of_a_job_without_nodes() -> None:
    was, now = digest.of(*router(2, 3)), digest.of(*router(2, 3, 4))
    assert not digest.may_run_on(was, now, ["vasp-02", "vasp-03", "vasp-04"], [])


@pytest.mark.parametrize("made_from", ["", digest.of(PLAN, SCRIPT), digest.of(*router(2, 3))[:16]])
def test_a_digest_of_one_part_says_nothing_of_nodes(made_from: str) -> None:
    assert not digest.may_run_on(made_from, digest.of(*router(2, 3)), ["vasp-02", "vasp-03"], ["vasp-02"])


def test_both_parts_are_read() -> None:
    made = digest.of(*router(2, 3))
    assert len(made) == 16 + 1 + 3 * 8
    assert digest.read(f"#!/bin/sh\n#SBATCH --comment=gleaner:{made}\n") == made
    assert digest.read(digest.replaced(made)) == digest.read(digest.outranked(made)) == made
    assert digest.is_replaced(digest.replaced(made))
    assert digest.is_outranked(digest.outranked(made))
    assert digest.read(f"gleaner:{made}0") == digest.read(f"gleaner:{made}-") == ""


def test_a_layer_split_tier_needs_all_of_its_nodes() -> None:
    was, now = dict(PLAN), {**PLAN, "nodes": {**PLAN["nodes"], "vasp-03": entry(3)}}
    assert not stays((was, SCRIPT), ({**now, "slurm": {"nodes": ["vasp-02", "vasp-03"]}}, SCRIPT))
