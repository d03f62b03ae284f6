"""Records: what a reader accepts, who may remove one, and what a hanging file system does not stop."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gleaner import files, record, site
from gleaner.record import Record, Unreadable, Withdrawn
from tests.unit.fakes import wait_for

GOOD = Record("fast", 41, 0, "vasp-02", 8080, ("one", "two"), 1790000000, 7)


def changed(**fields: Any) -> bytes:
    value = json.loads(GOOD.encode())
    for name, content in fields.items():
        if content is ...:
            del value[name]
        else:
            value[name] = content
    return json.dumps(value).encode()


def test_round_trip() -> None:
    assert record.parse(GOOD.encode()) == GOOD


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "not a JSON document"),
        (GOOD.encode()[:-10], "not a JSON document"),
        (b"\xff\xfe", "not a JSON document"),
        (b"[" * 4000, "nested|not a JSON"),
        (b"[]", "want an object"),
        (b"null", "want an object"),
        (GOOD.encode() + b" " * 4096, "bytes, want at most 4096"),
        (GOOD.encode().replace(b'"job":41', b'"job":41,"job":42'), "given twice"),
        (changed(v=2), "v: got 2, want 1"),
        (changed(v=True), "v: got True"),
        (changed(v=...), "v: got None"),
        (changed(supervisor="a b"), "supervisor: got 'a b'"),
        (changed(line=-1), "line: got -1, want an integer from 0 to 65535"),
        (changed(port=...), "port: missing"),
        (changed(port=0), "port: got 0"),
        (changed(port=65536), "port: got 65536"),
        (changed(port="8080"), "port: got '8080'"),
        (changed(port=True), "port: got True"),
        (changed(port=8080.0), "not an integer"),
        (changed(port=None), "port: got None"),
        (changed(job=0), "job: got 0"),
        (changed(job=10**30), "job: got 1000"),
        (changed(restart=-1), "restart: got -1"),
        (changed(seq=float("nan")), "not an integer"),
        (changed(host=""), "host: got ''"),
        (changed(host="vasp-02;"), "host: got"),
        (changed(host="vasp-02\n"), "host: got"),
        (changed(host="../etc"), "host: got"),
        (changed(host="-x"), "host: got"),
        (changed(host="a" * 64), "host: got"),
        (changed(host=["vasp-02"]), "host: got"),
        (changed(tier="../fast"), "tier: got"),
        (changed(tier="Fast"), "tier: got"),
        (changed(models="one"), "models: got"),
        (changed(models=["a\u0000b"]), "models: got"),
        (changed(models=["../one"]), "models: got"),
        (changed(models=["x"] * 25), "at most 24"),
        (changed(models=[1]), "models: got 1"),
        (changed(started=-1), "started: got -1"),
    ],
)
def test_refused_by_name(data: bytes, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        record.parse(data)
    # What a stranger wrote must not break a line of the journal.
    assert str(caught.value).isprintable()


@given(st.binary(max_size=5000))
def test_any_bytes_are_a_record_or_a_value_error(data: bytes) -> None:
    try:
        record.parse(data)
    except ValueError:
        return


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x)), st.data())
def test_any_field_value_is_kept_whole_or_refused(value: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tier", "job", "restart", "host", "port", "models", "started", "seq"]))
    try:
        parsed = record.parse(changed(**{name: value}))
    except ValueError:
        return
    assert record.parse(parsed.encode()) == parsed


def test_longest_record_fits() -> None:
    names = tuple("m" * 126 + f"{number:02d}" for number in range(record.MODELS_LIMIT))
    big = Record("t" * 32, 2**53, 2**53, "h" * 63, 65535, names, 2**53, 2**53)
    assert len(big.encode()) <= record.SIZE_LIMIT


def test_written_whole_and_leaves_no_work_file(tmp_path: Path) -> None:
    record.write(tmp_path, GOOD)
    assert record.read(tmp_path, "fast") == GOOD
    assert os.listdir(tmp_path) == ["fast.json"]
    assert stat.S_IMODE((tmp_path / "fast.json").stat().st_mode) == 0o644


def test_missing_is_withdrawn_but_garbage_is_not(tmp_path: Path) -> None:
    assert record.read(tmp_path, "fast") == Withdrawn()
    (tmp_path / "fast.json").write_text("{")
    assert isinstance(record.read(tmp_path, "fast"), Unreadable)


def test_missing_registry_withdraws_nothing(tmp_path: Path) -> None:
    reading = record.read(tmp_path / "unmounted", "fast")
    assert isinstance(reading, Unreadable)
    assert "mounted" in reading.why


def test_registry_that_fails_while_it_is_looked_for_withdraws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "is_dir", fail)
    reading = record.read(tmp_path, "fast")
    assert isinstance(reading, Unreadable)
    assert "Stale file handle" in reading.why


@given(st.from_regex(site._LOWER, fullmatch=True))
def test_every_tier_of_a_valid_inventory_has_a_record(name: str) -> None:
    assert record.parse(dataclasses.replace(GOOD, tier=name).encode()).tier == name


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_failing_file_system_withdraws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "read_bounded", fail)
    reading = record.read(tmp_path, "fast")
    assert isinstance(reading, Unreadable)
    assert os.strerror(code) in reading.why


def test_link_in_place_of_a_record_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(GOOD.encode())
    (tmp_path / "fast.json").symlink_to(tmp_path / "elsewhere")
    assert isinstance(record.read(tmp_path, "fast"), Unreadable)


def test_fifo_in_place_of_a_record_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fast.json")
    assert isinstance(record.read(tmp_path, "fast"), Unreadable)


def test_record_of_another_tier_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fast.json").write_bytes(changed(tier="reasoning"))
    reading = record.read(tmp_path, "fast")
    assert isinstance(reading, Unreadable)
    assert "tier: got reasoning, want fast" in reading.why


def test_removed_only_by_who_wrote_it(tmp_path: Path) -> None:
    record.write(tmp_path, GOOD)
    assert not record.remove(tmp_path, "fast", (41, 1))
    assert not record.remove(tmp_path, "fast", (40, 0))
    assert record.read(tmp_path, "fast") == GOOD
    assert record.remove(tmp_path, "fast", (41, 0))
    assert record.read(tmp_path, "fast") == Withdrawn()


def seq_of(registry: Path) -> int:
    reading = record.read(registry, "fast")
    return reading.seq if isinstance(reading, Record) else 0


def test_publisher_beats_and_withdraws(tmp_path: Path) -> None:
    publisher = record.Publisher(tmp_path, beat_seconds=0.05)
    publisher.publish(GOOD)
    wait_for(lambda: seq_of(tmp_path) > 3)
    assert publisher.withdraw(1.0)
    assert record.read(tmp_path, "fast") == Withdrawn()
    last = seq_of(tmp_path)
    time.sleep(0.2)
    assert seq_of(tmp_path) == last == 0


def test_publisher_says_what_no_reader_would_accept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    publisher = record.Publisher(tmp_path, beat_seconds=0.05)
    publisher.publish(dataclasses.replace(GOOD, host="not_a_host"))
    time.sleep(0.2)
    assert capfd.readouterr().err.count("host: got 'not_a_host'") == 1
    assert publisher.withdraw(1.0)


def test_publisher_outlives_a_fault_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def faulty(*_: object) -> None:
        raise KeyError("no such thing")

    publisher = record.Publisher(tmp_path, beat_seconds=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(record, "write", faulty)
        publisher.publish(GOOD)
        time.sleep(0.2)
    assert wait_for(lambda: seq_of(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(record, "remove", faulty)
        assert not publisher.withdraw(0.2)
    assert publisher.withdraw(1.0)
    assert capfd.readouterr().err.count("KeyError: 'no such thing'") == 2


def test_publisher_seq_grows_over_a_withdrawal(tmp_path: Path) -> None:
    publisher = record.Publisher(tmp_path, beat_seconds=0.05)
    publisher.publish(GOOD)
    first = wait_for(lambda: seq_of(tmp_path))
    assert publisher.withdraw(1.0)
    publisher.publish(GOOD)
    assert wait_for(lambda: seq_of(tmp_path)) > first


def test_withdraw_does_not_wait_for_a_hanging_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = record.Publisher(tmp_path, beat_seconds=0.05)
    publisher.publish(GOOD)
    wait_for(lambda: seq_of(tmp_path))

    answer = threading.Event()

    def hang(*_: object) -> bool:
        return answer.wait(10)

    monkeypatch.setattr(record, "remove", hang)
    began = time.monotonic()
    assert not publisher.withdraw(0.3)
    assert time.monotonic() - began < 5.0
    answer.set()
