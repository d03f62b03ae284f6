"""The plan of a tier: from inventory and header facts to all that its job needs, before anything runs.

Router tiers are planned whole. For a layer-split tier the plan names nodes, roles and what the devices hold
together; its server arguments follow from the tensor split, which this version does not compute.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gleaner import site as site_model
from gleaner.site import Headers, Model, Node, Problem, Site, Tier

PLAN_VERSION = 1
MODELS_DIR = "/scratch/ai/models"
MIB = 2**20

DEFAULT_CPUS = 8
TIMEOUT_SECONDS = 600
# A time limit warns the job (--signal) as long before its end as a preemption does, less this.
SIGNAL_MARGIN_SECONDS = 5

# Bytes of one KV block and its elements (ggml/src/ggml-common.h).
KV_BLOCKS = {"f16": (2, 1), "q8_0": (34, 32), "q4_0": (18, 32)}
# The known formula of the compute buffer was seen up to 5.5 % below llama.cpp's own figure.
COMPUTE_MARGIN = 1.06
# A llama-server child: program, vocabulary, sampler, threads. CUDA adds its libraries and pinned staging.
CHILD_MIB = {"cpu": 512, "cuda": 2048}
# The router process, and supervisor and agent beside it.
ROUTER_MIB = 512
# Of each process on a CUDA device: its context (0.3 to 0.5 GiB).
CUDA_CONTEXT_MIB = 512
# llama-server keeps up to this many copies of a sliding window's cells per slot, in host memory.
CONTEXT_CHECKPOINTS = 32
# Every n-th layer sees the whole context, where the header does not say (src/models/gemma*.cpp).
SLIDING_WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6}
# The architectures that these formulas describe; of others they are only a guess.
KNOWN_ARCHITECTURES = ("llama", "qwen2", "gemma3")


def _pad(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _mib(size: float) -> int:
    return -int(-size // MIB)


def _per_layer(value: int | Sequence[int], layers: int) -> list[int]:
    return [value] * layers if isinstance(value, int) else list(value)


def _largest(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else max(value, default=0)


def slot_cells(context_tokens: int) -> int:
    """KV cells of one slot: llama.cpp pads a context to 256 (src/llama-context.cpp)."""
    return _pad(context_tokens, 256)


def windowed_layers(facts: Mapping[str, Any]) -> list[bool]:
    """For each layer, whether it sees a sliding window only; False, which plans more, if unknown."""
    layers: int = facts["n_layers"]
    if not facts.get("sliding_window"):
        return [False] * layers
    pattern = facts.get("sliding_window_pattern")
    if pattern is None:
        pattern = SLIDING_WINDOW_PATTERNS.get(facts["architecture"])
    if pattern is None:
        return [False] * layers
    if not isinstance(pattern, int):
        return [bool(item) for item in pattern]
    return [pattern == 0 or layer % pattern < pattern - 1 for layer in range(layers)]


def _layer_cells(facts: Mapping[str, Any], context_tokens: int, ubatch_tokens: int) -> list[int]:
    """KV cells of one slot in each layer. A window's cells: src/llama-kv-cache-iswa.cpp."""
    cells = slot_cells(context_tokens)
    window = _pad(min(cells, (facts.get("sliding_window") or 0) + ubatch_tokens), 256)
    return [window if windowed else cells for windowed in windowed_layers(facts)]


def kv_bytes(
    facts: Mapping[str, Any],
    *,
    context_tokens: int,
    parallel: int = 1,
    type_k: str = "f16",
    type_v: str = "f16",
    ubatch_tokens: int = 512,
) -> int:
    """Bytes of the KV cache for ``parallel`` slots of ``context_tokens`` each, over all layers.

    Cells times (K row + V row), a row being KV heads times head size in blocks of its type; exact against
    llama.cpp for f16, q8_0 and q4_0. Raises ValueError for an unknown type.
    """
    return parallel * sum(
        cells * row
        for cells, row in zip(_layer_cells(facts, context_tokens, ubatch_tokens), _kv_row_bytes(facts, type_k, type_v))
    )


def _kv_row_bytes(facts: Mapping[str, Any], type_k: str, type_v: str) -> list[int]:
    for name, value in (("k", type_k), ("v", type_v)):
        if value not in KV_BLOCKS:
            raise ValueError(f"kv_cache.{name} = {value!r}; wanted {' or '.join(KV_BLOCKS)}")
    heads = _per_layer(facts["n_head_kv"], facts["n_layers"])

    def row(elements: int, kind: str) -> int:
        size, block = KV_BLOCKS[kind]
        return -(-elements // block) * size

    return [row(n * facts["head_dim_k"], type_k) + row(n * facts["head_dim_v"], type_v) for n in heads]


def checkpoint_bytes(facts: Mapping[str, Any], tier: Tier) -> int:
    """Host memory of the context checkpoints that llama-server keeps for sliding windows; 0 without one."""
    rows = _kv_row_bytes(facts, tier.kv_cache.k, tier.kv_cache.v)
    cells = _layer_cells(facts, tier.context_tokens, tier.ubatch_tokens)
    one = sum(n * row for n, row, windowed in zip(cells, rows, windowed_layers(facts)) if windowed)
    return CONTEXT_CHECKPOINTS * tier.parallel * one


def compute_bytes(
    facts: Mapping[str, Any], *, context_tokens: int, ubatch_tokens: int, flash_attention: bool, cuda: bool
) -> int:
    """Bytes of the compute buffer of a single device, with its margin.

    Without flash attention the scores of one micro-batch dominate, ``4 · ubatch · n_ctx · (n_head + 1)``; the
    other bound is the logits of a micro-batch. CUDA adds an f16 copy of the scores for softmax and a
    dequantised copy of the widest matrix for cuBLAS.
    """
    n_ctx, ub = slot_cells(context_tokens), ubatch_tokens
    n_embd, n_head, n_ff = facts["n_embd"], _largest(facts["n_head"]), _largest(facts["n_ff"])
    logits = 4 * ub * (facts["n_vocab"] + n_embd)
    hidden = 4 * ub * (2 * n_embd + n_ff)
    scores = 2 * ub * n_ctx if flash_attention else 4 * ub * n_ctx * (n_head + 1)
    extra = 0
    if cuda:
        extra = 2 * n_embd * n_ff + (0 if flash_attention else 2 * n_head * n_ctx * ub)
    return int((max(logits, scores + hidden) + extra) * COMPUTE_MARGIN)


@dataclass(frozen=True)
class Use:
    """What one loaded model of a tier takes, in MiB: on its device, and of the host besides."""

    model: str
    weights: int
    kv: int
    compute: int
    checkpoints: int
    context: int
    host_weights: int

    @property
    def device(self) -> int:
        return self.weights + self.kv + self.compute + self.context


def model_use(model: Model, tier: Tier, engine: site_model.Engine) -> Use:
    """Memory of one model. On CUDA the token embedding is the host's, unless it is the output too."""
    facts, cuda = model.facts, engine.backend == "cuda"
    sizes = facts["tensor_bytes"]
    weights = sizes["total"]
    if cuda and not facts["tied_output"]:
        weights -= sizes["token_embd"]
    return Use(
        model=model.name,
        weights=_mib(weights),
        kv=_mib(
            kv_bytes(
                facts,
                context_tokens=tier.context_tokens,
                parallel=tier.parallel,
                type_k=tier.kv_cache.k,
                type_v=tier.kv_cache.v,
                ubatch_tokens=tier.ubatch_tokens,
            )
        ),
        compute=_mib(
            compute_bytes(
                facts,
                context_tokens=tier.context_tokens,
                ubatch_tokens=tier.ubatch_tokens,
                flash_attention=engine.flash_attention,
                cuda=cuda,
            )
        ),
        checkpoints=_mib(checkpoint_bytes(facts, tier)),
        context=CUDA_CONTEXT_MIB if cuda else 0,
        host_weights=_mib(sizes["total"]),
    )


def _row(device: str, weights: int, kv: int, compute: int, other: int, limit: int) -> dict[str, Any]:
    total = weights + kv + compute + other
    return {
        "device": device,
        "weights": weights,
        "kv": kv,
        "compute": compute,
        "other": other,
        "total": total,
        "limit": limit,
        "headroom": limit - total,
        "verdict": "fits" if total <= limit else "too large",
    }


def host_memory_mib(uses: Iterable[Use], tier: Tier, backend: str) -> dict[str, int]:
    """Host memory of a router tier's job with these models loaded at once, in MiB, by what takes it.

    Weights count whole on either backend: with ``--load-mode mlock`` they are read into locked memory on the
    CPU, and on CUDA they pass through staging buffers and the page cache, which the job's memory limit counts
    too (the seed's workers died of that). KV cache and compute buffers are the host's on the CPU only. Each
    model is a process of its own, with its vocabulary, its context checkpoints and its prompt cache.
    """
    uses = list(uses)
    on_host = backend == "cpu"
    return {
        "weights": sum(use.host_weights for use in uses),
        "kv": sum(use.kv for use in uses) if on_host else 0,
        "compute": sum(use.compute for use in uses) if on_host else 0,
        "other": ROUTER_MIB + sum(CHILD_MIB[backend] + use.checkpoints + tier.prompt_cache_mib for use in uses),
    }


def _cpus(tier: Tier, nodes: Sequence[Node]) -> int:
    return tier.cpus or min(DEFAULT_CPUS, *(node.cpus for node in nodes))


def router_args(tier: Tier, engine: site_model.Engine, cpus: int) -> list[str]:
    """Arguments of ``llama-server`` in router mode, without --host and --port, which the agent adds.

    The router hands every one of them down to the process of each model, except its own --models-* options.
    """
    args = ["--models-dir", MODELS_DIR]
    args += ["--models-max", str(tier.models_max)]
    args += ["--ctx-size", str(slot_cells(tier.context_tokens) * tier.parallel)]
    args += ["--parallel", str(tier.parallel)]
    args += ["--batch-size", str(tier.batch_tokens), "--ubatch-size", str(tier.ubatch_tokens)]
    args += ["--cache-type-k", tier.kv_cache.k, "--cache-type-v", tier.kv_cache.v]
    args += ["--flash-attn", "on" if engine.flash_attention else "off"]
    args += ["--threads", str(tier.threads or cpus)]
    args += ["--load-mode", "mlock"]
    if engine.backend == "cuda":
        args += ["--gpu-layers", "999"]
    else:
        # Repacked weights live in buffers that llama.cpp does not lock.
        args += ["--no-repack"]
    # Without it llama.cpp moves layers to the CPU when it finds a device full, and says so only in its log.
    args += ["--fit", "off"]
    # Its default is 8 GiB of host memory for each model, beyond what the job was planned for.
    args += ["--cache-ram", str(tier.prompt_cache_mib)]
    args += ["--timeout", str(TIMEOUT_SECONDS)]
    args += ["--offline", "--no-ui"]
    return args + list(tier.server_args)


# LLAMA_CACHE: beside --models-dir the router would list what the user's download cache holds.
# GGML_NO_BACKTRACE: an abort would start gdb and keep the GPU.
SERVER_ENVIRONMENT = {"GGML_NO_BACKTRACE": "1", "LLAMA_CACHE": "/nonexistent"}


def _base(site: Site, tier: Tier, mem_mib: int | None, warnings: list[str]) -> dict[str, Any]:
    nodes = [site.nodes[name] for name in tier.all_nodes]
    roles = (
        dict.fromkeys(tier.nodes, "router")
        if tier.kind == "router"
        else {tier.head: "head", **dict.fromkeys(tier.workers, "worker")}
    )
    return {
        "v": PLAN_VERSION,
        "cluster": site.cluster_name,
        "tier": tier.name,
        "kind": tier.kind,
        "job_name": tier.job_name,
        "priority": tier.priority,
        "slurm": {
            "partition": site.slurm.ai_partition,
            "qos": site.slurm.ai_qos,
            "account": site.slurm.ai_account,
            "node_count": 1 if tier.kind == "router" else len(nodes),
            "nodes": list(tier.all_nodes),
            "exclude": [name for name in site.nodes if name not in tier.all_nodes],
            "gpus_per_node": tier.gpus_per_node,
            "cpus_per_node": _cpus(tier, nodes),
            "mem_mib": mem_mib,
            "signal_seconds": site.slurm.grace_seconds - SIGNAL_MARGIN_SECONDS,
        },
        "engine": {"prefix": f"{site.shared_dir}/ai/llama.cpp/{site.engine.version}-{site.engine.backend}"},
        "nodes": {
            node.name: {
                "address": node.cluster_address,
                "rpc_address": node.rpc_address,
                "numa_node": node.gpus[0].numa_node if node.gpus else 0,
                "role": roles[node.name],
            }
            for node in nodes
        },
        "server": {"node_port": tier.gateway_port, "args": [], "environment": {}},
        "models": [model.name for model in site.models_of(tier)],
        "drain_seconds": tier.drain_seconds,
        "load_timeout_seconds": tier.load_timeout_seconds,
        "memory": [],
        "warnings": warnings,
    }


def _competition(site: Site, tier: Tier) -> list[str]:
    warnings = []
    for other in site.tiers.values():
        shared = [name for name in tier.all_nodes if name in other.all_nodes]
        gpus = [min(len(site.nodes[name].gpus), 10**6) for name in shared]
        if other.name == tier.name or not shared:
            continue
        if any(count < tier.gpus_per_node + other.gpus_per_node for count in gpus):
            first = tier if tier.priority >= other.priority else other
            warnings.append(
                f"competes with tier {other.name} for the GPUs of {', '.join(shared)}: they cannot run there "
                f"at the same time; {first.name} has the higher priority"
            )
    return warnings


def _model_warnings(tier: Tier, models: Iterable[Model]) -> list[str]:
    warnings = []
    for model in models:
        facts = model.facts
        if facts["architecture"] not in KNOWN_ARCHITECTURES:
            warnings.append(
                f"{model.name}: the memory formulas do not describe architecture {facts['architecture']}; "
                f"check the model with llama-fit-params"
            )
        if tier.context_tokens > facts["context_length"]:
            warnings.append(
                f"{model.name}: context_tokens {tier.context_tokens} is more than "
                f"the {facts['context_length']} that the model was trained for"
            )
    return warnings


def _plan_router(site: Site, index: int, tier: Tier) -> tuple[dict[str, Any], list[Problem]]:
    variable = f"tiers[{index}]"
    found: list[Problem] = []
    backend = site.engine.backend
    models = site.models_of(tier)
    warnings = [*_competition(site, tier), *_model_warnings(tier, models)]
    if not models:
        found.append(
            Problem(
                "models",
                "no model for this router tier",
                "at least one",
                "add a model, or name it in the tier's models",
            )
        )
    uses = sorted((model_use(model, tier, site.engine) for model in models), key=lambda use: (-use.device, use.model))
    heaviest = uses[: tier.models_max]
    host = host_memory_mib(
        sorted(uses, key=lambda use: (-use.host_weights, use.model))[: tier.models_max], tier, backend
    )
    planned = sum(host.values())
    mem_mib = tier.memory_mib or planned
    if tier.memory_mib is not None and tier.memory_mib < planned:
        warnings.append(
            f"memory_mib {tier.memory_mib} is less than the {planned} MiB that this tier was planned to need"
        )

    rows = []
    for name in tier.nodes:
        node = site.nodes[name]
        if backend == "cuda":
            limit = min(gpu.memory_mib for gpu in node.gpus[: tier.gpus_per_node])
            row = _device_row(f"{name} gpu0", heaviest, limit)
            rows.append(row)
            found += _device_problems(variable, tier, name, uses, limit)
        row = _row(f"{name} host", host["weights"], host["kv"], host["compute"], host["other"], node.memory_mib)
        rows.append(row)
        if mem_mib > node.memory_mib:
            found.append(
                Problem(
                    f"{variable}.models_max",
                    f"{tier.models_max}, which needs {mem_mib} MiB of host memory",
                    f"at most {node.memory_mib} MiB, the memory_mib of {name}",
                    "lower models_max or context_tokens",
                )
            )

    plan = _base(site, tier, mem_mib, warnings)
    plan["server"] = {
        "node_port": tier.gateway_port,
        "args": router_args(tier, site.engine, plan["slurm"]["cpus_per_node"]),
        "environment": dict(SERVER_ENVIRONMENT),
    }
    plan["memory"] = rows
    return plan, found


def _device_row(device: str, uses: Sequence[Use], limit: int) -> dict[str, Any]:
    return _row(
        device,
        sum(use.weights for use in uses),
        sum(use.kv for use in uses),
        sum(use.compute for use in uses),
        sum(use.context for use in uses),
        limit,
    )


def _device_problems(variable: str, tier: Tier, node: str, uses: Sequence[Use], limit: int) -> list[Problem]:
    """Refuses a model that does not fit alone, and ``models_max`` models that do not fit together."""
    alone = [use for use in uses if use.device > limit]
    if alone:
        return [
            Problem(
                f"{variable}.context_tokens",
                f"{tier.context_tokens}, with which {use.model} needs {use.device} MiB",
                f"at most {limit} MiB, the GPU of {node}",
                "lower context_tokens or ubatch_tokens, or take the model out of this tier (tiers[].models)",
            )
            for use in alone
        ]
    together = 0
    fit = 0
    for use in uses[: tier.models_max]:
        together += use.device
        fit += together <= limit
    if together <= limit:
        return []
    names = ", ".join(f"{use.model} {use.device} MiB" for use in uses[: tier.models_max])
    return [
        Problem(
            f"{variable}.models_max",
            f"{tier.models_max}, which can be {names}: {together} MiB",
            f"at most {limit} MiB, the GPU of {node}",
            f"models_max: {fit}, or a smaller context_tokens",
        )
    ]


def _plan_layer_split(site: Site, tier: Tier) -> tuple[dict[str, Any], list[Problem]]:
    model = site.models[tier.model]
    warnings = [
        *_competition(site, tier),
        *_model_warnings(tier, [model]),
        "not served yet: this version plans no tensor split, so the tier gets no job",
    ]
    plan = _base(site, tier, tier.memory_mib, warnings)
    plan["rpc_port"] = site_model.RPC_PORT
    if site.engine.backend == "cuda":
        use = model_use(model, tier, site.engine)
        limit = sum(gpu.memory_mib for name in tier.all_nodes for gpu in site.nodes[name].gpus[: tier.gpus_per_node])
        row = _row("all its GPUs together", use.weights, use.kv, 0, 0, limit)
        row["verdict"] = "not split yet" if row["verdict"] == "fits" else row["verdict"]
        plan["memory"] = [row]
    return plan, []


def _plan(site: Site, tier_name: str) -> tuple[dict[str, Any], list[Problem]]:
    if tier_name not in site.tiers:
        raise ValueError(f"tier = {tier_name!r}; wanted one of {', '.join(site.tiers)}")
    index, tier = list(site.tiers).index(tier_name), site.tiers[tier_name]
    return _plan_router(site, index, tier) if tier.kind == "router" else _plan_layer_split(site, tier)


def plan_tier(site: Mapping[str, Any], tier_name: str, headers: Headers) -> dict[str, Any]:
    """The plan (``v`` 1) of one tier of a site: pure, in a fixed order, builtins only.

    Raises ValueError with every problem when the site has any, when what the tier wishes does not fit, or
    when there is no such tier.
    """
    plan, found = _plan(site_model.read(site, headers), tier_name)
    if found:
        raise ValueError(f"tier {tier_name} cannot be planned:\n" + "\n".join(str(problem) for problem in found))
    plain: dict[str, Any] = json.loads(json.dumps(plan))
    return plain


def problems(site: object, headers: Headers) -> list[Problem]:
    """All problems of a site: those that ``gleaner.site`` finds or, when it finds none, what does not fit."""
    found = site_model.problems(site, headers)
    if found or not isinstance(site, Mapping):
        return found
    model = site_model.read(site, headers)
    return [problem for name in model.tiers for problem in _plan(model, name)[1]]


COLUMNS = ("weights", "kv", "compute", "other", "total", "limit", "headroom")


def table(plans: Iterable[Mapping[str, Any]]) -> str:
    """The plans as text for people: one row a device, in MiB, then what is doubtful."""
    heads = [
        "tier",
        "device",
        *("head-room" if name == "headroom" else name for name in COLUMNS),
        "--mem",
        "verdict",
    ]
    rows: list[list[str]] = []
    notes: list[str] = []
    for plan in plans:
        mem = plan["slurm"]["mem_mib"]
        for row in plan["memory"]:
            numbers = [str(row[name]) for name in COLUMNS]
            rows.append([plan["tier"], row["device"], *numbers, "-" if mem is None else str(mem), row["verdict"]])
        if not plan["memory"]:
            rows.append([plan["tier"], "-", *("-" for _ in COLUMNS), "-" if mem is None else str(mem), "not planned"])
        notes += [f"{plan['tier']}: {warning}" for warning in plan["warnings"]]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        texts = [
            cell.ljust(width) if column in (0, 1, len(heads) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths))
        ]
        return "  ".join(texts).rstrip()

    body = [line(heads), line(["-" * width for width in widths]), *(line(row) for row in rows)]
    return "\n".join(["Memory of each tier, in MiB", *body, *(f"warning: {note}" for note in notes)])
