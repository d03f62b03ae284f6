"""Builds llama.cpp once for the whole cluster (`gleaner engine`).

A build may be interrupted and run again: it goes on where it was. What is published has been checked first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gleaner import cuda, download, engine, engine_move, files
from gleaner.engine import BUILDS, EngineError, Manifest, is_there, sums, switch, verify
from gleaner.engine_history import History

CONFIG = Path("/etc/gleaner/engine.json")

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_TO_DO = 3

SQUEUE_SECONDS = 10.0
# Libraries of the toolkit, which nodes do not have. The driver's libcuda.so.1 comes with each node.
_SHIPPED = re.compile(r"lib(?:cudart|cublas|cublasLt)\.so[.0-9]*")
_DRIVER = "libcuda.so"
_FOUND = re.compile(r"^\s*(\S+) => (/\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Config:
    """`/etc/gleaner/engine.json`: what to build, and where."""

    version: str
    backend: str
    source: dict[str, str]
    cpu_level: str
    targets: tuple[str, ...]
    cxx: str
    cmake_options: tuple[str, ...]
    root: Path
    work_directory: Path
    ccache_directory: Path
    jobs: int
    """Compilers at once; 0 is one per processor."""
    keep_builds: int
    service_user: str
    job_logs: Path
    toolkit: cuda.Toolkit | None
    libraries: tuple[Path, ...]
    """Folders of the toolkit's libraries, where the linker of this host does not look by itself."""
    flash_attention: bool
    put_to_use: bool
    """Whether the build becomes the one in use; else it only lies beside it, to be tried."""
    retry: bool
    """Whether a build is put to use although the tiers failed with it."""

    @classmethod
    def load(cls, path: Path) -> Config:
        return cls.from_json(path.name, files.load_config(path))

    @classmethod
    def from_json(cls, name: str, value: dict[str, Any]) -> Config:
        """ValueError when it does not describe a build; `name` says where it came from."""
        try:
            device = value["cuda"]
            return cls(
                version=str(value["version"]),
                backend=str(value["backend"]),
                source={name: str(value["source"][name]) for name in ("url", "sha256", "subdirectory")},
                cpu_level=str(value["cpu_level"]),
                targets=tuple(map(str, value["targets"])),
                cxx=str(value["cxx"]),
                cmake_options=tuple(map(str, value["cmake_options"])),
                root=Path(value["root"]),
                work_directory=Path(value["work_directory"]),
                ccache_directory=Path(value["ccache_directory"]),
                jobs=int(value["jobs"]),
                keep_builds=int(value["keep_builds"]),
                service_user=str(value["service_user"]),
                job_logs=Path(value["job_logs"]),
                toolkit=device
                and cuda.Toolkit(str(device["nvcc"]), str(value["cxx"]), tuple(map(str, device["architectures"]))),
                libraries=tuple(map(Path, device["libraries"])) if device else (),
                flash_attention=bool(device and device["flash_attention"]),
                put_to_use=bool(value["put_to_use"]),
                retry=bool(value["retry"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name}: does not describe a build ({error!r}): run playbooks/engine.yml") from None

    @property
    def name(self) -> str:
        return f"{self.version}-{self.backend}"

    @property
    def builds(self) -> Path:
        return self.root / BUILDS

    def compiler(self) -> str:
        """What the compilers call themselves; EngineError when one does not run."""
        try:
            done = subprocess.run(
                [self.cxx, "--version"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise EngineError(
                f"llama_cpp_cxx: {self.cxx} does not run ({error}): install the compiler, or name one that is installed"
            ) from None
        name = (done.stdout.splitlines() or [""])[0]
        return f"{name}; nvcc {self.toolkit.version()}" if self.toolkit else name

    def key(self, compiler: str) -> str:
        """Of everything that decides what comes out."""
        inputs = [
            self.name,
            self.source["sha256"],
            self.source["subdirectory"],
            self.cpu_level,
            list(self.targets),
            compiler,
            list(self.cmake_options),
        ]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]


# What is there


def refusal(config: Config, history: History, build: Path) -> str:
    """Why this build is not to be put to use; empty when it may be."""
    return "" if config.retry else history.complaint(build.name)


def stays(config: Config, history: History, build: Path) -> str:
    """Why the build in use stays although another one of its version is ordered; empty when it does not.

    A person went back to it, or the tiers did, and no other version to stay with can be named in an inventory.
    """
    current, complaint = (config.root / "current").resolve().name, refusal(config, history, build)
    ours = current[: -len(build.name.rpartition("-")[2]) - 1] == config.name
    if not config.put_to_use or not complaint or not ours or history.complaint(current):
        return ""
    return f"{build.name}, {complaint}: {current} stays in use (-e llama_cpp_retry=true tries the other once more)"


def published(config: Config, history: History, build: Path) -> bool:
    """The build is whole, its version's link leads to it, and so does the one in use, unless that is not to be."""
    if not is_there(build) or (config.put_to_use and history.move):
        return False
    links = {config.root / config.name: f"{BUILDS}/{build.name}"}
    if config.put_to_use:
        links[config.root / "current"] = f"{BUILDS}/{build.name}"
    return all(link.is_symlink() and os.readlink(link) == target for link, target in links.items())


def surplus(config: Config) -> list[Path]:
    """Builds that are there in vain: not among the newest, not linked as in use, not what a running job uses."""
    current, history = (config.root / "current").resolve().name, History.load(config.root)
    # The way back is kept open.
    spared = {current, history.good_before(config.root, current)}
    if history.move:
        spared |= {history.move.origin, history.move.target}
    # A job may run a build of which only it knows; where Slurm or one of them does not say which, all stay.
    argv = ["squeue", "--noheader", f"--user={config.service_user}", "--format=%A"]
    states = "--states=RUNNING,SUSPENDED,STOPPED,COMPLETING"
    try:
        done = subprocess.run([*argv, states], capture_output=True, text=True, timeout=SQUEUE_SECONDS, check=True)
        spared |= {engine.of_job(config.job_logs, job) for job in done.stdout.split()}
    except (OSError, subprocess.SubprocessError):
        return []
    there = [path for path in config.builds.glob("[!.]*") if path.is_dir()]
    by_age = sorted(there, key=lambda path: path.stat().st_mtime, reverse=True)
    return [path for path in by_age[config.keep_builds :] if path.name not in spared]


def remove_surplus(config: Config) -> None:
    """Remove them, and what an interrupted run was removing; what cannot go yet, as on NFS, goes with the next run."""
    for gone in config.builds.glob(".gone-*"):
        shutil.rmtree(gone, ignore_errors=True)
    for build in surplus(config):
        for link in config.root.iterdir():
            # Of a version that only this build had.
            if link.is_symlink() and os.readlink(link) == f"{BUILDS}/{build.name}":
                link.unlink()
        # Without its name first: half a build would be taken for one.
        shutil.rmtree(build.rename(build.with_name(f".gone-{build.name}")), ignore_errors=True)
        print(f"removed: {build}", flush=True)


# Building


@contextlib.contextmanager
def workplace(config: Config, key: str) -> Iterator[Path]:
    """The folder of this build, for one at a time; what an interrupted run left in it is gone on with."""
    work = config.work_directory / f"gleaner-llama.cpp-{key}"
    # Beside the folder, which goes when the build is done. The parent may be writable by all.
    lock = own(os.open(f"{work}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), f"{work}.lock")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the build that is already running in {work}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Compilers of a run that was killed may go on: they hold it as long.
        os.set_inheritable(lock, True)
        with contextlib.suppress(FileExistsError):
            work.mkdir(mode=0o700)
        os.close(own(os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW), str(work)))
        yield work
    finally:
        os.close(lock)


def own(fd: int, path: str) -> int:
    """The file or folder that was opened, if it is ours."""
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise EngineError(f"{path}: exists and belongs to somebody else: remove it")
    return fd


def bring_source(config: Config, work: Path) -> Path:
    """The unpacked source in the work folder."""
    url, wanted, inside = (config.source[name] for name in ("url", "sha256", "subdirectory"))
    archive, part, source = work / "source.archive", work / "source.archive.part", work / "source"
    if not archive.exists():
        try:
            got = download.fetch(download.Source("llama.cpp source", url, wanted), part)
        except FileNotFoundError as error:
            raise EngineError(
                f"llama_cpp_source.url: got {url}, which is not there on {os.uname().nodename} ({error.strerror}); "
                "cure: bring the file there, or name its place"
            ) from None
        if got != wanted:
            part.unlink()
            raise EngineError(
                f"llama_cpp_source.sha256: got {got} from {url}, want {wanted}; cure: correct the sum or the URL"
            )
        part.rename(archive)
    if not source.exists():
        unpacked = work / "source.part"
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir()
        argv = ["tar", "--extract", f"--file={archive}", f"--directory={unpacked}", "--no-same-owner", "--", inside]
        if subprocess.run(argv, check=False).returncode or not (unpacked / inside / "CMakeLists.txt").is_file():
            raise EngineError(
                f"llama_cpp_source.subdirectory: got {inside}, which holds no CMakeLists.txt in {url}; "
                "cure: name the folder of llama.cpp's top CMakeLists.txt"
            )
        unpacked.rename(source)
    return source / inside


def compile_all(config: Config, work: Path) -> Path:
    """The folder of the compiled programs. EngineError when it fails: the compiler's words are above."""
    source, build = bring_source(config, work), work / "build"
    environment = {
        **os.environ,
        "LC_ALL": "C",
        # Paths below the base folder are hashed as relative ones: a build with another key finds the same entries.
        "CCACHE_DIR": str(config.ccache_directory),
        "CCACHE_BASEDIR": str(work),
        "CCACHE_NOHASHDIR": "1",
    }
    if config.toolkit:
        environment["LDFLAGS"] = f"-Wl,-rpath-link,{driver_stub(config, work)}"
    call(["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *config.cmake_options], environment)
    call(["ninja", "-C", str(build), "-j", str(config.jobs or os.cpu_count() or 1), *config.targets], environment)
    return build / "bin"


def driver_stub(config: Config, work: Path) -> Path:
    """A folder in which the linker finds the driver's library, which a host without a GPU does not have."""
    folder = work / "driver"
    folder.mkdir(exist_ok=True)
    stub = next((path / "stubs" / _DRIVER for path in config.libraries if (path / "stubs" / _DRIVER).exists()), None)
    link = folder / f"{_DRIVER}.1"
    if stub and not link.is_symlink():
        link.symlink_to(stub)
    return folder


def call(argv: list[str], environment: dict[str, str]) -> None:
    """EngineError when it fails. It inherits the lock of the work folder, so that none builds beside a left-over."""
    code = subprocess.run(argv, env=environment, close_fds=False, check=False).returncode
    if code:
        raise EngineError(f"{argv[0]} ended with {code}: its own words are above")


def linked(program: Path, folders: tuple[Path, ...] = ()) -> str:
    """What the loader of this host finds for the program, and what it complains of."""
    search = {"LD_LIBRARY_PATH": ":".join(map(str, folders))} if folders else {}
    done = subprocess.run(
        ["ldd", str(program)], capture_output=True, text=True, check=False, env={**os.environ, **search, "LC_ALL": "C"}
    )
    return done.stdout + done.stderr


def ship(config: Config, programs: Path, prefix: Path) -> None:
    """Copy the programs into the prefix, with the libraries of the toolkit that they are linked with."""
    (prefix / "bin").mkdir(parents=True)
    for name in config.targets:
        shutil.copy2(programs / name, prefix / "bin" / name)
        for library, path in _FOUND.findall(linked(programs / name, config.libraries)):
            if _SHIPPED.fullmatch(library) and not (prefix / "lib" / library).exists():
                (prefix / "lib").mkdir(exist_ok=True)
                shutil.copy(path, prefix / "lib" / library)
    for name in config.targets:
        require_libraries(prefix, name)


def require_libraries(prefix: Path, name: str) -> None:
    """EngineError unless this host can load the program, with the toolkit's libraries from the prefix alone."""
    said = linked(prefix / "bin" / name)
    # A libc that is too old is "version `GLIBC_2.38' not found".
    missing = [line.strip() for line in said.splitlines() if "not found" in line and _DRIVER not in line]
    if missing:
        raise EngineError(
            f"{prefix / 'bin' / name}: {os.uname().nodename} cannot load it: {missing[0]}; cure: install what is "
            "missing, or have llama_cpp_build_host be a host of the oldest release that the nodes have"
        )
    for library, path in _FOUND.findall(said):
        if _SHIPPED.fullmatch(library) and prefix.resolve() not in Path(path).resolve().parents:
            raise EngineError(f"{name}: takes {library} from {path}, which nodes do not have, and not from {prefix}")


def make(config: Config, key: str, compiler: str, build: Path) -> None:
    """Compile, check, and put the build under its name."""
    with workplace(config, key) as work:
        if not is_there(build):
            if build.exists():
                # What was left of one that somebody was removing.
                build.rename(build.with_name(f".gone-{build.name}"))
            if config.toolkit:
                config.toolkit.require()
            programs = compile_all(config, work)
            host = os.uname().nodename
            for old in config.builds.glob(f".part-{host}-*"):
                shutil.rmtree(old, ignore_errors=True)
            part = config.builds / f".part-{host}-{key}"
            ship(config, programs, part)
            shipped = [part / "bin" / name for name in config.targets]
            Manifest(
                key=key,
                version=config.version,
                backend=config.backend,
                source=config.source,
                compiler=compiler,
                cpu_level=config.cpu_level,
                cmake_options=config.cmake_options,
                sha256=sums(part),
                built_on=host,
                proof=cuda.prove(config.toolkit, shipped, config.flash_attention) if config.toolkit else {},
            ).write(part)
            sync(part)
            part.rename(build)
        shutil.rmtree(work, ignore_errors=True)


def sync(folder: Path) -> None:
    """Have what was written reach the disk of the shared file system before it gets its name."""
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def build_engine(config: Config) -> None:
    os.umask(0o022)
    config.builds.mkdir(parents=True, exist_ok=True)
    compiler = config.compiler()
    key = config.key(compiler)
    build = config.builds / f"{config.name}-{key}"
    history = History.load(config.root)
    if reason := stays(config, history, build):
        print(reason, flush=True)
    elif not published(config, history, build):
        if complaint := refusal(config, history, build):
            raise EngineError(
                f"llama_cpp_version: got {config.version}, {complaint}; "
                "cure: name another version, or -e llama_cpp_retry=true to try this build once more"
            )
        make(config, key, compiler, build)
        switch(config.root / config.name, f"{BUILDS}/{build.name}")
        if config.put_to_use:
            switch(config.root / "current", f"{BUILDS}/{build.name}")
            if history.move:
                # What the inventory orders ends a move that was interrupted.
                dataclasses.replace(history, move=None).write(config.root)
    if config.put_to_use:
        remove_surplus(config)
    print(f"published: {build}", flush=True)


def to_do(config: Config) -> list[str]:
    """What `gleaner engine build` would do, a line each."""
    try:
        compiler = config.compiler()
    except EngineError as error:
        return [f"{config.name} is to be built, when its compiler is there: {error}"]
    build = config.builds / f"{config.name}-{config.key(compiler)}"
    lines, history = [], History.load(config.root)
    if not stays(config, history, build) and not published(config, history, build):
        lines = [f"{config.name} is to be {'put to use' if build.exists() else 'built'}"]
        if complaint := refusal(config, history, build):
            lines = [f"{config.name} would be refused: {build.name}, {complaint}"]
        elif config.put_to_use and (config.root / "current").exists():
            lines.append("every tier is to be drained and started with it")
    old = surplus(config) if config.put_to_use else []
    return [*lines, *(f"{path.name} is not used any more, to be removed" for path in old)]


# Commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in (
        ("build", "build and publish the engine that the configuration describes, remove old ones"),
        ("check", f"tell what is to be done; exit code {EXIT_TO_DO} when anything is"),
        ("prune", "remove old builds"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        action.add_argument("--config", type=Path, default=CONFIG, help=f"file (default: {CONFIG})")
        if name == "check":
            action.add_argument("text", nargs="?", help="a configuration, instead of the file")
    engine_move.add_arguments(actions)
    summary = "compare what this host sees of a build with its manifest"
    action = actions.add_parser("verify", help=summary, description=summary)
    action.add_argument("prefix", type=Path, help="folder of the build, or a link to it")
    action.add_argument("--memory", type=Path, help="file that remembers what was read, so that it is read once")


def run(args: argparse.Namespace) -> int:
    try:
        if args.action == "verify":
            prefix = args.prefix.resolve()
            print(f"{args.prefix}: {verify(prefix, args.memory)}")
            for program in sorted((prefix / "bin").iterdir()):
                require_libraries(prefix, program.name)
            return 0
        if args.action in ("begin", "end", "before"):
            return engine_move.run(args)
        text = getattr(args, "text", None)
        config = Config.from_json("TEXT", json.loads(text)) if text else Config.load(args.config)
        if args.action in ("build", "prune"):
            (build_engine if args.action == "build" else remove_surplus)(config)
            return 0
        lines = to_do(config)
    except (EngineError, download.DownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print("\n".join(lines))
    return EXIT_TO_DO if lines else 0
