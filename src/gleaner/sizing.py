"""Two questions about one model, without an inventory: which layers go where, and what does each device hold?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gleaner import architectures, gguf, memory, placement, plan
from gleaner.architectures import KV_BLOCKS, Batch, Device
from gleaner.plan import Slot, Split
from gleaner.site import BACKENDS, KV_TYPES, TIER_WHOLES, Checker

KV_KEYS = ("k", "v")
# llama.cpp's order of devices.
RANKS = ("a remote device", "a device of the head", "the head's CPU")
REMOTE, OWN, HEADS_CPU = range(3)


def tensor_split(n_layers: int, memories: object) -> dict[str, Any]:
    """``--tensor-split`` for devices with so much free memory each, in any unit, and layers that are all alike.

    ``tensor_split`` has the slots of each device in llama.cpp's order, ``layers`` the layers of each, and
    ``output_device`` is the index of the one that has the output layer besides. Raises ValueError.
    """
    check = Checker()
    devices = check.items(memories, "memory", "a number for each device: memory: [32768, 32768, 32768]")
    _refuse(check)
    counts = placement.split_by_memory(n_layers, devices)
    last = max(index for index, count in enumerate(counts) if count)
    layers = [count - (index == last) for index, count in enumerate(counts)]
    return {"tensor_split": counts, "layers": layers, "output_device": last}


def memory_plan(facts: object, wishes: object, devices: object) -> dict[str, Any]:
    """What one model takes of each device, in MiB, with the split that fills the fullest device least.

    ``devices`` stand in llama.cpp's order: remote ones, the head's own, and the head's CPU, which may be left out.
    A CPU that stands alone holds everything; after others it holds the token embedding. Raises ValueError with
    everything that is wrong.
    """
    check = Checker()
    model = _model(check, facts)
    batch = _batch(check, model, wishes)
    slots, cpu = _slots(check, devices)
    _refuse(check)
    most = min(model["n_layers"] + 1, placement.MAX_DEVICES)
    if len(slots) > most:
        wanted = f"at most {most} for {model['n_layers']} layers and the output"
        check.add("devices", len(slots), wanted, "leave devices out")
    _refuse(check)
    if slots:
        split = plan.lay_out(model, batch, slots)
        rows = split.rows
        if cpu is not None:
            rows.append(plan.row_of(cpu.name, "", split.uses[-1], cpu.limit_mib))
    else:
        assert cpu is not None
        every = model["n_layers"] + 1
        split = Split((cpu,), (every,), tuple(memory.uses(model, batch, [0] * every, [cpu.device])))
        rows = split.rows
    return {
        "tensor_split": list(split.counts) if slots else [],
        "devices": rows,
        "fits": all(row["headroom"] >= 0 for row in rows),
    }


def _refuse(check: Checker) -> None:
    if check.found:
        raise ValueError("\n".join(str(problem) for problem in check.found))


def _model(check: Checker, facts: object) -> Mapping[str, Any]:
    """The header facts; without any when they are of no use."""
    fault = gguf.facts_fault(facts)
    if fault is None:
        assert isinstance(facts, Mapping)
        fault = architectures.unknown(facts)
        if fault is None:
            return facts
    wanted = f"those of version {gguf.FACTS_VERSION}, of a model that the planner knows ({fault})"
    check.add("header facts", facts, wanted, "record them with gleaner gguf inspect FILE, or take another model")
    return {}


def _batch(check: Checker, model: Mapping[str, Any], value: object) -> Batch:
    wishes = check.mapping(value, "wishes")
    check.keys(wishes, ("context_tokens", "parallel", "ubatch_tokens", "kv_cache", "flash_attention"), "wishes.")
    wholes = {
        key: check.whole(wishes.get(key, usual), f"wishes.{key}", *TIER_WHOLES[key]) or 1
        for key, usual in (("context_tokens", None), ("parallel", 1), ("ubatch_tokens", 512))
    }
    flash_attention = wishes.get("flash_attention", False)
    check.flag(flash_attention, "wishes.flash_attention")
    cache = check.mapping(wishes.get("kv_cache", {}), "wishes.kv_cache")
    check.keys(cache, KV_KEYS, "wishes.kv_cache.")
    kinds = {}
    for key in KV_KEYS:
        variable = f"wishes.kv_cache.{key}"
        kinds[key] = check.choice(cache.get(key, "f16"), variable, KV_TYPES) or "f16"
        heads = model.get(f"head_dim_{key}", 0)
        if heads % KV_BLOCKS[kinds[key]][1]:
            check.add(variable, kinds[key], f"f16 for heads of {heads} elements, no multiple of 32", f"{key}: f16")
    if kinds["v"] != "f16" and not flash_attention:
        cure = "v: f16 with a quantised k, or flash_attention: true"
        check.add("wishes.kv_cache.v", kinds["v"], "f16 without flash_attention", cure)
    return Batch(
        context_tokens=wholes["context_tokens"],
        parallel=wholes["parallel"],
        ubatch_tokens=wholes["ubatch_tokens"],
        type_k=kinds["k"],
        type_v=kinds["v"],
        flash_attention=bool(flash_attention),
    )


def _slots(check: Checker, value: object) -> tuple[list[Slot], Slot | None]:
    """The devices that layers are spread over, and the head's CPU: the one that is not remote."""
    found: list[tuple[int, Slot]] = []
    example = "one item a device: devices: [{memory_mib: 32768}]"
    items = check.items(value, "devices", example)
    if value == []:
        check.add("devices", value, "at least one device", example)
    for index, item in enumerate(items):
        variable = f"devices[{index}]"
        device = check.entry(item, variable, ("memory_mib", "memory_used_mib", "backend", "remote"))
        if device is None:
            continue
        total = check.whole(device.get("memory_mib"), f"{variable}.memory_mib", *TIER_WHOLES["memory_mib"]) or 2**31
        used = check.whole(device.get("memory_used_mib", 0), f"{variable}.memory_used_mib", 0, total - 1, "0") or 0
        backend = check.choice(device.get("backend", "cuda"), f"{variable}.backend", BACKENDS)
        remote = device.get("remote", False)
        check.flag(remote, f"{variable}.remote")
        rank = REMOTE if remote else OWN if backend == "cuda" else HEADS_CPU
        found.append((rank, Slot(variable, "", total - used, Device(cuda=backend == "cuda"))))
    for (before, _), (after, slot) in zip(found, found[1:]):
        if after < before or before == after == HEADS_CPU:
            wanted = "llama.cpp's order: remote devices, those of the head, and its CPU once"
            check.add(slot.name, f"{RANKS[after]} behind {RANKS[before]}", wanted, "put them in this order")
    cpus = [slot for rank, slot in found if rank == HEADS_CPU]
    return [slot for rank, slot in found if rank != HEADS_CPU], cpus[0] if cpus else None
