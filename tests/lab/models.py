"""Models that come and go on a lab that serves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import yaml

from tests.lab.ansible import ROOT, Run, playbook, succeed
from tests.lab.cluster import TIER_NODE, TINY, run

VISIBLE = "/scratch/ai/models"
OFFERS = "/cluster/shared/offers"


def offered(name: str, of: str = TINY, **differences: str) -> dict[str, Any]:
    """A model of the inventory under another name."""
    models: list[dict[str, Any]] = yaml.safe_load((ROOT / "inventories/lab/group_vars/all/models.yml").read_text())[
        "models"
    ]
    (model,) = (model for model in models if model["name"] == of)
    return {**model, "name": name, **differences}


def offer(tmp_path: Path, *models: dict[str, Any], arguments: tuple[str, ...] = ()) -> Run:
    """Run the tiers' playbook with more models in the inventory."""
    known = yaml.safe_load((ROOT / "inventories/lab/group_vars/all/models.yml").read_text())["models"]
    file = tmp_path / "models.json"
    file.write_text(json.dumps({"models": [*known, *models]}))
    return playbook("playbooks/tiers.yml", "-e", f"@{file}", *arguments)


def split(source: Path, folder: Path, name: str, parts: int) -> list[Path]:
    """The model in parts, as `llama-gguf-split` makes them, by gguf's own writer."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    most = -(-len(reader.tensors) // parts)
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", architecture, split_max_tensors=most)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{name}-*.gguf"))


def visible() -> set[str]:
    return set(run(TIER_NODE, f"ls {VISIBLE}").split())


@contextlib.contextmanager
def restored(*files: str) -> Iterator[None]:
    """The inventory's models are there again after the block, and none of these, which are not ours to remove."""
    before = visible()
    try:
        yield
    finally:
        run(TIER_NODE, f"rm -rf {OFFERS} {' '.join(f'{VISIBLE}/{name}.gguf' for name in files)}")
        succeed("playbooks/tiers.yml")
    assert visible() == before
