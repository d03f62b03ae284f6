"""Keep what a build's manifest proves: from standard input to docs/cuda-proof.json.

Only what the build is a function of, and what was found in it: no host, no time, no path of the machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cuda-proof.json"
INPUTS = ("version", "backend", "compiler", "cpu_level", "cmake_options")


def proof_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that anyone with the same inputs gets again. ValueError when it proves nothing."""
    if not manifest.get("proof", {}).get("programs"):
        raise ValueError(f"the manifest of {manifest.get('version')} holds no proof: was it built for CUDA?")
    source = {name: manifest["source"][name] for name in ("sha256", "subdirectory")}
    return {
        "made_by": "make test-cuda",
        **{name: manifest[name] for name in INPUTS},
        "source": source,
        **manifest["proof"],
    }


def main() -> int:
    try:
        text = json.dumps(proof_of(json.load(sys.stdin)), indent=2) + "\n"
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    part = DOCUMENT.with_suffix(".part")
    part.write_text(text)
    part.replace(DOCUMENT)
    print(f"written: {DOCUMENT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
