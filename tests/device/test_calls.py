# SPDX-License-Identifier: Apache-2.0
"""Logs of system calls: what the guest writes is copied, placed, and never trusted."""

from __future__ import annotations

import contextlib
import random
from array import array
from collections.abc import Iterator

import pytest

from bridge.device.abi import CALL_WORDS_BITS, CallFlag, CallLogWord, CallWord
from bridge.device.calls import CallBook, CallLog, HostThread, LoggedCall
from bridge.device.kcov import Device, Kcov
from bridge.device.region import Area, Region
from bridge.device.streams import Stream
from bridge.errors import IncompleteError
from bridge.sources.ledger import Cursor, Ledger

RING_WORDS = 1 << 12
LOG_WORDS = CallLogWord.RING + RING_WORDS
OWNER = 7 << 32 | 312
OTHER = 8 << 32 | 313


class Source:
    """Gives the PCs that a test puts into it, once."""

    def __init__(self) -> None:
        self.pcs: list[int] = []

    def consume(self) -> list[int]:
        pcs, self.pcs = self.pcs, []
        return pcs


class Guest:
    """Writes records into a ring as the guest's module does."""

    def __init__(self, words: memoryview) -> None:
        self.words = words
        self.time = 1000

    def put(self, *words: int) -> None:
        head = self.words[CallLogWord.HEAD]
        for word in words:
            ring = self.words[CallLogWord.RING_WORDS]
            self.words[CallLogWord.RING + head % ring] = word & 2**64 - 1
            head = head + 1 & 2**64 - 1
        self.words[CallLogWord.HEAD] = head

    def call(self, number: int, result: int | None, count: int, strings: bytes = b"") -> None:
        text = strings + bytes(-len(strings) % 8)
        flags = 0 if result is None else CallFlag.RETURNED
        flags |= 2 if strings else 0
        size = CallWord.STRINGS + len(text) // 8
        self.time += 10
        command = array("Q", b"name" + bytes(12))
        self.put(
            size | flags << CALL_WORDS_BITS,
            *(number, result or 0, self.time, self.time + 5, count),
            *range(1, 7),
            *command,
            *array("Q", text),
        )


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region(1 << 21)
    yield region
    region.close()


def make_area(region: Region, words: int) -> Area:
    area = region.allocate(words)
    assert area is not None
    return area


@pytest.fixture
def traced(region: Region) -> Area:
    return make_area(region, 512)


@pytest.fixture
def log(region: Region, traced: Area) -> CallLog:
    return CallLog(make_area(region, LOG_WORDS), traced, clear_bitmap=False)


@pytest.fixture
def guest(log: CallLog) -> Guest:
    return Guest(log.area.words)


def finished(book: CallBook, thread: object) -> list[LoggedCall]:
    book.end(thread, 0)
    book.finish()
    return list(book.calls)


# The ring


def test_call_log_of_a_bitmap_names_it_only_if_it_is_to_be_cleared(region: Region) -> None:
    traced = make_area(region, 512)
    traced.bitmap_words = 16
    for clear in (False, True):
        words = CallLog(make_area(region, LOG_WORDS), traced, clear_bitmap=clear).area.words
        assert words[CallLogWord.COUNT_OFFSET] == traced.offset + 16 * 8
        assert words[CallLogWord.BITMAP_OFFSET] == traced.offset
        assert words[CallLogWord.BITMAP_WORDS] == (16 if clear else 0)
        assert words[CallLogWord.RING_WORDS] == RING_WORDS


def test_call_log_many_records_around_the_ring_are_all_taken(log: CallLog, guest: Guest) -> None:
    book = CallBook()
    book.begin("thread", OWNER)
    for number in range(1000):
        guest.call(number, number, 0, b"/some/path\0" if number % 3 else b"")
        if number % 100 == 99:
            book.add("thread", log)
            assert log.area.words[CallLogWord.TAIL] == log.area.words[CallLogWord.HEAD]
    calls = finished(book, "thread")
    assert [call.number for call in calls] == list(range(1000))
    assert [call.result for call in calls] == list(range(1000))
    assert calls[1].strings == {1: (b"/some/path", False)}
    assert calls[0].strings == {}
    book.check()


def test_call_log_present_call_is_taken_at_the_end_alone(log: CallLog, guest: Guest) -> None:
    guest.call(39, 312, 0)
    words = log.area.words
    start = int(CallLogWord.CALL)
    words[start : start + CallWord.STRINGS] = words[
        CallLogWord.RING : CallLogWord.RING + CallWord.STRINGS
    ]
    record = CallWord.STRINGS * 8
    assert len(log.take(last=True)[0]) == record, "the owner is in no call"
    words[CallLogWord.ENTERED] = 1
    assert log.take() == (b"", 0)
    assert len(log.take(last=True)[0]) == record
    for size in (0, 13, 145, 2**64 - 1):
        words[start] = size
        assert log.take(last=True) == (b"", 0)


@pytest.mark.parametrize("head", [RING_WORDS + 1, 2**64 - 1, 2**63])
def test_call_log_hostile_head_is_a_lost_record(log: CallLog, guest: Guest, head: int) -> None:
    log.area.words[CallLogWord.HEAD] = head
    assert log.take() == (b"", 1)
    guest.call(39, 312, 0)
    records, lost = log.take()
    assert (len(records), lost) == (CallWord.STRINGS * 8, 0)


@pytest.mark.parametrize("size", [0, 1, CallWord.STRINGS - 1, 15, 500, 0xFFFF])
def test_call_book_record_of_a_wrong_size_is_lost(log: CallLog, guest: Guest, size: int) -> None:
    book = CallBook()
    book.begin("thread", OWNER)
    guest.call(39, 312, 0)
    guest.put(size, *[0] * (CallWord.STRINGS - 1))
    book.add("thread", log)
    guest.call(40, 312, 0)
    book.add("thread", log)
    assert [call.number for call in finished(book, "thread")] == [39, 40]
    with pytest.raises(IncompleteError, match="1 system calls were lost"):
        book.check()


def test_call_book_records_that_the_guest_lost_are_counted(log: CallLog, guest: Guest) -> None:
    book = CallBook()
    book.begin("thread", OWNER)
    log.area.words[CallLogWord.LOST] = 3
    book.add("thread", log)
    log.area.words[CallLogWord.LOST] = 5
    book.add("thread", log)
    assert finished(book, "thread") == []
    with pytest.raises(IncompleteError, match="5 system calls were lost"):
        book.check()


def test_call_book_more_than_it_holds_are_counted(
    log: CallLog, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.device.calls._MOST_WORDS", 40)
    book = CallBook()
    book.begin("thread", OWNER)
    for _ in range(4):
        guest.call(39, 0, 0)
        guest.call(39, 0, 0)
        book.add("thread", log)
    assert len(finished(book, "thread")) == 2
    with pytest.raises(IncompleteError, match="6 system calls were lost: there are more than"):
        book.check()


def test_call_book_any_words_of_a_guest_are_survived(log: CallLog, guest: Guest) -> None:
    chance = random.Random(1)
    book = CallBook()
    book.begin("thread", OWNER)
    for _ in range(300):
        if chance.random() < 0.5:
            guest.call(chance.getrandbits(64), chance.getrandbits(63), chance.getrandbits(64))
        else:
            size = chance.choice((chance.getrandbits(64), chance.randrange(200)))
            guest.put(size, *(chance.getrandbits(64) for _ in range(chance.randrange(150))))
        if chance.random() < 0.3:
            book.add("thread", log)
        if chance.random() < 0.02:
            log.area.words[chance.randrange(LOG_WORDS)] = chance.getrandbits(64)
    book.recorded("thread", 10)
    for call in finished(book, "thread"):
        assert 0 <= call.start <= call.stop <= 10
        assert call.thread == 312
        assert len(call.arguments) == 6
        assert all(len(text) < 1024 for text, _ in call.strings.values())


# The device


def traced_stream(
    region: Region, source: Source
) -> tuple[Device[Cursor], Stream, Kcov[Cursor], Guest]:
    device: Device[Cursor] = Device(region, Ledger([source]))
    stream = Stream(1024, calls=CallBook())
    device.open_stream(stream)
    kcov, guest = join(device, stream, OWNER, 1)
    return device, stream, kcov, guest


def join(
    device: Device[Cursor], stream: Stream, task: int, slot: int
) -> tuple[Kcov[Cursor], Guest]:
    kcov = device.open(slot, slot)
    assert device.join_stream(kcov, task, stream.number) == 0
    assert kcov.calls is not None
    return kcov, Guest(kcov.calls.area.words)


def ended(device: Device[Cursor], stream: Stream) -> list[tuple[int, list[int]]]:
    """The calls' numbers, each with its PCs."""
    device.close_stream(stream)
    stream.finish()
    stream.check()
    assert stream.calls is not None
    return [(call.number, stream.pcs[call.start : call.stop]) for call in stream.calls.calls]


def count(kcov: Kcov[Cursor]) -> int:
    assert kcov.area is not None
    return kcov.area.count


def test_device_call_has_the_pcs_of_its_return(region: Region) -> None:
    source = Source()
    device, stream, kcov, guest = traced_stream(region, source)
    for number, pcs in ((1, [10, 11]), (2, []), (3, [12])):
        guest.call(number, 0, count(kcov))
        source.pcs = pcs
        assert device.syscall_return(kcov, OWNER, number) == 0
    assert ended(device, stream) == [(1, [10, 11]), (2, []), (3, [12])]


class Threads:
    """Says which thread ran a block, as a source does."""

    def __init__(self) -> None:
        self.on = False
        self.thread_of: dict[int, HostThread] = {}

    def record_threads(self, on: bool) -> None:
        self.on = on


def ran(device: Device[Cursor], stream: Stream) -> dict[int, list[str | None]]:
    """The name of the target's thread of each PC, by the call's number."""
    device.close_stream(stream)
    stream.finish()
    assert stream.calls is not None
    return {
        call.number: [
            thread.name if (thread := call.thread_at(place, stream.pcs[place])) else None
            for place in range(call.start, call.stop)
        ]
        for call in stream.calls.calls
    }


@pytest.mark.parametrize("bitmap_words", [0, 64], ids=["each PC", "each PC once"])
def test_device_pcs_have_the_threads_of_the_target(region: Region, bitmap_words: int) -> None:
    source, threads = Source(), Threads()
    device: Device[Cursor] = Device(region, Ledger([source]), threads=threads)
    stream = Stream(2048, calls=CallBook(), bitmap_words=bitmap_words)
    device.open_stream(stream)
    assert not threads.on
    kcov, guest = join(device, stream, OWNER, 1)
    other, other_guest = join(device, stream, OTHER, 2)
    assert threads.on
    one, two = HostThread(1, 1, "one"), HostThread(1, 2, "two")
    pcs = [10, 11, 12]
    for number, (owner, log, threads.thread_of) in enumerate(
        [
            (kcov, guest, dict.fromkeys(pcs, one)),
            (other, other_guest, dict.fromkeys(pcs, one)),
            (kcov, guest, {10: one, 11: two}),
            (kcov, guest, dict.fromkeys(pcs, two)),
            (other, other_guest, {}),
            (kcov, guest, dict.fromkeys(pcs, two)),
        ]
    ):
        log.time += 100 * number
        log.call(number, 0, count(owner))
        source.pcs = [pc + (100 * number if bitmap_words else 0) for pc in pcs]
        threads.thread_of = {
            pc + (100 * number if bitmap_words else 0): ran for pc, ran in threads.thread_of.items()
        }
        task = OWNER if owner is kcov else OTHER
        assert device.syscall_return(owner, task, number) == 0
    assert ran(device, stream) == {
        0: ["one"] * 3,
        1: ["one"] * 3,
        2: ["one", "two", None],
        3: ["two"] * 3,
        4: [None] * 3,
        5: ["two"] * 3,
    }
    assert not threads.on


def test_device_threads_of_any_count_are_survived(region: Region) -> None:
    source, threads = Source(), Threads()
    device: Device[Cursor] = Device(region, Ledger([source]), threads=threads)
    stream = Stream(1024, calls=CallBook())
    device.open_stream(stream)
    kcov, guest = join(device, stream, OWNER, 1)
    assert kcov.area is not None
    for number, value in enumerate((2**64 - 1, 0, 2**63, 5)):
        kcov.area.words[0] = value
        guest.call(number, 0, value)
        source.pcs = [10, 11]
        threads.thread_of = {10: HostThread(1, number, "one")}
        assert device.syscall_return(kcov, OWNER, number) == 0
    assert len(ran(device, stream)) == 4


def test_device_pcs_of_a_call_that_fill_the_area_stay_together(region: Region) -> None:
    source = Source()
    device, stream, kcov, guest = traced_stream(region, source)
    expected = []
    for number in range(10):
        guest.call(number, 0, count(kcov))
        source.pcs = [1000 * number + at for at in range(400 * number)]
        expected.append((number, list(source.pcs)))
        assert device.syscall_return(kcov, OWNER, number) == 0
    assert ended(device, stream) == expected


def test_device_thread_that_waits_gets_no_block_of_the_other(region: Region) -> None:
    source = Source()
    device, stream, parent, waits = traced_stream(region, source)
    child, reads = join(device, stream, OTHER, 2)
    waits.call(61, 313, count(parent))
    reads.time += 1
    reads.call(0, 47, count(child))
    source.pcs = [10, 11]
    assert device.syscall_return(child, OTHER, 0) == 0
    assert device.task_exit(child, OTHER) == 0
    assert device.syscall_return(parent, OWNER, 61) == 0
    reads_time = [(61, []), (0, [10, 11])]
    assert ended(device, stream) == reads_time


def test_device_log_is_emptied_on_request_of_its_owner_alone(region: Region) -> None:
    device, stream, kcov, guest = traced_stream(region, Source())
    guest.call(39, 312, 0)
    assert device.take_calls(kcov, OTHER) != 0
    assert guest.words[CallLogWord.TAIL] == 0
    assert device.take_calls(kcov, OWNER) == 0
    assert guest.words[CallLogWord.TAIL] == CallWord.STRINGS
    assert device.task_exit(kcov, OWNER) == 0
    assert device.take_calls(kcov, OWNER) != 0
    assert ended(device, stream) == [(39, [])]


def test_device_log_stays_until_the_guest_releases_the_instance(region: Region) -> None:
    device, stream, kcov, guest = traced_stream(region, Source())
    device.close_stream(stream)
    # A process that still runs writes until it learns that its command has ended.
    guest.call(39, 312, 0)
    in_use = region.areas_in_use
    device.release(kcov)
    assert region.areas_in_use == in_use - 2
    assert device.instances == 0


def test_device_ring_is_smaller_where_little_room_is_left(region: Region) -> None:
    with contextlib.closing(Region(1 << 26)) as large:
        for each, ring in ((large, 1 << 15), (region, 1 << 12)):
            _, _, kcov, guest = traced_stream(each, Source())
            assert guest.words[CallLogWord.RING_WORDS] == ring
            assert kcov.calls is not None
            assert len(guest.words) == kcov.calls.area.size == CallLogWord.RING + ring


def test_device_without_room_for_the_log_has_no_area_either(region: Region) -> None:
    device: Device[Cursor] = Device(region, Ledger([]))
    stream = Stream(1024, calls=CallBook())
    device.open_stream(stream)
    while region.has_room(LOG_WORDS):
        make_area(region, LOG_WORDS)
    in_use = region.areas_in_use
    kcov = device.open(1, 1)
    assert device.join_stream(kcov, OWNER, stream.number) != 0
    assert region.areas_in_use == in_use
    assert kcov.calls is None
    device.release(kcov)
