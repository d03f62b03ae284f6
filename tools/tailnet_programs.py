#!/usr/bin/env python3
"""Build tailscale, tailscaled and headscale for the scenario tailnet: pinned versions, once, into the lab's cache.

Exit code 3, with the reason, where this machine has no Go that is new enough, or no way to its modules.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

NOT_HERE = 3
# What the modules below say in their go.mod.
GO_AT_LEAST = (1, 26, 6)
# Where the archive of go.dev is unpacked by its instructions, beside PATH.
GO_PLACES = ("go", "/usr/local/go/bin/go")
# How go words that a module proxy cannot be reached, or does not have what is asked for.
NO_WAY = re.compile(
    r"dial tcp|no such host|connection refused|i/o timeout|TLS handshake|\b(403|404|410|50\d)\b|module lookup disabled"
)
PROGRESS_SECONDS = 15.0


class NotHere(Exception):
    """This machine lacks what the programs are built with; the text says what."""


@dataclass(frozen=True)
class Program:
    name: str
    module: str
    version: str
    flags: str = ""
    files: tuple[str, ...] = ()
    """Of its folder in the module, what its package has besides."""

    @property
    def pin(self) -> str:
        return f"{self.module}@{self.version}"


TAILSCALE = "v1.102.5"
_STAMPS = " ".join(f"-X tailscale.com/version.{name}Stamp={TAILSCALE[1:]}" for name in ("long", "short"))
PROGRAMS = (
    Program("tailscale", "tailscale.com", TAILSCALE, _STAMPS),
    Program("tailscaled", "tailscale.com", TAILSCALE, _STAMPS, ("tailscaled.service", "tailscaled.defaults")),
    Program("headscale", "github.com/juanfont/headscale", "v0.29.3"),
)


def find_go() -> str:
    """The go command. NotHere when there is none, or only an older one."""
    least = ".".join(map(str, GO_AT_LEAST))
    older = []
    for found in filter(None, map(shutil.which, GO_PLACES)):
        said = subprocess.run(
            [found, "env", "GOVERSION"],
            env={**os.environ, "GOTOOLCHAIN": "local"},
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        if tuple(map(int, re.findall(r"\d+", said)[:3])) >= GO_AT_LEAST:
            return found
        older.append(f"{found} is {said or 'no Go'}")
    what = ", ".join(older) or "neither PATH nor /usr/local/go has one"
    raise NotHere(f"no Go that is new enough: {what}; wanted {least} or newer")


def environment(cache: Path) -> dict[str, str]:
    """That of go: nothing is written elsewhere, no other toolchain is fetched; the proxy is the user's own."""
    return {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOTOOLCHAIN": "local",
        "GOPATH": str(cache / "go"),
        "GOCACHE": str(cache / "build"),
        "GOFLAGS": "-modcacherw -mod=readonly -buildvcs=false",
    }


def source(go: str, program: Program, env: dict[str, str]) -> str:
    """The folder of the module, checked against its sum. NotHere when it cannot be had.

    `go install module@version` asks for the list of versions besides, only to warn of deprecated ones; a proxy that
    keeps just what was asked for once has no such list.
    """
    done = subprocess.run(
        [go, "mod", "download", "-json", program.pin], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr
        if done.stdout.startswith("{"):
            said = str(json.loads(done.stdout).get("Error", said))
        reason = f"{program.pin} cannot be had: {' '.join(said.split())}"
        raise NotHere(reason) if NO_WAY.search(said) else RuntimeError(reason)
    return str(json.loads(done.stdout)["Dir"])


def failure(program: Program, lines: list[str]) -> Exception:
    """NotHere where go could not get modules, as its own lines say; anything else is a build that broke."""
    said = "".join(lines)
    if any(NO_WAY.search(line) for line in lines if re.match(r"go: |\S+: module lookup|\S+@v\S+: ", line)):
        return NotHere(f"modules of {program.pin} cannot be had: {' '.join(said.split())}")
    return RuntimeError(f"{program.pin} does not build:\n{said}")


def compile_program(go: str, program: Program, folder: Path, env: dict[str, str]) -> None:
    where = source(go, program, env)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as made:
        argv = [go, "build", "-C", where, "-v", "-trimpath", "-ldflags", f"-s -w {program.flags}", "-o", made]
        with subprocess.Popen(
            [*argv, f"./cmd/{program.name}"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as build:
            assert build.stderr is not None
            began = told = time.monotonic()
            lines: list[str] = []
            packages = 0
            for line in build.stderr:
                lines = [*lines[-20:], line]
                packages += not line.startswith("go: ")
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    print(f"{program.name}: {packages} packages in {told - began:.0f} s", flush=True)
        if build.returncode:
            raise failure(program, lines)
        for name in program.files:
            shutil.copyfile(Path(where, "cmd", program.name, name), folder / name)
        # Last: what is there has all that belongs to it.
        os.replace(Path(made) / program.name, folder / program.name)


def build(cache: Path) -> Path:
    """The folder of the programs, built where they are missing. NotHere when this machine cannot."""
    folder = cache / "-".join(dict.fromkeys(program.version for program in PROGRAMS))
    missing = [program for program in PROGRAMS if not (folder / program.name).exists()]
    if missing:
        go, env = find_go(), environment(cache)
        folder.mkdir(parents=True, exist_ok=True)
        for program in missing:
            print(f"building {program.name} of {program.pin}", flush=True)
            compile_program(go, program, folder, env)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path, help="folder for the programs, modules and what go remembers")
    arguments = parser.parse_args()
    try:
        print(build(arguments.cache.absolute()))
    except NotHere as reason:
        print(f"not built: {reason}", file=sys.stderr)
        return NOT_HERE
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
