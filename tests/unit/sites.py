"""A site without problems, for tests to spoil."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SHA256 = "0123456789abcdef" * 4


def facts(**changes: Any) -> dict[str, Any]:
    """Header facts of a small llama: 4 layers, 4/2 heads of 32, 1000 tokens."""
    value: dict[str, Any] = {
        "v": 1,
        "architecture": "llama",
        "name": "small",
        "file_type": 1,
        "n_layers": 4,
        "n_embd": 128,
        "n_ff": 384,
        "n_head": 4,
        "n_head_kv": 2,
        "head_dim_k": 32,
        "head_dim_v": 32,
        "n_vocab": 1000,
        "context_length": 8192,
        "sliding_window": None,
        "sliding_window_pattern": None,
        "split": None,
        "tied_output": False,
        "n_tensors": 39,
        "layer_tensors": [
            f"{name}.weight"
            for name in (
                *("attn_k", "attn_norm", "attn_output", "attn_q", "attn_v"),
                *("ffn_down", "ffn_gate", "ffn_norm", "ffn_up"),
            )
        ],
        "size_bytes": 40 * 2**20,
        "tensor_bytes": {
            "total": 38 * 2**20,
            "token_embd": 3 * 2**20,
            "output": 3 * 2**20,
            "per_layer": [8 * 2**20] * 4,
        },
    }
    return {**value, **changes}


def headers() -> dict[str, Any]:
    return {"small": facts(), "other": facts(name="other"), "large": facts(name="large")}


def model(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "source": f"https://models.example/{name}.gguf",
        "sha256": SHA256,
        "header": f"models/{name}.json",
    }


def node(number: int) -> dict[str, Any]:
    return {
        "cluster_address": f"10.0.0.{number}",
        "rpc_address": f"10.0.1.{number}",
        "cpus": 40,
        "memory_mib": 384000,
        "gpus": [{"model": "v100s", "memory_mib": 32768, "numa_node": 1}],
    }


def site() -> dict[str, Any]:
    """Two tiers over three nodes; every call gives a new one."""
    return {
        "cluster_name": "test",
        "controller": "slurm-ctl",
        "controllers": ["slurm-ctl"],
        "controller_address": "10.0.0.5",
        "service_user": "ai-inference",
        "shared_dir": "/cluster/shared",
        "inventory_dir": "/inventory",
        "llama_cpp": {
            "version": "0.5.0",
            "backend": "cuda",
            "flash_attention": False,
            "cuda_architectures": ["70-real"],
            "source": {
                "url": "https://source.example/llama.cpp.tar.gz",
                "sha256": SHA256,
                "subdirectory": "llama.cpp",
            },
        },
        "slurm": {
            "manage_cluster": True,
            "ai_partition": "gpu_ai",
            "ai_qos": "ai_opportunistic",
            "ai_account": "ai",
            "grace_seconds": 30,
            "preempting_qos": ["vasp_priority"],
            "vasp_partition": "gpu_vasp",
            "vasp_account": "vasp",
            "vasp_users": ["alice"],
        },
        "nodes": {"vasp-01": node(11), "vasp-02": node(12), "vasp-03": node(13)},
        "models": [model("small"), model("other"), model("large")],
        "tiers": [
            {
                "name": "fast",
                "kind": "router",
                "job_name": "llama-14b",
                "gateway_port": 8080,
                "nodes": ["vasp-02"],
                "priority": 10,
                "models_max": 2,
                "context_tokens": 4096,
            },
            {
                "name": "reasoning",
                "kind": "layer_split",
                "job_name": "llama-72b",
                "gateway_port": 8081,
                "head": "vasp-01",
                "workers": ["vasp-02", "vasp-03"],
                "priority": 20,
                "model": "large",
                "context_tokens": 8192,
                "kv_cache": {"k": "q4_0", "v": "f16"},
            },
        ],
    }


def beefcake2() -> dict[str, Any]:
    """The first cluster's inventory as its templates make it, with stand-ins for what a site has to fill in."""
    folder = ROOT / "inventories/beefcake2"
    variables: dict[str, Any] = {}
    for name in ("cluster", "engine", "models", "provide", "slurm", "tiers"):
        variables.update(yaml.safe_load((folder / f"group_vars/all/{name}.yml").read_text()))
    cluster = yaml.safe_load((folder / "hosts.yml").read_text())["all"]["children"]["cluster"]["children"]
    nodes, slurm = cluster["slurm_nodes"], site()["slurm"]
    return {
        **{key: variables[key] for key in ("cluster_name", "controller", "service_user", "shared_dir", "tiers")},
        "inventory_dir": str(folder),
        "llama_cpp": {
            **{key: variables[f"llama_cpp_{key}"] for key in ("version", "backend", "flash_attention")},
            "cuda_architectures": variables["llama_cpp_cuda_architectures"],
            "source": {"url": "https://source.example/llama.cpp.tar.gz", "sha256": SHA256},
        },
        "slurm": {**{key: variables[f"slurm_{key}"] for key in slurm}, "vasp_account": slurm["vasp_account"]},
        "models": [{**model, "source": "https://models.example", "sha256": SHA256} for model in variables["models"]],
        "controller_address": variables["addresses"][variables["controller"]]["cluster"],
        "nodes": {
            name: {
                "cluster_address": f"10.0.0.{number}",
                "rpc_address": f"10.0.1.{number}",
                **copy.deepcopy(nodes["vars"]),
            }
            for number, name in enumerate(nodes["hosts"], 11)
        },
    }
