"""The plan of a tier: from inventory and header facts to all that its job needs, before anything runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gleaner import architectures, memory, placement, rules
from gleaner import site as site_model
from gleaner.architectures import Batch, Device
from gleaner.memory import MIB, mib
from gleaner.site import Gpu, Headers, KvCache, Model, Node, Problem, Site, Tier

PLAN_VERSION = 1
MODELS_DIR = "/scratch/ai/models"
RPC_CACHE_DIR = "/scratch/ai/rpc-cache"
STATE_DIRECTORY = "/scratch/ai/state"

DEFAULT_CPUS = 8
TIMEOUT_SECONDS = 600
# A time limit warns the job (--signal) as long before its end as a preemption does, less this.
SIGNAL_MARGIN_SECONDS = 5
# More than age or fair share add to a job's priority on most sites.
NICE_STEP = 100_000
# Micro-batches that are tried where the tier names none: the larger, the faster a prompt is read.
UBATCH_TOKENS = (512, 256, 128, 64, 32, 16)
# A choice with less reads prompts so slowly that a smaller context is offered beside it.
BRISK_UBATCH_TOKENS = 128

# LLAMA_CACHE: beside --models-dir the router would list what the user's download cache holds.
# GGML_NO_BACKTRACE: an abort would start gdb and keep the GPU.
SERVER_ENVIRONMENT = {"GGML_NO_BACKTRACE": "1", "LLAMA_CACHE": "/nonexistent"}


def batch_of(site: Site, tier: Tier, ubatch_tokens: int) -> Batch:
    return Batch(
        context_tokens=tier.context_tokens,
        parallel=tier.parallel,
        ubatch_tokens=ubatch_tokens,
        type_k=tier.kv_cache.k,
        type_v=tier.kv_cache.v,
        flash_attention=site.engine.flash_attention,
    )


def _ubatches(tier: Tier) -> list[int]:
    if tier.ubatch_tokens is not None:
        return [tier.ubatch_tokens]
    return [size for size in UBATCH_TOKENS if size <= tier.batch_tokens] or [tier.batch_tokens]


def _cpus(tier: Tier, nodes: Sequence[Node]) -> int:
    return tier.cpus or min(DEFAULT_CPUS, *(node.cpus for node in nodes))


# Rows of the table: one for each device and each host, in MiB.


def _total_mib(use: memory.Use) -> int:
    """The total as tables show it, and as it is held against limits: the sum of parts, each in whole MiB."""
    return sum(mib(part) for part in dataclasses.astuple(use))


def row_of(device: str, layers: str, use: memory.Use, limit: int) -> dict[str, Any]:
    total = _total_mib(use)
    return {
        "device": device,
        "layers": layers,
        **{key: mib(part) for key, part in dataclasses.asdict(use).items()},
        "total": total,
        "limit": limit,
        "headroom": limit - total,
        "verdict": "fits" if total <= limit else "too large",
    }


def _sum(uses: Iterable[memory.Use]) -> memory.Use:
    uses = list(uses)
    return memory.Use(
        *(sum(getattr(use, field.name) for use in uses) for field in dataclasses.fields(memory.Use)),
    )


# Router tiers


@dataclass(frozen=True)
class _Loaded:
    """What one loaded model of a router tier takes of its GPU and of the host."""

    model: str
    device: memory.Use
    host: memory.Use


def _loaded(model: Model, tier: Tier, batch: Batch, cuda: bool) -> _Loaded:
    """Memory of one model of a router tier, which is a process of its own.

    Weights count whole for the host on either backend: with ``--load-mode mlock`` they are read into locked
    memory on the CPU, and on CUDA they pass through staging buffers and the page cache, which the job's memory
    limit counts too (the first cluster's workers died of that).
    """
    facts = model.facts
    devices = [Device(cuda=True), Device()] if cuda else [Device()]
    uses = memory.uses(facts, batch, [0] * (facts["n_layers"] + 1), devices)
    own = memory.server_bytes(facts, batch, cuda=cuda, prompt_cache_mib=tier.prompt_cache_mib)
    on_host = uses[-1]
    weights = facts["tensor_bytes"]["total"] if cuda else on_host.weights
    return _Loaded(model.name, uses[0], memory.Use(weights, on_host.kv, on_host.compute, on_host.other + own))


def router_args(site: Site, tier: Tier, cpus: int, ubatch_tokens: int) -> list[str]:
    """Arguments of ``llama-server`` in router mode, without --host and --port, which the agent adds.

    The router hands every one of them down to the process of each model, except its own --models-* options.
    """
    args = ["--models-dir", MODELS_DIR]
    args += ["--models-max", str(tier.models_max)]
    args += _common_args(site, tier, cpus, ubatch_tokens)
    args += ["--offline", "--no-ui"]
    return args + list(tier.server_args)


def _common_args(site: Site, tier: Tier, cpus: int, ubatch_tokens: int) -> list[str]:
    batch = batch_of(site, tier, ubatch_tokens)
    args = ["--ctx-size", str(batch.cells * tier.parallel)]
    args += ["--parallel", str(tier.parallel)]
    args += ["--batch-size", str(tier.batch_tokens), "--ubatch-size", str(ubatch_tokens)]
    args += ["--cache-type-k", tier.kv_cache.k, "--cache-type-v", tier.kv_cache.v]
    args += ["--flash-attn", "on" if site.engine.flash_attention else "off"]
    args += ["--threads", str(tier.threads or cpus)]
    args += ["--load-mode", "mlock"]
    if site.engine.backend == "cuda":
        args += ["--gpu-layers", "999"]
    else:
        # Repacked weights live in buffers that llama.cpp does not lock.
        args += ["--no-repack"]
    # Without it llama.cpp moves layers to the CPU when it finds a device full, and says so only in its log.
    args += ["--fit", "off"]
    # Its default is 8 GiB of host memory for each model, beyond what the job was planned for.
    args += ["--cache-ram", str(tier.prompt_cache_mib)]
    return [*args, "--timeout", str(TIMEOUT_SECONDS)]


def _router_rows(site: Site, tier: Tier, loaded: Sequence[_Loaded]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of each node, with what of a tier may be loaded at once at its worst; the host's row is the last."""
    cuda = site.engine.backend == "cuda"
    heaviest = sorted(loaded, key=lambda one: (-one.device.total, one.model))[: tier.models_max]
    host = _router_host(tier, loaded)
    for name in tier.nodes:
        node = site.nodes[name]
        if cuda:
            limit = _given_gpus(node, tier)[0].free_mib
            yield name, row_of(f"{name} gpu0", "all", _sum(one.device for one in heaviest), limit)
        yield name, row_of(f"{name} host", "" if cuda else "all", host, node.memory_mib)


def _router_host(tier: Tier, loaded: Sequence[_Loaded]) -> memory.Use:
    """Host memory of a router tier's job at its worst: the router, what watches it, and a process for each model."""
    largest = sorted(loaded, key=lambda one: (-one.host.total, one.model))[: tier.models_max]
    return _sum([memory.Use(0, 0, 0, memory.SERVER_BYTES + memory.JOB_BYTES), *(one.host for one in largest)])


def _router_fits(site: Site, tier: Tier, loaded: Sequence[_Loaded]) -> bool:
    """Whether ``models_max`` models at their worst fit the GPU of each node."""
    heaviest = sorted((one.device for one in loaded), key=_total_mib, reverse=True)[: tier.models_max]
    limits = [_given_gpus(site.nodes[name], tier)[0].free_mib for name in tier.nodes]
    return _total_mib(_sum(heaviest)) <= min(limits)


def _router_problems(site: Site, index: int, tier: Tier, loaded: Sequence[_Loaded], mem_mib: int) -> Iterator[Problem]:
    """Refuses a model that does not fit alone, and ``models_max`` models that do not fit together.

    Nodes with the same limit share their problem.
    """
    variable = f"tiers[{index}]"
    uses = sorted(loaded, key=lambda one: (-one.device.total, one.model))
    limits: dict[tuple[str, int], list[str]] = {}
    for name in tier.nodes:
        node = site.nodes[name]
        if site.engine.backend == "cuda":
            limits.setdefault(("gpu", _given_gpus(node, tier)[0].free_mib), []).append(name)
        limits.setdefault(("host", node.memory_mib), []).append(name)
    for (what, limit), names in limits.items():
        if what == "gpu":
            yield from _gpu_problems(site, variable, tier, ", ".join(names), uses, limit)
        elif mem_mib > limit:
            yield Problem(
                f"{variable}.models_max",
                f"{tier.models_max}, which needs {mem_mib} MiB of host memory",
                f"at most {limit} MiB, the memory_mib of {', '.join(names)}",
                "lower models_max or context_tokens",
            )


def _gpu_problems(
    site: Site, variable: str, tier: Tier, nodes: str, uses: Sequence[_Loaded], limit: int
) -> Iterator[Problem]:
    def needed(names: Iterable[str], context_tokens: int) -> int:
        smaller = dataclasses.replace(tier, context_tokens=context_tokens)
        return _total_mib(_sum(_device_use(site, smaller, name) for name in names))

    def largest(*names: str) -> int:
        return _largest_context(lambda context: needed(names, context) <= limit, tier.context_tokens)

    alone = [one for one in uses if _total_mib(one.device) > limit]
    for one in alone:
        context = largest(one.model)
        yield Problem(
            f"{variable}.context_tokens",
            f"{tier.context_tokens}, with which {one.model} needs {_total_mib(one.device)} MiB",
            f"at most {limit} MiB, the GPU of {nodes}",
            (f"context_tokens: {context}, or " if context else "") + "take the model out of this tier (tiers[].models)",
        )
    most = uses[: tier.models_max]
    totals = [_total_mib(_sum(one.device for one in most[: count + 1])) for count in range(len(most))]
    if not alone and totals[-1] > limit:
        context = largest(*(one.model for one in most))
        each = ", ".join(f"{one.model} {_total_mib(one.device)} MiB" for one in most)
        yield Problem(
            f"{variable}.models_max",
            f"{tier.models_max}, which can be {each}: {totals[-1]} MiB",
            f"at most {limit} MiB, the GPU of {nodes}",
            f"models_max: {sum(total <= limit for total in totals)}"
            + (f", or context_tokens: {context}" if context else ""),
        )


def _device_use(site: Site, tier: Tier, model: str) -> memory.Use:
    """What a model takes of a router tier's GPU with the smallest micro-batch that the tier allows."""
    batch = batch_of(site, tier, _ubatches(tier)[-1])
    facts = site.models[model].facts
    places, devices = [0] * (facts["n_layers"] + 1), [Device(cuda=True), Device()]
    compute = architectures.compute_bytes(*_sketched(facts, batch, places), devices)
    return memory.uses_with(facts, batch, places, devices, compute)[0]


def _largest_context(fits: Callable[[int], bool], most: int) -> int:
    """The largest context, in steps of 256 tokens up to ``most``, that fits; 0 when none does."""
    low, high = 0, most // 256
    while low < high:
        middle = (low + high + 1) // 2
        if fits(256 * middle):
            low = middle
        else:
            high = middle - 1
    return 256 * low


def _unanswered(site: Site, tier: Tier, models: Sequence[Model]) -> Iterator[Problem]:
    """Aliases to which nobody would answer: a router knows the models of a folder by their files' names alone."""
    split = {other.model for other in site.tiers.values() if other.kind == "layer_split"}
    for index, (name, model) in enumerate(site.models.items()):
        if model.aliases and model in models and name not in split:
            yield Problem(
                f"models[{index}].aliases",
                f"{', '.join(model.aliases)} of {name}, which router tier {tier.name} serves",
                "none: a router tier knows a model by its name alone",
                "remove them, or serve the model by a tier of kind layer_split",
            )


def _plan_router(site: Site, index: int, tier: Tier) -> tuple[dict[str, Any], list[Problem]]:
    models = site.models_of(tier)
    cuda = site.engine.backend == "cuda"
    if not models:
        return _base(site, tier, tier.memory_mib, []), [
            Problem(
                "models",
                "no model for this router tier",
                "at least one",
                "add a model, or name it in the tier's models",
            )
        ]
    found, warnings = rules.check(rules.Case(site, index, tier, models, _ubatches(tier)[0]))
    nameless = list(_unanswered(site, tier, models))
    if tier.models is not None:
        found += nameless
    else:
        # Only because no layer-split tier has the model now: the tier may come back.
        warnings += map(str, nameless)
    if any(architectures.unknown(model.facts) for model in models):
        return _base(site, tier, tier.memory_mib, warnings), found
    for ubatch_tokens in _ubatches(tier):
        loaded = [_loaded(model, tier, batch_of(site, tier, ubatch_tokens), cuda) for model in models]
        if not cuda or _router_fits(site, tier, loaded):
            break
    planned = _total_mib(_router_host(tier, loaded))
    mem_mib = tier.memory_mib or planned
    if tier.memory_mib is not None and tier.memory_mib < planned:
        warnings.append(
            f"memory_mib {tier.memory_mib} is less than the {planned} MiB that this tier was planned to need"
        )
    plan = _base(site, tier, mem_mib, warnings)
    plan["server"] = {
        "node_port": tier.gateway_port,
        "args": router_args(site, tier, plan["slurm"]["cpus_per_node"], ubatch_tokens),
        "environment": dict(SERVER_ENVIRONMENT),
    }
    plan["memory"] = [row for _, row in _router_rows(site, tier, loaded)]
    return plan, [*found, *_router_problems(site, index, tier, loaded, mem_mib)]


# Layer-split tiers


@dataclass(frozen=True)
class Slot:
    """One device of a layer-split tier, in llama.cpp's order."""

    name: str
    node: str
    limit_mib: int
    device: Device


@dataclass(frozen=True)
class Split:
    """A model laid over the devices of a tier: slots of each, and what each takes."""

    slots: tuple[Slot, ...]
    counts: tuple[int, ...]
    uses: tuple[memory.Use, ...]

    @property
    def fits(self) -> bool:
        return all(_total_mib(use) <= slot.limit_mib for slot, use in zip(self.slots, self.uses))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each device of the tier; the head's CPU has none."""
        return [
            row_of(slot.name, layers, use, slot.limit_mib)
            for slot, layers, use in zip(self.slots, self._layers(), self.uses)
        ]

    def _layers(self) -> list[str]:
        """For each device, its layers in words: ``0-26``, ``54-79 + output``."""
        words = []
        first, n_layers = 0, sum(self.counts) - 1
        for count in self.counts:
            last = min(first + count, n_layers) - 1
            some = f"{first}-{last}" if last > first else f"{first}" if last == first else ""
            if count and first + count > n_layers:
                some = f"{some} + output" if some else "output"
            words.append(some)
            first += count
        return words


def _given_gpus(node: Node, tier: Tier) -> list[Gpu]:
    """The GPUs that a job gets of a node, at worst: Slurm chooses, so the smallest are planned."""
    return sorted(node.gpus, key=lambda gpu: gpu.free_mib)[: tier.gpus_per_node]


def _slots(site: Site, tier: Tier) -> tuple[Slot, ...]:
    """The devices of a tier: those of the workers first, then the head's own, which only CUDA gives it."""
    cuda = site.engine.backend == "cuda"
    if not cuda:
        return tuple(Slot(f"{name} cpu", name, site.nodes[name].memory_mib, Device()) for name in tier.workers)
    return tuple(
        Slot(f"{name} gpu{index}", name, gpu.free_mib, Device(cuda=True))
        for name in (*tier.workers, tier.head)
        for index, gpu in enumerate(_given_gpus(site.nodes[name], tier))
    )


def lay_out(facts: Mapping[str, Any], batch: Batch, slots: Sequence[Slot], *, quick: bool = False) -> Split:
    """The split that fills the fullest device least. ``quick`` computes it with a sketch of the model.

    Raises ValueError for more devices than slots of the model.
    """
    devices = [*(slot.device for slot in slots), Device()]
    limits = [slot.limit_mib * MIB for slot in slots]
    # A device without a layer has no attention to compute: what devices need is taken from a split that has some.
    spare = int(facts["n_layers"] >= max(len(slots), 2))
    first = placement.slots_of_counts(placement.split_by_memory(facts["n_layers"] - spare, limits))
    first += first[-1:] * spare
    fixed = architectures.compute_bytes(*_sketched(facts, batch, first), devices)
    empty = memory.uses_with(facts, batch, first, devices, fixed)
    weights, kv = memory.slot_weights(facts), [*memory.kv_bytes(facts, batch), 0]
    sums = [0]
    for weight, cache in zip(weights, kv):
        sums.append(sums[-1] + weight + cache)

    def fill(index: int) -> Callable[[int, int], float]:
        constant = empty[index].compute + empty[index].other
        return lambda start, end: (sums[end] - sums[start] + constant) / limits[index]

    counts = placement.least_maximal_fill(len(weights), [fill(index) for index in range(len(slots))])
    places = placement.slots_of_counts(counts)
    sketched = _sketched(facts, batch, places) if quick else (facts, batch, places)
    compute = architectures.compute_bytes(*sketched, devices)
    return Split(tuple(slots), tuple(counts), tuple(memory.uses_with(facts, batch, places, devices, compute)))


def _sketched(
    facts: Mapping[str, Any], batch: Batch, places: Sequence[int]
) -> tuple[Mapping[str, Any], Batch, Sequence[int]]:
    small, few = memory.sketch(facts, places)
    return small, batch, few


def head_args(site: Site, tier: Tier, split: Split, cpus: int, ubatch_tokens: int) -> list[str]:
    """Arguments of the head's ``llama-server``, without --host and --port, which the agent adds."""
    endpoints = ",".join(f"{site.nodes[name].rpc_address}:{site_model.RPC_PORT}" for name in tier.workers)
    model = site.models[tier.model]
    args = ["--model", f"{MODELS_DIR}/{model.path}", "--alias", ",".join((model.name, *model.aliases))]
    args += ["--rpc", endpoints, "--split-mode", "layer"]
    args += ["--tensor-split", ",".join(map(str, split.counts))]
    args += _common_args(site, tier, cpus, ubatch_tokens)
    if "--gpu-layers" not in args:
        args += ["--gpu-layers", "999"]
    args += ["--reasoning-format", tier.reasoning_format]
    if tier.chat_template is not None:
        args += ["--chat-template-file", _template_file(site, tier)]
    return [*args, "--offline", "--no-ui", *tier.server_args]


def _template_file(site: Site, tier: Tier) -> str:
    return f"{site.shared_dir}/ai/plans/{tier.name}.jinja"


def _split_environment(tier: Tier) -> dict[str, str]:
    """Of head and workers. The engine looks whether GGML_RPC_DEBUG is there, not what it says."""
    return {"GGML_NO_BACKTRACE": "1", **({"GGML_RPC_DEBUG": "1"} if tier.rpc_debug else {})}


def _worker(site: Site, tier: Tier, split: Split, cpus: int) -> dict[str, Any]:
    """What the RPC servers are started with; address and port are the node's and the agent adds them.

    Devices are named, since one that finds no GPU would else serve its layers on the processor, and nobody would know.

    Their cache of tensors spares a return of the tier sending the weights again. It may hold those of two splits.
    """
    held = max(mib(use.weights) for use in split.uses[:-1])
    gpus = [f"CUDA{index}" for index in range(tier.gpus_per_node)]
    devices = ["--device", ",".join(gpus)] if site.engine.backend == "cuda" else []
    return {
        "port": site_model.RPC_PORT,
        "args": ["--threads", str(tier.threads or cpus), *devices, "--cache"],
        "environment": _split_environment(tier),
        "cache": {"directory": RPC_CACHE_DIR, "limit_mib": 2 * held},
        "confined": tier.rpc_confined,
    }


def _split_hosts(site: Site, tier: Tier, model: Model, batch: Batch, split: Split) -> Iterator[tuple[str, memory.Use]]:
    """Host memory of each node's part of the job.

    On CUDA it is an upper bound from the first cluster's incident, since it could not be measured here: with 45 GiB
    of weights workers were killed at 64 GiB and lived with 200. Each node is given the weights twice: they pass
    through the page cache, which the job's limit counts, and may be locked or pinned besides.
    """
    facts, cuda = model.facts, site.engine.backend == "cuda"
    head = memory.server_bytes(facts, batch, cuda=cuda) + memory.staging_bytes(facts)
    worker = memory.rpc_server_bytes(facts, cuda=cuda)
    for name in (tier.head, *tier.workers):
        other = (head if name == tier.head else worker) + memory.JOB_BYTES
        if cuda:
            compute = split.uses[-1].compute if name == tier.head else 0
            yield name, memory.Use(2 * facts["tensor_bytes"]["total"], 0, compute, other)
        elif name == tier.head:
            yield name, dataclasses.replace(split.uses[-1], other=other)
        else:
            here = _sum(use for slot, use in zip(split.slots, split.uses) if slot.node == name)
            yield name, dataclasses.replace(here, other=here.other + other)


@dataclass(frozen=True)
class _Wish:
    """What may be asked of a layer-split tier; the choices that the plan offers differ in these."""

    tier: Tier
    flash_attention: bool

    def batch(self, site: Site, ubatch_tokens: int) -> Batch:
        batch = batch_of(site, self.tier, ubatch_tokens)
        return dataclasses.replace(batch, flash_attention=self.flash_attention)

    def ubatch(self, site: Site, model: Model) -> int | None:
        """The largest micro-batch with which it fits devices and hosts; None when it does not."""
        slots = _slots(site, self.tier)
        if not 0 < len(slots) <= min(model.facts["n_layers"] + 1, placement.MAX_DEVICES):
            return None
        for size in _ubatches(self.tier):
            batch = self.batch(site, size)
            splits = (lay_out(model.facts, batch, slots, quick=quick) for quick in (True, False))
            if all(split.fits and self._hosts_hold(site, model, batch, split) for split in splits):
                return size
        return None

    def _hosts_hold(self, site: Site, model: Model, batch: Batch, split: Split) -> bool:
        hosts = dict(_split_hosts(site, self.tier, model, batch, split))
        wanted = self.tier.memory_mib or max(map(_total_mib, hosts.values()))
        return all(wanted <= site.nodes[name].memory_mib for name in hosts)

    def broken(self, site: Site, model: Model, ubatch_tokens: int) -> set[str]:
        """The names of the rules that it breaks; of other tiers, too, when it changes the engine that all have."""
        engine = dataclasses.replace(site.engine, flash_attention=self.flash_attention)
        changed = dataclasses.replace(site, engine=engine, tiers={**site.tiers, self.tier.name: self.tier})
        index = list(site.tiers).index(self.tier.name)
        found = rules.broken(rules.Case(changed, index, self.tier, (model,), ubatch_tokens))
        if self.flash_attention != site.engine.flash_attention:
            for number, other in enumerate(site.tiers.values()):
                if number != index:
                    before, after = (
                        rules.broken(rules.Case(one, number, other, site.models_of(other), _ubatches(other)[-1]))
                        for one in (site, changed)
                    )
                    found |= after - before
        return found

    def largest(self, site: Site, model: Model) -> list[_Wish]:
        """The same with the largest context that fits and, where that reads prompts slowly, with half of it or less.

        Empty when not even 256 tokens fit.
        """
        most = max(self.tier.context_tokens, 256)
        context = _largest_context(lambda tokens: self.with_context(tokens).ubatch(site, model) is not None, most)
        found = [self.with_context(context)] if context else []
        for tokens in (most >> shift for shift in range(most.bit_length() - 8)):
            if tokens <= context and (self.with_context(tokens).ubatch(site, model) or 0) >= BRISK_UBATCH_TOKENS:
                found.append(self.with_context(tokens))
                break
        return found

    def with_context(self, context_tokens: int) -> _Wish:
        return self.changed(context_tokens=context_tokens)

    def changed(self, flash_attention: bool | None = None, **changes: Any) -> _Wish:
        flash = self.flash_attention if flash_attention is None else flash_attention
        return _Wish(dataclasses.replace(self.tier, **changes), flash)


def largest_context(site: Site, tier: Tier, model: Model, flash_attention: bool) -> int:
    """The largest context of a layer-split tier, up to the one that it wishes, with its own micro-batch; 0: none."""
    wish = _Wish(tier, flash_attention)
    return _largest_context(
        lambda tokens: wish.with_context(tokens).ubatch(site, model) is not None, tier.context_tokens
    )


def _wishes(site: Site, tier: Tier, model: Model, *, fits: bool) -> Iterator[tuple[str, _Wish]]:
    """What could be asked of a tier instead, in the order in which it is offered; not all of it fits."""
    flash = site.engine.flash_attention
    cache = tier.kv_cache
    if not flash and cache.v in rules.QUANTISED:
        cache = KvCache(cache.k, "f16")
    plain = _Wish(dataclasses.replace(tier, ubatch_tokens=None, kv_cache=cache), flash)
    if not fits:
        yield "the wanted context with a smaller micro-batch", plain
        for kind in rules.QUANTISED if cache.k == "f16" else ():
            smaller = KvCache(kind, kind if flash else "f16")
            yield f"the wanted context with K in {kind}", plain.changed(kv_cache=smaller)
        for wish in plain.largest(site, model):
            yield "a smaller context", wish
        for kind in () if flash else rules.QUANTISED:
            yield (
                f"flash attention, an opt-in, with K and V in {kind}",
                plain.changed(True, kv_cache=KvCache(kind, kind)),
            )
    shared = {name for _, names in rules.competitors(site, tier) for name in names}
    left = tuple(name for name in tier.workers if name not in shared)
    if tier.head not in shared and 0 < len(left) < len(tier.workers):
        for wish in plain.changed(workers=left).largest(site, model):
            yield f"both tiers at once, {', '.join(sorted(shared))} left to the other", wish


def _alternatives(site: Site, tier: Tier, model: Model, *, fits: bool) -> list[dict[str, Any]]:
    """Choices where a wish cannot be had: what else fits on the tier's nodes, and what leaves nodes to others.

    None of them breaks a rule that the wish itself does not break.
    """
    found: dict[str, dict[str, Any]] = {}
    broken = _Wish(tier, site.engine.flash_attention).broken(site, model, _ubatches(tier)[-1])
    for what, wish in _wishes(site, tier, model, fits=fits):
        ubatch_tokens = wish.ubatch(site, model)
        if ubatch_tokens is None or wish.broken(site, model, ubatch_tokens) - broken:
            continue
        choice = {
            "context_tokens": wish.tier.context_tokens,
            "ubatch_tokens": ubatch_tokens,
            "kv_cache": {"k": wish.tier.kv_cache.k, "v": wish.tier.kv_cache.v},
            "flash_attention": wish.flash_attention,
            "head": tier.head,
            "workers": list(wish.tier.workers),
        }
        found.setdefault(json.dumps(choice), {"what": what, **choice})
    return list(found.values())


def _choice_in_words(choice: Mapping[str, Any]) -> str:
    words = [
        f"context_tokens: {choice['context_tokens']}",
        f"ubatch_tokens: {choice['ubatch_tokens']}",
        f"kv_cache: {{k: {choice['kv_cache']['k']}, v: {choice['kv_cache']['v']}}}",
        f"workers: [{', '.join(choice['workers'])}]",
    ]
    if choice["flash_attention"]:
        words.append("llama_cpp_flash_attention: true")
    return f"{choice['what']} ({', '.join(words)})"


def _plan_layer_split(site: Site, index: int, tier: Tier) -> tuple[dict[str, Any], list[Problem]]:
    variable = f"tiers[{index}]"
    model = site.models[tier.model]
    facts = model.facts
    slots = _slots(site, tier)
    wish = _Wish(tier, site.engine.flash_attention)
    found: list[Problem] = []
    most = min(facts["n_layers"] + 1, placement.MAX_DEVICES)
    if len(slots) > most:
        found.append(
            Problem(
                f"{variable}.workers",
                f"{len(slots)} devices for the {facts['n_layers']} layers of {model.name} and its output",
                f"at most {most}: one device a layer, and no more than llama.cpp takes",
                "fewer workers, or fewer gpus_per_node",
            )
        )
    known = architectures.unknown(facts) is None
    ubatch = wish.ubatch(site, model) if known and not found else None
    ubatch_tokens = ubatch or _ubatches(tier)[-1]
    broken, warnings = rules.check(rules.Case(site, index, tier, (model,), ubatch_tokens))
    if not known or found:
        return _base(site, tier, tier.memory_mib, warnings), [*found, *broken]

    batch = batch_of(site, tier, ubatch_tokens)
    split = lay_out(facts, batch, slots)
    hosts = [
        row_of(f"{name} host", "", use, site.nodes[name].memory_mib)
        for name, use in _split_hosts(site, tier, model, batch, split)
    ]
    planned = max(row["total"] for row in hosts)
    mem_mib = tier.memory_mib or planned
    if tier.memory_mib is not None and tier.memory_mib < planned:
        warnings.append(
            f"memory_mib {tier.memory_mib} is less than the {planned} MiB that this tier was planned to need"
        )
    alternatives = _alternatives(site, tier, model, fits=split.fits)
    rows = split.rows
    for row in rows:
        if row["headroom"] < 0:
            found.append(
                Problem(
                    f"{variable}.context_tokens",
                    f"{tier.context_tokens}, with which {row['device']} needs {row['total']} MiB "
                    f"(ubatch_tokens {ubatch_tokens})",
                    f"at most {row['limit']} MiB",
                    "; or ".join(map(_choice_in_words, alternatives)) or "more GPUs, or a smaller model",
                )
            )
            break
    for row in hosts:
        if mem_mib > row["limit"]:
            found.append(
                Problem(
                    f"{variable}.memory_mib",
                    f"{mem_mib} MiB of host memory on each node",
                    f"at most {row['limit']} MiB, what {row['device']} has",
                    "another node, fewer of its GPUs' worth of context_tokens, or a smaller model",
                )
            )
    plan = _base(site, tier, mem_mib, warnings)
    plan["rpc_port"] = site_model.RPC_PORT
    plan["server"] = {
        "node_port": tier.gateway_port,
        "args": head_args(site, tier, split, plan["slurm"]["cpus_per_node"], ubatch_tokens),
        "environment": _split_environment(tier),
    }
    if tier.chat_template is not None:
        plan["chat_template"] = tier.chat_template
        plan["chat_template_file"] = _template_file(site, tier)
    plan["worker"] = _worker(site, tier, split, plan["slurm"]["cpus_per_node"])
    plan["tensor_split"] = list(split.counts)
    plan["memory"] = rows + hosts
    plan["alternatives"] = alternatives
    return plan, [*broken, *found]


def _nice(site: Site, tier: Tier) -> int:
    """Slurm's ``--nice``: more for each tier that goes before this one, if any of them wants the same nodes."""
    above = [other for other in site.tiers.values() if other.priority > tier.priority]
    rivals = any(set(other.all_nodes) & set(tier.all_nodes) for other in above)
    return NICE_STEP * len(above) if rivals else 0


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
            "nice": _nice(site, tier),
        },
        "engine": {
            "prefix": f"{site.shared_dir}/ai/llama.cpp/{site.engine.version}-{site.engine.backend}",
            "flash_attention": site.engine.flash_attention,
            # On the node: which of the build's files it has read and found right.
            "memory": f"{STATE_DIRECTORY}/engine.json",
        },
        "nodes": {
            node.name: {
                "address": node.cluster_address,
                "rpc_address": node.rpc_address,
                "numa_node": node.gpus[0].numa_node if node.gpus else 0,
                "gpus": {
                    "count": tier.gpus_per_node if node.gpus else 0,
                    # Declared as used by others, who may have been there before us.
                    "shared": any(gpu.memory_used_mib for gpu in node.gpus),
                },
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
        "alternatives": [],
    }


def _plan(site: Site, tier_name: str) -> tuple[dict[str, Any], list[Problem]]:
    if tier_name not in site.tiers:
        raise ValueError(f"tier = {tier_name!r}; wanted one of {', '.join(site.tiers)}")
    index, tier = list(site.tiers).index(tier_name), site.tiers[tier_name]
    return (_plan_router if tier.kind == "router" else _plan_layer_split)(site, index, tier)


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


def examine(site: object, headers: Headers) -> tuple[list[Problem], list[dict[str, Any]]]:
    """All problems of a site, and the plans of its tiers, also of those that do not fit.

    There are no plans while the inventory itself is wrong (``gleaner.site``); whether they fit is asked after that.
    """
    found = site_model.problems(site, headers)
    if found or not isinstance(site, Mapping):
        return found, []
    model = site_model.read(site, headers)
    planned = [_plan(model, name) for name in model.tiers]
    plans: list[dict[str, Any]] = json.loads(json.dumps([plan for plan, _ in planned]))
    return [problem for _, problems in planned for problem in problems], plans


def problems(site: object, headers: Headers) -> list[Problem]:
    """All problems of a site: those of the inventory itself or, when it has none, what does not fit."""
    return examine(site, headers)[0]


COLUMNS = ("weights", "kv", "compute", "other", "total", "limit", "headroom")


def table(plans: Iterable[Mapping[str, Any]]) -> str:
    """The plans as text for people: one row a device, in MiB, then what is doubtful and what else could be had."""
    heads = [
        "tier",
        "device",
        "layers",
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
            memory_wanted = "-" if mem is None else str(mem)
            rows.append([plan["tier"], row["device"], row["layers"], *numbers, memory_wanted, row["verdict"]])
        if not plan["memory"]:
            rows.append(
                [plan["tier"], "-", "-", *("-" for _ in COLUMNS), "-" if mem is None else str(mem), "not planned"]
            )
        notes += [f"warning: {plan['tier']}: {warning}" for warning in plan["warnings"]]
        notes += [f"choice: {plan['tier']}: {_choice_in_words(choice)}" for choice in plan["alternatives"]]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        texts = [
            cell.ljust(width) if column in (0, 1, 2, len(heads) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths))
        ]
        return "  ".join(texts).rstrip()

    body = [line(heads), line(["-" * width for width in widths]), *(line(row) for row in rows)]
    return "\n".join(["Memory of each tier, in MiB", *body, *notes])
