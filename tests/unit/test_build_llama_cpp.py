"""The build script, with stand-ins for cmake, ninja and the compiler: what is published, and what is removed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "roles/llama_cpp/files/usr/local/sbin/gleaner-build-llama-cpp"

PROGRAMS = {
    "c++": "echo 'c++ 1.0'",
    "cmake": 'while [ "$1" != -B ]; do shift; done; mkdir -p "$2/bin"',
    "ninja": 'cp /bin/true "$2/bin/llama-server"',
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
            (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
            (self.bin / name).chmod(0o755)
        self.running()
        (root / "source" / "CMakeLists.txt").write_text("project(x)\n")
        self.archive = root / "source.tar.gz"
        with tarfile.open(self.archive, "w:gz") as archive:
            archive.add(root / "source", "source")
        self.config = root / "config"
        self.work = root / "work"
        self.hour = 1_700_000_000

    def configure(self, version: str, keep: int = 2) -> None:
        self.config.write_text(
            f"LLAMA_CPP_VERSION={version}\nLLAMA_CPP_BACKEND=cpu\nLLAMA_CPP_SOURCE_URL=file://{self.archive}\n"
            f"LLAMA_CPP_SOURCE_SHA256={hashlib.sha256(self.archive.read_bytes()).hexdigest()}\n"
            "LLAMA_CPP_SOURCE_SUBDIRECTORY=source\nLLAMA_CPP_CPU_LEVEL=x86-64-v3\nLLAMA_CPP_TARGETS=llama-server\n"
            f"LLAMA_CPP_CXX=c++\nLLAMA_CPP_NVCC=nvcc\nLLAMA_CPP_ROOT={self.root}\nLLAMA_CPP_WORK_DIR={self.work}\n"
            f"LLAMA_CPP_CCACHE_DIR={self.work}\nLLAMA_CPP_JOBS=1\nLLAMA_CPP_KEEP_BUILDS={keep}\n"
            f"LLAMA_CPP_SERVICE_USER=ai-inference\nLLAMA_CPP_LOGS={self.logs}\nset -- -DX=1\n"
        )

    def run(self, action: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.bin}:/usr/bin:/bin"}
        return subprocess.run(
            ["sh", str(SCRIPT), action, str(self.config)], env=environment, capture_output=True, text=True, check=False
        )

    def build(self, version: str, keep: int = 2) -> str:
        """Publish a version; its build, an hour younger than the one before and older than any to come."""
        self.configure(version, keep)
        done = self.run("build")
        assert done.returncode == 0, done.stderr
        name = os.readlink(self.root / f"{version}-cpu").rpartition("/")[2]
        self.hour += 3600
        os.utime(self.builds / name, times=(self.hour, self.hour))
        return name

    def running(self, **builds: str) -> None:
        """The jobs that Slurm lists, each with the build that it says it runs; none where that is empty."""
        (self.bin / "jobs").write_text("".join(f"{job[1:]}\n" for job in builds))
        for job, name in builds.items():
            (self.logs / job[1:]).mkdir(exist_ok=True)
            if name:
                (self.logs / job[1:] / "engine").symlink_to(self.builds / name)

    @property
    def there(self) -> set[str]:
        return {path.name for path in self.builds.iterdir()}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_build_is_published_once(site: Site) -> None:
    site.configure("1")
    assert site.run("check").returncode == 1
    name = site.build("1")
    assert (site.root / "current").resolve() == site.builds / name
    assert (site.builds / name / "bin" / "llama-server").exists()
    assert site.run("check").returncode == 0
    (site.bin / "ninja").unlink()
    assert site.run("build").returncode == 0, "built again"


def test_the_newest_builds_stay_and_older_ones_go_with_their_links(site: Site) -> None:
    one, two = site.build("1"), site.build("2")
    assert site.there == {one, two}
    three = site.build("3")
    assert site.there == {two, three}
    assert {path.name for path in site.root.iterdir()} == {".builds", "2-cpu", "3-cpu", "current"}


def test_a_build_of_a_running_job_stays_until_the_job_ends(site: Site) -> None:
    one = site.build("1")
    site.running(_41=one)
    two, three = site.build("2"), site.build("3")
    assert site.there == {one, two, three}
    assert site.run("check").returncode == 0
    site.running()
    assert site.run("check").returncode == 1, "nothing would remove it"
    done = site.run("build")
    assert f"removed: {site.builds / one}" in done.stdout
    assert site.there == {two, three}
    assert site.run("check").returncode == 0


def test_what_is_in_use_stays_however_old_it_is(site: Site) -> None:
    one, _, _ = site.build("1", 9), site.build("2", 9), site.build("3", 9)
    # Back to the first version: its build is there, and is the oldest one.
    site.configure("1", 1)
    assert site.run("build").returncode == 0
    assert (site.root / "current").resolve() == site.builds / one
    assert one in site.there
    assert len(site.there) == 2
    assert (site.root / "1-cpu" / "bin" / "llama-server").exists()


@pytest.mark.parametrize("doubt", ["slurm", "job"])
def test_in_doubt_every_build_stays(site: Site, doubt: str) -> None:
    for version in ("1", "2", "3"):
        site.build(version, 9)
    site.configure("3", 1)
    if doubt == "slurm":
        (site.bin / "away").touch()
    else:
        site.running(_41="")
    assert site.run("check").returncode == 0
    assert site.run("build").returncode == 0
    assert len(site.there) == 3
