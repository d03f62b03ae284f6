"""The engine is built once, and anew only when its version, its options or the compiler are others.

What is tested is `gleaner engine` where it is installed. llama.cpp takes minutes to compile, so that the builds here
are of a program of three lines, with the same CMake, Ninja and compiler.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, run

CONFIG = "/etc/gleaner/engine.json"
PLACE = "/var/tmp/test-engine"
COMPILER = f"{PLACE}/c++"
# Exit codes of `gleaner engine`: done, failed, something to do.
DONE, FAILED, TO_DO = 0, 1, 3

CMAKE = """cmake_minimum_required(VERSION 3.14)
project(tiny CXX)
add_executable(llama-server main.cpp)
target_compile_definitions(llama-server PRIVATE ANSWER=${ANSWER})
set_target_properties(llama-server PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
"""
PROGRAM = """#include <cstdio>
int main() { std::printf("%d\\n", ANSWER); }
"""
# A compiler whose version the test can change.
WRAPPER = """#!/bin/sh
[ "$1" != --version ] || { cat /var/tmp/test-engine/compiler-version; exit; }
exec g++ "$@"
"""
SETTINGS: dict[str, Any] = {
    "v": 1,
    "version": "1",
    "backend": "cpu",
    "cpu_level": "x86-64-v3",
    "targets": ["llama-server"],
    "cxx": COMPILER,
    "cuda": None,
    "root": f"{PLACE}/root",
    "work_directory": PLACE,
    "ccache_directory": f"{PLACE}/ccache",
    "jobs": 1,
    "keep_builds": 9,
    "service_user": cluster.SERVICE_USER,
    "job_logs": f"{PLACE}/logs",
    "put_to_use": True,
    "retry": False,
}
PUBLISHED = f"{PLACE}/root/current/bin/llama-server"


def engine(action: str, file: str) -> tuple[int, str]:
    """Run `gleaner engine` with a configuration: its exit code, and what it said."""
    done = cluster.host(CONTROLLER).run(f"gleaner engine {action} --config {file}")
    return done.rc, f"{done.stderr}{done.stdout}"


def checked(**changes: Any) -> int:
    """What `check` says of the real configuration with these changes."""
    value = json.loads(run(CONTROLLER, f"cat {CONFIG}"))
    cluster.put(CONTROLLER, f"{PLACE}/edited.json", json.dumps({**value, **changes}))
    code, said = engine("check", f"{PLACE}/edited.json")
    assert code in (DONE, TO_DO), said
    return code


def real(key: str) -> Any:
    return json.loads(run(CONTROLLER, f"cat {CONFIG}"))[key]


def test_the_published_engine_is_the_configured_one() -> None:
    assert checked() == DONE
    assert checked(jobs=1) == DONE
    assert checked(source={**real("source"), "url": "https://mirror/x"}) == DONE


def test_another_configuration_wants_another_engine() -> None:
    options = real("cmake_options")
    for changes in (
        {"version": "another"},
        {"backend": "another"},
        {"source": {**real("source"), "sha256": "another"}},
        {"cpu_level": "x86-64-v4"},
        {"targets": ["llama-server"]},
        {"cxx": "cpp"},
        {"cmake_options": [option.replace("OPENMP=ON", "OPENMP=OFF") for option in options]},
        {"cmake_options": [*options, "-DANOTHER=ON"]},
    ):
        assert checked(**changes) == TO_DO, changes


@pytest.fixture(scope="module", autouse=True)
def _place() -> Iterator[None]:
    run(CONTROLLER, f"rm -rf {PLACE} && mkdir -p {PLACE}/tiny")
    cluster.put(CONTROLLER, f"{PLACE}/tiny/CMakeLists.txt", CMAKE)
    cluster.put(CONTROLLER, f"{PLACE}/tiny/main.cpp", PROGRAM)
    run(CONTROLLER, f"tar --create --file={PLACE}/source.tar --directory={PLACE} tiny")
    cluster.put(CONTROLLER, COMPILER, WRAPPER)
    run(CONTROLLER, f"chmod 0755 {COMPILER}")
    compiler_is("1")
    yield
    run(CONTROLLER, f"rm -rf {PLACE}")


def compiler_is(version: str) -> None:
    cluster.put(CONTROLLER, f"{PLACE}/compiler-version", f"c++ {version}\n")


def build(answer: int = 1, **changes: Any) -> tuple[str, bool]:
    """Build and publish: the folder of the build, and whether anything was compiled for it."""
    source = {
        "url": f"file://{PLACE}/source.tar",
        "sha256": run(CONTROLLER, f"sha256sum {PLACE}/source.tar").split()[0],
        "subdirectory": "tiny",
    }
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_COMPILER={COMPILER}", f"-DANSWER={answer}"]
    cluster.put(
        CONTROLLER,
        f"{PLACE}/config.json",
        json.dumps({**SETTINGS, "source": source, "cmake_options": options, **changes}),
    )
    wanted = engine("check", f"{PLACE}/config.json")[0] == TO_DO
    code, said = engine("build", f"{PLACE}/config.json")
    assert code == DONE, said
    assert said.splitlines()[-1].startswith(f"published: {PLACE}/root/.builds/"), said
    assert engine("check", f"{PLACE}/config.json")[0] == DONE
    assert run(CONTROLLER, PUBLISHED) == str(answer)
    compiled = "Building CXX object" in said
    assert wanted or not compiled
    return run(CONTROLLER, f"readlink --canonicalize {PLACE}/root/current"), compiled


def test_it_is_compiled_once_and_again_for_each_other_configuration() -> None:
    first, compiled = build()
    assert compiled
    inode = run(CONTROLLER, f"stat --dereference --format=%i {PUBLISHED}")
    assert build() == (first, False)
    assert run(CONTROLLER, f"stat --dereference --format=%i {PUBLISHED}") == inode

    builds = {first}
    for what, answer, changes in (("options", 2, {}), ("version", 1, {"version": "2"})):
        folder, compiled = build(answer, **changes)
        assert compiled, what
        assert folder not in builds, what
        builds.add(folder)
    compiler_is("2")
    folder, compiled = build()
    assert compiled, "compiler"
    assert folder not in builds
    manifest = cluster.host(CONTROLLER).file(f"{folder}/manifest.json").content_string
    assert '"compiler": "c++ 2"' in manifest

    # The builds before are still there: a server may run from one, and nothing is compiled to go back.
    compiler_is("1")
    assert build() == (first, False)
    assert run(CONTROLLER, f"{folder}/bin/llama-server") == "1"


def test_a_source_that_is_not_the_ordered_one_publishes_nothing() -> None:
    build()
    before = run(CONTROLLER, f"find {PLACE}/root -printf '%p %i %l\\n' | sort")
    value = json.loads(run(CONTROLLER, f"cat {PLACE}/config.json"))
    # Another build, so that it is wanted.
    wrong = {**value, "version": "3", "source": {**value["source"], "sha256": "0" * 64}}
    cluster.put(CONTROLLER, f"{PLACE}/wrong.json", json.dumps(wrong))
    code, said = engine("build", f"{PLACE}/wrong.json")
    assert code == FAILED
    assert "llama_cpp_source.sha256: got" in said
    assert run(CONTROLLER, f"find {PLACE}/root -printf '%p %i %l\\n' | sort") == before
