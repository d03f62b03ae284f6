"""The engine is built once, and anew only when its version, its options or the compiler are others.

What is tested is the build script where it is installed. llama.cpp takes minutes to compile, so that the builds here
are of a program of three lines, with the same CMake, Ninja and compiler.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, run

SCRIPT = "/usr/local/sbin/gleaner-build-llama-cpp"
CONFIG = "/etc/default/gleaner-llama-cpp"
PLACE = "/var/tmp/test-engine"
COMPILER = f"{PLACE}/c++"

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
SETTINGS = {
    "LLAMA_CPP_VERSION": "1",
    "LLAMA_CPP_BACKEND": "cpu",
    "LLAMA_CPP_SOURCE_URL": f"file://{PLACE}/source.tar",
    "LLAMA_CPP_SOURCE_SUBDIRECTORY": "tiny",
    "LLAMA_CPP_CPU_LEVEL": "x86-64-v3",
    "LLAMA_CPP_TARGETS": "llama-server",
    "LLAMA_CPP_CXX": COMPILER,
    "LLAMA_CPP_NVCC": "/usr/bin/nvcc",
    "LLAMA_CPP_ROOT": f"{PLACE}/root",
    "LLAMA_CPP_WORK_DIR": PLACE,
    "LLAMA_CPP_CCACHE_DIR": f"{PLACE}/ccache",
    "LLAMA_CPP_KEEP_BUILDS": "9",
    "LLAMA_CPP_SERVICE_USER": cluster.SERVICE_USER,
    "LLAMA_CPP_LOGS": f"{PLACE}/logs",
    "LLAMA_CPP_JOBS": "1",
}
PUBLISHED = f"{PLACE}/root/current/bin/llama-server"


def put(path: str, text: str) -> None:
    run(CONTROLLER, f"cat > {path} <<'EOF'\n{text}EOF")


def checked(change: str) -> bool:
    """Whether the engine that is published is the one of the real configuration after this edit with sed."""
    done = cluster.host(CONTROLLER).run(f"sed '{change}' {CONFIG} > {PLACE}/edited && {SCRIPT} check {PLACE}/edited")
    assert done.rc in (0, 1), done
    assert not done.stderr, done
    return bool(done.rc == 0)


@pytest.mark.parametrize(
    "change",
    ["", "s/^LLAMA_CPP_JOBS=.*/LLAMA_CPP_JOBS=1/", "s/^LLAMA_CPP_SOURCE_URL=.*/LLAMA_CPP_SOURCE_URL=https:mirror/"],
    ids=["nothing", "jobs", "mirror"],
)
def test_the_published_engine_is_the_configured_one(change: str) -> None:
    assert checked(change)


@pytest.mark.parametrize(
    "change",
    [
        "s/^LLAMA_CPP_VERSION=.*/LLAMA_CPP_VERSION=another/",
        "s/^LLAMA_CPP_BACKEND=.*/LLAMA_CPP_BACKEND=another/",
        "s/^LLAMA_CPP_SOURCE_SHA256=.*/LLAMA_CPP_SOURCE_SHA256=another/",
        "s/^LLAMA_CPP_CPU_LEVEL=.*/LLAMA_CPP_CPU_LEVEL=x86-64-v4/",
        "s/^LLAMA_CPP_TARGETS=.*/LLAMA_CPP_TARGETS=llama-server/",
        "s/^LLAMA_CPP_CXX=.*/LLAMA_CPP_CXX=cpp/",
        "s/-DGGML_OPENMP=ON/-DGGML_OPENMP=OFF/",
        "s/-DGGML_OPENMP=ON/-DGGML_OPENMP=ON -DANOTHER=ON/",
    ],
    ids=["version", "backend", "source", "cpu-level", "targets", "compiler", "option", "more-options"],
)
def test_another_configuration_wants_another_engine(change: str) -> None:
    assert not checked(change)


@pytest.fixture(scope="module", autouse=True)
def _place() -> Iterator[None]:
    run(CONTROLLER, f"rm -rf {PLACE} && mkdir -p {PLACE}/tiny")
    put(f"{PLACE}/tiny/CMakeLists.txt", CMAKE)
    put(f"{PLACE}/tiny/main.cpp", PROGRAM)
    run(CONTROLLER, f"tar --create --file={PLACE}/source.tar --directory={PLACE} tiny")
    put(COMPILER, WRAPPER)
    run(CONTROLLER, f"chmod 0755 {COMPILER}")
    compiler_is("1")
    yield
    run(CONTROLLER, f"rm -rf {PLACE}")


def compiler_is(version: str) -> None:
    put(f"{PLACE}/compiler-version", f"c++ {version}\n")


def build(answer: int = 1, **changes: str) -> tuple[str, bool]:
    """Build and publish: the folder of the build, and whether anything was compiled for it."""
    settings = {**SETTINGS, "LLAMA_CPP_SOURCE_SHA256": run(CONTROLLER, f"sha256sum {PLACE}/source.tar").split()[0]}
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_COMPILER={COMPILER}", f"-DANSWER={answer}"]
    lines = [f"{name}='{value}'" for name, value in {**settings, **changes}.items()]
    put(f"{PLACE}/config", "\n".join([*lines, f"set -- {' '.join(options)}", ""]))
    wanted = cluster.host(CONTROLLER).run(f"{SCRIPT} check {PLACE}/config").rc != 0
    said = run(CONTROLLER, f"{SCRIPT} build {PLACE}/config")
    assert said.splitlines()[-1].startswith(f"published: {PLACE}/root/.builds/"), said
    assert cluster.host(CONTROLLER).run(f"{SCRIPT} check {PLACE}/config").rc == 0
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
    for what, answer, changes in (("options", 2, {}), ("version", 1, {"LLAMA_CPP_VERSION": "2"})):
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
    put(
        f"{PLACE}/wrong",
        run(CONTROLLER, f"sed 's/^LLAMA_CPP_SOURCE_SHA256=.*/LLAMA_CPP_SOURCE_SHA256=0/' {PLACE}/config") + "\n",
    )
    refused = cluster.host(CONTROLLER).run(f"{SCRIPT} build {PLACE}/wrong")
    assert refused.rc == 1
    assert "llama_cpp_source.sha256: got" in refused.stderr
    assert run(CONTROLLER, f"find {PLACE}/root -printf '%p %i %l\\n' | sort") == before
