# SPDX-License-Identifier: Apache-2.0
"""The region: areas are apart, zeroed, given back; appends stay inside whatever word 0 says."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.device.abi import AREAS_OFFSET, MAGIC, PAGE_SIZE, WORD, HeaderWord
from bridge.device.region import Area, Region
from bridge.errors import RegionError, UsageError
from tests.support.examples import examples

MIB = 1 << 20


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region(4 * MIB)
    yield region
    region.close()


def test_header_has_the_layout(region: Region) -> None:
    stored = os.pread(region.fd, 64, 0)
    assert stored[:8] == b"KCOVBRDG" == MAGIC.to_bytes(8, "little")
    assert region.control[HeaderWord.REGION_BYTES] == region.size


@pytest.mark.parametrize("size", [0, -1, 3 * MIB, MIB // 2, 1 << 50])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(UsageError, match="not possible"):
        Region(size)


def test_region_no_memory_is_a_region_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "memfd_create", full)
    with pytest.raises(RegionError, match="Cannot allocate memory"):
        Region(MIB)


def test_nobody_can_resize_it(region: Region) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, MIB)


def test_region_large_takes_no_memory_until_used() -> None:
    region = Region(1 << 34)
    try:
        assert os.fstat(region.fd).st_blocks * 512 < MIB
    finally:
        region.close()


def test_areas_fill_the_region_and_come_back(region: Region) -> None:
    free = region.bytes_free
    areas = []
    while (area := region.allocate(100_000)) is not None:
        areas.append(area)
    assert len(areas) == free // (-(-100_000 * WORD // PAGE_SIZE) * PAGE_SIZE)
    spans = sorted((area.offset, area.offset + area.bytes) for area in areas)
    assert spans[0][0] >= AREAS_OFFSET
    assert spans[-1][1] <= region.size
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    for area in areas[::2] + areas[1::2]:
        region.free(area)
    assert region.bytes_free == free
    assert region.areas_in_use == 0
    whole = region.allocate(free // WORD)
    assert whole is not None


def test_free_area_is_zeroed_and_its_memory_released(region: Region) -> None:
    first = region.allocate(200_000)
    assert first is not None
    assert first.append([7] * 199_999) == 199_999
    used = os.fstat(region.fd).st_blocks
    region.free(first)
    assert os.fstat(region.fd).st_blocks < used - 200_000 * WORD // 512 // 2
    second = region.allocate(200_000)
    assert second is not None
    assert second.offset == first.offset
    assert os.pread(region.fd, second.bytes, second.offset) == bytes(second.bytes)


def test_clear_region_is_as_new(region: Region) -> None:
    before = bytes(os.pread(region.fd, region.size, 0))
    area = region.allocate(1000)
    assert area is not None
    with pytest.raises(ValueError, match="in use"):
        region.clear()
    region.free(area)
    for offset in range(0, region.size, PAGE_SIZE):
        os.pwrite(region.fd, b"\xff" * 8, offset)
    region.clear()
    assert os.pread(region.fd, region.size, 0) == before
    assert region.allocate(1000) is not None


def test_freeing_twice_is_refused(region: Region) -> None:
    area = region.allocate(10)
    assert area is not None
    region.free(area)
    with pytest.raises(ValueError, match="freed before"):
        region.free(area)


def _words(region: Region, area: Area) -> list[int]:
    data = os.pread(region.fd, area.bytes, area.offset)
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


@settings(max_examples=examples(100))
@given(
    size=st.integers(1, 1200),
    count=st.one_of(st.integers(0, 1300), st.integers(0, 2**64 - 1)),
    pcs=st.lists(st.integers(0, 2**64 - 1), max_size=40),
)
def test_append_as_a_model_and_never_outside(size: int, count: int, pcs: list[int]) -> None:
    region = Region(MIB)
    try:
        before, area, after = (region.allocate(n) for n in (600, size, 600))
        assert before is not None
        assert area is not None
        assert after is not None
        os.pwrite(region.fd, count.to_bytes(8, "little"), area.offset)
        model = [count] + [0] * (size - 1)
        fitting = 0
        for pc in pcs:
            if model[0] + 1 <= size - 1:
                model[0] += 1
                model[model[0]] = pc
                fitting += 1
        assert area.append(pcs) == fitting
        words = _words(region, area)
        assert words[:size] == model
        assert not any(words[size:])
        assert not any(_words(region, before))
        assert not any(_words(region, after))
        assert area.read() == model[1 : min(model[0], size - 1) + 1]
    finally:
        region.close()


@settings(max_examples=examples(30))
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60_000)), max_size=60))
def test_any_order_of_taking_and_giving_back(steps: list[tuple[bool, int]]) -> None:
    region = Region(2 * MIB)
    try:
        whole = region.bytes_free
        held: list[Area] = []
        for take, number in steps:
            if take:
                room = region.has_room(number)
                area = region.allocate(number)
                assert (area is not None) == room
                if area is not None:
                    held.append(area)
            elif held:
                region.free(held.pop(number % len(held)))
            assert region.bytes_free + sum(area.bytes for area in held) == whole
            spans = sorted((area.offset, area.offset + area.bytes) for area in held)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        for area in held:
            region.free(area)
        assert region.allocate(whole // WORD) is not None
    finally:
        region.close()
