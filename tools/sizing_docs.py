#!/usr/bin/env python3
"""Write what docs/sizing.md says of the first cluster's numbers and of the rules, from the planner's own figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from gleaner import memory, plan, rules
from gleaner import site as site_model
from gleaner.architectures import Batch
from gleaner.site import KvCache, Model, Site, Tier
from tests.unit import sites

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
CACHES = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q4_0", "f16"))
UBATCHES = (1024, 512, 256, 128, 64, 32)
CONTEXT = 131072


def caches(model: Model) -> Iterator[str]:
    yield f"KV cache of {model.name} at {CONTEXT} tokens, all devices together:"
    yield ""
    yield "| K | V | GiB |"
    yield "|---|---|---|"
    for k, v in CACHES:
        batch = Batch(CONTEXT, type_k=k, type_v=v, flash_attention=v != "f16")
        yield f"| {k} | {v} | {sum(memory.kv_bytes(model.facts, batch)) / GIB:.2f} |"


def contexts(site: Site, tier: Tier, model: Model) -> Iterator[str]:
    yield "| nodes | K, V | flash attention | " + " | ".join(f"ubatch {size}" for size in UBATCHES) + " |"
    yield "|---|---|---|" + "---|" * len(UBATCHES)
    for workers in (tier.workers, tier.workers[1:]):
        for k, v, flash in (("f16", "f16", False), ("q4_0", "f16", False), ("q8_0", "q8_0", True)):
            changed = dataclasses.replace(tier, workers=workers, kv_cache=KvCache(k, v), context_tokens=CONTEXT)
            tiers = [dataclasses.replace(changed, ubatch_tokens=n, batch_tokens=max(n, 512)) for n in UBATCHES]
            cells = [str(plan.largest_context(site, one, model, flash)) for one in tiers]
            yield f"| {len(workers) + 1} | {k}, {v} | {'on' if flash else 'off'} | {' | '.join(cells)} |"


def section() -> str:
    value = sites.beefcake2()
    headers = site_model.read_headers(value)
    site = site_model.read(value, headers)
    tier = next(tier for tier in site.tiers.values() if tier.kind == "layer_split")
    model = site.models[tier.model]
    planned = json.loads(json.dumps(plan.plan_tier(value, tier.name, headers)))
    lines = [
        *caches(model),
        "",
        f"The largest context of {model.name}, by nodes and micro-batch, in tokens (at most {CONTEXT} was asked for):",
        "",
        *contexts(site, tier, model),
        "",
        f"The plan of `inventories/beefcake2` for the tier {tier.name}: `--tensor-split "
        f"{','.join(map(str, planned['tensor_split']))}`, `--mem` {planned['slurm']['mem_mib']} MiB.",
        "",
        "```text",
        plan.table([planned]),
        "```",
    ]
    return "\n".join(lines)


def main() -> None:
    for name, text in (("seed", section()), ("rules", rules.table())):
        report.write(name, text, ROOT / "docs/sizing.md")


if __name__ == "__main__":
    main()
