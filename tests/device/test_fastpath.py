# SPDX-License-Identifier: Apache-2.0
"""The compiled classes do what the plain ones do, and the tests pass with either."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.device import fastpath
from bridge.device.fastpath import plain

ROOT = Path(__file__).resolve().parents[2]
SUITE = (
    "tests/device/test_region.py",
    "tests/device/test_kcov.py",
    "tests/device/test_device_model.py",
    "tests/device/test_doorbell.py",
    "tests/device/test_doorbell_fuzz.py",
    "tests/sources/test_ledger.py",
    "tests/sources/python/test_source.py",
    "tests/sources/python/test_comparisons.py",
    "tests/session/test_isolated.py",
    "tests/sources/test_remote.py",
)
"""Who uses the classes, without a virtual machine."""


def can_be_compiled() -> bool:
    header = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which("gcc") is not None and header.is_file()


def test_it_is_compiled_where_it_can_be() -> None:
    if os.environ.get("KCOV_BRIDGE_PLAIN"):
        assert not fastpath.COMPILED
    elif can_be_compiled():
        assert fastpath.COMPILED, fastpath.WHY_PLAIN


def test_the_tests_pass_with_the_plain_classes() -> None:
    if not fastpath.COMPILED:
        pytest.skip("this run is with the plain classes itself")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not vm and not bench", *SUITE],
        cwd=ROOT,
        env={**os.environ, "KCOV_BRIDGE_PLAIN": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


both = pytest.mark.skipif(not fastpath.COMPILED, reason="there is nothing to compare with")

words = st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1))
pc_lists = st.lists(st.integers(0, 2**64 - 1), max_size=12)


def containers(pcs: list[int]) -> list[Sequence[int]]:
    return [pcs, tuple(pcs), array("Q", pcs)]


@both
@given(
    st.integers(1, 16),
    st.lists(st.tuples(words, st.integers(0, 15), pc_lists, st.integers(0, 2)), max_size=8),
)
def test_areas(size: int, steps: list[tuple[int, int, list[int], int]]) -> None:
    memories = [memoryview(bytearray((size + 2) * 8)).cast("Q") for _ in range(2)]
    areas = [
        kind(memory[:size], size)
        for kind, memory in zip((plain.AreaWords, fastpath.AreaWords), memories, strict=True)
    ]
    for count, bitmap, pcs, container in steps:
        for area, memory in zip(areas, memories, strict=True):
            area.bitmap_words = bitmap % size
            memory[area.bitmap_words] = count
        ours, theirs = (area.append(containers(pcs)[container]) for area in areas)
        assert ours == theirs
        assert memories[0] == memories[1]
    for area in areas:
        area.release()
    with pytest.raises(ValueError, match="released"):
        areas[1].append([1])


@both
@pytest.mark.parametrize("bad", [[1, -1], [1, 2**64], [1, "two"], array("I", [1, 2]), [None, 3]])
def test_what_is_no_pc_is_refused_and_counts_nothing(bad: Sequence[int]) -> None:
    for kind in (plain.AreaWords, fastpath.AreaWords):
        memory = memoryview(bytearray(64)).cast("Q")
        if isinstance(bad, array) and kind is plain.AreaWords:
            continue  # that makes an array of numbers of any
        with pytest.raises((OverflowError, TypeError, ValueError)):
            kind(memory, 8).append(bad)
        assert memory[0] == 0


@both
def test_an_area_lies_in_its_words() -> None:
    for kind in (plain.AreaWords, fastpath.AreaWords):
        for size in (0, -1, 9):
            with pytest.raises(ValueError, match="an area of"):
                kind(memoryview(bytearray(64)).cast("Q"), size)


paths = st.sampled_from(["a.py", "b.py", "z.py", "none.py"])
line_sets = st.dictionaries(
    paths, st.sets(st.one_of(st.integers(0, 220), st.integers(0, 2**80)), max_size=40), max_size=4
)


def find(path: str) -> tuple[str, list[int]] | None:
    """Files of 200 lines with a block of three lines in each four; z.py comes first."""
    if path == "none.py":
        return None
    base = 1000 * ord(path[0])
    return ("0" if path == "z.py" else path), [
        0 if line % 4 == 0 else base + line // 4 for line in range(200)
    ]


@both
@given(st.lists(st.tuples(line_sets, st.sets(paths), st.booleans()), max_size=10))
def test_line_taps(steps: list[tuple[dict[str, set[int]], set[str], bool]]) -> None:
    """Steps of lines that frames add, which sets they hold on to, and how it is looked at."""
    datas: list[dict[str, set[int]]] = [{}, {}]
    taps = [plain.LineDrain(datas[0], find), fastpath.LineDrain(datas[1], find)]
    held: list[list[set[int]]] = [[], []]
    for lines, kept, adopt in steps:
        given_: list[list[int]] = []
        for number, (data, tap) in enumerate(zip(datas, taps, strict=True)):
            if adopt:
                given_.append(tap.adopt({path: set(each) for path, each in lines.items()}))
                continue
            held[number] = []
            for path, each in lines.items():
                data.setdefault(path, set()).update(each)
                if path in kept:
                    held[number].append(data[path])
            given_.append(tap.drain())
            assert not any(data.values())
            assert set(data) == kept & set(lines)
        assert given_[0] == given_[1]
        assert len(set(given_[1])) == len(given_[1])
        assert taps[0].covered == taps[1].covered
    held.clear()
    for tap in taps:
        tap.put_back()
    assert {path: each for path, each in datas[0].items() if each} == {
        path: each for path, each in datas[1].items() if each
    }


def test_nothing_is_lost_where_finding_out_about_a_file_fails() -> None:
    def fail(path: str) -> tuple[str, list[int]]:
        if fails:
            raise RuntimeError
        return path, list(range(10))

    for kind in (plain.LineDrain, fastpath.LineDrain):
        fails = True
        data = {"a.py": {1, 2}, "b.py": {3}}
        tap = kind(data, fail)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                tap.drain()
        fails = False
        assert tap.drain() == [1, 2, 3]
        tap.put_back()
        assert data == {"a.py": {1, 2}, "b.py": {3}}
