"""Model files on a node: only verified ones are visible under their name (`gleaner models`).

Work files live in `.staging/` of the same folder. `.staging/verified.json` remembers what was hashed, so
that 45 GB are read once and not at every run.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gleaner import files, record, slurm, upstream
from gleaner.record import Record, Unreadable, Withdrawn

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_MISSING = 3

CHUNK = 4 << 20
PROGRESS_SECONDS = 5.0
NETWORK_SECONDS = 60.0
ATTEMPTS = 5
GIB = 1 << 30
# Left free on the disk beside the model, so that logs and caches still find room.
SPARE_BYTES = 64 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class StageError(Exception):
    """One model cannot be staged; the text says why and what cures it."""


@dataclass(frozen=True)
class Model:
    name: str
    source: str
    sha256: str
    size_bytes: int | None
    header: dict[str, Any] | None


@dataclass(frozen=True)
class Spec:
    directory: Path
    models: tuple[Model, ...]

    @classmethod
    def load(cls, path: Path) -> Spec:
        value = files.load_config(path)
        try:
            directory = Path(value["directory"])
            models = tuple(_model(entry) for entry in value["models"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a model list ({error!r}): run playbooks/tiers.yml") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        names = [model.name for model in models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{path}: models[].name: got {twice[0]} twice, want each once")
        return cls(directory, models)

    @property
    def staging(self) -> Path:
        return self.directory / ".staging"

    def path_of(self, model: Model) -> Path:
        return self.directory / f"{model.name}.gguf"


def _model(entry: dict[str, Any]) -> Model:
    name, source, sha256 = str(entry["name"]), str(entry["source"]), str(entry["sha256"])
    size, header = entry.get("size_bytes"), entry.get("header")
    if not _NAME.fullmatch(name):
        raise ValueError(f"models[].name: got {name!r}, want a file stem like {_NAME.pattern}")
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"models[{name}].sha256: got {sha256!r}, want 64 hexadecimal digits in lower case")
    if urllib.parse.urlsplit(source).scheme not in ("http", "https", "file"):
        raise ValueError(f"models[{name}].source: got {source!r}, want https://…, http://… or file:///…")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"models[{name}].size_bytes: got {size!r}, want a positive integer")
    if header is not None and not isinstance(header, dict):
        raise ValueError(
            f"models[{name}].header: got {type(header).__name__}, want the facts of `gleaner gguf inspect`"
        )
    return Model(name, source, sha256, size, header)


# What is there


def fingerprint(path: Path) -> dict[str, int]:
    """What tells that a file is still the one that was hashed."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def load_verified(spec: Spec) -> dict[str, dict[str, Any]]:
    try:
        value = json.loads(files.read_bounded(spec.staging / "verified.json", files.JSON_LIMIT))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def note_verified(spec: Spec, model: Model) -> None:
    known = load_verified(spec)
    known[model.name] = {"sha256": model.sha256, **fingerprint(spec.path_of(model))}
    known = {name: entry for name, entry in known.items() if (spec.directory / f"{name}.gguf").exists()}
    files.write_atomic(spec.staging / "verified.json", (json.dumps(known, indent=1) + "\n").encode())


def state_of(spec: Spec, model: Model) -> str:
    """present, missing, changed (not the wanted content) or unverified (there, but not hashed yet)."""
    path = spec.path_of(model)
    try:
        now = fingerprint(path)
    except FileNotFoundError:
        return "missing"
    known = load_verified(spec).get(model.name)
    if not isinstance(known, dict) or any(known.get(key) != value for key, value in now.items()):
        return "unverified"
    return "present" if known.get("sha256") == model.sha256 else "changed"


def unknown_files(spec: Spec) -> list[str]:
    """Visible model files that the list does not name: the router serves them, nobody vouches for them."""
    wanted = {spec.path_of(model).name for model in spec.models}
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in spec.directory.glob("*.gguf") if path.name not in wanted)
    return []


def check(spec: Spec) -> dict[str, Any]:
    """What `gleaner models check` prints."""
    states = {model.name: state_of(spec, model) for model in spec.models}
    return {
        "directory": str(spec.directory),
        "complete": all(state == "present" for state in states.values()),
        "models": states,
        "unknown": unknown_files(spec),
    }


# Staging


class Progress:
    """A line about every five seconds, and one at the end."""

    def __init__(self, name: str, total: int | None) -> None:
        self._name, self._total = name, total
        self._at = time.monotonic()

    def show(self, done: int, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._at < PROGRESS_SECONDS:
            return
        self._at = now
        if self._total:
            share = f"{100 * done // self._total} % {done / GIB:.1f}/{self._total / GIB:.1f} GiB"
        else:
            share = f"{done / GIB:.1f} GiB"
        print(f"{self._name} {share}", flush=True)


def hash_file(path: Path, progress: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
            done += len(data)
            progress.show(done)
    return digest.hexdigest()


def require_space(spec: Spec, model: Model, wanted: int) -> None:
    free = shutil.disk_usage(spec.staging).free
    if free < wanted + SPARE_BYTES:
        raise StageError(
            f"{spec.directory}: got {free} bytes free, want {wanted + SPARE_BYTES} for {model.name}: "
            "free space on that disk or take the model off the tier"
        )


@contextlib.contextmanager
def opened(source: str, offset: int) -> Iterator[tuple[BinaryIO | http.client.HTTPResponse, int, int | None]]:
    """The source from `offset`: stream, offset that it really starts at, whole size if known."""
    parts = urllib.parse.urlsplit(source)
    if parts.scheme == "file":
        path = Path(urllib.parse.unquote(parts.path))
        with path.open("rb") as stream:
            stream.seek(offset)
            yield stream, offset, path.stat().st_size
        return
    request = urllib.request.Request(source, headers={"User-Agent": "gleaner"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    with urllib.request.urlopen(request, timeout=NETWORK_SECONDS) as response:
        length = response.headers.get("Content-Length", "")
        start = offset if response.status == 206 else 0
        yield response, start, start + int(length) if length.isdigit() else None


def fetch(spec: Spec, model: Model, part: Path) -> str:
    """Bring the source into `part`, resuming what is there; its sha256."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return fetch_once(spec, model, part)
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                # The part is as long as the source, or longer: the hash decides, or it starts anew.
                digest = hash_file(part, Progress(model.name, None))
                if digest == model.sha256:
                    return digest
                part.unlink()
                continue
            if error.code < 500 or attempt == ATTEMPTS:
                raise StageError(f"{model.source}: HTTP {error.code} {error.reason}") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if attempt == ATTEMPTS:
                raise StageError(f"{model.source}: {error}; what came is kept for the next run") from None
        print(f"{model.name} interrupted, resuming ({attempt} of {ATTEMPTS - 1})", flush=True)
        time.sleep(min(2**attempt, 10) / 2)
    raise StageError(f"{model.source}: no whole answer in {ATTEMPTS} attempts; what came is kept for the next run")


def fetch_once(spec: Spec, model: Model, part: Path) -> str:
    have = part.stat().st_size if part.exists() else 0
    with opened(model.source, have) as (stream, start, total), part.open("r+b" if have else "wb") as target:
        if total is not None:
            require_space(spec, model, total - have)
            if model.size_bytes is not None and total != model.size_bytes:
                raise StageError(
                    f"{model.source}: got {total} bytes, want size_bytes={model.size_bytes}: "
                    "the source has changed, or the inventory is wrong"
                )
        target.truncate(start)
        progress = Progress(model.name, total)
        digest, done = hashlib.sha256(), 0
        while done < start and (data := target.read(min(CHUNK, start - done))):
            digest.update(data)
            done += len(data)
            progress.show(done)
        target.seek(start)
        while data := stream.read(CHUNK):
            target.write(data)
            digest.update(data)
            done += len(data)
            progress.show(done)
        target.flush()
        os.fsync(target.fileno())
        if total is not None and done < total:
            raise http.client.IncompleteRead(b"", total - done)
        progress.show(done, last=True)
    return digest.hexdigest()


def check_header(path: Path, model: Model) -> None:
    from gleaner import gguf

    try:
        gguf.check_file(path, model.header)
    except ValueError as error:
        raise StageError(f"{model.name}: sha256 is right, but the file is not servable: {error}") from None


def adopt_visible(spec: Spec, model: Model) -> bool:
    """A file that is visible but not noted: note it if its content is right."""
    path = spec.path_of(model)
    print(f"{model.name} is there, reading it to verify", flush=True)
    if hash_file(path, Progress(model.name, path.stat().st_size)) != model.sha256:
        return False
    check_header(path, model)
    note_verified(spec, model)
    return True


def stage_one(spec: Spec, model: Model) -> bool:
    """Make the model visible and verified; true when anything had to be done. StageError if it cannot be."""
    state = state_of(spec, model)
    if state == "present":
        return False
    if state == "unverified" and adopt_visible(spec, model):
        return True
    part = spec.staging / f"{model.name}.part"
    if model.size_bytes is not None:
        have = part.stat().st_size if part.exists() else 0
        require_space(spec, model, max(model.size_bytes - have, 0))
    got = fetch(spec, model, part)
    if got != model.sha256:
        part.unlink()
        raise StageError(
            f"{model.name}: sha256: got {got}, want {model.sha256}: "
            f"{model.source} is corrupt or has changed, nothing was made visible"
        )
    try:
        check_header(part, model)
    except StageError:
        part.unlink()
        raise
    part.chmod(0o644)
    os.replace(part, spec.path_of(model))
    fd = os.open(spec.directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    note_verified(spec, model)
    print(f"{model.name} staged", flush=True)
    return True


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
    """Stage every model that can be; each failure is told, none stops the others."""
    failures: list[str] = []
    changed: list[str] = []
    with locked(spec):
        for model in spec.models:
            try:
                if stage_one(spec, model):
                    changed.append(model.name)
            except (StageError, OSError) as error:
                failures.append(str(error))
                print(f"error: {error}", file=sys.stderr, flush=True)
    for name in unknown_files(spec):
        print(f"{spec.directory / name} is not in the inventory; left alone", flush=True)
    print(json.dumps({"changed": changed, "failed": failures}), flush=True)
    return EXIT_FAILED if failures else 0


# Telling a running router


def reload(config: upstream.Config, tier_name: str, expect: list[str], timeout_seconds: float) -> int:
    """Have the tier's running router read its folder again, and wait until it lists what is expected.

    Says what it "newly serves", if anything: a model staged by a run that failed later is announced by the next.
    """
    tier = next((one for one in config.tiers if one.tier == tier_name), None)
    if tier is None:
        have = ", ".join(one.tier for one in config.tiers)
        raise StageError(f"--tier: got {tier_name}, want one of {have}")
    reading = record.read(config.registry, tier_name)
    if isinstance(reading, Withdrawn):
        print(f"{tier_name} is not running: it will read the folder when it starts")
        return 0
    if isinstance(reading, Unreadable):
        raise StageError(reading.why)
    address = address_of(tier, reading)
    deadline = time.monotonic() + timeout_seconds
    missing = set(expect)
    before: set[str] | None = None
    while True:
        try:
            if before is None:
                before = listed(address, tier.node_port, "", deadline - time.monotonic())
            after = listed(address, tier.node_port, "?reload=1", deadline - time.monotonic())
            missing = set(expect) - after
        except ConnectionRefusedError:
            print(f"{tier_name} is not running: it will read the folder when it starts")
            return 0
        except (OSError, ValueError, http.client.HTTPException) as error:
            # A node that lost its power leaves its record behind.
            if not job_runs(config, tier, reading):
                print(f"{tier_name} is not running: it will read the folder when it starts")
                return 0
            if time.monotonic() >= deadline:
                raise StageError(f"http://{address}:{tier.node_port}/v1/models: {error}") from None
        else:
            if not missing:
                print(f"{tier_name} on {reading.host} serves {', '.join(sorted(after)) or 'no model'}")
                if after - before:
                    print(f"newly serves {', '.join(sorted(after - before))}")
                return 0
        if time.monotonic() >= deadline:
            raise StageError(
                f"{tier_name} on {reading.host} does not list {', '.join(sorted(missing))} "
                f"within {timeout_seconds:g} s: are the files visible on that node?"
            )
        time.sleep(0.5)


def job_runs(config: upstream.Config, tier: upstream.TierConfig, reading: Record) -> bool:
    """The record's job is running, as far as Slurm can be asked."""
    try:
        jobs = slurm.jobs(config.service_user, [tier.job_name])
    except slurm.SlurmError:
        return True
    return any(job.id == reading.job and job.state == "RUNNING" for job in jobs)


def address_of(tier: upstream.TierConfig, reading: Record) -> str:
    if reading.host not in tier.nodes:
        raise StageError(f"record: host: got {reading.host}, want one of {', '.join(sorted(tier.nodes))}")
    return tier.nodes[reading.host]


def listed(address: str, port: int, query: str, timeout_seconds: float) -> set[str]:
    """The model ids that the router lists; with the query ``?reload=1`` after reading its folder again."""
    # A server that was started before there was a key asks for none.
    key = files.read_key(files.SERVER_KEY) if files.SERVER_KEY.exists() else ""
    connection = http.client.HTTPConnection(address, port, timeout=max(timeout_seconds, 1.0))
    try:
        connection.request("GET", f"/v1/models{query}", headers={"Authorization": f"Bearer {key}"} if key else {})
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
    try:
        return {str(entry["id"]) for entry in json.loads(body)["data"]}
    except (KeyError, TypeError):
        raise ValueError("answer is no list of models") from None


# Commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in (
        ("check", f"print what is there as JSON; exit code {EXIT_MISSING} when something is missing"),
        ("stage", "bring and verify what is missing"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        action.add_argument("--spec", type=Path, default=Path("/etc/gleaner/models.json"))
    summary = "have a running router read its folder again"
    action = actions.add_parser("reload", help=summary, description=summary)
    action.add_argument("--config", type=Path, default=Path("/etc/gleaner/gateway.json"))
    action.add_argument("--tier", required=True)
    action.add_argument("--expect", nargs="*", default=[], metavar="STEM", help="wait until these are listed")
    action.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")


def run(args: argparse.Namespace) -> int:
    try:
        if args.action == "reload":
            return reload(upstream.Config.load(args.config), args.tier, args.expect, args.timeout)
        spec = Spec.load(args.spec)
        if args.action == "stage":
            return stage(spec)
    except (StageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    found = check(spec)
    print(json.dumps(found, indent=1))
    return 0 if found["complete"] else EXIT_MISSING
