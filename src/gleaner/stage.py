"""Model files on a node: only verified ones are visible under their name (`gleaner models`).

A model is the file `NAME.gguf`, or, where it is split, the folder `NAME` with its parts as llama.cpp calls them. Either
becomes visible in one step.

Work files live in `.staging/` of the same folder: `NAME.SUM.part` is on its way in, `NAME.doubt` was visible and has to
be read, `NAME.gone` is on its way out. `.staging/verified.json` remembers what was hashed, so that 45 GB are read once
and not at every run, and what we brought ourselves, which alone is ours to remove.

What another node of the site has already comes from there (`gleaner.lend`), before its source is asked.

The routers of this node are told of each change: they read the folder only when they start or are asked to.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gleaner import download, files, lend, model_files

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_MISSING = 3

# A router that unloads a model answers when its process has ended, which it kills after 10 s.
TELL_SECONDS = 60.0
LOOK_SECONDS = 5.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class StageError(download.DownloadError):
    """One model cannot be staged; the text says why and what cures it."""


@dataclass(frozen=True)
class Part:
    """One file of a model."""

    source: str
    sha256: str
    size_bytes: int | None


@dataclass(frozen=True)
class Model:
    name: str
    parts: tuple[Part, ...]
    header: dict[str, Any] | None

    @property
    def split(self) -> bool:
        return len(self.parts) > 1

    @property
    def sha256(self) -> str:
        return model_files.sum_of([part.sha256 for part in self.parts])

    @property
    def files(self) -> list[str]:
        return model_files.file_names(self.name, len(self.parts))


@dataclass(frozen=True)
class Spec:
    directory: Path
    models: tuple[Model, ...]
    address: str
    """Where routers of this node listen, each on one of the ports."""
    ports: tuple[int, ...]
    drain_seconds: float
    """How long requests in flight may go on when their model leaves."""
    lenders: tuple[str, ...] = ()
    """Where other nodes lend what they have, `http://address:port` each."""

    @classmethod
    def load(cls, path: Path) -> Spec:
        value = files.load_config(path)
        try:
            directory = Path(value["directory"])
            wanted = tuple(_model(entry) for entry in value["models"])
            address = str(value["routers"]["address"])
            ports = tuple(int(port) for port in value["routers"]["ports"])
            drain_seconds = float(value["routers"]["drain_seconds"])
            lenders = tuple(str(url) for url in value.get("lenders", ()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a model list ({error!r}): run playbooks/tiers.yml") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        names = [model.name for model in wanted]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{path}: models[].name: got {twice[0]} twice, want each once")
        return cls(directory, wanted, address, ports, drain_seconds, lenders)

    @property
    def staging(self) -> Path:
        return self.directory / ".staging"

    def wanting(self, pairs: list[str]) -> Spec:
        """The same folder with other models, each given as ``NAME=SHA256,…``: enough to check, not to stage."""
        wanted = [
            _model({"name": name, "parts": [{"source": "file:///", "sha256": one} for one in sums.split(",")]})
            for name, _, sums in (pair.partition("=") for pair in pairs)
        ]
        return dataclasses.replace(self, models=tuple(wanted))

    def path_of(self, model: Model) -> Path:
        return self.directory / model_files.place_of(model.name, len(model.parts))

    def visible(self, name: str) -> Path | None:
        """Where a model of this name is, whole or split; None when it is not there."""
        places = (self.directory / f"{name}.gguf", self.directory / name)
        return next((path for path in places if path.is_file() or holds_models(path)), None)

    def work_file(self, name: str, kind: str) -> Path:
        return self.staging / f"{name}.{kind}"

    def part_of(self, model: Model) -> Path:
        """Where the model comes in. Its sum is part of the name: what came of another content is not gone on with."""
        return self.staging / f"{model.name}.{model.sha256[:12]}.part"

    def named(self, kind: str) -> list[str]:
        """Of which models there are work files of this kind, which is doubt or gone."""
        return sorted(path.name[: -len(kind) - 1] for path in self.staging.glob(f"*.{kind}"))


def holds_models(path: Path) -> bool:
    """It is a folder in which llama.cpp would find a model."""
    return path.is_dir() and not path.name.startswith(".") and any(path.glob("*.gguf"))


def _model(entry: dict[str, Any]) -> Model:
    name, header = str(entry["name"]), entry.get("header")
    if not _NAME.fullmatch(name):
        raise ValueError(f"models[].name: got {name!r}, want a file stem like {_NAME.pattern}")
    if header is not None and not isinstance(header, dict):
        raise ValueError(
            f"models[{name}].header: got {type(header).__name__}, want the facts of `gleaner gguf inspect`"
        )
    given = entry.get("parts") or [entry]
    parts = tuple(_part(name, part) for part in given)
    size = (header or {}).get("size_bytes")
    if len(parts) == 1 and parts[0].size_bytes is None and isinstance(size, int):
        # Its header facts know how long it is.
        parts = (dataclasses.replace(parts[0], size_bytes=size),)
    return Model(name, parts, header)


def _part(name: str, entry: dict[str, Any]) -> Part:
    source, sha256, size = str(entry["source"]), str(entry["sha256"]), entry.get("size_bytes")
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"models[{name}].sha256: got {sha256!r}, want 64 hexadecimal digits in lower case")
    if urllib.parse.urlsplit(source).scheme not in ("http", "https", "file"):
        raise ValueError(f"models[{name}].source: got {source!r}, want https://…, http://… or file:///…")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"models[{name}].size_bytes: got {size!r}, want a positive integer")
    return Part(source, sha256, size)


# What is there


def fingerprint(path: Path) -> dict[str, list[int]]:
    """What tells that a model is still the one that was hashed: size, time and inode of each file, by its name."""
    stats = {file.name: file.stat() for file in ([path] if path.is_file() else path.iterdir())}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in sorted(stats.items())}


def load_verified(spec: Spec) -> dict[str, dict[str, Any]]:
    return verified_in(spec.directory)


def verified_in(directory: Path) -> dict[str, dict[str, Any]]:
    """What is remembered of the models in a folder, by name; nothing when that cannot be read."""
    try:
        value = json.loads(files.read_bounded(directory / ".staging" / "verified.json", files.JSON_LIMIT))
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {name: _entry(name, entry) for name, entry in value.items() if isinstance(entry, dict)}


def _entry(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """As it is written now; before there were split models, an entry had its one file's marks itself."""
    if "files" in entry or "sha256" not in entry:
        return entry
    marks = [entry.get(key) for key in ("size", "mtime_ns", "inode")]
    return {
        "sha256": entry["sha256"],
        "sums": [entry["sha256"]],
        "staged": entry.get("staged"),
        "files": {f"{name}.gguf": marks},
    }


def note_verified(spec: Spec, model: Model, staged: bool) -> None:
    """Remember a visible model as hashed. What we staged stays ours when it is only read again."""
    known = load_verified(spec)
    before = known.get(model.name, {})
    ours = staged or (before.get("staged") is True and before.get("sha256") == model.sha256)
    known[model.name] = {
        "sha256": model.sha256,
        "sums": [part.sha256 for part in model.parts],
        "staged": ours,
        "files": fingerprint(spec.path_of(model)),
    }
    known = {name: entry for name, entry in known.items() if spec.visible(name)}
    files.write_atomic(spec.staging / "verified.json", (json.dumps(known, indent=1) + "\n").encode())


def is_what_was_noted(path: Path, entry: dict[str, Any]) -> bool:
    """The model is still the one that was hashed; FileNotFoundError when there is none."""
    return bool(entry.get("files") == fingerprint(path))


def state_of(spec: Spec, model: Model) -> str:
    """present, missing, changed (not the wanted content) or unverified (there, but not hashed yet)."""
    known = load_verified(spec).get(model.name, {})
    try:
        if not is_what_was_noted(spec.path_of(model), known):
            return "unverified"
    except FileNotFoundError:
        return "missing"
    return "present" if known.get("sha256") == model.sha256 else "changed"


def leaving(spec: Spec) -> list[str]:
    """Models that we staged and the list no longer names, or names as split where they are whole, or the reverse."""
    wanted = {model.name: spec.path_of(model) for model in spec.models}
    found = []
    for name, entry in sorted(load_verified(spec).items()):
        path = spec.visible(name)
        if entry.get("staged") is not True or not _NAME.fullmatch(name) or path in (None, wanted.get(name)):
            continue
        assert path is not None
        with contextlib.suppress(FileNotFoundError):
            if is_what_was_noted(path, entry):
                found.append(name)
    return found


def left_over(spec: Spec) -> list[Path]:
    """Work files that nothing goes on with: of models on their way out, and downloads that are not wanted any more."""
    wanted = {spec.part_of(model) for model in spec.models}
    return [
        *(spec.work_file(name, "gone") for name in spec.named("gone")),
        *sorted(path for path in spec.staging.glob("*.part") if path not in wanted),
    ]


def foreign(spec: Spec) -> list[Path]:
    """Model files that we neither staged nor were told of: nobody vouches for them."""
    wanted = {model.name for model in spec.models}
    known = {*(spec.path_of(model) for model in spec.models), *(spec.visible(name) for name in leaving(spec))}
    there = [path for path in spec.directory.glob("*") if path.suffix == ".gguf" or holds_models(path)]
    return [
        *sorted(path for path in there if path not in known),
        # Its model left the inventory before it had been read.
        *(spec.work_file(name, "doubt") for name in spec.named("doubt") if name not in wanted),
    ]


def unlisted(spec: Spec) -> list[str]:
    """Models that are there, but unknown to a running router."""
    present = {model.name for model in spec.models if state_of(spec, model) == "present"}
    missing: set[str] = set()
    for port in spec.ports if present else ():
        # One that does not run, or does not answer, has nothing to be told now.
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            missing |= present - set(listed(spec.address, port, "", LOOK_SECONDS))
    return sorted(missing)


def check(spec: Spec) -> dict[str, Any]:
    """What `gleaner models check` tells."""
    states = {model.name: state_of(spec, model) for model in spec.models}
    found: dict[str, Any] = {
        "directory": str(spec.directory),
        "models": states,
        "leaving": leaving(spec),
        "left_over": [path.name for path in left_over(spec)],
        "unlisted": unlisted(spec),
        "foreign": [path.name for path in foreign(spec)],
    }
    todo = found["leaving"] or found["left_over"] or found["unlisted"]
    return {**found, "complete": not todo and all(state == "present" for state in states.values())}


_STATE_WORDS = {
    "missing": "is not there, to be staged",
    "changed": "has another content than the inventory names, to be replaced",
    "unverified": "was not verified, to be read before it is served",
}


def words(found: dict[str, Any]) -> list[str]:
    """The same for people, a line each: what `gleaner models stage` would do, and what it leaves alone."""
    return [
        *(f"{name} {_STATE_WORDS[state]}" for name, state in found["models"].items() if state != "present"),
        *(f"{name} is no longer in the inventory, to be removed" for name in found["leaving"]),
        *(f"{name} is left over, to be removed" for name in found["left_over"]),
        *(f"{name} is not listed by a running router, which is to be told" for name in found["unlisted"]),
        *(f"{name} is not in the inventory and was not staged by gleaner, left alone" for name in found["foreign"]),
    ]


# Staging


def check_header(path: Path, model: Model) -> None:
    from gleaner import gguf

    try:
        gguf.check_file(path / model.files[0] if model.split else path, model.header)
    except ValueError as error:
        raise StageError(f"{model.name}: sha256 is right, but the file is not servable: {error}") from None


def show(spec: Spec, model: Model, path: Path, staged: bool) -> None:
    """Make a verified work file, or folder, visible."""
    for file in path.iterdir() if model.split else [path]:
        file.chmod(0o644)
    if model.split:
        path.chmod(0o755)
    os.replace(path, spec.path_of(model))
    fd = os.open(spec.directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    note_verified(spec, model, staged)


def remove(path: Path) -> int:
    """Delete a work file or folder; how many bytes it had."""
    size = sum(stat[0] for stat in fingerprint(path).values())
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return size


def sum_on_disk(model: Model, path: Path) -> str:
    """The model's sum as its files have it; empty when it is not made of its files."""
    if path.is_dir() != model.split or (model.split and {file.name for file in path.iterdir()} != {*model.files}):
        return ""
    places = [path / name for name in model.files] if model.split else [path]
    return model_files.sum_of(
        [files.hash_file(file, download.Progress(file.stem, file.stat().st_size).show) for file in places]
    )


def vindicate(spec: Spec, model: Model) -> bool:
    """Make a model visible again that was hidden for doubt, if its content is right."""
    doubt = spec.work_file(model.name, "doubt")
    if not doubt.exists():
        return False
    print(f"{model.name} is there, reading it to verify", flush=True)
    if sum_on_disk(model, doubt) != model.sha256:
        remove(doubt)
        print(f"{model.name} was there with another content, removed", flush=True)
        return False
    check_header(doubt, model)
    show(spec, model, doubt, staged=False)
    return True


def stage_one(spec: Spec, model: Model) -> bool:
    """Make the model visible and verified; true when anything had to be done. StageError if it cannot be."""
    if state_of(spec, model) == "present":
        return False
    if vindicate(spec, model):
        return True
    whole = spec.part_of(model)
    if model.split:
        whole.mkdir(exist_ok=True)
    require_all(spec, model, whole)
    for name, part in zip(model.files, model.parts):
        if model.split and (whole / name).exists():
            # It has this name since its sum was right.
            continue
        bring(spec, name[: -len(".gguf")], part, whole / f"{name}.part" if model.split else whole)
        if model.split:
            os.replace(whole / f"{name}.part", whole / name)
    try:
        check_header(whole, model)
    except StageError:
        remove(whole)
        raise
    show(spec, model, whole, staged=True)
    print(f"{model.name} staged", flush=True)
    return True


def require_all(spec: Spec, model: Model, whole: Path) -> None:
    """DownloadError when the disk has no room for what is still to come, as far as sizes are known."""
    have = sum(stat[0] for stat in fingerprint(whole).values()) if whole.exists() else 0
    wanted = sum(part.size_bytes or 0 for part in model.parts) or (model.header or {}).get("size_bytes", 0)
    if wanted:
        download.require_space(model.name, spec.staging, max(wanted - have, 0))


def bring(spec: Spec, name: str, part: Part, target: Path) -> None:
    """Have the file there with the right content: from a node that has it, or else from its source."""
    for lender in lend.who_has(spec.lenders, part.sha256):
        print(f"{name} comes from {lender.place}", flush=True)
        try:
            source = download.Source(name, lender.url, part.sha256, part.size_bytes, lender.headers)
            if download.fetch(source, target) == part.sha256:
                return
            print(f"{name}: {lender.place} sent another content; going on elsewhere", flush=True)
            target.unlink()
        except (download.DownloadError, OSError) as error:
            print(f"{name}: {error}; going on elsewhere", flush=True)
    origin, resumed = download.Source(name, part.source, part.sha256, part.size_bytes), target.exists()
    got = download.fetch(origin, target)
    if got != part.sha256 and resumed:
        print(f"{name}: what came before is not of this content; beginning anew", flush=True)
        target.unlink()
        got = download.fetch(origin, target)
    if got != part.sha256:
        target.unlink()
        raise StageError(
            f"{name}: sha256: got {got}, want {part.sha256}: "
            f"{part.source} is corrupt or has changed, nothing was made visible"
        )


def withdraw(spec: Spec) -> list[str]:
    """Take away what the inventory does not vouch for; the models that are gone for good.

    What is not known to be right is hidden at once. A model that is right, but no longer wanted, stays until its
    requests in flight have ended. Routers are told before anything is deleted.
    """
    for model in spec.models:
        state = state_of(spec, model)
        if state in ("unverified", "changed"):
            hide(spec, spec.path_of(model), model.name, "doubt" if state == "unverified" else "gone")
    going = leaving(spec)
    hidden = {*spec.named("doubt"), *spec.named("gone")}
    wait_until_idle(spec, {*going, *hidden})
    for name in going:
        if path := spec.visible(name):
            hide(spec, path, name, "gone")
    absent = {name for name in [*going, *hidden] if not spec.visible(name)}
    if absent:
        tell(spec, absent=absent)
    for path in left_over(spec):
        size = remove(path)
        print(f"{path.name} removed, {size} bytes", flush=True)
    return going


def hide(spec: Spec, path: Path, name: str, kind: str) -> None:
    hidden = spec.work_file(name, kind)
    if hidden.exists():
        remove(hidden)
    os.replace(path, hidden)
    print(f"{name} taken out of sight", flush=True)


@contextlib.contextmanager
def locked(spec: Spec) -> Iterator[None]:
    """One stager at a time on a node."""
    spec.staging.mkdir(parents=True, exist_ok=True)
    with (spec.staging / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise StageError(f"{spec.directory}: another `gleaner models stage` is at work here: wait for it") from None
        yield


def stage(spec: Spec) -> int:
    """Stage every model that can be, and take away the others; each failure is told, none stops the rest."""
    failures: list[str] = []
    changed: list[str] = []
    removed: list[str] = []

    def failed(error: Exception) -> None:
        failures.append(str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)

    with locked(spec):
        try:
            removed = withdraw(spec)
            tell(spec, present=set(unlisted(spec)))
        except (download.DownloadError, OSError) as error:
            failed(error)
        for model in spec.models:
            try:
                if stage_one(spec, model):
                    changed.append(model.name)
                    tell(spec, present={model.name})
            except (download.DownloadError, OSError) as error:
                failed(error)
    for path in foreign(spec):
        print(f"{path} is not in the inventory and was not staged by gleaner; left alone", flush=True)
    print(json.dumps({"changed": changed, "removed": removed, "failed": failures}), flush=True)
    return EXIT_FAILED if failures else 0


# Telling the routers of this node


def tell(spec: Spec, present: set[str] | None = None, absent: set[str] | None = None) -> None:
    """Have each running router read the folder again, until it lists what is there and not what is gone."""
    wanted, unwanted = present or set(), absent or set()
    for port in spec.ports if wanted or unwanted else ():
        router = f"the router on {spec.address}:{port}"
        deadline = time.monotonic() + TELL_SECONDS
        while True:
            try:
                names = set(listed(spec.address, port, "?reload=1", max(deadline - time.monotonic(), 1.0)))
            except ConnectionRefusedError:
                # It reads the folder when it starts.
                break
            except (OSError, ValueError, http.client.HTTPException) as error:
                why = f"/v1/models: {error}"
            else:
                wrong = [*(f"not {name}" for name in sorted(wanted - names)), *sorted(unwanted & names)]
                if not wrong:
                    news = [
                        *(f"serves {name}" for name in sorted(wanted)),
                        *(f"lets {name} go" for name in sorted(unwanted)),
                    ]
                    print(f"{router} {', '.join(news)}", flush=True)
                    break
                why = f"it lists {', '.join(wrong)}"
            if time.monotonic() >= deadline:
                raise StageError(f"{router} did not read {spec.directory} again within {TELL_SECONDS:g} s: {why}")
            time.sleep(0.5)


def wait_until_idle(spec: Spec, names: set[str]) -> None:
    """Let requests to these models end, as long as drain_seconds allow."""
    deadline = time.monotonic() + spec.drain_seconds
    for port in spec.ports if names else ():
        while working := at_work(spec.address, port, names):
            if time.monotonic() >= deadline:
                print(f"{', '.join(working)} still at work after {spec.drain_seconds:g} s, unloaded", flush=True)
                break
            time.sleep(0.5)


def at_work(address: str, port: int, names: set[str]) -> list[str]:
    """Which of these models answer a request there, or may do so: no loading, no eviction comes of asking."""
    try:
        states = listed(address, port, "", LOOK_SECONDS)
    except ConnectionRefusedError:
        return []
    except (OSError, ValueError, http.client.HTTPException):
        return sorted(names)
    return [name for name in sorted(names & set(states)) if _works(address, port, name, states[name])]


def _works(address: str, port: int, name: str, state: str) -> bool:
    if state == "loading":
        # Somebody waits for it.
        return True
    if state not in ("loaded", "sleeping"):
        return False
    query = urllib.parse.urlencode({"model": name, "autoload": "false"})
    try:
        return any(slot["is_processing"] for slot in ask(address, port, f"/slots?{query}", LOOK_SECONDS))
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        # A server answers this only between two batches.
        return True


def listed(address: str, port: int, query: str, timeout_seconds: float) -> dict[str, str]:
    """The models that a router lists, with their states; after reading its folder if the query is ``?reload=1``."""
    try:
        entries = ask(address, port, f"/v1/models{query}", timeout_seconds)["data"]
        return {str(entry["id"]): str(entry["status"]["value"]) for entry in entries}
    except (KeyError, TypeError):
        raise ValueError("answer is no list of models") from None


def ask(address: str, port: int, path: str, timeout_seconds: float) -> Any:
    """The JSON that a server answers; ValueError for everything else, StageError when it has another key."""
    # A server that was started before there was a key asks for none.
    key = files.read_key(files.SERVER_KEY) if files.SERVER_KEY.exists() else ""
    connection = http.client.HTTPConnection(address, port, timeout=timeout_seconds)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status == 401:
        raise StageError(
            f"http://{address}:{port} was started with another key than {files.SERVER_KEY}: "
            "have the tier start again, with `scontrol requeue` of its job"
        )
    if response.status != 200:
        raise ValueError(f"HTTP {response.status}")
    return json.loads(body)


# Commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in (
        ("check", f"tell what is to be done; exit code {EXIT_MISSING} when anything is"),
        ("stage", "bring and verify what is missing, remove what the inventory no longer names"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        action.add_argument("--spec", type=Path, default=Path("/etc/gleaner/models.json"))
        if name == "check":
            action.add_argument("--wanted", nargs="*", metavar="NAME=SHA256,…", help="models, instead of the spec's")
            action.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    try:
        spec = Spec.load(args.spec)
        if args.action == "stage":
            return stage(spec)
        found = check(spec if args.wanted is None else spec.wanting(args.wanted))
    except (download.DownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(json.dumps(found, indent=1) if args.json else "\n".join(words(found)))
    return 0 if found["complete"] else EXIT_MISSING
