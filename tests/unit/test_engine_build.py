"""`gleaner engine`, with stand-ins for cmake, ninja and the compilers: what is built, published, and removed."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from gleaner import engine, engine_build, files
from gleaner.engine_build import EXIT_FAILED, EXIT_REFUSED, EXIT_TO_DO

PROGRAMS = {
    "c++": "echo 'c++ 1.0'",
    "cmake": 'while [ "$1" != -B ]; do shift; done; mkdir -p "$2/bin"; echo "$LDFLAGS" >>"$2/ldflags"',
    "ninja": 'cp /bin/true "$2/bin/llama-server"; [ ! -e "$2/broken" ]',
    "squeue": '[ ! -e "$(dirname "$0")/away" ] || exit 1; cat "$(dirname "$0")/jobs"',
}


class Site:
    """A shared folder, a source archive, and programs on PATH."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root / "llama.cpp", root / "bin"
        self.logs, self.builds = root / "logs", root / "llama.cpp" / ".builds"
        for folder in (self.bin, self.logs, root / "work", root / "source"):
            folder.mkdir()
        for name, text in PROGRAMS.items():
            self.program(name, text)
        self.running()
        (root / "source" / "CMakeLists.txt").write_text("project(x)\n")
        self.archive = root / "source.tar.gz"
        with tarfile.open(self.archive, "w:gz") as archive:
            archive.add(root / "source", "source")
        self.config = root / "engine.json"
        self.work = root / "work"
        self.hour = 1_700_000_000

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def configure(self, version: str = "1", **changes: Any) -> dict[str, Any]:
        value = {
            "v": 1,
            "version": version,
            "backend": "cpu",
            "source": {
                "url": f"file://{self.archive}",
                "sha256": hashlib.sha256(self.archive.read_bytes()).hexdigest(),
                "subdirectory": "source",
            },
            "cpu_level": "x86-64-v3",
            "targets": ["llama-server"],
            "cxx": "c++",
            "cmake_options": ["-DX=1"],
            "cuda": None,
            "root": str(self.root),
            "work_directory": str(self.work),
            "ccache_directory": str(self.work),
            "jobs": 1,
            "keep_builds": 2,
            "service_user": "ai-inference",
            "job_logs": str(self.logs),
            "put_to_use": True,
            "retry": False,
            **changes,
        }
        self.config.write_text(json.dumps(value))
        return value

    def run(self, action: str, *more: str) -> int:
        parser = argparse.ArgumentParser()
        engine_build.add_arguments(parser)
        where = ["--config", str(self.config)] if action in ("build", "check", "prune") else []
        return engine_build.run(parser.parse_args([action, *where, *more]))

    def build(self, version: str = "1", **changes: Any) -> Path:
        """Publish a version; its build, an hour younger than the one before and older than any to come."""
        self.configure(version, **changes)
        assert self.run("build") == 0
        build = (self.root / f"{version}-cpu").resolve()
        self.hour += 3600
        os.utime(build, times=(self.hour, self.hour))
        return build

    def running(self, **builds: Path | None) -> None:
        """The jobs that Slurm lists, each with the build that it says it runs; none where that is None."""
        (self.bin / "jobs").write_text("".join(f"{job[1:]}\n" for job in builds))
        for job, build in builds.items():
            (self.logs / job[1:]).mkdir(exist_ok=True)
            if build:
                (self.logs / job[1:] / "engine").symlink_to(build)

    @property
    def there(self) -> set[Path]:
        return set(self.builds.iterdir())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    found = Site(tmp_path)
    monkeypatch.setenv("PATH", f"{found.bin}:/usr/bin:/bin")
    return found


def test_a_build_is_published_once(site: Site) -> None:
    site.configure()
    assert site.run("check") == EXIT_TO_DO
    build = site.build()
    assert (site.root / "current").resolve() == build
    assert (build / "bin" / "llama-server").exists()
    assert site.run("check") == 0
    assert [path.suffix for path in site.work.iterdir()] == [".lock"]
    (site.bin / "ninja").unlink()
    assert site.run("build") == 0, "built again"


@pytest.mark.parametrize(
    "change",
    [
        {"version": "2"},
        {"backend": "other"},
        {"cpu_level": "x86-64-v4"},
        {"targets": ["llama-server", "another"]},
        {"cmake_options": ["-DX=2"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_configuration_wants_another_build(
    site: Site, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    site.build()
    assert site.run("check", json.dumps({**site.configure(), **change})) == EXIT_TO_DO
    assert "is to be built" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{}, {"jobs": 7}, {"source": "mirror"}], ids=["nothing", "jobs", "mirror"])
def test_what_does_not_change_the_outcome_wants_no_other_build(site: Site, change: dict[str, Any]) -> None:
    site.build()
    value = site.configure()
    if change.get("source"):
        change = {"source": {**value["source"], "url": "https://mirror/x"}}
    assert site.run("check", json.dumps({**value, **change})) == 0


def test_another_compiler_wants_another_build(site: Site) -> None:
    first = site.build()
    site.program("c++", "echo 'c++ 2.0'")
    assert site.run("check") == EXIT_TO_DO
    assert site.build() != first
    assert first in site.there


def test_the_newest_builds_stay_and_older_ones_go_with_their_links(site: Site) -> None:
    one, two = site.build("1"), site.build("2")
    assert site.there == {one, two}
    three = site.build("3")
    assert site.there == {two, three}
    assert {path.name for path in site.root.iterdir()} == {".builds", "2-cpu", "3-cpu", "current"}


def test_a_build_of_a_running_job_stays_until_the_job_ends(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    one = site.build("1")
    site.running(_41=one)
    two, three = site.build("2"), site.build("3")
    assert site.there == {one, two, three}
    assert site.run("check") == 0
    site.running()
    assert site.run("check") == EXIT_TO_DO, "nothing would remove it"
    assert site.run("build") == 0
    assert f"removed: {one}" in capsys.readouterr().out
    assert site.there == {two, three}
    assert site.run("check") == 0


def test_what_is_in_use_stays_however_old_it_is(site: Site) -> None:
    one, _, _ = site.build("1", keep_builds=9), site.build("2", keep_builds=9), site.build("3", keep_builds=9)
    # Back to the first version: its build is there, and is the oldest one.
    site.configure("1", keep_builds=1)
    assert site.run("build") == 0
    assert (site.root / "current").resolve() == one
    assert one in site.there
    assert len(site.there) == 2
    assert (site.root / "1-cpu" / "bin" / "llama-server").exists()


@pytest.mark.parametrize("doubt", ["slurm", "job"])
def test_in_doubt_every_build_stays(site: Site, doubt: str) -> None:
    for version in ("1", "2", "3"):
        site.build(version, keep_builds=9)
    site.configure("3", keep_builds=1)
    if doubt == "slurm":
        (site.bin / "away").touch()
    else:
        site.running(_41=None)
    assert site.run("check") == 0
    assert site.run("build") == 0
    assert len(site.there) == 3


def test_a_source_that_is_not_the_ordered_one_publishes_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    value = site.configure()
    site.configure(source={**value["source"], "sha256": "0" * 64})
    assert site.run("build") == EXIT_FAILED
    assert f"llama_cpp_source.sha256: got {value['source']['sha256']}" in capsys.readouterr().err
    assert list(site.builds.iterdir()) == []
    # The right sum is another build: it fetches anew, and is not led astray by what is left.
    assert site.build().is_dir()


def test_a_folder_that_is_not_in_the_archive_is_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    value = site.configure()
    site.configure(source={**value["source"], "subdirectory": "elsewhere"})
    assert site.run("build") == EXIT_FAILED
    assert "llama_cpp_source.subdirectory: got elsewhere" in capsys.readouterr().err


def test_a_failed_build_publishes_nothing_and_is_gone_on_with(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.configure()
    site.program("ninja", "exit 1")
    assert site.run("build") == EXIT_FAILED
    assert "ninja ended with 1" in capsys.readouterr().err
    assert list(site.builds.iterdir()) == []
    (work,) = (path for path in site.work.iterdir() if path.is_dir())
    (work / "source" / "source" / "mark").touch()
    site.program("ninja", '[ -e "$2/../source/source/mark" ] && cp /bin/true "$2/bin/llama-server"')
    assert site.run("build") == 0, "it began anew"
    assert not work.exists()


def test_a_work_folder_of_somebody_else_is_refused(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.configure()
    config = engine_build.Config.load(site.config)
    (site.work / f"gleaner-llama.cpp-{config.key(config.compiler())}").symlink_to("/tmp")
    assert site.run("build") == EXIT_FAILED
    assert "gleaner-llama.cpp-" in capsys.readouterr().err
    assert list(site.builds.iterdir()) == []


def test_two_builders_wait_for_each_other(site: Site) -> None:
    site.configure()
    site.program("ninja", 'sleep 0.5; cp /bin/true "$2/bin/llama-server"')
    done: list[int] = []
    threads = [threading.Thread(target=lambda: done.append(site.run("build"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [0, 0]
    assert len(site.there) == 1


def test_a_source_that_is_not_there_is_named_with_its_host(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    value = site.configure()
    site.configure(source={**value["source"], "url": "file:///nonexistent/x.tar.gz"})
    assert site.run("build") == EXIT_FAILED
    assert "llama_cpp_source.url: got file:///nonexistent/x.tar.gz, which is not there on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("ldd: ./x: /lib/libc.so.6: version `GLIBC_2.38' not found (required by ./x)", "GLIBC_2.38"),
        ("\tlibgomp.so.1 => not found", "libgomp.so.1 => not found"),
        ("\tlibcublas.so.12 => /usr/lib/libcublas.so.12 (0x0)", "and not from"),
        ("\tlibcuda.so.1 => not found", ""),
    ],
    ids=["libc", "library", "toolkit", "driver"],
)
def test_what_a_node_cannot_load_is_refused_but_for_the_driver(
    site: Site, said: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build = site.build()
    site.program("ldd", f"cat <<'EOF'\n{said}\nEOF")
    assert site.run("verify", str(build)) == (EXIT_FAILED if why else 0)
    assert why in capsys.readouterr().err


def test_the_lock_outlives_the_builder_with_its_compilers(site: Site) -> None:
    site.configure()
    # What ninja leaves behind has the lock, until it ends.
    site.program("ninja", 'cp /bin/true "$2/bin/llama-server"; sleep 30 >/dev/null 2>&1 & echo $! >"$2/left"')
    config = engine_build.Config.load(site.config)
    with engine_build.workplace(config, "k") as work:
        programs = engine_build.compile_all(config, work)
        left = int((programs.parent / "left").read_text())
    with Path(f"{work}.lock").open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(left, 9)
        fcntl.flock(lock, fcntl.LOCK_EX)


def test_a_compiler_that_is_not_there_is_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (site.bin / "c++").unlink()
    site.configure(cxx="/nonexistent/c++")
    assert site.run("build") == EXIT_FAILED
    assert "llama_cpp_cxx: /nonexistent/c++ does not run" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"v": 1}', '{"v": 1, "source": 7}'])
def test_what_is_no_configuration_is_refused(site: Site, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    site.config.write_text(text)
    assert site.run("build") == EXIT_REFUSED
    assert "engine.json" in capsys.readouterr().err


# What a host sees of a build


def test_a_whole_build_is_verified(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    build = site.build()
    assert site.run("verify", str(site.root / "current")) == 0
    assert build.name.rpartition("-")[2] in capsys.readouterr().out


@pytest.mark.parametrize("how", ["changed", "missing", "added", "no manifest", "garbled", "outside"])
def test_a_build_that_is_not_what_was_published_is_refused(
    site: Site, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build = site.build()
    program, manifest = build / "bin" / "llama-server", build / "manifest.json"
    if how == "changed":
        program.write_bytes(program.read_bytes() + b"\0")
    elif how == "missing":
        program.unlink()
    elif how == "added":
        (build / "bin" / "libggml.so").touch()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "garbled":
        manifest.write_bytes(manifest.read_bytes()[:100])
    else:
        value = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**value, "sha256": {"../x": "0" * 64}}))
    assert site.run("verify", str(build)) == EXIT_FAILED
    said = capsys.readouterr().err
    assert str(build) in said
    if how in ("changed", "missing", "added"):
        assert {"changed": "sha256: got", "missing": "No such file", "added": "somebody added it"}[how] in said


def test_what_was_read_before_is_read_again_only_when_it_changed(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, memory, read = site.build(), tmp_path / "memory", list[Path]()
    hash_file = files.hash_file

    def look(path: Path) -> str:
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr(files, "hash_file", look)
    program = build / "bin" / "llama-server"
    key = engine.verify(build, memory)
    assert engine.verify(build, memory) == key
    assert read == [program]
    program.touch()
    engine.verify(build, memory)
    assert read == [program, program]
    memory.write_text("[")
    engine.verify(build, memory)
    assert len(read) == 3
    shutil.copy(program, tmp_path / "same")
    os.replace(tmp_path / "same", program)
    program.write_bytes(b"x")
    with pytest.raises(engine.EngineError, match="sha256: got"):
        engine.verify(build, memory)
