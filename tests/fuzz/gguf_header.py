"""A coverage-guided search for a GGUF header that breaks what tests/unit/gguf_claims.py claims.

    python -m tests.fuzz.gguf_header --seconds 600 --corpus /var/cache/gleaner/fuzz

An input is a file, or the parts of a split model with ``NEXT_PART`` between them. What breaks a claim is written to
tests/fuzz/findings, where the unit tests try it again for ever. ``--record`` adds the run to docs/fuzzing.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.lab import ROOT, commit

DOCUMENT = ROOT / "docs" / "fuzzing.md"
FINDINGS = ROOT / "tests" / "fuzz" / "findings"
NEXT_PART = b"\0--next-part--\0"
MOST_PARTS = 4
MOST_INPUT_BYTES = 16384
# The bounds of one input; the run ends where one takes more. An ordinary one takes a millisecond of the processor, a
# plan of 512 layers about a second; the process has some 80 MiB.
MOST_INPUT_SECONDS = 20
MOST_MEMORY_MIB = 1024


def parts_of(data: bytes) -> list[bytes]:
    """The files that an input stands for."""
    return data.split(NEXT_PART, MOST_PARTS - 1)


def seeds() -> Iterator[bytes]:
    """Small sound models of several kinds, as the `gguf` package writes them, and one with a value of every type."""
    from tests.unit import gguf_claims, gguf_files

    small: dict[str, Any] = {"n_embd": 4, "n_ff": 4, "n_head": 2, "n_head_kv": 1, "n_vocab": 4}
    kinds: list[dict[str, Any]] = [
        {},
        {"architecture": "llama", "layers": 1, "bias": False, "tied": True},
        {"architecture": "gemma3", "bias": False, "sliding_window": 512, "head_dim": 4},
        {"architecture": "llama", "bias": False, "n_head_kv": [1, 2]},
        {"architecture": "qwen3", "layers": 1, "bias": False, "n_embd": 32, "n_ff": 32, "types": gguf_files.q8_0},
        {"architecture": "novel", "layers": 1},
        {"layers": 1, "part_tensors": 8},
    ]
    yield gguf_claims.content(gguf_claims.fields(gguf_claims.values()))
    yield NEXT_PART.join(gguf_claims.content(part, tensors=2) for part in gguf_claims.split_fields())
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(kinds):
            first = gguf_files.write_model(Path(folder) / f"{number}.gguf", **{**small, **kind})
            found = sorted(Path(folder).glob(f"{number}*.gguf"))
            assert first in found
            yield NEXT_PART.join(path.read_bytes() for path in found)


def words() -> Iterator[bytes]:
    """What a mutation may put into an input as a whole: names that mean something, and numbers at edges."""
    from tests.unit import gguf_claims

    header = [*gguf_claims.fields(gguf_claims.values()), *gguf_claims.split_fields()[0]]
    yield from {field.content for field in header if field.is_text and field.content}
    yield from {content for field in header if not field.is_text for content in gguf_claims.extremes(field)}
    yield NEXT_PART


def quoted(word: bytes) -> str:
    """A word in a dictionary of libFuzzer."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"'


def prepare(corpus: Path) -> Path:
    """Put the seeds into the corpus; returns the dictionary, which lies beside it."""
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    dictionary = corpus.with_name(f"{corpus.name}.words")
    dictionary.write_text("".join(f"{quoted(word)}\n" for word in sorted(words())))
    return dictionary


def _too_slow(*_: object) -> NoReturn:
    raise AssertionError(f"one input took more than {MOST_INPUT_SECONDS} seconds of the processor")


def search(corpus: Path, seconds: int) -> None:
    """Search in this process, which libFuzzer ends."""
    import atheris

    # Their branches follow the layers, not the header, and there are so many that all else would be slow.
    arithmetic = ["gleaner.ggml_graph", "gleaner.placement"]
    with atheris.instrument_imports(include=["gleaner"], exclude=arithmetic):
        from tests.unit import gguf_claims

    dictionary = prepare(corpus)
    with tempfile.TemporaryDirectory() as folder:

        def one(data: bytes) -> None:
            for path in Path(folder).iterdir():
                path.unlink()
            first = gguf_claims.write_parts(Path(folder), parts_of(data))
            # libFuzzer's own limit is one of the clock, which goes on while the machine is busy with something else.
            signal.setitimer(signal.ITIMER_VIRTUAL, MOST_INPUT_SECONDS)
            gguf_claims.claim(first)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

        signal.signal(signal.SIGVTALRM, _too_slow)
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={MOST_INPUT_BYTES}",
            "-timeout=1000000",
            "-report_slow_units=1000000",
            f"-rss_limit_mb={MOST_MEMORY_MIB}",
            f"-artifact_prefix={FINDINGS}/",
            f"-dict={dictionary}",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *options, str(corpus)], one)
        atheris.Fuzz()


def row(output: str, began: datetime.datetime, seconds: Sequence[float], revision: str, findings: int) -> str:
    """A row of the table in docs/fuzzing.md, from what libFuzzer printed; ValueError when that says too little."""
    executions = re.findall(r"^stat::number_of_executed_units: (\d+)$", output, re.MULTILINE)
    # A claim that breaks while the corpus is read does so before the first of these.
    edges = re.findall(r"^#\d+\s.* cov: (\d+) .* corp: (\d+)/", output, re.MULTILINE) or [("not counted",) * 2]
    if not executions:
        raise ValueError("libFuzzer printed no statistics; wanted those of -print_final_stats=1")
    times = (f"{number:.0f}" for number in seconds)
    cells = (f"{began:%Y-%m-%d %H:%M} UTC", revision, *times, executions[-1], *edges[-1], findings)
    return "| " + " | ".join(map(str, cells)) + " |"


def record(command: list[str]) -> int:
    """Run the search in a process of its own, show what it prints, and add the run to the document."""
    before, revision = set(FINDINGS.iterdir()), commit()
    began, start = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
    output = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            print(line, end="", flush=True)
    found = sorted(set(FINDINGS.iterdir()) - before)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (time.monotonic() - start, used.ru_utime + used.ru_stime)
    line = row("".join(output), began, seconds, revision, len(found))
    temporary = DOCUMENT.with_suffix(".new")
    temporary.write_text(f"{DOCUMENT.read_text().rstrip()}\n{line}\n")
    os.replace(temporary, DOCUMENT)
    for path in found:
        print(f"found {path}: make unit tries it again; commit it with the cure", file=sys.stderr)
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Search for a GGUF header that breaks what is claimed of all.")
    parser.add_argument("--seconds", type=int, default=600, help="how long to search (600)")
    parser.add_argument("--corpus", type=Path, required=True, help="the folder of inputs that reach new code; it grows")
    parser.add_argument("--record", action="store_true", help="add the run to docs/fuzzing.md")
    args = parser.parse_args()
    if args.record:
        same = [f"--seconds={args.seconds}", f"--corpus={args.corpus}"]
        return record([sys.executable, "-m", "tests.fuzz.gguf_header", *same])
    search(args.corpus, args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
