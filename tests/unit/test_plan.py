"""Plans: what a tier's job is told, and the memory arithmetic behind it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gleaner import memory, plan
from gleaner import site as site_model
from tests.unit import sites

ROOT = Path(__file__).resolve().parents[2]


def recorded(inventory: str, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((ROOT / f"inventories/{inventory}/models/{name}.json").read_text())
    return value


BEHEMOTH = recorded("beefcake2", "or1-behemoth-72b-q4_k_m")
CODER = recorded("beefcake2", "strand-rust-coder-14b-q8_0")
GEMMA = recorded("lab", "gemma-3-270m-q4_k_m")


def read(value: dict[str, Any], headers: dict[str, Any]) -> site_model.Site:
    return site_model.read(value, headers)


def site_with(**models: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A site of one router tier on vasp-02 with these models, and their headers."""
    value = sites.site()
    value["models"] = [sites.model(name) for name in models]
    value["tiers"] = value["tiers"][:1]
    return value, dict(models)


def test_plan_of_a_router_tier() -> None:
    got = plan.plan_tier(sites.site(), "fast", sites.headers())
    assert got["slurm"] == {
        "partition": "gpu_ai",
        "qos": "ai_opportunistic",
        "account": "ai",
        "node_count": 1,
        "nodes": ["vasp-02"],
        "exclude": ["vasp-01", "vasp-03"],
        "gpus_per_node": 1,
        "cpus_per_node": 8,
        "mem_mib": got["slurm"]["mem_mib"],
        "signal_seconds": 25,
        "nice": 100000,
    }
    assert got["nodes"] == {
        "vasp-02": {
            "address": "10.0.0.12",
            "rpc_address": "10.0.1.12",
            "numa_node": 1,
            "gpus": {"count": 1, "shared": False},
            "role": "router",
        }
    }
    assert got["engine"] == {
        "prefix": "/cluster/shared/ai/llama.cpp/0.5.0-cuda",
        "flash_attention": False,
        "memory": "/scratch/ai/state/engine.json",
    }
    assert got["models"] == ["small", "other"]
    assert (got["v"], got["cluster"], got["tier"], got["kind"]) == (1, "test", "fast", "router")
    assert (got["job_name"], got["priority"]) == ("llama-14b", 10)
    assert (got["drain_seconds"], got["load_timeout_seconds"]) == (5, 600)


def options(args: list[str]) -> dict[str, str]:
    """``--flag value`` pairs of an argument list; a flag without a value has ''."""
    found: dict[str, str] = {}
    for word, after in zip(args, [*args[1:], "--"]):
        if word.startswith("--"):
            found[word] = "" if after.startswith("--") else after
    return found


def test_router_arguments() -> None:
    value = sites.site()
    value["tiers"][0].update(parallel=2, server_args=["--verbosity", "4"], threads=12)
    got = plan.plan_tier(value, "fast", sites.headers())["server"]
    assert got["node_port"] == 8080
    flags = options(got["args"])
    assert flags["--models-dir"] == "/scratch/ai/models"
    assert flags["--models-max"] == "2"
    assert (flags["--ctx-size"], flags["--parallel"]) == ("8192", "2")
    assert (flags["--flash-attn"], flags["--fit"], flags["--gpu-layers"]) == ("off", "off", "999")
    assert (flags["--load-mode"], flags["--cache-ram"], flags["--timeout"]) == ("mlock", "0", "600")
    assert flags["--threads"] == "12"
    assert got["args"][-2:] == ["--verbosity", "4"]
    assert not {"--host", "--port", "--mlock", "--no-mmap"} & set(flags)
    assert all(isinstance(word, str) for word in got["args"])


def test_cpu_tier_locks_all_its_weights_and_offloads_nothing() -> None:
    value = sites.site()
    value["llama_cpp"]["backend"] = "cpu"
    flags = options(plan.plan_tier(value, "fast", sites.headers())["server"]["args"])
    assert "--no-repack" in flags
    assert "--gpu-layers" not in flags


def test_cpu_host_memory_is_the_sum_of_its_parts() -> None:
    value, headers = site_with(a=sites.facts(), b=sites.facts(), c=sites.facts())
    value["llama_cpp"]["backend"] = "cpu"
    value["tiers"][0]["prompt_cache_mib"] = 100
    got = plan.plan_tier(value, "fast", headers)
    tier = read(value, headers).tiers["fast"]
    (row,) = got["memory"]
    # Two of three at a time, 38 MiB of weights each; K and V of 2 heads of 32 in f16, 4096 cells, 4 layers.
    # Each tensor may be padded.
    assert row["weights"] == 2 * 38 + 1
    assert row["kv"] == 2 * 4
    # The router, and each process's own share and prompt cache.
    batch = plan.batch_of(read(value, headers), tier, 512)
    own = memory.server_bytes(headers["a"], batch, cuda=False) + memory.cpu_work_bytes(headers["a"], batch)
    assert row["other"] == memory.mib(memory.SERVER_BYTES + memory.JOB_BYTES + 2 * (own + 100 * 2**20))
    assert row["total"] == row["weights"] + row["kv"] + row["compute"] + row["other"] == got["slurm"]["mem_mib"]
    assert row["headroom"] == row["limit"] - row["total"]
    assert (row["device"], row["limit"], row["verdict"]) == ("vasp-02 host", 384000, "fits")


def test_a_sliding_window_costs_host_memory_for_checkpoints() -> None:
    value, headers = site_with(gemma=GEMMA)
    value["llama_cpp"]["backend"] = "cpu"
    (row,) = plan.plan_tier(value, "fast", headers)["memory"]
    checkpoints = 32 * 15 * 1024 * (2 * 256 * 2) // 2**20
    assert checkpoints < row["other"] < checkpoints + 400


def test_memory_mib_overrides_the_planned_memory_with_a_warning_when_it_is_less() -> None:
    value = sites.site()
    value["tiers"][0]["memory_mib"] = 1000
    got = plan.plan_tier(value, "fast", sites.headers())
    assert got["slurm"]["mem_mib"] == 1000
    assert any("memory_mib 1000 is less than the" in warning for warning in got["warnings"])


def test_two_14b_do_not_fit_32_gib_and_what_fits_is_named() -> None:
    value, headers = site_with(first=CODER, second=CODER)
    value["tiers"][0]["context_tokens"] = 16384
    (problem,) = plan.problems(value, headers)
    assert problem.variable == "tiers[0].models_max"
    assert "first" in problem.got
    assert "second" in problem.got
    assert problem.wanted == "at most 32768 MiB, the GPU of vasp-02"
    assert problem.cure.startswith("models_max: 1")
    value["tiers"][0]["models_max"] = 1
    assert plan.problems(value, headers) == []


def test_a_model_that_does_not_fit_alone_is_refused() -> None:
    value, headers = site_with(behemoth=BEHEMOTH, small=sites.facts())
    (problem,) = plan.problems(value, headers)
    assert problem.variable == "tiers[0].context_tokens"
    assert "behemoth needs" in problem.got
    with pytest.raises(ValueError, match="behemoth needs"):
        plan.plan_tier(value, "fast", headers)


def test_more_host_memory_than_the_node_has_is_refused() -> None:
    value = sites.site()
    value["nodes"]["vasp-02"]["memory_mib"] = 2000
    value["tiers"] = value["tiers"][:1]
    (problem,) = plan.problems(value, sites.headers())
    assert (problem.variable, problem.wanted) == (
        "tiers[0].models_max",
        "at most 2000 MiB, the memory_mib of vasp-02",
    )


def test_a_router_tier_without_models_is_refused() -> None:
    value, headers = site_with()
    assert [problem.variable for problem in plan.problems(value, headers)] == ["models"]


def test_layer_split_plan_names_roles_and_the_split() -> None:
    got = plan.plan_tier(sites.site(), "reasoning", sites.headers())
    assert {name: node["role"] for name, node in got["nodes"].items()} == {
        "vasp-01": "head",
        "vasp-02": "worker",
        "vasp-03": "worker",
    }
    assert got["rpc_port"] == 50052
    assert got["slurm"]["node_count"] == 3
    assert got["tensor_split"] == [1, 2, 2]
    assert [row["layers"] for row in got["memory"]] == ["0", "1-2", "3 + output", "", "", ""]
    flags = options(got["server"]["args"])
    assert flags["--model"] == "/scratch/ai/models/large.gguf"
    assert flags["--rpc"] == "10.0.1.12:50052,10.0.1.13:50052"
    assert (flags["--split-mode"], flags["--tensor-split"]) == ("layer", "1,2,2")
    assert (flags["--cache-ram"], flags["--fit"], flags["--gpu-layers"]) == ("0", "off", "999")
    assert flags["--reasoning-format"] == "deepseek"
    assert flags["--alias"] == "large"
    assert "--chat-template-file" not in flags
    assert "GGML_RPC_DEBUG" not in {**got["server"]["environment"], **got["worker"]["environment"]}


def test_a_layer_split_model_is_served_under_all_of_its_names() -> None:
    value = sites.site()
    value["models"][2]["aliases"] = ["OR1-Large", "L.1"]
    got = plan.plan_tier(value, "reasoning", sites.headers())
    assert options(got["server"]["args"])["--alias"] == "large,OR1-Large,L.1"
    # Records and staging know it by one.
    assert got["models"] == ["large"]


def test_aliases_to_which_no_tier_answers_are_refused() -> None:
    value = sites.site()
    value["models"][0]["aliases"] = ["Small"]
    (warning,) = (text for text in plan.plan_tier(value, "fast", sites.headers())["warnings"] if "aliases" in text)
    assert warning.startswith("models[0].aliases = Small of small, which router tier fast serves; wanted none: ")
    value["tiers"][0]["models"] = ["other"]
    assert plan.problems(value, sites.headers()) == []
    value["tiers"][0]["models"] = ["other", "small"]
    (problem,) = plan.problems(value, sites.headers())
    assert (problem.variable, problem.cure) == (
        "models[0].aliases",
        "remove them, or serve the model by a tier of kind layer_split",
    )
    # One that a layer-split tier has answers there, whoever else serves it.
    value["tiers"][1]["model"] = "small"
    assert plan.problems(value, sites.headers()) == []


def test_layer_split_tier_with_a_chat_template_and_the_engines_debug_output() -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    value = sites.site()
    value["tiers"][1] |= {"chat_template": template, "rpc_debug": True, "reasoning_format": "none"}
    got = plan.plan_tier(value, "reasoning", sites.headers())
    assert (got["chat_template"], got["chat_template_file"]) == (template, "/cluster/shared/ai/plans/reasoning.jinja")
    flags = options(got["server"]["args"])
    assert (flags["--chat-template-file"], flags["--reasoning-format"]) == (got["chat_template_file"], "none")
    assert got["server"]["environment"]["GGML_RPC_DEBUG"] == got["worker"]["environment"]["GGML_RPC_DEBUG"] == "1"


@pytest.mark.parametrize(
    ("nodes", "priorities", "nice"),
    [
        (["vasp-02"], (10, 20), {"fast": 100000, "reasoning": 0}),
        (["vasp-02"], (20, 10), {"fast": 0, "reasoning": 100000}),
        (["vasp-04"], (10, 20), {"fast": 0, "reasoning": 0}),
    ],
)
def test_a_tier_is_nice_to_those_that_go_before_it_on_its_nodes(
    nodes: list[str], priorities: tuple[int, int], nice: dict[str, int]
) -> None:
    value = sites.site()
    value["nodes"]["vasp-04"] = {
        **value["nodes"]["vasp-03"],
        "cluster_address": "10.0.0.14",
        "rpc_address": "10.0.1.14",
    }
    value["tiers"][0] |= {"nodes": nodes, "priority": priorities[0]}
    value["tiers"][1]["priority"] = priorities[1]
    plans = {name: plan.plan_tier(value, name, sites.headers()) for name in nice}
    assert {name: one["slurm"]["nice"] for name, one in plans.items()} == nice


def test_tiers_that_share_a_gpu_are_warned_of() -> None:
    for tier in ("fast", "reasoning"):
        (warning,) = (
            text for text in plan.plan_tier(sites.site(), tier, sites.headers())["warnings"] if "GPUs tier" in text
        )
        assert "vasp-02" in warning
        assert "vasp-01" not in warning
        assert "reasoning has the higher priority" in warning


def test_tiers_with_a_gpu_each_do_not_compete() -> None:
    value = sites.site()
    value["nodes"]["vasp-02"]["gpus"] *= 2
    warnings = plan.plan_tier(value, "fast", sites.headers())["warnings"]
    assert not [text for text in warnings if "GPUs tier" in text]


def test_a_context_beyond_the_trained_one_is_a_warning() -> None:
    value, headers = site_with(odd=sites.facts(context_length=1024))
    warnings = plan.plan_tier(value, "fast", headers)["warnings"]
    assert any("at most the 1024 that odd was trained for" in text for text in warnings)


def test_an_architecture_that_is_not_known_is_refused_by_name() -> None:
    value, headers = site_with(odd=sites.facts(architecture="novel"))
    (problem,) = plan.problems(value, headers)
    assert problem.variable == "models[odd].header"
    assert problem.got.startswith("architecture novel")
    value["tiers"] = [{**sites.site()["tiers"][1], "model": "odd"}]
    (problem,) = plan.problems(value, headers)
    assert problem.got.startswith("architecture novel")


def split_site(facts: dict[str, Any], gpu_mib: int = 32768, **tier: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A site of one layer-split tier over two nodes with a GPU each, and its header."""
    value = sites.site()
    for node in value["nodes"].values():
        node["gpus"][0]["memory_mib"] = gpu_mib
    value["models"] = [sites.model("large")]
    value["tiers"] = [{**value["tiers"][1], "workers": ["vasp-02"], **tier}]
    return value, {"large": facts}


def test_what_the_table_calls_too_large_is_refused_and_nothing_else() -> None:
    """Each part is shown in whole MiB, so the total in the table can be more than the bytes; limits are held to it."""
    facts = sites.facts()
    facts["tensor_bytes"].update(per_layer=[8 * 2**20 + 100] * 4, total=38 * 2**20 + 400)
    value, headers = site_with(small=facts)
    model = read(value, headers)
    loaded = plan._loaded(
        model.models["small"], model.tiers["fast"], plan.batch_of(model, model.tiers["fast"], 16), True
    )
    gpu = value["nodes"]["vasp-02"]["gpus"][0]
    value["tiers"][0]["ubatch_tokens"] = 16
    (row, _) = plan.plan_tier(value, "fast", headers)["memory"]
    assert memory.mib(loaded.device.total) < row["total"]
    gpu["memory_mib"] = row["total"]
    assert plan.plan_tier(value, "fast", headers)["memory"][0]["verdict"] == "fits"
    gpu["memory_mib"] = row["total"] - 1
    (problem,) = plan.problems(value, headers)
    assert problem.got == f"4096, with which small needs {row['total']} MiB"


def test_several_models_are_held_to_the_total_of_the_table() -> None:
    value, headers = site_with(a=sites.facts(), b=sites.facts(), c=sites.facts())
    value["tiers"][0].update(ubatch_tokens=16, models_max=3)
    gpu = value["nodes"]["vasp-02"]["gpus"][0]
    total = plan.plan_tier(value, "fast", headers)["memory"][0]["total"]
    gpu["memory_mib"] = total
    assert plan.problems(value, headers) == []
    gpu["memory_mib"] = total - 1
    (problem,) = plan.problems(value, headers)
    assert problem.got.endswith(f": {total} MiB")
    assert problem.cure.startswith("models_max: 2")


def test_a_micro_batch_is_taken_only_if_the_whole_model_fits_with_it() -> None:
    """The sketch of this shape has a smaller hole in a buffer than the model: 783 against 793 MiB with 512 tokens."""
    facts = sites.facts(
        architecture="gemma3",
        n_layers=17,
        n_embd=3200,
        n_ff=6144,
        n_head=8,
        n_head_kv=4,
        head_dim_k=256,
        head_dim_v=256,
        n_vocab=262144,
        sliding_window=1024,
        tensor_bytes={"total": 19 * 2**20, "token_embd": 2**20, "output": 2**20, "per_layer": [2**20] * 17},
    )
    wish: dict[str, Any] = {"context_tokens": 4096, "kv_cache": {"k": "q4_0", "v": "f16"}}
    value, headers = split_site(facts, **wish)
    model = read(value, headers)
    tier = model.tiers["reasoning"]
    batch, slots = plan.batch_of(model, tier, 512), plan._slots(model, tier)
    quick, whole = (plan.lay_out(facts, batch, slots, quick=quick).rows for quick in (True, False))
    limit = quick[0]["total"]
    assert limit < whole[0]["total"]
    value, headers = split_site(facts, limit, **wish)
    got = plan.plan_tier(value, "reasoning", headers)
    assert options(got["server"]["args"])["--ubatch-size"] == "256"
    assert {row["verdict"] for row in got["memory"]} == {"fits"}


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_model_of_hardly_a_layer_is_split_too(backend: str, layers: int) -> None:
    sizes = {"total": 20 * 2**20, "token_embd": 2**20, "output": 2**20, "per_layer": [2**20] * layers}
    value, headers = split_site(sites.facts(n_layers=layers, tensor_bytes=sizes))
    value["llama_cpp"]["backend"] = backend
    got = plan.plan_tier(value, "reasoning", headers)
    assert sum(got["tensor_split"]) == layers + 1
    assert got["memory"][-1]["verdict"] == "fits"


def test_more_devices_than_llama_cpp_takes_or_layers_are_refused() -> None:
    sizes = {"total": 50 * 2**20, "token_embd": 2**20, "output": 2**20, "per_layer": [2**20] * 40}
    value, headers = split_site(sites.facts(n_layers=40, tensor_bytes=sizes), gpus_per_node=9)
    for node in value["nodes"].values():
        node["gpus"] *= 9
    (problem,) = plan.problems(value, headers)
    assert str(problem) == (
        "tiers[0].workers = 18 devices for the 40 layers of large and its output; wanted at most 16: one device a "
        "layer, and no more than llama.cpp takes; cure: fewer workers, or fewer gpus_per_node"
    )
    value["tiers"][0]["gpus_per_node"] = 8
    assert plan.problems(value, headers) == []
    value, headers = split_site(sites.facts(), gpus_per_node=3)
    for node in value["nodes"].values():
        node["gpus"] *= 3
    (problem,) = plan.problems(value, headers)
    assert problem.wanted.startswith("at most 5: ")


def test_no_choice_is_offered_that_would_be_refused() -> None:
    """Heads of 48 elements are too odd for a quantised cache, and for CUDA's flash attention."""
    sizes = {"total": 50 * 2**20, "token_embd": 2**20, "output": 2**20, "per_layer": [2**20] * 40}
    for head, offered in ((48, {"f16"}), (64, {"f16", "q8_0", "q4_0"})):
        facts = sites.facts(n_layers=40, n_head=32, n_head_kv=32, head_dim_k=head, head_dim_v=head, tensor_bytes=sizes)
        wish: dict[str, Any] = {"context_tokens": 131072, "ubatch_tokens": 16, "kv_cache": {"k": "f16", "v": "f16"}}
        value, headers = split_site(facts, 16000, **wish)
        value["tiers"][0]["workers"] = ["vasp-02", "vasp-03"]
        whole = read(value, headers)
        choices = plan._alternatives(whole, whole.tiers["reasoning"], whole.models["large"], fits=False)
        assert {choice["kv_cache"]["k"] for choice in choices} == offered
        for choice in choices:
            keys = ("context_tokens", "ubatch_tokens", "kv_cache", "workers")
            changed = {**value["tiers"][0], **{key: choice[key] for key in keys}}
            engine = {**value["llama_cpp"], "flash_attention": choice["flash_attention"]}
            other = {**value, "tiers": [changed], "llama_cpp": engine}
            assert plan.problems(other, headers) == [], choice


MODELS: dict[str, dict[str, Any]] = {
    "small": sites.facts(),
    "odd-heads": sites.facts(head_dim_k=48, head_dim_v=48),
    "novel": sites.facts(architecture="novel"),
    "one-layer": sites.facts(n_layers=1, tensor_bytes={**sites.facts()["tensor_bytes"], "per_layer": [2**20]}),
    "windowed": GEMMA,
    "heavy": sites.facts(
        n_layers=10,
        n_head=32,
        tensor_bytes={"total": 22 * 2**30, "token_embd": 2**30, "output": 2**30, "per_layer": [2 * 2**30] * 10},
    ),
}


@st.composite
def any_site(draw: st.DrawFn) -> dict[str, Any]:
    """A site that ``gleaner.site`` has nothing against: one tier of each kind, with any wishes, on any devices."""
    value = sites.site()
    value["llama_cpp"].update(backend=draw(st.sampled_from(["cpu", "cuda"])), flash_attention=draw(st.booleans()))
    value["models"] = [sites.model(name) for name in MODELS]
    gpus = draw(st.integers(1, 3))
    for node in value["nodes"].values():
        node["memory_mib"] = draw(st.integers(500, 100_000))
        node["gpus"] = [
            {"model": "v100s", "numa_node": 0, "memory_mib": draw(st.integers(600, 33_000))} for _ in range(gpus)
        ]
    types = st.sampled_from(["f16", "q8_0", "q4_0"])
    for tier in value["tiers"]:
        tier.update(
            context_tokens=draw(st.integers(1, 100_000)),
            parallel=draw(st.integers(1, 3)),
            gpus_per_node=draw(st.integers(1, gpus)),
            kv_cache={"k": draw(types), "v": draw(types)},
            ubatch_tokens=draw(st.none() | st.integers(1, 600)),
        )
    fast, reasoning = value["tiers"]
    fast.update(
        models=draw(st.lists(st.sampled_from(sorted(MODELS)), min_size=1, max_size=3, unique=True)),
        models_max=draw(st.integers(1, 3)),
        nodes=draw(st.lists(st.sampled_from(sorted(value["nodes"])), min_size=1, unique=True)),
    )
    reasoning.update(
        model=draw(st.sampled_from(sorted(MODELS))),
        workers=draw(st.lists(st.sampled_from(["vasp-02", "vasp-03"]), min_size=1, unique=True)),
    )
    return value


@settings(deadline=None, max_examples=30)
@given(any_site())
def test_whatever_is_wished_is_planned_or_refused_and_choices_can_be_had(value: dict[str, Any]) -> None:
    assert site_model.problems(value, MODELS) == []
    found = plan.problems(value, MODELS)
    assert all(problem.variable and problem.got and problem.wanted and problem.cure for problem in found)
    whole = read(value, MODELS)
    for name in whole.tiers:
        planned, refused = plan._plan(whole, name)
        assert refused or planned["memory"]
        too_large = {row["device"] for row in planned["memory"] if row["verdict"] != "fits"}
        assert refused or not too_large
        # Where a context is all that is wrong, each choice is without problems.
        if {problem.variable for problem in refused} <= {"tiers[1].context_tokens"}:
            for choice in planned["alternatives"]:
                keys = ("context_tokens", "ubatch_tokens", "kv_cache", "workers")
                changed = {**value["tiers"][1], **{key: choice[key] for key in keys}}
                engine = {**value["llama_cpp"], "flash_attention": choice["flash_attention"]}
                other = {**value, "tiers": [value["tiers"][0], changed], "llama_cpp": engine}
                assert plan._plan(read(other, MODELS), name)[1] == [], choice


def test_plan_is_json_in_a_fixed_order() -> None:
    value, headers = sites.site(), sites.headers()
    before = copy.deepcopy((value, headers))
    first, second = (json.dumps(plan.plan_tier(value, "fast", headers)) for _ in range(2))
    assert first == second
    assert (value, headers) == before


def test_unknown_tier_and_bad_site_are_errors() -> None:
    with pytest.raises(ValueError, match="tier = 'slow'; wanted one of fast, reasoning"):
        plan.plan_tier(sites.site(), "slow", sites.headers())
    value = sites.site()
    value["models"][0]["sha256"] = ""
    with pytest.raises(ValueError, match=r"models\[0\]\.sha256"):
        plan.plan_tier(value, "fast", sites.headers())
    assert plan.problems(value, sites.headers()) == site_model.problems(value, sites.headers())


def test_table_has_a_row_for_each_device_and_every_warning() -> None:
    plans = [plan.plan_tier(sites.site(), tier, sites.headers()) for tier in ("fast", "reasoning")]
    title, heads, rule, *rows = plan.table(plans).splitlines()
    assert title == "Memory of each tier, in MiB"
    assert re.split(r"  +", heads) == [
        *("tier", "device", "layers", "weights", "kv", "compute", "other", "total", "limit"),
        *("head-room", "--mem", "verdict"),
    ]
    notes = [row for row in rows if row.startswith(("warning: ", "choice: "))]
    assert rows[-len(notes) :] == notes
    warned = [f"warning: {item['tier']}: {text}" for item in plans for text in item["warnings"]]
    assert [note for note in notes if note.startswith("warning: ")] == warned
    assert [note for note in notes if "both tiers at once" in note]
    cells = [re.split(r"  +", row) for row in rows[: -len(notes)]]
    assert [row[:2] for row in cells] == [
        ["fast", "vasp-02 gpu0"],
        ["fast", "vasp-02 host"],
        ["reasoning", "vasp-02 gpu0"],
        ["reasoning", "vasp-03 gpu0"],
        ["reasoning", "vasp-01 gpu0"],
        ["reasoning", "vasp-01 host"],
        ["reasoning", "vasp-02 host"],
        ["reasoning", "vasp-03 host"],
    ]
    assert {row[-1] for row in cells} == {"fits"}
    fast = plans[0]["memory"][0]
    assert cells[0][3:10] == [str(fast[name]) for name in plan.COLUMNS]
    assert set(rule) == {"-", " "}
