"""The committed proof of the production engine is of the very build that the production inventory orders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gleaner import engine_build
from tests.lab.ansible import ROOT
from tests.render import beefcake2
from tools import cuda_proof


@pytest.fixture(scope="module")
def config(site: beefcake2.Rendered) -> engine_build.Config:
    return engine_build.Config.load(site.folder / beefcake2.CONTROLLER / "etc/gleaner/engine.json")


@pytest.fixture(scope="module")
def proof() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(cuda_proof.DOCUMENT.read_text())
    return value


def test_it_is_of_the_ordered_build(config: engine_build.Config, proof: dict[str, Any]) -> None:
    """After a change of a pin or an option: `make test-cuda`."""
    assert config.toolkit is not None
    assert proof["source"] == {name: config.source[name] for name in ("sha256", "subdirectory")}
    assert (proof["version"], proof["backend"]) == (config.version, config.backend)
    assert proof["cpu_level"] == config.cpu_level
    assert proof["cmake_options"] == list(config.cmake_options)
    assert sorted(proof["programs"]) == sorted(config.targets)
    assert proof["flash_attention"] is config.flash_attention is False


def test_every_image_is_for_sm70_and_flash_attention_is_stubs(proof: dict[str, Any]) -> None:
    assert proof["toolkit"].startswith("12.")
    for name, found in proof["programs"].items():
        assert list(found["images"]["sm"]) == ["70"], name
        assert found["images"]["sm"]["70"] > 100, name
        assert found["images"]["compute"] == {}, name
        assert 0 < found["flash_attention_kernels"] == found["flash_attention_trap_stubs"], name
        assert found["functions"] > found["flash_attention_kernels"] + found["flash_attention_helpers"], name


def test_a_manifest_without_a_proof_writes_nothing() -> None:
    with pytest.raises(ValueError, match="holds no proof"):
        cuda_proof.proof_of({"version": "1", "proof": {}})


def test_the_proof_holds_nothing_of_the_machine() -> None:
    manifest: dict[str, Any] = {
        **dict.fromkeys(cuda_proof.INPUTS, "x"),
        "built_on": "host",
        "sha256": {"bin/x": "0"},
        "source": {"url": "file:///srv/x", "sha256": "0", "subdirectory": "y"},
        "proof": {"toolkit": "12.4", "programs": {"llama-server": {}}},
    }
    text = json.dumps(cuda_proof.proof_of(manifest))
    assert "host" not in text
    assert "/srv" not in text


def test_document_is_where_the_tool_writes_it() -> None:
    assert Path("docs/cuda-proof.json") == cuda_proof.DOCUMENT.relative_to(ROOT)
