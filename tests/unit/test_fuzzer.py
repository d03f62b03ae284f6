"""The fuzzer: it begins with sound models, fails where a claim is broken, and records what libFuzzer said."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from tests.fuzz import gguf_header as fuzzer
from tests.unit import gguf_claims as claims

OUTPUT = """\
#2\tINITED cov: 100 ft: 120 corp: 1/2640b exec/s: 0 rss: 60Mb
#4096\tpulse  cov: 1182 ft: 2376 corp: 93/233Kb lim: 16384 exec/s: 163 rss: 69Mb
#7537\tDONE   cov: 1185 ft: 2383 corp: 98/252Kb lim: 16384 exec/s: 183 rss: 69Mb
Done 7537 runs in 41 second(s)
stat::number_of_executed_units: 7537
"""


@pytest.mark.parametrize("seed", list(fuzzer.seeds()), ids=range(len(list(fuzzer.seeds()))))
def test_a_seed_is_a_sound_model(tmp_path: Path, seed: bytes) -> None:
    assert len(seed) <= fuzzer.MOST_INPUT_BYTES
    assert claims.claim(claims.write_parts(tmp_path, fuzzer.parts_of(seed))) is not None


def test_an_input_is_a_file_or_the_parts_of_a_model() -> None:
    assert fuzzer.parts_of(b"a") == [b"a"]
    assert fuzzer.parts_of(b"a" + fuzzer.NEXT_PART + b"b") == [b"a", b"b"]
    assert len(fuzzer.parts_of(fuzzer.NEXT_PART * 100)) == fuzzer.MOST_PARTS


def test_the_corpus_begins_with_the_seeds(tmp_path: Path) -> None:
    dictionary = fuzzer.prepare(tmp_path / "corpus")
    assert {path.read_bytes() for path in (tmp_path / "corpus").iterdir()} == set(fuzzer.seeds())
    lines = dictionary.read_text().splitlines()
    assert fuzzer.quoted(b"llama.block_count") in lines
    assert fuzzer.quoted(b"\xff" * 8) == '"' + r"\xff" * 8 + '"' in lines


def test_a_run_is_a_row_of_the_table() -> None:
    began = datetime.datetime(2026, 1, 2, 3, 4, 5)
    row = fuzzer.row(OUTPUT, began, (41.4, 39.6), "0123456789ab", 0)
    assert row == "| 2026-01-02 03:04 UTC | 0123456789ab | 41 | 40 | 7537 | 1185 | 98 | 0 |"
    head = next(line for line in fuzzer.DOCUMENT.read_text().splitlines() if line.startswith("| date |"))
    assert head.count("|") == row.count("|")


def test_a_run_that_ends_at_once_is_a_row_too() -> None:
    row = fuzzer.row(OUTPUT.splitlines()[-1] + "\n", datetime.datetime(2026, 1, 2), (1, 1), "0", 1)
    assert row == "| 2026-01-02 00:00 UTC | 0 | 1 | 1 | 7537 | not counted | not counted | 1 |"


def test_a_run_that_says_nothing_is_not_recorded() -> None:
    with pytest.raises(ValueError, match="no statistics"):
        fuzzer.row("Traceback\n", datetime.datetime(2026, 1, 2), (1, 1), "0", 0)
