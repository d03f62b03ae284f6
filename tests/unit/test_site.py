"""What `gleaner.site` finds wrong in an inventory, and that it finds it all without ever raising."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gleaner import site as site_model
from tests.unit import sites

MISSING = object()


def spoil(path: tuple[Any, ...], value: object) -> dict[str, Any]:
    """A good site with one place changed; MISSING takes the key away."""
    spoiled = sites.site()
    place: Any = spoiled
    for step in path[:-1]:
        place = place[step]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return spoiled


FAST, REASONING = ("tiers", 0), ("tiers", 1)
VASP_02 = ("nodes", "vasp-02")
GPU = (*VASP_02, "gpus", 0)
SOURCE = ("llama_cpp", "source")

# Where the site is spoiled, with what; the variable named, words of what is wanted, words of the cure.
TABLE: list[tuple[tuple[Any, ...], object, str, str, str]] = [
    ((*FAST, "kind"), "rooter", "tiers[0].kind", "router or layer_split", "did you mean router"),
    ((*FAST, "kind"), MISSING, "tiers[0].kind", "router or layer_split", "set tiers[0].kind"),
    ((*FAST, "name"), "Fast Tier", "tiers[0].name", "lower-case", "fast"),
    ((*FAST, "name"), "reasoning", "tiers[1].name", "a name of its own", "rename"),
    ((*FAST, "job_name"), "llama_14b", "tiers[0].job_name", "lower-case letters, digits and -", "llama-14b"),
    ((*FAST, "job_name"), "llama-72b", "tiers[1].job_name", "a job name of its own (tiers[0]", "rename"),
    ((*FAST, "job_name"), "x;rm", "tiers[0].job_name", "lower-case", "llama-14b"),
    ((*FAST, "gateway_port"), 8081, "tiers[1].gateway_port", "a port of its own (tiers[0]", "rename"),
    ((*FAST, "gateway_port"), 50052, "tiers[0].gateway_port", "the RPC workers", "8080"),
    ((*FAST, "gateway_port"), 6817, "tiers[0].gateway_port", "slurmctld", "8080"),
    ((*FAST, "gateway_port"), 80, "tiers[0].gateway_port", "from 1024 to 65535", "8080"),
    ((*FAST, "gateway_port"), 70000, "tiers[0].gateway_port", "from 1024 to 65535", "8080"),
    ((*FAST, "gateway_port"), "8080", "tiers[0].gateway_port", "whole number", "8080"),
    ((*FAST, "gateway_port"), True, "tiers[0].gateway_port", "whole number", "8080"),
    ((*FAST, "priority"), MISSING, "tiers[0].priority", "whole number", "10"),
    ((*FAST, "context_tokens"), 0, "tiers[0].context_tokens", "from 1", "16384"),
    ((*FAST, "context_tokens"), MISSING, "tiers[0].context_tokens", "from 1", "16384"),
    ((*FAST, "context_tokens"), 4096.5, "tiers[0].context_tokens", "whole number", "16384"),
    ((*FAST, "models_max"), 0, "tiers[0].models_max", "from 1 to 64", "2"),
    ((*FAST, "nodes"), [], "tiers[0].nodes", "at least one node", "nodes:"),
    ((*FAST, "nodes"), "vasp-02", "tiers[0].nodes", "a list", "nodes:"),
    (
        (*FAST, "nodes"),
        ["vasp-02", "vasp-2"],
        "tiers[0].nodes[1]",
        "vasp-01, vasp-02",
        "did you mean vasp-02",
    ),
    ((*FAST, "nodes"), ["vasp-02", {"a": 1}], "tiers[0].nodes[1]", "slurm_nodes", "add the host"),
    ((*FAST, "nodes"), ["vasp-02", "vasp-02"], "tiers[0].nodes[1]", "each node once", "remove one"),
    ((*FAST, "head"), "vasp-01", "tiers[0].head", "layer_split has it", "remove it"),
    ((*FAST, "context_token"), 1, "tiers[0].context_token", "one of name", "did you mean context_tokens"),
    ((*FAST, "cpus"), 41, "tiers[0].cpus", "at most 40, the cpus of vasp-02", "hostvars[vasp-02].cpus"),
    ((*FAST, "memory_mib"), 384001, "tiers[0].memory_mib", "at most 384000", "lower it"),
    ((*FAST, "gpus_per_node"), 2, "tiers[0].gpus_per_node", "at most 1, the GPUs that vasp-02", "gpus"),
    ((*FAST, "models"), ["smal"], "tiers[0].models[0]", "large, other, small", "did you mean small"),
    ((*FAST, "models"), [], "tiers[0].models", "at least one model", "leave it out"),
    ((*FAST, "server_args"), ["--port", "1"], "tiers[0].server_args[0]", "the plan does not set", "own key"),
    ((*FAST, "server_args"), ["-c"], "tiers[0].server_args[0]", "the plan does not set", "own key"),
    ((*FAST, "server_args"), [5], "tiers[0].server_args[0]", "one argument as text", "quote it"),
    ((*FAST, "server_args"), "--verbosity 4", "tiers[0].server_args", "a list", "dash"),
    ((*FAST, "drain_seconds"), 21, "tiers[0].drain_seconds", "at most 20", "shorter"),
    ((*FAST, "ubatch_tokens"), 4096, "tiers[0].ubatch_tokens", "at most batch_tokens (2048)", "lower it"),
    ((*FAST, "kv_cache"), {"k": "q5_1"}, "tiers[0].kv_cache.k", "f16 or q8_0 or q4_0", "set tiers[0]"),
    ((*FAST, "kv_cache"), "q8_0", "tiers[0].kv_cache", "a dictionary", "key: value"),
    (("tiers",), MISSING, "tiers", "a list", "dash"),
    (("tiers", 0), "fast", "tiers[0]", "a dictionary", "key: value"),
    ((*REASONING, "head"), MISSING, "tiers[1].head", "slurm_nodes", "add the host"),
    ((*REASONING, "head"), "slurm-ctl", "tiers[1].head", "slurm_nodes", "add the host"),
    ((*REASONING, "workers"), MISSING, "tiers[1].workers", "a list", "workers:"),
    ((*REASONING, "workers"), [], "tiers[1].workers", "at least one worker", "kind router"),
    ((*REASONING, "workers"), ["vasp-01"], "tiers[1].workers[0]", "each node once (tiers[1].head", "remove"),
    ((*REASONING, "model"), MISSING, "tiers[1].model", "a model of `models`", "add the model"),
    ((*REASONING, "model"), "larg", "tiers[1].model", "a model of `models`", "did you mean large"),
    ((*REASONING, "nodes"), ["vasp-01"], "tiers[1].nodes", "router has it", "kind: router"),
    ((*REASONING, "chat_template"), "think.jinja", "tiers[1].chat_template", "the text of a chat template", "lookup("),
    ((*REASONING, "chat_template"), {}, "tiers[1].chat_template", "the text of a chat template", "leave it out"),
    ((*REASONING, "reasoning_format"), "deepsek", "tiers[1].reasoning_format", "deepseek or", "did you mean deepseek"),
    ((*REASONING, "rpc_debug"), 1, "tiers[1].rpc_debug", "true or false", "false"),
    ((*REASONING, "server_args"), ["--chat-template"], "tiers[1].server_args[0]", "does not set", "own key"),
    ((*FAST, "rpc_debug"), True, "tiers[0].rpc_debug", "layer_split has it", "remove it"),
    (("models",), {}, "models", "a list", "dash"),
    (("models", 0, "name"), "a/b", "models[0].name", "without a path", "<name>.gguf"),
    (("models", 0, "name"), "..", "models[0].name", "without a path", "<name>.gguf"),
    (("models", 0, "name"), "small.gguf", "models[0].name", "without .gguf", "name: small"),
    (("models", 0, "name"), "mmproj-small", "models[0].name", "companion", "rename"),
    (("models", 0, "name"), "small-00001-of-00002", "models[0].name", "the name of the whole model", "parts: ["),
    (("models", 1, "name"), "small", "models[1].name", "a name of its own (models[0]", "rename"),
    (("models", 0, "aliases"), "Small", "models[0].aliases", "a list", "models[0].aliases: ["),
    (("models", 0, "aliases"), ["a,b"], "models[0].aliases[0]", "letters, digits", "the other name"),
    (("models", 0, "aliases"), [7], "models[0].aliases[0]", "letters, digits", "the other name"),
    (("models", 0, "aliases"), ["small"], "models[0].aliases[0]", "a name of its own (models[0].name", "rename"),
    (
        ("models", 0, "aliases"),
        ["Small", "Small"],
        "models[0].aliases[1]",
        "of its own (models[0].aliases[0]",
        "rename",
    ),
    (("models", 0, "aliases"), ["other"], "models[1].name", "a name of its own (models[0].aliases[0]", "rename"),
    (("models", 1, "aliases"), ["small"], "models[1].aliases[0]", "a name of its own (models[0].name", "rename"),
    (("models", 0, "source"), "http://a/b.gguf", "models[0].source", "https://… or file:///…", "URL"),
    (("models", 0, "source"), "/srv/b.gguf", "models[0].source", "https://… or file:///…", "URL"),
    (("models", 0, "source"), "file://srv/b.gguf", "models[0].source", "file:///…", "URL"),
    (("models", 0, "source"), 'https://a/"b', "models[0].source", "without spaces or quotes", "URL"),
    (("models", 0, "source"), MISSING, "models[0].source", "https://… or file:///…", "URL"),
    (("models", 0, "sha256"), "abc", "models[0].sha256", "64 lower-case hexadecimal", "sha256sum"),
    (("models", 0, "sha256"), sites.SHA256.upper(), "models[0].sha256", "64 lower-case", "sha256sum"),
    (("models", 0, "sha256"), MISSING, "models[0].sha256", "64 lower-case", "sha256sum"),
    (("models", 0, "header"), MISSING, "models[0].header", "header facts", "gleaner gguf inspect small.gguf"),
    (("models", 0, "header"), "../small.json", "models[0].header", "relative", "gleaner gguf inspect"),
    (("models", 0, "header"), "/small.json", "models[0].header", "relative", "gleaner gguf inspect"),
    (("models", 0, "name"), "unread", "models[0].header", "the file was not read", "gleaner gguf inspect"),
    (
        ("models", 0, "size_bytes"),
        5,
        "models[0].size_bytes",
        f"{40 * 2**20}, as in models/small.json",
        "inspect",
    ),
    (("models", 0, "sha265"), "x", "models[0].sha265", "one of name", "did you mean sha256"),
    (("nodes",), {}, "groups['slurm_nodes']", "at least one host", "slurm_nodes"),
    (("nodes", "a,b"), sites.node(14), "groups['slurm_nodes']", "host names", "rename"),
    ((*VASP_02, "gpus"), [], "tiers[0].gpus_per_node", "at most 0", "hostvars[vasp-02].gpus"),
    ((*VASP_02, "gpus"), MISSING, "hostvars[vasp-02].gpus", "a list", "v100s"),
    ((*VASP_02, "gpus"), [{"model": "v100s"}], "hostvars[vasp-02].gpus[0].memory_mib", "whole", "32768"),
    ((*VASP_02, "gpus"), ["v100s"], "hostvars[vasp-02].gpus[0]", "a dictionary", "key: value"),
    ((*VASP_02, "memory_mib"), MISSING, "hostvars[vasp-02].memory_mib", "whole number", "384000"),
    ((*VASP_02, "cpus"), MISSING, "hostvars[vasp-02].cpus", "whole number", "40"),
    ((*VASP_02, "cpus"), -1, "hostvars[vasp-02].cpus", "from 1", "40"),
    ((*VASP_02, "sockets"), 0, "hostvars[vasp-02].sockets", "from 1 to 64", "2"),
    ((*VASP_02, "sockets"), "2", "hostvars[vasp-02].sockets", "whole number", "2"),
    ((*VASP_02, "sockets"), 3, "hostvars[vasp-02].cpus", "a multiple of 3", "slurmd -C"),
    ((*VASP_02, "threads_per_core"), 17, "hostvars[vasp-02].threads_per_core", "from 1 to 16", "2"),
    ((*GPU, "cores"), 4, "hostvars[vasp-02].gpus[0].cores", "0-19", "as text"),
    ((*GPU, "cores"), "0-", "hostvars[vasp-02].gpus[0].cores", "0-19", "as text"),
    ((*GPU, "cores"), "3-1", "hostvars[vasp-02].gpus[0].cores", "ranges that go up, unlike 3-1", "as text"),
    ((*GPU, "cores"), "0,38-40", "hostvars[vasp-02].gpus[0].cores", "below 40", "as text"),
    ((*GPU, "device"), "nvidia0", "hostvars[vasp-02].gpus[0].device", "a device file", "/dev/nvidia0"),
    ((*GPU, "device"), "/dev/../x", "hostvars[vasp-02].gpus[0].device", "a device file", "/dev/nvidia0"),
    ((*GPU, "core"), "0", "hostvars[vasp-02].gpus[0].core", "one of model", "did you mean cores"),
    ((*VASP_02, "rpc_address"), "vasp-02-ib", "hostvars[vasp-02].rpc_address", "an IPv4", "not a host name"),
    (
        (*VASP_02, "cluster_address"),
        "10.0.0.11",
        "hostvars[vasp-02].cluster_address",
        "of its own",
        "correct",
    ),
    ((*VASP_02, "cluster_address"), "10.0.0.999", "hostvars[vasp-02].cluster_address", "an IPv4", "address"),
    (("llama_cpp", "backend"), "rocm", "llama_cpp_backend", "cpu or cuda", "set llama_cpp_backend"),
    (("llama_cpp", "version"), "../0.5", "llama_cpp_version", "a folder's name", "version"),
    (("llama_cpp", "version"), None, "llama_cpp_version", "a folder's name", "version"),
    (("llama_cpp", "flash_attention"), "no", "llama_cpp_flash_attention", "true or false", "false"),
    (("llama_cpp", "cuda_architectures"), [], "llama_cpp_cuda_architectures", "at least one", "70-real"),
    (("llama_cpp", "cuda_architectures"), ["sm_70"], "llama_cpp_cuda_architectures[0]", "70-real", "V100"),
    (SOURCE, None, "llama_cpp_source", "url, sha256 and subdirectory", "fill it in"),
    ((*SOURCE, "url"), "ftp://x", "llama_cpp_source.url", "https://", "URL"),
    ((*SOURCE, "sha256"), "0", "llama_cpp_source.sha256", "64 lower-case", "the archive"),
    ((*SOURCE, "subdirectory"), "../x", "llama_cpp_source.subdirectory", "relative path", "folder"),
    (("slurm", "ai_qos"), "AI", "slurm_ai_qos", "lower-case name", "ai_opportunistic"),
    (("slurm", "ai_account"), MISSING, "slurm_ai_account", "lower-case name", "ai"),
    (("slurm", "ai_partition"), "a b", "slurm_ai_partition", "partition", "gpu_ai"),
    (("slurm", "manage_cluster"), MISSING, "slurm_manage_cluster", "true or false", "false"),
    (("slurm", "apply_policy"), "flase", "slurm_apply_policy", "true or false", "false"),
    (("slurm", "apply_policy"), "", "slurm_apply_policy", "true or false", "false"),
    (("slurm", "apply_policy"), None, "slurm_apply_policy", "true or false", "false"),
    (("slurm", "apply_policy"), 1, "slurm_apply_policy", "true or false", "false"),
    (("slurm", "vasp_partition"), None, "slurm_vasp_partition", "partition", "gpu_vasp"),
    (("slurm", "vasp_partition"), "gpu_ai", "slurm_vasp_partition", "of its own (slurm_ai_partition", "rename"),
    (("slurm", "vasp_account"), None, "slurm_vasp_account", "of the paying users", "sacctmgr show associations"),
    (("slurm", "vasp_account"), "ai", "slurm_vasp_account", "another account than slurm_ai_account", "rename"),
    (("slurm", "vasp_users"), "alice", "slurm_vasp_users", "a list", "the site keeps its accounts"),
    (("slurm", "vasp_users"), ["a b"], "slurm_vasp_users[0]", "a user name", "as on the hosts"),
    (("slurm", "preempting_qos"), [], "slurm_preempting_qos", "at least one", "vasp_priority"),
    (("slurm", "preempting_qos"), ["VASP"], "slurm_preempting_qos[0]", "lower-case", "vasp_priority"),
    (("slurm", "preempting_qos"), ["ai_opportunistic"], "slurm_preempting_qos[0]", "another QoS", "vasp_priority"),
    (("slurm", "grace_seconds"), 5, "slurm_grace_seconds", "from 11", "30"),
    (("cluster_name",), "Beefcake 2", "cluster_name", "lower-case", "beefcake2"),
    (("controller",), "other", "groups['slurm_controller']", "exactly the host other", "slurm_controller"),
    (("controller",), None, "controller", "inventory name", "slurm-ctl"),
    (("controller_address",), None, "hostvars[slurm-ctl].cluster_address", "an IPv4", "ip -brief -4 address"),
    (("service_user",), "root", "service_user", "an ordinary user", "never run models as root"),
    (("shared_dir",), "cluster/shared", "shared_dir", "an absolute path", "/cluster/shared"),
    (("shared_dir",), "/cluster/../etc", "shared_dir", "an absolute path", "/cluster/shared"),
]


def test_good_site_has_no_problems() -> None:
    assert site_model.problems(sites.site(), sites.headers()) == []


@pytest.mark.parametrize(("path", "value", "variable", "wanted", "cure"), TABLE)
def test_problem_names_variable_value_and_cure(
    path: tuple[Any, ...], value: object, variable: str, wanted: str, cure: str
) -> None:
    found = site_model.problems(spoil(path, value), sites.headers())
    named = [problem for problem in found if problem.variable == variable]
    assert named, [str(problem) for problem in found]
    assert any(wanted in problem.wanted and cure in problem.cure for problem in named), str(named)


@pytest.mark.parametrize(("path", "value", "variable"), [row[:3] for row in TABLE])
def test_text_holds_the_value_got(path: tuple[Any, ...], value: object, variable: str) -> None:
    found = site_model.problems(spoil(path, value), sites.headers())
    named = next(problem for problem in found if problem.variable == variable)
    assert str(named).startswith(f"{variable} = {named.got}; wanted ")
    if value is MISSING or value is None:
        assert any(problem.got == "undefined" for problem in found)
    elif isinstance(value, (str, int)) and named.variable.endswith(str(path[-1])):
        assert named.got == repr(value)


def test_a_node_may_say_how_its_processors_and_gpus_lie() -> None:
    value = sites.site()
    value["nodes"]["vasp-02"] |= {"sockets": 2, "threads_per_core": 2}
    gpu = value["nodes"]["vasp-02"]["gpus"][0]
    value["nodes"]["vasp-02"]["gpus"] = [gpu | {"cores": "0-9", "device": "/dev/nvidia1"}, gpu | {"cores": "10,12-19"}]
    (problem,) = site_model.problems(value, sites.headers())
    assert (problem.variable, problem.got) == ("hostvars[vasp-02].gpus[1].device", "'/dev/nvidia1'")
    assert "gpus[0].device has this one" in problem.wanted
    value["nodes"]["vasp-02"]["gpus"][1]["device"] = "/dev/nvidia0"
    assert site_model.problems(value, sites.headers()) == []
    gpus = site_model.read(value, sites.headers()).nodes["vasp-02"].gpus
    assert [(one.cores, one.device) for one in gpus] == [("0-9", "/dev/nvidia1"), ("10,12-19", "/dev/nvidia0")]
    # Half as many cores as processors.
    value["nodes"]["vasp-02"]["gpus"][1]["cores"] = "20"
    (problem,) = site_model.problems(value, sites.headers())
    assert problem.wanted == "numbers below 20, which is cpus / threads_per_core"


def test_names_of_others_need_not_look_like_ours() -> None:
    value = sites.site()
    value["slurm"] |= {"preempting_qos": ["high.prio"], "vasp_account": "chem.vasp", "vasp_users": ["Ann.Lee@uni"]}
    assert site_model.problems(value, sites.headers()) == []
    del value["slurm"]["vasp_users"]
    assert site_model.problems(value, sites.headers()) == []


def test_a_version_that_is_none_of_the_releases_is_named_with_those_that_are() -> None:
    value = sites.site()
    value["llama_cpp"] |= {"version": "9.9", "source": None, "releases": ["0.5.0", "0.1.0"]}
    (problem,) = site_model.problems(value, sites.headers())
    assert (problem.variable, problem.got) == ("llama_cpp_version", "'9.9'")
    assert problem.wanted == "one of llama_cpp_releases: 0.5.0, 0.1.0"
    value["llama_cpp"]["version"] = "0.1.0"
    (problem,) = site_model.problems(value, sites.headers())
    assert problem.variable == "llama_cpp_source"


def test_a_model_has_its_aliases() -> None:
    value = sites.site()
    value["models"][2]["aliases"] = ["Large", "L.1"]
    models = site_model.read(value, sites.headers()).models
    assert (models["large"].aliases, models["small"].aliases) == (("Large", "L.1"), ())


@pytest.mark.parametrize(
    ("managed", "lengths", "named"),
    [
        (True, {}, ["vault_server_key", "vault_munge_key", "vault_slurmdbd_password"]),
        (False, {}, ["vault_server_key"]),
        (False, {"vault_server_key": 64}, []),
        (True, {"vault_server_key": 64, "vault_munge_key": 1025, "vault_slurmdbd_password": 32}, ["vault_munge_key"]),
    ],
)
def test_secrets_are_asked_for_where_they_are_needed(managed: bool, lengths: dict[str, int], named: list[str]) -> None:
    value = spoil(("slurm", "manage_cluster"), managed)
    assert [problem.variable for problem in site_model.secret_problems(value, lengths)] == named


def test_a_secret_that_is_missing_is_told_where_to_go() -> None:
    missing, _, short = site_model.secret_problems(sites.site(), {"vault_slurmdbd_password": 8})
    assert (missing.got, missing.wanted) == ("undefined", "a text of 32 to 1024 characters")
    assert "`ansible-vault edit /inventory/group_vars/all/vault.yml`" in missing.cure
    assert "vault_server_key: and what `openssl rand -hex 32` prints" in missing.cure
    assert short.got == "8 characters"
    assert short.wanted.endswith("while slurm_manage_cluster is true")


@pytest.mark.parametrize("value", [True, False, "true", "False"])
def test_leave_of_one_run_may_be_given_as_a_word(value: object) -> None:
    assert site_model.problems(spoil(("slurm", "apply_policy"), value), sites.headers()) == []


def test_all_problems_are_found_in_one_go() -> None:
    spoiled = sites.site()
    spoiled["tiers"][0]["kind"] = "rooter"
    spoiled["models"][0]["sha256"] = "no"
    del spoiled["nodes"]["vasp-03"]["rpc_address"]
    spoiled["llama_cpp"]["backend"] = None
    named = {problem.variable for problem in site_model.problems(spoiled, sites.headers())}
    assert named == {
        "tiers[0].kind",
        "models[0].sha256",
        "hostvars[vasp-03].rpc_address",
        "llama_cpp_backend",
    }


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ("No such file or directory", "No such file"),
        (sites.facts(v=2), "version is 2"),
        (sites.facts(n_layers=0), "n_layers is 0"),
        (sites.facts(n_head_kv=[1, 2]), "n_head_kv is [1, 2]"),
        (sites.facts(n_embd="128"), "n_embd is '128'"),
        (sites.facts(tensor_bytes={}), "tensor_bytes.total is missing"),
        (sites.facts(split={"count": 2, "no": 0}), "as many files as the header facts are of, which is 2"),
    ],
)
def test_bad_header_facts_name_the_model(facts: Any, words: str) -> None:
    headers = {**sites.headers(), "small": facts}
    (problem,) = site_model.problems(sites.site(), headers)
    assert problem.variable == "models[0].header"
    assert words in problem.wanted


def part(number: int) -> dict[str, Any]:
    return {"source": f"https://models.example/small-0000{number}-of-00002.gguf", "sha256": str(number) * 64}


def split_site(**more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A site whose first model is split in two, and its headers."""
    value = sites.site()
    first = {key: value["models"][0][key] for key in ("name", "header")}
    value["models"][0] = {**first, "parts": [part(1), part(2)], **more}
    return value, {**sites.headers(), "small": sites.facts(split={"count": 2, "no": 0})}


def test_a_split_model_lists_its_parts() -> None:
    value, headers = split_site()
    assert site_model.problems(value, headers) == []
    whole = site_model.read(value, headers)
    assert whole.models["small"].path == "small/small-00001-of-00002.gguf"
    assert whole.models["other"].path == "other.gguf"
    (small, *_) = site_model.node_models(value, headers, "vasp-02")
    assert small["parts"] == [{**part(1), "size_bytes": None}, {**part(2), "size_bytes": None}]
    assert small["sums"] == ["1" * 64, "2" * 64]


@pytest.mark.parametrize(
    ("change", "variable", "wanted"),
    [
        ({"parts": [part(1)]}, "models[0].parts", "two parts or more"),
        ({"parts": [part(1), part(2), part(3)]}, "models[0].parts", "which is 2"),
        ({"parts": {}}, "models[0].parts", "a list"),
        ({"parts": [part(1), {"source": "x", "sha256": "2" * 64}]}, "models[0].parts[1].source", "https://"),
        ({"parts": [part(1), {**part(2), "sha256": "2"}]}, "models[0].parts[1].sha256", "64"),
        ({"parts": [part(1), {**part(2), "name": "x"}]}, "models[0].parts[1].name", "one of source"),
        ({"sha256": "1" * 64}, "models[0].sha256", "nothing beside parts"),
        ({"size_bytes": 7}, "models[0].size_bytes", "nothing beside parts"),
    ],
)
def test_what_is_wrong_with_parts_is_named(change: dict[str, Any], variable: str, wanted: str) -> None:
    found = site_model.problems(*split_site(**change))
    assert any(problem.variable == variable and wanted in problem.wanted for problem in found), found


def test_parts_of_what_is_one_file_are_refused() -> None:
    value, _ = split_site()
    (problem,) = site_model.problems(value, sites.headers())
    assert (problem.variable, problem.wanted[-10:]) == ("models[0].parts", "which is 1")


GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for step, inner in steps:
        found += places(inner, (*path, step))
    return found


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_garbage_anywhere_is_a_list_of_problems(data: st.DataObject) -> None:
    spoiled = spoil(data.draw(st.sampled_from(places(sites.site()))), data.draw(GARBAGE))
    found = site_model.problems(spoiled, sites.headers())
    if not found:
        site_model.read(spoiled, sites.headers())
    for problem in found:
        assert all((problem.variable, problem.got, problem.wanted, problem.cure))


@given(GARBAGE, st.dictionaries(st.text(max_size=5), GARBAGE, max_size=2))
@settings(max_examples=100, deadline=None)
def test_garbage_for_a_site_is_a_list_of_problems(value: Any, headers: Any) -> None:
    assert site_model.problems(value, headers)
    assert site_model.secret_problems(value, {})
    site_model.read_headers(value)


@pytest.mark.parametrize("path", [("cluster_name",), (*FAST, "cpus"), (*FAST, 10**5000), ("nodes", 10**5000)])
def test_a_number_too_long_to_print_is_a_problem(path: tuple[Any, ...]) -> None:
    found = site_model.problems(spoil(path, 10**5000), sites.headers())
    assert any("too long to print" in str(problem) for problem in found)


def test_problems_leave_the_site_as_it_was() -> None:
    value = sites.site()
    before = copy.deepcopy(value)
    site_model.problems(value, sites.headers())
    assert value == before


def test_read_raises_with_every_problem() -> None:
    spoiled = spoil(("models", 0, "sha256"), "no")
    spoiled["shared_dir"] = "x"
    with pytest.raises(ValueError, match=r"(?s)shared_dir.*models\[0\]\.sha256"):
        site_model.read(spoiled, sites.headers())


def test_headers_are_read_beside_the_inventory(tmp_path: Path) -> None:
    value = {**sites.site(), "inventory_dir": str(tmp_path)}
    (tmp_path / "models").mkdir()
    (tmp_path / "models/small.json").write_text(json.dumps(sites.facts()))
    (tmp_path / "models/other.json").write_text("{")
    headers = site_model.read_headers(value)
    assert headers["small"] == sites.facts()
    assert "not JSON" in str(headers["other"])
    assert headers["large"] == "No such file or directory"


def test_a_router_serves_what_no_layer_split_tier_names() -> None:
    whole = site_model.read(sites.site(), sites.headers())
    assert [model.name for model in whole.models_of(whole.tiers["fast"])] == ["small", "other"]
    assert [model.name for model in whole.models_of(whole.tiers["reasoning"])] == ["large"]


def test_each_node_holds_the_models_of_its_tiers() -> None:
    held = {
        node: [model["name"] for model in site_model.node_models(sites.site(), sites.headers(), node)]
        for node in sites.site()["nodes"]
    }
    assert held == {"vasp-01": ["large"], "vasp-02": ["small", "other"], "vasp-03": []}


def test_docs_have_every_key_of_a_tier_with_its_default() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/inventory.md").read_text()
    table = text.partition("| key of `tiers[]` |")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*?) ?\|", table, flags=re.MULTILINE))
    numbers = {
        field.name: str(field.default) if type(field.default) is int else ""
        for field in dataclasses.fields(site_model.Tier)
    }
    assert rows == numbers


def test_a_key_that_cannot_be_printed_is_shown_in_quotes() -> None:
    """Each problem is one line, whatever the key."""
    value = sites.site()
    value["tiers"][0]["pri\nority"] = 1
    (problem,) = site_model.problems(value, sites.headers())
    assert str(problem).startswith("tiers[0].'pri\\nority' = 1; wanted one of name, kind")
