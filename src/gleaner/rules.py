"""Combinations that do not work, or may not: what is wrong, why, and where that is known from.

A broken rule is an error and the plan is refused; a doubtful one is a warning in the plan. Each finding names the
variable, the value got, the value wanted and the cure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gleaner import architectures
from gleaner.gpus import CUDA_ARCHITECTURES
from gleaner.site import Model, Problem, Site, Tier

QUANTISED = ("q8_0", "q4_0")
SM70 = 70
# Heads for which CUDA has flash attention kernels with K and V of one size (ggml-cuda/fattn.cu).
FLASH_ATTENTION_HEADS = (40, 64, 72, 80, 96, 112, 128, 256)
MAX_RPC_ENDPOINTS = 2
# Strides travel in 32 bits (rpc_tensor, ggml-rpc.cpp).
RPC_STRIDE_BYTES = 2**32


@dataclass(frozen=True)
class Case:
    """One tier of a site, as the rules see it."""

    site: Site
    index: int
    tier: Tier
    models: tuple[Model, ...]
    ubatch_tokens: int

    @property
    def prefix(self) -> str:
        return f"tiers[{self.index}]"

    def variable_of(self, nodes: list[str]) -> str:
        """The variable by which the tier has these nodes."""
        place = "nodes" if not self.split else "head" if nodes == [self.tier.head] else "workers"
        return f"{self.prefix}.{place}"

    @property
    def cuda(self) -> bool:
        return self.site.engine.backend == "cuda"

    @property
    def split(self) -> bool:
        return self.tier.kind == "layer_split"

    @property
    def gpu_models(self) -> list[str]:
        return sorted({gpu.model for name in self.tier.all_nodes for gpu in self.site.nodes[name].gpus})


class Rule(NamedTuple):
    name: str
    level: str
    reason: str
    source: str
    find: Callable[[Case], Iterator[Problem]]


RULES: list[Rule] = []
_Find = Callable[[Case], Iterator[Problem]]


def _rule(name: str, level: str, reason: str, source: str) -> Callable[[_Find], _Find]:
    def add(find: _Find) -> _Find:
        RULES.append(Rule(name, level, reason, source, find))
        return find

    return add


@_rule(
    "known architecture",
    "error",
    "memory is computed from the graph of an architecture; for another one it would be a guess",
    "src/gleaner/architectures.py",
)
def _known_architecture(case: Case) -> Iterator[Problem]:
    for model in case.models:
        why = architectures.unknown(model.facts)
        if why is not None:
            yield Problem(
                f"models[{model.name}].header",
                why,
                "a model whose memory the planner can compute",
                "take the model out of the inventory; what it would take of a device, "
                "`llama-fit-params --fit-print on` of the installed engine tells",
            )


@_rule(
    "quantised V needs flash attention",
    "error",
    "without flash attention V lies transposed, which a quantised type cannot",
    "llama.cpp, src/llama-context.cpp: `quantized V cache was requested, but this requires Flash Attention`",
)
def _quantised_v(case: Case) -> Iterator[Problem]:
    if case.tier.kv_cache.v in QUANTISED and not case.site.engine.flash_attention:
        yield Problem(
            f"{case.prefix}.kv_cache.v",
            repr(case.tier.kv_cache.v),
            "f16 while llama_cpp_flash_attention is false",
            "v: f16 with a quantised k, or llama_cpp_flash_attention: true",
        )


@_rule(
    "quantised KV fits the heads",
    "error",
    "a quantised row is made of blocks of 32 elements, and a head must not share one",
    "llama.cpp, src/llama-context.cpp: `cache type … with block size … does not divide n_embd_head`",
)
def _whole_blocks(case: Case) -> Iterator[Problem]:
    for key, kind, size in (("k", case.tier.kv_cache.k, "head_dim_k"), ("v", case.tier.kv_cache.v, "head_dim_v")):
        for model in case.models:
            if kind in QUANTISED and model.facts[size] % architectures.KV_BLOCKS[kind][1]:
                yield Problem(
                    f"{case.prefix}.kv_cache.{key}",
                    f"{kind!r} with {model.name}, whose heads have {model.facts[size]} elements",
                    "f16, or a model whose heads are a multiple of 32",
                    f"{key}: f16",
                )


@_rule(
    "flash attention on SM70 is an opt-in",
    "warning",
    "it crashed the first cluster's servers on V100S; without it the plan holds, so it is the site's own choice",
    "the first cluster's operators (docs/sizing.md)",
)
def _flash_attention_on_sm70(case: Case) -> Iterator[Problem]:
    old = [model for model in case.gpu_models if CUDA_ARCHITECTURES.get(model) == SM70]
    if case.cuda and case.site.engine.flash_attention and old:
        yield Problem(
            "llama_cpp_flash_attention",
            f"true with GPUs {', '.join(old)} (SM70)",
            "false, unless it was tried on this site's own GPUs",
            "llama_cpp_flash_attention: false",
        )


@_rule(
    "flash attention knows the heads",
    "error",
    "CUDA has no kernel for other sizes, and llama.cpp would compute attention elsewhere or abort",
    "llama.cpp, ggml/src/ggml-cuda/fattn.cu",
)
def _flash_attention_heads(case: Case) -> Iterator[Problem]:
    if not (case.cuda and case.site.engine.flash_attention):
        return
    for model in case.models:
        k, v = model.facts["head_dim_k"], model.facts["head_dim_v"]
        if k != v or k not in FLASH_ATTENTION_HEADS:
            yield Problem(
                "llama_cpp_flash_attention",
                f"true with {model.name}, whose heads have {k} (K) and {v} (V) elements",
                f"heads of {', '.join(map(str, FLASH_ATTENTION_HEADS))} elements",
                "llama_cpp_flash_attention: false, or leave the model out",
            )


@_rule(
    "K and V of one type over RPC with flash attention",
    "error",
    "mixed types crash the worker",
    "llama.cpp issue 27905",
)
def _mixed_types_over_rpc(case: Case) -> Iterator[Problem]:
    cache = case.tier.kv_cache
    if case.split and case.site.engine.flash_attention and cache.k != cache.v:
        yield Problem(
            f"{case.prefix}.kv_cache",
            f"k: {cache.k}, v: {cache.v}",
            "one type for both while llama_cpp_flash_attention is true",
            f"{{k: {cache.k}, v: {cache.k}}}",
        )


@_rule(
    "at most two RPC endpoints",
    "error",
    "three or more can wait for each other for ever while a prompt is processed",
    "llama.cpp issue 28487",
)
def _rpc_endpoints(case: Case) -> Iterator[Problem]:
    if case.split and len(case.tier.workers) > MAX_RPC_ENDPOINTS:
        yield Problem(
            f"{case.prefix}.workers",
            ", ".join(case.tier.workers),
            f"at most {MAX_RPC_ENDPOINTS}",
            "use nodes with more GPUs each (gpus_per_node), or a smaller model",
        )


@_rule(
    "one RPC server a node",
    "error",
    "its port is the same for all tiers, and it serves one head at a time",
    "llama.cpp, ggml/src/ggml-rpc/ggml-rpc.cpp",
)
def _one_rpc_server(case: Case) -> Iterator[Problem]:
    if not case.split:
        return
    rivals = {other.name for other, _ in competitors(case.site, case.tier)}
    for other in list(case.site.tiers.values())[: case.index]:
        shared = [name for name in case.tier.workers if name in other.workers]
        if shared and other.name not in rivals:
            yield Problem(
                f"{case.prefix}.workers",
                f"{', '.join(shared)}, workers of tier {other.name} too, which would run at the same time",
                "nodes that are workers of one tier",
                "other workers for one of the two",
            )


@_rule(
    "the head is the first node",
    "warning",
    "Slurm runs the batch step on the first node of a job, and what watches the tier is there: a cut between the head "
    "and a worker alone would not be seen",
    "src/gleaner/supervisor.py",
)
def _head_first(case: Case) -> Iterator[Problem]:
    if not case.split:
        return
    first = next(name for name in case.site.nodes if name in case.tier.all_nodes)
    if case.tier.head != first:
        yield Problem(
            f"{case.prefix}.head",
            case.tier.head,
            f"{first}, which is the first of the tier's nodes in the inventory, as it is in slurm.conf",
            f"head: {first}, with {case.tier.head} among the workers",
        )


@_rule(
    "CUDA is built for the GPUs",
    "error",
    "a build without a GPU's architecture does not run on it: CUDA 13 can no longer make SM70",
    "CUDA release notes; nvcc 13: `Unsupported gpu architecture 'compute_70'`",
)
def _built_for_the_gpus(case: Case) -> Iterator[Problem]:
    if not case.cuda:
        return
    for model in case.gpu_models:
        wanted = CUDA_ARCHITECTURES.get(model)
        if wanted is None:
            continue
        built = [re.match(r"(\d+)[af]?(-virtual|-real)?$", item) for item in case.site.engine.cuda_architectures]
        known = [(int(item.group(1)), item.group(2)) for item in built if item is not None]
        # A real image runs within its generation only; PTX is compiled by the driver for later ones.
        if not any(number <= wanted and (kind != "-real" or number // 10 == wanted // 10) for number, kind in known):
            yield Problem(
                "llama_cpp_cuda_architectures",
                str(list(case.site.engine.cuda_architectures)),
                f"one that runs on {model} (SM{wanted})",
                f'llama_cpp_cuda_architectures: ["{wanted}-real"]',
            )


@_rule(
    "the GPU is known",
    "warning",
    "whether the build runs on it cannot be told",
    "src/gleaner/rules.py",
)
def _known_gpu(case: Case) -> Iterator[Problem]:
    for model in case.gpu_models if case.cuda else ():
        if model not in CUDA_ARCHITECTURES:
            node = next(
                name for name in case.tier.all_nodes if model in {gpu.model for gpu in case.site.nodes[name].gpus}
            )
            yield Problem(
                f"hostvars[{node}].gpus",
                f"model {model!r}",
                f"one of {', '.join(CUDA_ARCHITECTURES)}",
                "compare its compute capability with llama_cpp_cuda_architectures yourself",
            )


@_rule(
    "no prompt cache in host memory over RPC",
    "error",
    "saving a prompt's state from a worker aborts the server",
    "llama.cpp issue 26529",
)
def _prompt_cache_over_rpc(case: Case) -> Iterator[Problem]:
    if case.split and case.tier.prompt_cache_mib:
        yield Problem(
            f"{case.prefix}.prompt_cache_mib", str(case.tier.prompt_cache_mib), "0 in a layer-split tier", "remove it"
        )


@_rule(
    "a router tier uses one GPU",
    "error",
    "llama-server would spread each model over all GPUs it sees, which no plan covers",
    "llama.cpp, --split-mode (default: layer)",
)
def _router_on_one_gpu(case: Case) -> Iterator[Problem]:
    if case.tier.kind == "router" and case.tier.gpus_per_node > 1:
        yield Problem(
            f"{case.prefix}.gpus_per_node",
            str(case.tier.gpus_per_node),
            "1 in a router tier",
            "gpus_per_node: 1; a model that needs more is a tier of kind layer_split",
        )


@_rule(
    "scores travel in 32 bits",
    "warning",
    "the stride from one request to the next is cut at 4 GiB when a tensor goes over RPC",
    "llama.cpp, ggml/src/ggml-rpc/ggml-rpc.cpp: `rpc_tensor stores nb[] as uint32_t`",
)
def _rpc_strides(case: Case) -> Iterator[Problem]:
    if not case.split or case.site.engine.flash_attention or case.tier.parallel == 1:
        return
    batch = architectures.Batch(case.tier.context_tokens, case.tier.parallel, case.ubatch_tokens)
    for model in case.models:
        heads = max(architectures.per_layer(model.facts["n_head"], model.facts["n_layers"]))
        size = 4 * batch.cells * (batch.tokens // batch.parallel) * heads
        if size >= RPC_STRIDE_BYTES:
            yield Problem(
                f"{case.prefix}.ubatch_tokens",
                f"{case.ubatch_tokens}, with which the scores of a request in a layer are {size} bytes",
                f"less than {RPC_STRIDE_BYTES} bytes",
                "a smaller ubatch_tokens or context_tokens, or parallel: 1",
            )


@_rule(
    "tiers on the same GPUs have an order",
    "error",
    "two tiers that exclude each other run by their priority; with the same one neither would yield",
    "docs/architecture.md",
)
def _same_priority(case: Case) -> Iterator[Problem]:
    for other, shared in competitors(case.site, case.tier):
        if other.priority == case.tier.priority and list(case.site.tiers).index(other.name) < case.index:
            yield Problem(
                f"{case.prefix}.priority",
                str(case.tier.priority),
                f"another one than that of tier {other.name}, which wants the GPUs of {', '.join(shared)} too",
                "give the tier that shall win the higher priority",
            )


@_rule(
    "tiers compete for the same GPUs",
    "warning",
    "a GPU serves one tier at a time, so they never run together",
    "Slurm, gres/gpu",
)
def _competing(case: Case) -> Iterator[Problem]:
    for other, shared in competitors(case.site, case.tier):
        first = case.tier if case.tier.priority > other.priority else other
        yield Problem(
            case.variable_of(shared),
            f"{', '.join(shared)}, whose GPUs tier {other.name} wants too",
            "nodes of its own for each tier that shall run at the same time",
            f"as it is, {first.name} has the higher priority and the other runs when it does not",
        )


@_rule(
    "a node has a GPU for each of its tiers",
    "warning",
    "any two of them can run together, but not all of them at the same time",
    "Slurm, gres/gpu",
)
def _crowded(case: Case) -> Iterator[Problem]:
    rivals = {other.name for other, _ in competitors(case.site, case.tier)}
    for name in case.tier.all_nodes:
        # A router tier with other nodes to go to is not counted.
        bound = [tier for tier in case.site.tiers.values() if name in tier.all_nodes and not _elsewhere(tier, name)]
        wanted, gpus = sum(tier.gpus_per_node for tier in bound), len(case.site.nodes[name].gpus)
        if case.tier in bound and wanted > gpus and not rivals & {tier.name for tier in bound}:
            yield Problem(
                case.variable_of([name]),
                f"{name}, of which tiers {', '.join(tier.name for tier in bound)} want {wanted} GPUs",
                f"at most {gpus} in all",
                "other nodes for one of them; as it is, those of higher priority run and the others when they can",
            )


def _elsewhere(tier: Tier, name: str) -> bool:
    return tier.kind == "router" and set(tier.nodes) != {name}


@_rule(
    "the model was trained for the context",
    "warning",
    "answers get worse beyond it",
    "the model's header, context_length",
)
def _trained_context(case: Case) -> Iterator[Problem]:
    for model in case.models:
        if case.tier.context_tokens > model.facts["context_length"]:
            yield Problem(
                f"{case.prefix}.context_tokens",
                str(case.tier.context_tokens),
                f"at most the {model.facts['context_length']} that {model.name} was trained for",
                "lower it, or give the model a tier of its own",
            )


def competitors(site: Site, tier: Tier) -> list[tuple[Tier, list[str]]]:
    """The tiers that cannot run at the same time as this one, and the nodes whose GPUs do not suffice for both.

    A router tier needs only one of its nodes: it competes where no node is left for it.
    """
    found = []
    for other in site.tiers.values():
        shared = [name for name in tier.all_nodes if name in other.all_nodes and other.name != tier.name]
        tight = [name for name in shared if len(site.nodes[name].gpus) < tier.gpus_per_node + other.gpus_per_node]
        routers = [one for one in (tier, other) if one.kind == "router"]
        if len(routers) == 2:
            seated = len({*tier.nodes, *other.nodes}) > 1 or not tight
        else:
            seated = not tight or any(set(one.nodes) - set(tight) for one in routers)
        if not seated:
            found.append((other, tight))
    return found


def check(case: Case) -> tuple[list[Problem], list[str]]:
    """The broken rules of a tier, and the doubtful ones as text."""
    errors: list[Problem] = []
    warnings: list[str] = []
    for rule in RULES:
        for problem in rule.find(case):
            if rule.level == "error":
                errors.append(problem)
            else:
                warnings.append(f"{problem}; because {rule.reason}")
    return errors, warnings


def broken(case: Case) -> set[str]:
    """The names of the rules that a tier breaks."""
    return {rule.name for rule in RULES if rule.level == "error" and any(True for _ in rule.find(case))}


def table() -> str:
    """The rules as a Markdown table."""
    lines = ["| rule | when broken | why | known from |", "|---|---|---|---|"]
    lines += [f"| {rule.name} | {rule.level} | {rule.reason} | {rule.source} |" for rule in RULES]
    return "\n".join(lines) + "\n"
