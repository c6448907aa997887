# SPDX-License-Identifier: Apache-2.0
"""The doorbell loop, driven by a Python stand-in for the guest module on the real region."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from bridge.device import abi, streams
from bridge.device.abi import Answer, HeaderWord, Op, ResponseWord
from bridge.device.coverage_epoch import coverage_epoch_value
from bridge.device.doorbell import Doorbell
from bridge.device.ivshmem import IvshmemServer
from bridge.device.kcov import Device, Personality
from bridge.device.region import Area, Region
from bridge.device.streams import Stream
from bridge.errors import IncompleteError, SourceError
from bridge.sources.comparisons import ComparisonLedger, NoComparisons, syscall_comparison
from tests.support.doorbell import TASK, WORDS, Counting, FakeGuest


class Bench:
    def __init__(self, poll_seconds: float) -> None:
        self.region = Region(16 << 20)
        self.server = IvshmemServer(self.region)
        self.coverage = Counting()
        self.device = Device(self.region, self.coverage, Personality.LINUX)
        self.doorbell = Doorbell(
            self.region, self.device, self.server.bell, poll_seconds=poll_seconds
        )
        self.doorbell.start()
        self.guest = FakeGuest(self.region, self.server.bell)

    def area(self, slot: int, words: int = WORDS) -> list[int]:
        offset = self.guest.answer(slot, ResponseWord.AREA_OFFSET)
        data = os.pread(self.region.fd, words * 8, offset)
        count = int.from_bytes(data[:8], "little")
        return [int.from_bytes(data[i : i + 8], "little") for i in range(8, 8 + 8 * count, 8)]

    def close(self) -> None:
        self.doorbell.stop()
        self.server.close()
        self.region.close()


@pytest.fixture(params=[0.0, 0.002], ids=["asleep", "polling"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


def test_requests_from_open_to_release_are_answered(bench: Bench) -> None:
    guest = bench.guest
    guest.trace(3)
    for number in range(50):
        assert guest.call(3, Op.RETURN, arg0=number) == 0
    assert bench.area(3) == list(range(1, 51))
    assert guest.answer(3, ResponseWord.APPENDED) == 50
    assert guest.call(3, Op.DISABLE) == 0
    assert guest.call(3, Op.RETURN) == errno.EINVAL
    assert guest.call(3, Op.RELEASE) == 0
    assert bench.region.areas_in_use == 0
    assert bench.device.instances == 0


def test_requests_many_threads_at_once_lose_nothing(bench: Bench) -> None:
    rounds, threads = 500, 8
    for slot in range(threads):
        bench.guest.trace(slot, task=TASK + slot)
    failures: list[object] = []

    def work(slot: int) -> None:
        try:
            for _ in range(rounds):
                assert bench.guest.call(slot, Op.RETURN, task=TASK + slot) == 0
        except AssertionError as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(slot,)) for slot in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert bench.device.totals.returns == rounds * threads
    given = sorted(pc for slot in range(threads) for pc in bench.area(slot))
    assert given == list(range(1, rounds * threads + 1))[: len(given)]


def test_request_new_generation_ends_the_slots_last_instance(bench: Bench) -> None:
    bench.guest.trace(0, generation=1)
    assert bench.guest.call(0, Op.INIT, 2, arg0=WORDS) == 0
    assert bench.region.areas_in_use == 1
    assert bench.device.enabled == 0


def test_nonsense_is_an_errno(bench: Bench) -> None:
    guest = bench.guest
    assert guest.call(9, Op.RETURN) == errno.EINVAL
    assert guest.call(9, Op.EXIT) == errno.EINVAL
    for op in (0, 99, 2**32, 2**64 - 1):
        assert guest.call(9, op) == errno.EINVAL
    assert guest.call(9, Op.INIT, arg0=2**64 - 1) == errno.EINVAL
    assert guest.call(9, Op.MAP, arg0=2**64 - 1, arg1=2**63, arg2=2**64 - 1) == errno.EINVAL
    assert bench.doorbell.counters.refused == 6
    guest.trace(9, generation=4)


def test_kick_wrong_slot_or_count_is_still_answered(bench: Bench) -> None:
    guest = bench.guest
    guest.trace(5)
    for kick in (0, 2**64 - 1, 0xFFFF, 77 << 16 | 999):
        sequence = guest.post(5, Op.RETURN, 1)
        guest.control[HeaderWord.KICK] = kick
        os.eventfd_write(guest.bell, 1)
        assert guest.wait(5, sequence)
    sequence = guest.post(5, Op.RETURN, 1)
    os.eventfd_write(guest.bell, 1)
    assert guest.wait(5, sequence), "a bell without a kick makes the host look"


def test_coverage_epoch_with_relays_changes_by_itself(bench: Bench) -> None:
    control = bench.guest.control
    assert control[HeaderWord.COVERAGE_EPOCH] == 0
    control[HeaderWord.COVERAGE_EPOCH] = 7
    time.sleep(0.6)
    assert control[HeaderWord.COVERAGE_EPOCH] == 0, "every return is to be reported"
    bench.doorbell.rely_on_epoch()
    seen: set[int] = set()
    end = time.monotonic() + 10
    while len(seen) < 5 and time.monotonic() < end:
        seen.add(control[HeaderWord.COVERAGE_EPOCH])
        time.sleep(0.02)
    assert len(seen) == 5
    assert 0 not in seen


def test_returns_that_need_a_comparison_are_all_reported() -> None:
    with contextlib.ExitStack() as stack:
        region = Region(16 << 20)
        stack.callback(region.close)
        server = IvshmemServer(region)
        stack.callback(server.close)
        ledger = ComparisonLedger(NoComparisons())
        device = Device(
            region, Counting(), comparisons=ledger, syscall_comparison=syscall_comparison
        )
        doorbell = Doorbell(region, device, server.bell, silent=True)
        doorbell.start()
        stack.callback(doorbell.stop)
        doorbell.rely_on_epoch()
        guest = FakeGuest(region, server.bell)
        for slot, mode in ((1, abi.KCOV_TRACE_PC), (2, abi.KCOV_TRACE_CMP)):
            assert guest.call(slot, Op.INIT, arg0=WORDS) == 0
            assert guest.call(slot, Op.MAP, arg0=WORDS * 8) == 0
            assert guest.call(slot, Op.ENABLE, task=TASK + slot, arg0=mode) == 0
        assert guest.answer(1, ResponseWord.FLAGS) == Answer.SILENT
        assert guest.answer(2, ResponseWord.FLAGS) == 0
        for number in range(1, 4):
            # As the module does: an epoch that it reads before it asks is not there at the next.
            epoch = guest.control[HeaderWord.COVERAGE_EPOCH]
            assert guest.call(2, Op.RETURN, task=TASK + 2, arg0=39) == 0
            assert guest.control[HeaderWord.COVERAGE_EPOCH] not in (0, epoch)
            assert guest.answer(2, ResponseWord.APPENDED) == number
        doorbell.call(doorbell.look_at_guest)
        assert not doorbell.target_answered


def test_target_answered_is_what_relays_write_alone(bench: Bench) -> None:
    control, doorbell = bench.guest.control, bench.doorbell

    def answered() -> bool:
        doorbell.call(doorbell.look_at_guest)
        return doorbell.target_answered

    assert not answered()
    doorbell.rely_on_epoch()
    for _ in range(3):
        # The doorbell writes twice meanwhile.
        time.sleep(0.6)
        assert not answered()
        doorbell.call(doorbell.reset)
    control[HeaderWord.COVERAGE_EPOCH] = coverage_epoch_value()
    doorbell.call(doorbell.reset)
    time.sleep(0.6)
    assert answered()


def test_unreported_returns_count_with_next_request(bench: Bench) -> None:
    guest, totals = bench.guest, bench.device.totals
    guest.trace(2)
    assert guest.call(2, Op.RETURN, arg1=10) == 0
    assert totals.returns == 11
    assert guest.call(2, Op.DISABLE, arg0=1, arg1=5) == errno.EINVAL
    assert totals.returns == 11
    assert guest.call(2, Op.DISABLE, arg1=5) == 0
    assert totals.returns == 16
    assert guest.call(2, Op.ENABLE) == 0
    assert guest.call(2, Op.EXIT, task=TASK + 1, arg1=7) == 0
    assert totals.returns == 16, "the word of somebody who owns nothing"
    assert guest.call(2, Op.EXIT, arg1=2**64 - 1) == 0
    assert totals.returns == 16 + 2**32 - 1, "no more than a guest could have made"


def test_source_raises_is_counted_and_the_guest_continues(bench: Bench) -> None:
    bench.guest.trace(1)
    bench.coverage.broken = True
    assert bench.guest.call(1, Op.RETURN) == errno.EIO
    assert isinstance(bench.doorbell.failure, RuntimeError)
    bench.coverage.broken = False
    assert bench.guest.call(1, Op.RETURN) == 0
    assert bench.doorbell.counters.source_failures == 1


def test_asleep_it_uses_no_processor(bench: Bench) -> None:
    bench.guest.trace(0)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_kicks_at_any_moment_of_falling_asleep(bench: Bench) -> None:
    bench.guest.trace(0)
    pause = random.Random(1)
    for _ in range(2_000):
        assert bench.guest.call(0, Op.RETURN) == 0
        end = time.perf_counter() + pause.random() * 0.0005
        while time.perf_counter() < end:
            pass


def test_stopped_it_says_so(bench: Bench) -> None:
    bench.doorbell.stop()
    bench.doorbell.stop()
    assert bench.region.control[HeaderWord.HOST_EPOCH] == 0


def test_random_words_over_the_control_part_never_end_the_loop(bench: Bench) -> None:
    noise = random.Random(7)
    control = bench.guest.control
    words = abi.AREAS_OFFSET // 8
    for _ in range(20_000):
        value = noise.choice((noise.getrandbits(64), noise.randrange(12), 0, 2**64 - 1))
        control[noise.randrange(words)] = value
        if noise.random() < 0.1:
            os.eventfd_write(bench.server.bell, 1)
    slot = 17
    sequence = bench.guest.post(slot, Op.RELEASE, 0)
    os.eventfd_write(bench.server.bell, 1)
    assert bench.guest.wait(slot, sequence)
    bench.region.restore_header()
    bench.guest.trace(slot, generation=2**40)
    assert bench.guest.call(slot, Op.RETURN, 2**40) == 0
    assert len(bench.area(slot)) == 1


def test_reset_rewound_guest_is_served_anew(bench: Bench) -> None:
    first = bench.guest.sequence
    for slot in range(3):
        bench.guest.trace(slot, task=TASK + slot)
        assert bench.guest.call(slot, Op.RETURN, task=TASK + slot) == 0
    epoch = bench.guest.control[HeaderWord.HOST_EPOCH]
    bench.doorbell.call(bench.doorbell.reset)
    assert bench.guest.control[HeaderWord.HOST_EPOCH] not in (0, epoch)
    assert bench.device.instances == bench.device.enabled == bench.region.areas_in_use == 0
    assert not any(os.pread(bench.region.fd, 4 << 20, abi.REQUESTS_OFFSET))
    # It repeats itself, number by number.
    bench.guest.sequence = first
    bench.guest.trace(0)
    assert bench.guest.call(0, Op.RETURN) == 0
    assert bench.area(0) == [bench.coverage.next]
    time.sleep(0.6)
    assert bench.doorbell.counters.repaired == 0


def test_coverage_position_is_shown_again_after_repair_and_reset(bench: Bench) -> None:
    doorbell, control = bench.doorbell, bench.region.control
    doorbell.call(lambda: doorbell.set_coverage_position(41))
    assert control[HeaderWord.COVERAGE_POSITION] == 41
    control[HeaderWord.COVERAGE_POSITION] = 7
    deadline = time.monotonic() + 10
    while control[HeaderWord.COVERAGE_POSITION] != 41 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert control[HeaderWord.COVERAGE_POSITION] == 41
    doorbell.call(doorbell.reset)
    assert control[HeaderWord.COVERAGE_POSITION] == 41


@pytest.mark.parametrize("soonest_ns", [0, 10_000])
def test_answer_to_enable_says_how_soon_a_target_can_answer(soonest_ns: int) -> None:
    bench = Bench(0.0)
    try:
        bench.doorbell.stop()
        bench.doorbell = Doorbell(
            bench.region, bench.device, bench.server.bell, soonest_ns=soonest_ns
        )
        bench.doorbell.start()
        bench.guest.trace(0)
        assert bench.guest.answer(0, ResponseWord.SOONEST_NS) == soonest_ns
        # What is read as one is to miss nothing.
        stream = Stream(1 << 16)
        bench.doorbell.call(lambda: bench.device.open_stream(stream))
        joins = bench.guest.call(1, Op.STREAM, task=TASK + 1, arg0=stream.number, arg1=1)
        assert joins == 0
        assert bench.guest.answer(1, ResponseWord.SOONEST_NS) == 0
        bench.doorbell.call(lambda: bench.device.close_stream(stream))
    finally:
        bench.close()


def test_reset_keeps_what_the_guest_counted_before(bench: Bench) -> None:
    control, doorbell = bench.guest.control, bench.doorbell
    words = HeaderWord.GUEST_TIMEOUTS, HeaderWord.GUEST_SKIPPED, HeaderWord.GUEST_UNTRACED
    for word, count in zip(words, (5, 7, 11), strict=True):
        control[word] = count
    doorbell.call(doorbell.reset)
    doorbell.call(doorbell.look_at_guest)
    counts = doorbell.guest_timeouts, doorbell.guest_skipped, doorbell.guest_untraced
    assert counts == (5, 7, 11)
    # The rewound guest counts from 0 again.
    control[HeaderWord.GUEST_UNTRACED] = 2
    doorbell.call(doorbell.look_at_guest)
    assert doorbell.guest_untraced == 13


def test_look_at_guest_counts_what_comes_after_any_value(bench: Bench) -> None:
    control, doorbell = bench.guest.control, bench.doorbell
    sums = []
    for count in (4, 4, 2**63, 1, 3):
        control[HeaderWord.GUEST_UNTRACED] = count
        doorbell.call(doorbell.look_at_guest)
        sums.append(doorbell.guest_untraced)
    assert sums == [4, 4, 2**63, 2**63 + 1, 2**63 + 3]


class Hanging:
    """Stands for QEMU's plugin where it hangs while it writes, so that nothing can be detached."""

    def attach(self, slot: int, area: Area, task: int) -> None:
        pass

    def counts(self, slot: int) -> tuple[int, int]:
        return 0, 0

    def detach(self, slot: int) -> tuple[int, int]:
        raise SourceError("QEMU hangs while it writes coverage")


def hanging_bench(personality: Personality = Personality.LINUX) -> Bench:
    bench = Bench(0.0)
    bench.doorbell.stop()
    bench.device = Device(bench.region, bench.coverage, personality, watcher=Hanging())
    bench.doorbell = Doorbell(bench.region, bench.device, bench.server.bell)
    bench.doorbell.start()
    return bench


@pytest.mark.parametrize("op", [Op.DISABLE, Op.EXIT, Op.CLOSE, Op.RELEASE])
@pytest.mark.parametrize("personality", Personality)
def test_request_whose_source_raises_is_answered_and_so_are_all_others(
    op: Op, personality: Personality
) -> None:
    bench = hanging_bench(personality)
    try:
        guest = bench.guest
        guest.trace(3)
        owner_stays = op is Op.CLOSE and personality is Personality.LINUX
        assert guest.call(3, op) == (errno.EPERM if owner_stays else errno.EIO)
        assert bench.device.enabled == int(owner_stays)
        if op is not Op.RELEASE:
            assert guest.call(3, Op.RELEASE) == (errno.EIO if owner_stays else 0)
        assert bench.doorbell.counters.source_failures == 1
        assert isinstance(bench.doorbell.failure, SourceError)
        assert bench.device.instances == bench.region.areas_in_use == 0
        guest.trace(5)
        assert guest.call(5, Op.RETURN) == 0
        assert bench.doorbell.ended_by is None
    finally:
        bench.close()


def test_area_that_somebody_may_still_write_into_is_not_given_away() -> None:
    bench = hanging_bench()
    try:
        guest = bench.guest
        guest.trace(3)
        before, free = guest.answer(3, ResponseWord.AREA_OFFSET), bench.region.bytes_free
        assert guest.call(3, Op.RELEASE) == errno.EIO
        assert bench.region.bytes_free == free
        guest.trace(5, generation=2)
        assert guest.answer(5, ResponseWord.AREA_OFFSET) != before
    finally:
        bench.close()


def test_slot_new_generation_is_served_where_the_end_of_the_last_one_raises() -> None:
    bench = hanging_bench()
    try:
        bench.guest.trace(3)
        assert bench.guest.call(3, Op.INIT, generation=2, arg0=WORDS) == 0
        assert bench.doorbell.counters.source_failures == 1
        assert bench.device.instances == 1
    finally:
        bench.close()


def test_reset_with_a_source_that_raises_ends_all_instances() -> None:
    bench = hanging_bench()
    try:
        for slot in range(3):
            bench.guest.trace(slot, task=TASK + slot)
        bench.doorbell.call(bench.doorbell.reset)
        assert bench.doorbell.counters.source_failures == 3
        assert bench.device.instances == bench.device.enabled == 0
        bench.doorbell.call(bench.doorbell.reset)
        bench.guest.trace(1, generation=9)
    finally:
        bench.close()


def test_exit_without_a_thread_for_the_disk_is_answered_and_the_loss_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(1 << 16)
    bench.doorbell.call(lambda: bench.device.open_stream(stream))
    assert bench.guest.call(0, Op.STREAM, arg0=stream.number, arg1=1) == 0
    ((_, kcov),) = bench.doorbell.call(bench.doorbell.instances)
    assert kcov.area is not None
    taken = kcov.area.size - 1
    kcov.area._words[0] = taken
    monkeypatch.setattr(streams, "_IN_MEMORY_BYTES", 0)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "pc-log":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert bench.guest.call(0, Op.EXIT) == 0
    assert stream._log.lost == taken
    stream.finish()
    with pytest.raises(IncompleteError, match="can't start new thread"):
        stream.check()


def test_call_after_stop_writes_into_no_other_descriptor(bench: Bench) -> None:
    bench.doorbell.stop()
    # What is opened next gets the numbers that were closed.
    taken = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
    try:
        bench.doorbell._awaken()
        for descriptor in taken:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(descriptor)
    finally:
        for descriptor in taken:
            os.close(descriptor)
