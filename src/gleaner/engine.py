"""A build of llama.cpp in its own folder, with a manifest of what it was made from and of each of its files.

    <root>/.builds/<version>-<backend>-<key>/   one build, never changed once it has this name
    <root>/<version>-<backend>                  link to the newest build of that version
    <root>/current                              link to the build in use

The key is of everything that decides what comes out, so two builds of different inputs never share a folder. Plans name
the folder, not a link, so that a tier's nodes cannot be led to different ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gleaner import files

BUILDS = ".builds"
MANIFEST = "manifest.json"
# With --limit the host that builds may be left out.
CURE = "run playbooks/engine.yml without --limit"


class EngineError(Exception):
    """A build cannot be made, or is not what its manifest says; the text says why and what cures it."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a build."""

    key: str
    version: str
    backend: str
    source: dict[str, str]
    compiler: str
    cpu_level: str
    cmake_options: tuple[str, ...]
    sha256: dict[str, str]
    """Path inside the build, such as ``bin/llama-server``, to the sum of the file."""
    built_on: str = ""
    proof: dict[str, Any] = field(default_factory=dict)
    """What `gleaner.cuda` found in the device code; empty for a build without any."""

    @classmethod
    def load(cls, prefix: Path) -> Manifest:
        """EngineError when there is none, or none that can be read."""
        path = prefix / MANIFEST
        try:
            value = files.load_config(path)
            fields = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
            manifest = cls(**{**fields, "cmake_options": tuple(value["cmake_options"])})
            if not isinstance(manifest.sha256, dict) or not manifest.sha256 or not all(map(_inside, manifest.sha256)):
                raise ValueError(f"{path}: sha256: got {sorted(manifest.sha256)}, want files of the build")
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"{path}: no manifest of a build ({error!r}): {CURE}") from None
        except ValueError as error:
            raise EngineError(f"{error}: {CURE}") from None
        return manifest

    @property
    def flash_attention(self) -> bool:
        """Whether its kernels for flash attention compute; on a GPU they may be compiled out."""
        return self.backend != "cuda" or "-DGGML_CUDA_FA=ON" in self.cmake_options

    def write(self, prefix: Path) -> None:
        value = {"v": 1, **self.__dict__, "cmake_options": list(self.cmake_options)}
        files.write_atomic(prefix / MANIFEST, (json.dumps(value, indent=2) + "\n").encode())


def _inside(name: str) -> bool:
    parts = Path(name).parts
    return len(parts) > 1 and ".." not in parts and parts[0] != "/"


def folder_of(root: Path, name: str) -> Path:
    """Where a build is, or would be."""
    return root / BUILDS / name


def is_there(build: Path) -> bool:
    """Whether a build was published: its manifest is written last, and goes with it."""
    return (build / MANIFEST).is_file()


def switch(link: Path, target: str) -> None:
    """Have the link lead to the target; a reader sees the old one or the new one."""
    with tempfile.TemporaryDirectory(prefix=".switch-", dir=link.parent) as folder:
        new = Path(folder, "link")
        new.symlink_to(target)
        new.replace(link)


def identity(prefix: Path) -> str:
    """Sum of the build's manifest, and so of each of its files: the same inputs, compiled twice, need not agree."""
    try:
        return files.hash_file(prefix / MANIFEST)
    except OSError as error:
        raise EngineError(f"{prefix / MANIFEST}: cannot be read ({error.strerror}): {CURE}") from None


def sums(prefix: Path) -> dict[str, str]:
    """Sum of every file in the folders of a build."""
    found = sorted(path for path in prefix.glob("*/**/*") if path.is_file())
    return {str(path.relative_to(prefix)): files.hash_file(path) for path in found}


def of_job(logs: Path, job: object) -> str:
    """Name of the build that a job runs, from the link that it leaves beside its logs; OSError when it leaves none."""
    return Path(os.readlink(logs / str(job) / "engine")).name


def verify(prefix: Path, memory: Path | None = None) -> str:
    """The key of the build whose files this host sees, each with the content that was published.

    `memory` is a file of this host that keeps what was read before: a file is read again only when its inode, size or
    times have changed. EngineError names what is missing, changed or too much.
    """
    manifest = Manifest.load(prefix)
    known = _remembered(memory)
    seen: dict[str, list[Any]] = {}
    for name, wanted in manifest.sha256.items():
        path = prefix / name
        try:
            mark = _mark(path)
            before = known.get(str(path))
            got = before[1] if isinstance(before, list) and before[:1] == [mark] else files.hash_file(path)
        except OSError as error:
            raise EngineError(f"{path}: cannot be read on {os.uname().nodename} ({error.strerror}): {CURE}") from None
        if got != wanted:
            raise EngineError(
                f"{path}: sha256: got {got} on {os.uname().nodename}, want {wanted}: "
                "the file was changed, or this host sees another file than the one that was built: "
                f"remove the build's folder and {CURE}"
            )
        seen[str(path)] = [mark, got]
    for name in _unknown(prefix, manifest):
        raise EngineError(f"{prefix / name}: not in {MANIFEST}: somebody added it: remove it")
    if memory is not None and seen != known:
        # Only a help: where nothing can be remembered, all is read again.
        with contextlib.suppress(OSError):
            files.write_atomic(memory, json.dumps(seen).encode(), mode=0o600)
    return manifest.key


def _unknown(prefix: Path, manifest: Manifest) -> Iterator[str]:
    """Files beside those of the manifest: a library there would be loaded before that of the system."""
    for path in sorted(prefix.glob("*/**/*")):
        name = str(path.relative_to(prefix))
        if name not in manifest.sha256 and not path.is_dir():
            yield name


def _mark(path: Path) -> list[int]:
    """What tells that a file is the one that was read before."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(0, "not a regular file")
    return [about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]


def _remembered(memory: Path | None) -> dict[str, Any]:
    try:
        value = json.loads(files.read_bounded(memory, files.JSON_LIMIT)) if memory else {}
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
