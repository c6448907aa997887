# SPDX-License-Identifier: Apache-2.0
"""Streams: what a command covers is kept on the host, whole, in order, in bounded memory."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bridge.device import streams
from bridge.device.abi import ENOTSUPP, FOLLOW_FLAG, KCOV_TRACE_PC, Comparison
from bridge.device.kcov import Device, Kcov, Mode, Personality
from bridge.device.region import Area, Region
from bridge.device.streams import PcLog, Stream, WordLog
from bridge.errors import IncompleteError, SourceError
from bridge.sources.comparisons import ComparisonCursor

ALICE, BOB, CAROL = 0x1_0000_0064, 0x2_0000_0065, 0x3_0000_0066
AREA_WORDS = 2048


def words(*values: int) -> bytes:
    return array("Q", values).tobytes()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Covered:
    """A source that the test fills: each cursor sees what came after it."""

    def __init__(self) -> None:
        self.pcs: list[int] = []

    def open_cursor(self) -> list[int]:
        return [len(self.pcs)]

    def collect(self, cursor: list[int], since: int = 0) -> Sequence[int]:
        news = self.pcs[cursor[0] :]
        cursor[0] = len(self.pcs)
        return news

    def close_cursor(self, cursor: list[int]) -> None:
        cursor.clear()


class Compared:
    """Two comparisons at each look."""

    def open_cursor(self) -> ComparisonCursor:
        return ComparisonCursor(0, 0)

    def collect(self, cursor: ComparisonCursor) -> tuple[Sequence[Comparison], int]:
        return [(6, 1, 2, 0xF1), (6, 3, 4, 0xF2)], 0

    def close_cursor(self, cursor: ComparisonCursor) -> None:
        pass


class Watching:
    """Stands for the plugin in QEMU: writes into areas by itself, between two requests."""

    def __init__(self) -> None:
        self.areas: dict[int, Area] = {}
        self.written: dict[int, int] = {}

    def attach(self, slot: int, area: Area, task: int) -> None:
        self.areas[slot] = area
        self.written[slot] = 0

    def write(self, slot: int, pcs: Sequence[int]) -> int:
        fitted = self.areas[slot].append(pcs)
        self.written[slot] += fitted
        return fitted

    def counts(self, slot: int) -> tuple[int, int]:
        return self.written[slot], 0

    def detach(self, slot: int) -> tuple[int, int]:
        del self.areas[slot]
        return self.written[slot], 0


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region(16 << 20)
    yield region
    region.close()


class Host:
    def __init__(self, region: Region, **more: object) -> None:
        self.covered = Covered()
        self.device: Device[list[int]] = Device(region, self.covered, **more)  # type: ignore[arg-type]

    def stream(self, area_words: int = AREA_WORDS, **more: object) -> Stream:
        stream = Stream(area_words, **more)  # type: ignore[arg-type]
        self.device.open_stream(stream)
        return stream

    def join(self, stream: Stream, task: int, slot: int = 0) -> Kcov[list[int]]:
        kcov = self.device.open(slot=slot)
        assert self.device.join_stream(kcov, task, stream.number) == 0
        return kcov

    def cover(self, kcov: Kcov[list[int]], *pcs: int) -> None:
        assert kcov.owner is not None
        self.covered.pcs += pcs
        assert self.device.syscall_return(kcov, kcov.owner, 1) == 0

    def end(self, kcov: Kcov[list[int]]) -> None:
        assert kcov.owner is not None
        assert self.device.task_exit(kcov, kcov.owner) == 0
        assert self.device.release(kcov) == 0

    def pcs(self, stream: Stream) -> PcLog:
        self.device.close_stream(stream)
        stream.finish()
        stream.check()
        return stream.pcs


@pytest.fixture
def host(region: Region) -> Host:
    return Host(region)


def test_stream_thread_that_ends_gives_its_pcs(host: Host) -> None:
    stream = host.stream()
    kcov = host.join(stream, ALICE)
    assert kcov.mode is Mode.TRACE_PC
    host.cover(kcov, 10, 11)
    host.cover(kcov, 10)
    host.end(kcov)
    assert host.pcs(stream) == [10, 11, 10]
    assert (kcov.appended, kcov.dropped) == (3, 0)


def test_stream_orders_threads_by_their_end(host: Host) -> None:
    stream = host.stream()
    one, other, left = (
        host.join(stream, task, slot) for slot, task in enumerate((ALICE, BOB, CAROL))
    )
    # Each is given what is covered, whoever it was.
    host.cover(one, 1)
    host.cover(other, 2)
    host.end(other)
    host.cover(one, 3)
    host.end(one)
    host.cover(left)
    assert host.pcs(stream) == [1, 2, 1, 2, 3, 1, 2, 3], "the one that still runs comes last"


def test_stream_pcs_beyond_the_area_are_all_kept_in_order(host: Host) -> None:
    stream = host.stream()
    kcov = host.join(stream, ALICE)
    expected = list(range(5 * AREA_WORDS))
    host.cover(kcov, *expected[:3])
    host.cover(kcov, *expected[3:])
    host.end(kcov)
    assert host.pcs(stream) == expected
    assert (kcov.appended, kcov.dropped) == (len(expected), 0)
    assert host.device.totals.dropped == 0


def test_stream_areas_and_instances_are_free_when_threads_have_ended(
    host: Host, region: Region
) -> None:
    stream = host.stream()
    free = region.bytes_free
    for task in range(1, 5001):
        kcov = host.join(stream, task)
        host.cover(kcov, task)
        host.end(kcov)
    assert region.bytes_free == free
    assert host.device.instances == 0
    assert host.pcs(stream) == list(range(1, 5001))


def test_stream_area_shrinks_where_the_region_is_nearly_full(host: Host, region: Region) -> None:
    stream = host.stream(1 << 12)
    sizes = []
    for task in range(1, 3000):
        kcov = host.device.open(slot=task)
        if host.device.join_stream(kcov, task, stream.number) == errno.ENOMEM:
            break
        sizes.append(kcov.size)
    assert sizes[0] == 1 << 12
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1024
    assert region.bytes_free < 8192
    assert len(sizes) > 1000


def test_join_stream_of_another_number_is_refused(host: Host) -> None:
    stream = host.stream()
    kcov = host.device.open()
    assert host.device.join_stream(kcov, ALICE, stream.number ^ 2) == errno.ESRCH
    host.pcs(stream)
    assert host.device.join_stream(kcov, ALICE, stream.number) == errno.ESRCH, "it has ended"
    assert kcov.area is None


def test_join_stream_twice_or_from_an_initialised_instance_is_refused(host: Host) -> None:
    stream = host.stream()
    kcov = host.join(stream, ALICE)
    assert host.device.join_stream(kcov, BOB, stream.number) == errno.EBUSY
    assert host.device.join_stream(host.device.open(), ALICE, stream.number) == errno.EBUSY
    plain = host.device.open()
    assert host.device.init_trace(plain, 512) == 0
    assert host.device.join_stream(plain, BOB, stream.number) == errno.EBUSY
    assert host.device.enable(plain, ALICE, KCOV_TRACE_PC) == errno.EBUSY


def test_close_stream_ends_the_threads_that_still_run(host: Host) -> None:
    stream = host.stream()
    kcov = host.join(stream, ALICE)
    host.cover(kcov, 1)
    assert host.pcs(stream) == [1]
    assert host.device.syscall_return(kcov, ALICE, 1) == errno.EINVAL
    assert host.device.task_exit(kcov, ALICE) == 0
    assert host.device.release(kcov) == 0
    host.device.close_stream(stream)


def test_close_of_the_descriptor_leaves_a_stream_traced_in_both_personalities(
    region: Region,
) -> None:
    for personality in Personality:
        host = Host(region, personality=personality)
        stream = host.stream()
        kcov = host.join(stream, ALICE)
        assert host.device.last_close(kcov, ALICE) == errno.EPERM
        host.cover(kcov, 1)
        host.end(kcov)
        assert host.pcs(stream) == [1]
    assert region.areas_in_use == 0


def test_stream_with_a_bitmap_has_each_pc_once_a_thread(host: Host) -> None:
    stream = host.stream(bitmap_words=64)
    one, other = host.join(stream, ALICE, 0), host.join(stream, BOB, 1)
    assert one.mode is Mode.UNIQUE_PC
    host.cover(one, 5, 6, 5)
    host.cover(one, 6, 7)
    host.end(one)
    host.cover(other)
    host.end(other)
    assert host.pcs(stream) == [5, 6, 7, 5, 6, 7]


def test_stream_bitmap_survives_that_the_area_is_emptied(host: Host) -> None:
    stream = host.stream(bitmap_words=512)
    kcov = host.join(stream, ALICE)
    many = list(range(2 * AREA_WORDS))
    host.cover(kcov, *many)
    host.cover(kcov, *many)
    host.end(kcov)
    assert host.pcs(stream) == many


def test_stream_of_comparisons(region: Region) -> None:
    host = Host(region, comparisons=Compared())
    stream = host.stream(1024, comparisons=True)
    kcov = host.join(stream, ALICE)
    for _ in range(1000):
        assert host.device.syscall_return(kcov, ALICE, 1) == 0
    host.end(kcov)
    host.device.close_stream(stream)
    stream.finish()
    records = stream.records
    assert len(records) == 2000, "an area of 1024 words holds 255 at a time"
    assert list(records) == [(6, 1, 2, 0xF1), (6, 3, 4, 0xF2)] * 1000
    assert records[-1] == records[1999] == (6, 3, 4, 0xF2)
    assert pickle.loads(pickle.dumps(records))[3] == records[3]
    assert records[1:3] == [(6, 3, 4, 0xF2), (6, 1, 2, 0xF1)]
    with pytest.raises(IndexError):
        records[2000]


def test_stream_of_comparisons_counts_those_that_were_dropped(
    region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = Compared()
    host = Host(region, comparisons=compared)
    stream = host.stream(1024, comparisons=True)
    kcov = host.join(stream, ALICE)
    assert host.device.syscall_return(kcov, ALICE, 1) == 0
    assert stream.dropped == 0
    records, _ = compared.collect(compared.open_cursor())
    monkeypatch.setattr(compared, "collect", lambda cursor: (records, 7))
    assert host.device.syscall_return(kcov, ALICE, 1) == 0
    assert stream.dropped == 7


def test_stream_of_comparisons_without_their_source_is_refused(host: Host) -> None:
    stream = host.stream(comparisons=True)
    assert host.device.join_stream(host.device.open(), ALICE, stream.number) == ENOTSUPP


def test_watched_area_is_emptied_at_returns_before_it_is_full(region: Region) -> None:
    watching = Watching()
    host = Host(region, watcher=watching)
    stream = host.stream()
    kcov = host.join(stream, ALICE, slot=7)
    expected = list(range(20 * 600))
    for start in range(0, len(expected), 600):
        assert watching.write(7, expected[start : start + 600]) == 600
        host.cover(kcov)
    host.end(kcov)
    assert host.pcs(stream) == expected
    assert kcov.appended == len(expected)


def test_count_that_the_guest_made_up_costs_no_more_than_the_area(host: Host) -> None:
    stream = host.stream()
    kcov = host.join(stream, ALICE)
    assert kcov.area is not None
    kcov.area._words[0] = 2**64 - 1
    host.cover(kcov, 1)
    host.end(kcov)
    assert len(host.pcs(stream)) <= 2 * AREA_WORDS


def test_untraced_threads_are_counted(host: Host) -> None:
    stream = host.stream()
    assert host.device.count_untraced(stream.number, 2) == 0
    assert host.device.count_untraced(stream.number ^ 2, 1) == errno.ESRCH
    assert stream.untraced == 2


def test_stream_numbers_are_of_63_bits_and_differ() -> None:
    numbers = {Stream(AREA_WORDS).number for _ in range(100)}
    assert len(numbers) == 100
    assert all(0 < number < FOLLOW_FLAG for number in numbers)


# The log


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs that need a file from the third word on, and are read in pieces."""
    monkeypatch.setattr(streams, "_IN_MEMORY_BYTES", 16)
    monkeypatch.setattr(streams, "_CHUNK_WORDS", 5)


def test_log_that_outgrows_memory_is_read_from_an_unnamed_file(small: None, tmp_path: Path) -> None:
    log = WordLog(tmp_path)
    for number in range(100):
        assert log.append(words(number, 1000 + number))
    log.finish()
    assert list(tmp_path.iterdir()) == []
    everything = [value for number in range(100) for value in (number, 1000 + number)]
    assert log.read(0, 200).tolist() == everything
    assert log.read(1, 5).tolist() == everything[1:5], "part of it in memory"
    assert log.read(150, 999).tolist() == everything[150:]
    assert len(log) == 200


def test_log_of_a_few_words_needs_no_file(tmp_path: Path) -> None:
    before = open_files()
    log = WordLog(tmp_path / "missing")
    assert log.append(words(*range(1000)))
    log.finish()
    assert log.read(0, 1000).tolist() == list(range(1000))
    assert open_files() == before


def test_log_closes_its_file_when_nobody_has_it(small: None, tmp_path: Path) -> None:
    before = open_files()
    log = WordLog(tmp_path)
    log.append(words(*range(10)))
    log.finish()
    assert open_files() == before + 1
    del log
    assert open_files() == before


def test_pc_log_is_a_sequence(small: None, host: Host) -> None:
    stream = host.stream()
    one, other = host.join(stream, ALICE, 0), host.join(stream, BOB, 1)
    host.cover(one, *range(7))
    host.cover(other)
    host.end(other)
    host.cover(one, 7, 8)
    host.end(one)
    pcs = host.pcs(stream)
    expected = [*range(7), *range(9)]
    assert list(pcs) == expected
    assert pcs == expected
    assert expected == pcs
    assert pcs != expected[:-1]
    assert pcs != [*expected[:-1], 99]
    assert len(pcs) == 16
    assert [pcs[index] for index in range(-16, 16)] == 2 * expected
    assert set(pcs) == set(range(9))
    assert 8 in pcs
    assert 9 not in pcs
    assert pcs.index(3) == 3
    assert pcs.count(8) == 1
    assert list(reversed(pcs)) == expected[::-1]
    for start in range(-17, 18):
        for stop in (-3, 0, 5, 16, 20):
            assert pcs[start:stop] == expected[start:stop]
            assert pcs[start:stop:-2] == expected[start:stop:-2]
    for index in (16, -17):
        with pytest.raises(IndexError):
            pcs[index]


def test_pickled_log_is_whole_elsewhere(small: None, host: Host) -> None:
    stream = host.stream()
    kcov = host.join(stream, ALICE)
    host.cover(kcov, *range(100))
    host.end(kcov)
    pcs = pickle.loads(pickle.dumps(host.pcs(stream)))
    assert isinstance(pcs, PcLog)
    assert pcs == list(range(100))
    assert pcs[98:] == [98, 99]
    assert pickle.loads(pickle.dumps(host.pcs(host.stream()))) == []


def test_empty_pc_log(host: Host) -> None:
    pcs = host.pcs(host.stream())
    assert not pcs
    assert list(pcs) == pcs[:] == pcs[3:] == []
    assert pcs == []


def test_log_that_cannot_be_written_says_that_the_pcs_are_incomplete(
    small: None, host: Host, tmp_path: Path
) -> None:
    stream = host.stream(directory=tmp_path / "missing")
    kcov = host.join(stream, ALICE)
    host.cover(kcov, 1, 2)
    host.device._hand_over(kcov)
    host.cover(kcov, *range(3, 100))
    host.end(kcov)
    host.device.close_stream(stream)
    stream.finish()
    with pytest.raises(IncompleteError, match=r"incomplete: 97 .*No such file") as caught:
        stream.check()
    assert caught.value.exit_status == 125
    assert list(stream.pcs) == [1, 2], "what could be kept is there"


def test_log_on_a_full_disk_keeps_what_was_written(small: None, host: Host, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    stream = host.stream(directory=tmp_path)
    kcov = host.join(stream, ALICE)
    # As on a full disk, a write is short at first, then fails; Python ignores SIGXFSZ.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        for number in range(20):
            host.cover(kcov, *range(100 * number, 100 * number + 100))
            host.device._hand_over(kcov)
        host.end(kcov)
        host.device.close_stream(stream)
        stream.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(stream.pcs) == list(range(1000)), "8000 bytes"
    with pytest.raises(IncompleteError, match=r"1,000 words"):
        stream.check()


def test_log_waits_for_a_slow_disk_no_longer_than_the_guest_can(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_QUEUE_BYTES", 8)
    monkeypatch.setattr(streams, "_QUEUE_SECONDS", 0.01)
    log = WordLog(tmp_path)
    reader, writer = os.pipe()
    pwrite = os.pwrite

    def slow(fd: int, data: bytes, offset: int) -> int:
        os.read(reader, 1)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    taken = [log.append(words(1, 2)) for _ in range(4)]
    assert taken[:1] == [True]
    assert not taken[-1]
    monkeypatch.setattr(streams, "_QUEUE_SECONDS", 60.0)
    begun = time.monotonic()
    assert not log.append(words(1, 2))
    taken.append(False)
    assert time.monotonic() - begun < 30, "it waits once only"
    os.write(writer, b"....")
    log.finish()
    assert log.lost == 2 * taken.count(False)
    assert log.error is not None
    assert "slower" in str(log.error)
    assert log.read(0, 99).tolist() == [1, 2] * taken.count(True)
    os.close(reader)
    os.close(writer)


def test_close_of_a_stream_with_many_threads_is_done_in_portions(host: Host) -> None:
    stream = host.stream()
    for slot in range(5):
        host.cover(host.join(stream, ALICE + slot, slot), slot)
    done = [host.device.close_some(stream, 0.0)]
    assert host.device.enabled == 4
    assert host.device.join_stream(host.device.open(slot=9), BOB, stream.number) == errno.ESRCH
    while not done[-1]:
        done.append(host.device.close_some(stream, 0.0))
    assert len(done) >= 5
    assert host.device.enabled == 0
    assert host.pcs(stream) == [0, 1, 2, 3, 4]


class Dropping(Watching):
    """The plugin, to which the area was too small."""

    def counts(self, slot: int) -> tuple[int, int]:
        return self.written[slot], 9

    def detach(self, slot: int) -> tuple[int, int]:
        return super().detach(slot)[0], 9


@pytest.mark.parametrize("ends", [True, False])
def test_stream_pcs_that_the_watcher_dropped_are_counted(region: Region, ends: bool) -> None:
    watching = Dropping()
    host = Host(region, watcher=watching)
    stream = host.stream()
    kcov = host.join(stream, ALICE)
    watching.write(0, [1])
    host.cover(kcov, 2)
    if ends:
        host.end(kcov)
    assert host.pcs(stream) == [1, 2]
    assert stream.dropped == 9


class Stuck(Watching):
    """The plugin in a QEMU that hangs."""

    def detach(self, slot: int) -> tuple[int, int]:
        raise SourceError("QEMU hangs while it writes coverage")


def test_close_stream_of_a_watcher_that_fails_makes_it_incomplete(region: Region) -> None:
    host = Host(region, watcher=Stuck())
    stream = host.stream()
    kcov = host.join(stream, ALICE)
    host.cover(kcov, 2)
    with pytest.raises(IncompleteError, match="still ran are incomplete: QEMU hangs"):
        host.pcs(stream)
    assert stream.pcs == [2]


def test_stream_few_threads_get_whole_areas_many_leave_room_for_others(host: Host) -> None:
    """The kernel's part of one execve() has 75,000 PCs with repeats."""
    stream = host.stream(1 << 17)
    sizes = [host.join(stream, 1 + slot, slot).size for slot in range(200)]
    assert sizes[0] == 1 << 17
    assert sizes[:8] == sorted(sizes[:8], reverse=True)
    assert min(sizes[:8]) >= 1 << 15
    assert max(sizes[8:]) < 1 << 13
