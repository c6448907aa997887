# SPDX-License-Identifier: Apache-2.0
"""Words for the engine from what a target compares."""

from __future__ import annotations

import ast
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.device.abi import KCOV_CMP_CONST, KCOV_CMP_SIZE, Comparison
from bridge.fuzz.dictionary import WORDS_LIMIT, Dictionary
from bridge.fuzz.engine import JobOptions, find_engine, start_job
from bridge.fuzz.lane import Execution, LaneFlag
from bridge.fuzz.messages import NewCells
from tests.support.null_slot import NullSlot


def constant(value: int, log2: int, other: int = 7) -> Comparison:
    return KCOV_CMP_SIZE(log2) | KCOV_CMP_CONST, value, other, 0xFFFFFFFF81000000


def words(*comparisons: Comparison) -> list[bytes]:
    dictionary = Dictionary()
    dictionary.add(comparisons)
    return [word for word, _ in dictionary.words()]


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        (constant(0x6E, 0), {b"n", b"110"}),
        (constant(5, 0), {b"\x05"}),
        (constant(0x1234, 1), {b"\x12\x34", b"\x34\x12", b"4660"}),
        (constant(0x6E, 2), {b"n", b"n\0\0\0", b"\0\0\0n", b"110"}),
        (constant(0xFFFFFFFE, 2), {b"\xfe\xff\xff\xff", b"\xff\xff\xff\xfe", b"-2"}),
        # A magic number of readable bytes.
        (constant(0x504B, 1), {b"PK", b"KP"}),
    ],
)
def test_words_of_a_constant(comparison: Comparison, expected: set[bytes]) -> None:
    assert set(words(comparison)) == expected


def test_words_of_two_values_is_the_one_that_stays() -> None:
    same = [(KCOV_CMP_SIZE(0), value, 107, 0xFFFFFFFF81000010) for value in (110, 112, 120)]
    assert set(words(*same)) == {b"k", b"107"}
    turned = [(KCOV_CMP_SIZE(0), 107, value, 0xFFFFFFFF81000010) for value in (110, 112, 120)]
    assert set(words(*turned)) == {b"k", b"107"}


def test_words_of_two_values_that_both_change_are_none() -> None:
    assert words(*((KCOV_CMP_SIZE(2), n, n + 1, 0xFFFFFFFF81000010) for n in range(9))) == []


def test_words_of_two_values_that_both_stay_are_both() -> None:
    assert set(words((KCOV_CMP_SIZE(0), 110, 107, 1))) == {b"n", b"110", b"k", b"107"}


def test_words_most_frequent_first_and_bounded() -> None:
    dictionary = Dictionary()
    for value in range(1000, 2000):
        dictionary.add([constant(value, 1)] * (3 if value == 1500 else 1))
    found = dictionary.words()
    assert len(found) == WORDS_LIMIT
    assert found[0][1] == 3
    assert {word for word, times in found if times == 3} == {b"1500", b"\x05\xdc", b"\xdc\x05"}


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3)), max_size=20))
def test_add_any_record_gives_words_of_nine_bytes_as_numbers(
    records: list[tuple[int, int]],
) -> None:
    for word in words(*(constant(value, log2) for value, log2 in records)):
        assert 1 <= len(word) <= 20


def test_write_each_word_can_be_read_back(tmp_path: Path) -> None:
    dictionary = Dictionary()
    dictionary.add([constant(0x22, 0), constant(0x5C, 0), constant(0x00FF, 1), constant(0x41, 0)])
    path = tmp_path / "words.dict"
    assert dictionary.write(path) == len(dictionary.words())
    quoted = [line.partition("=")[2] for line in path.read_text().splitlines()]
    read = {ast.literal_eval(f"b{text}") for text in quoted}
    assert read == {word for word, _ in dictionary.words()}


def test_write_without_words_makes_no_file(tmp_path: Path) -> None:
    assert Dictionary().write(tmp_path / "words.dict") == 0
    assert not (tmp_path / "words.dict").exists()


class Recorded:
    """Executes nothing: what cases do in a guest is in tests/system/test_comparisons.py."""

    def __init__(self, statuses: Sequence[int | None]) -> None:
        self.statuses = list(statuses)

    def execute(self, case: bytes, timeout: float, flags: LaneFlag | None = None) -> Execution:
        assert flags == LaneFlag.COMPARISONS
        return Execution(
            self.statuses.pop(0), (), b"", 0.0, 0, comparisons=(constant(case[0] * 1000, 1),)
        )


def test_learn_stops_at_a_case_that_ends_badly() -> None:
    dictionary = Dictionary()
    recorded = Recorded([0, None, 0])
    dictionary.learn(recorded, [b"\1", b"\2", b"\3"], timeout=1)
    assert {b"1000", b"2000"} < {word for word, _ in dictionary.words()}
    assert recorded.statuses == [0]


def test_engine_reads_the_file_and_uses_its_words(tmp_path: Path) -> None:
    """``KCOV`` is four bytes that a target without a gradient would ask for in vain."""
    dictionary = Dictionary()
    dictionary.add([constant(int.from_bytes(b"KCOV", "little"), 2), constant(0x22, 0)])
    dictionary.write(tmp_path / "words.dict")
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "one").write_bytes(b"x")
    options = JobOptions(time_limit_ms=1000, dictionaries=(tmp_path / "words.dict",))
    with (
        NullSlot(tmp_path) as slot,
        start_job(find_engine(), slot.socket, tmp_path / "seeds", tmp_path / "out", options) as job,
    ):
        end = time.monotonic() + 120
        while not any(case.startswith(b"KCOV") for case in slot.cases(NewCells)):
            job.check()
            assert job.running
            assert time.monotonic() < end
            time.sleep(0.05)
        text = job.process.stderr_text
    assert f"Loaded {dictionary.write(tmp_path / 'again')} extra tokens" in text
