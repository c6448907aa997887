# SPDX-License-Identifier: Apache-2.0
"""The doorbell loop while a guest scribbles over the region, and what the host may write then.

The guest here has a mapping of its own of the same memory and knows each word that it wrote. Each
other word that changed must be one that the host may write.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.device import abi
from bridge.device.abi import HeaderWord, HostState, Op, RequestWord, ResponseWord
from bridge.device.doorbell import Doorbell
from bridge.device.ivshmem import IvshmemServer
from bridge.device.kcov import Device, Kcov, Personality
from bridge.device.region import Area, Region
from tests.support.doorbell import WORDS, Counting, FakeGuest
from tests.support.examples import examples

REGION = 1 << 20
REQUESTS = abi.REQUESTS_OFFSET // 8
RESPONSES = abi.RESPONSES_OFFSET // 8
AREAS = abi.AREAS_OFFSET // 8
BORDERS = [0, 1, 2, 3, 511, 512, 513, 1024, 4096, 8192, 2**28 - 1, 2**28, 2**32, 2**63, 2**64 - 1]
HOST_WORDS = {
    *(word for word in HeaderWord if word <= HeaderWord.HOST_STATE),
    *range(RESPONSES, RESPONSES + abi.SLOTS * abi.SLOT_WORDS),
}


def pages(area: Area) -> range:
    """The words of an area and of what is left of its last page."""
    return range(area.offset // 8, (area.offset + area.bytes) // 8)


class Watched(Device[int]):
    """A device that notes which words it may have written since it was last asked."""

    def __init__(self, region: Region, personality: Personality) -> None:
        super().__init__(region, Counting(), personality)
        self.written: set[int] = set()
        self.zeroed: set[int] = set()
        self.joined = 0

    def _note(self, kcov: Kcov[int]) -> None:
        if kcov.area is not None:
            first = kcov.area.offset // 8
            self.written.update(range(first, first + kcov.area.size))

    def init_trace(self, kcov: Kcov[int], size: int) -> int:
        error = super().init_trace(kcov, size)
        if kcov.area is not None and not error:
            self.zeroed.update(pages(kcov.area))
        return error

    def map(
        self, kcov: Kcov[int], length: int, page_offset: int, live_mappings: int = 1
    ) -> tuple[int, int]:
        made = kcov.area is None
        answer = super().map(kcov, length, page_offset, live_mappings)
        if kcov.area is not None and made:
            self.zeroed.update(pages(kcov.area))
        return answer

    def enable(self, kcov: Kcov[int], task: int, mode: int, address: int = 0) -> int:
        error = super().enable(kcov, task, mode, address)
        if not error:
            self._note(kcov)
        return error

    def unique_enable(self, kcov: Kcov[int], task: int, bitmap_words: int, address: int = 0) -> int:
        error = super().unique_enable(kcov, task, bitmap_words, address)
        if not error:
            self._note(kcov)
        return error

    def join_lane(self, kcov: Kcov[int], argument: int) -> int:
        error = super().join_lane(kcov, argument)
        if not error:
            self.joined += 1
        return error

    def look(self) -> tuple[set[int], set[int]]:
        """What may have been written, and what given back, since the last look."""
        looked = self.written, self.zeroed
        self.written, self.zeroed = set(), set()
        for kcov in self._open:
            if kcov.owner is not None:
                self._note(kcov)
        return looked


class Storm:
    """A host and a guest that wants to do it harm."""

    def __init__(self, personality: Personality) -> None:
        self.region = Region(REGION)
        self.server = IvshmemServer(self.region)
        self.device = Watched(self.region, personality)
        lane = self.device.open_lane([512, 512, 1024])
        assert lane is not None
        self.lane = lane
        free = self.region.free

        def noted(area: Area) -> None:
            self.device.zeroed.update(pages(area))
            free(area)

        self.region.free = noted  # type: ignore[method-assign]
        self.doorbell = Doorbell(
            self.region, self.device, self.server.bell, poll_seconds=200e-6, epoch=77
        )
        self.memory = mmap.mmap(self.region.fd, REGION)
        self.view = memoryview(self.memory)
        self.words = self.view.cast("Q")
        self.mine: set[int] = set()
        self.doorbell.start()
        self.before, _, _ = self.look()

    def close(self) -> None:
        self.doorbell.stop()
        self.server.close()
        self.words.release()
        self.view.release()
        self.memory.close()
        self.region.close()

    def look(self) -> tuple[list[int], set[int], set[int]]:
        """The whole region, and what the device notes, at a moment when neither side writes."""

        def there() -> tuple[bytes, set[int], set[int]]:
            return os.pread(self.region.fd, REGION, 0), *self.device.look()

        data, written, zeroed = self.doorbell.call(there, timeout=60)
        return memoryview(data).cast("Q").tolist(), written, zeroed

    def put(self, word: int, value: int) -> None:
        self.mine.add(word)
        self.words[word] = value

    def put_byte(self, at: int, value: int) -> None:
        """Unaligned: half a word at a time is seen by the host, too."""
        self.mine.add(at // 8)
        self.view[at] = value

    def ring(self) -> None:
        os.eventfd_write(self.server.bell, 1)

    def request(self, slot: int, words: tuple[int, ...]) -> None:
        at = REQUESTS + slot * abi.SLOT_WORDS
        if words[0] == Op.LANE and words[3] < 16:
            # The guest knows the lane's number, and tries its indices and those beyond.
            argument = self.lane.number | words[3] << abi.LANE_INDEX_SHIFT
            words = (*words[:3], argument, *words[4:])
        for index, value in enumerate(words, 1):
            self.put(at + index, value)
        self.put(at, self.words[at] + 1 & 2**64 - 1)
        kick = self.words[HeaderWord.KICK]
        self.put(HeaderWord.KICK, ((kick >> 16) + 1 << 16 | slot) & 2**64 - 1)

    def check(self) -> None:
        """No word changed that was nobody's to write; the loop lives and nothing failed."""
        now, written, zeroed = self.look()
        for word, (new, old) in enumerate(zip(now, self.before, strict=True)):
            if new == old or word in self.mine or word in HOST_WORDS or word in written:
                continue
            assert word in zeroed, f"word {word:#x} became {new:#x}"
            assert new == 0, f"word {word:#x} became {new:#x}"
        self.before = now
        self.mine.clear()
        assert self.doorbell.failure is None

    def fresh(self) -> None:
        """An honest guest that names its instances, here none but one, is served."""
        for slot in range(abi.SLOTS):
            self.put(REQUESTS + slot * abi.SLOT_WORDS + RequestWord.GENERATION, 0)
        guest = FakeGuest(self.region, self.server.bell)
        slot, generation, task = 5, 2**62 + 1, 0x7777_0000_0001
        guest.trace(slot, generation, task)
        for _ in range(3):
            assert guest.call(slot, Op.RETURN, generation, task=task) == 0
        start = guest.answer(slot, ResponseWord.AREA_OFFSET) // 8
        assert self.words[start] == 3
        assert guest.call(slot, Op.DISABLE, generation, task=task) == 0
        assert guest.call(slot, Op.RELEASE, generation) == 0


@contextmanager
def storm(personality: Personality) -> Iterator[Storm]:
    one = Storm(personality)
    try:
        yield one
    finally:
        one.close()


values = st.one_of(st.sampled_from(BORDERS), st.integers(0, 16), st.integers(0, 2**64 - 1))
slots = st.integers(0, 3) | st.integers(0, abi.SLOTS - 1)
ids = st.integers(0, 3)
requests = st.tuples(
    st.sampled_from(list(Op)), ids, ids, st.sampled_from(BORDERS) | values, values, values
)
# What leads somewhere: sizes and lengths that fit together, no odd arguments.
plausible = st.builds(
    lambda op, generation, task, size: (
        op,
        generation,
        task,
        {Op.INIT: size, Op.MAP: size * 8, Op.UNIQUE: 3, Op.LANE: size // 512}.get(op, 0),
        0,
        0,
    ),
    st.sampled_from(list(Op)),
    ids,
    ids,
    st.sampled_from([512, 1024]),
)
actions = st.one_of(
    st.tuples(st.just("request"), slots, plausible),
    st.tuples(st.just("request"), slots, requests),
    st.tuples(st.just("word"), st.integers(0, REGION // 8 - 1), values),
    st.tuples(st.just("control"), st.integers(0, AREAS - 1), values),
    st.tuples(st.just("header"), st.sampled_from(list(HeaderWord)), values),
    st.tuples(st.just("count"), st.integers(0, 30), values),
    st.tuples(st.just("byte"), st.integers(0, REGION - 1), st.integers(0, 255)),
    st.tuples(st.just("ring"), st.just(0), st.just(0)),
)


@pytest.mark.parametrize("personality", list(Personality), ids=lambda which: which.value)
def test_region_random_writes_every_request_is_answered(personality: Personality) -> None:
    @settings(
        max_examples=examples(30),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(actions, max_size=80))
    def play(deeds: list[tuple[str, int, object]]) -> None:
        with storm(personality) as host:
            for kind, where, what in deeds:
                if isinstance(what, tuple):
                    host.request(where, what)
                elif isinstance(what, int):
                    if kind == "byte":
                        host.put_byte(where, what)
                    elif kind == "ring":
                        host.ring()
                    elif kind == "count":
                        host.put(AREAS + where * 512, what)
                    else:
                        host.put(where, what)
            host.ring()
            host.check()
            host.fresh()

    play()


def own_memory() -> int:
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"^RssAnon:\s+(\d+) kB", status, re.M)
    return int(kilobytes) << 10


@pytest.mark.parametrize("personality", list(Personality), ids=lambda which: which.value)
def test_region_long_storm_every_request_is_answered(
    personality: Personality, caplog: pytest.LogCaptureFixture
) -> None:
    noise = random.Random(11)
    with storm(personality) as host:
        host.check()
        held = own_memory()
        for _ in range(15):
            for _ in range(2_000):
                kind = noise.random()
                value = noise.choice((noise.getrandbits(64), noise.randrange(12), *BORDERS))
                if kind < 0.4:
                    op = noise.choice((*range(12), Op.LANE))
                    size = noise.choice((512, 1024, 4096))
                    argument = size if op == Op.INIT else size * 8 if op == Op.MAP else 0
                    argument = noise.randrange(4) if op == Op.LANE else argument
                    slot, generation = noise.randrange(6), noise.randrange(3)
                    task = noise.randrange(4)
                    host.request(slot, (op, generation, task, argument, 0, 0))
                elif kind < 0.7:
                    host.put(noise.randrange(AREAS), value)
                elif kind < 0.9:
                    host.put(noise.randrange(AREAS, REGION // 8), value)
                elif kind < 0.95:
                    host.put(AREAS + noise.randrange(30) * 512, value)
                else:
                    host.ring()
            host.check()
        host.fresh()
        # How many get served while more are written is up to the scheduler: some in each round.
        assert host.doorbell.counters.requests > 15
        assert host.device.joined > 0
        assert own_memory() - held < 32 << 20
        assert not caplog.records


def test_repair_after_scribbling_restores_host_words() -> None:
    with storm(Personality.LINUX) as host:
        guest = FakeGuest(host.region, host.server.bell)
        guest.trace(3)
        answer = RESPONSES + 3 * abi.SLOT_WORDS
        answered = host.words[answer]
        epoch = host.words[HeaderWord.HOST_EPOCH]
        for word in (*range(HeaderWord.HOST_EPOCH + 1), answer):
            host.words[word] = 0xBAD
        # Neither a kick nor a bell: the host looks by itself.
        assert guest.wait(3, answered)
        assert host.words[HeaderWord.MAGIC] == abi.MAGIC
        assert host.words[HeaderWord.REGION_BYTES] == REGION
        assert host.words[HeaderWord.HOST_EPOCH] == epoch


def test_request_without_bell_and_kick_is_found() -> None:
    with storm(Personality.LINUX) as host:
        guest = FakeGuest(host.region, host.server.bell)
        sequence = guest.post(9, Op.INIT, 1, arg0=WORDS)
        host.words[HeaderWord.HOST_STATE] = HostState.AWAKE
        assert guest.wait(9, sequence)


def test_guest_believes_the_host_gone_gets_a_new_epoch() -> None:
    with storm(Personality.LINUX) as host:
        guest = FakeGuest(host.region, host.server.bell)
        guest.trace(3)
        seen = host.words[HeaderWord.HOST_EPOCH]
        assert seen == 77
        host.words[HeaderWord.GUEST_TIMEOUTS] = 1
        # A guest may count before it looks, so there is more than one.
        for _ in range(3):
            end = time.monotonic() + 30
            while (now := host.words[HeaderWord.HOST_EPOCH]) == seen and time.monotonic() < end:
                time.sleep(0.01)
            assert now != seen
            seen = now
        assert seen % 2 == 1
        assert guest.call(3, Op.RETURN) == 0


def test_instances_that_no_slot_names_give_way() -> None:
    with storm(Personality.LINUX) as host:
        guest = FakeGuest(host.region, host.server.bell)
        room = host.region.bytes_free // 8
        assert guest.call(100, Op.INIT, 1, arg0=room) == 0
        assert guest.call(101, Op.INIT, 1, arg0=WORDS) == errno.ENOMEM
        # Overwritten, or named anew by a guest that knows of no instance there.
        host.words[REQUESTS + 100 * abi.SLOT_WORDS + RequestWord.GENERATION] = 0
        assert guest.call(101, Op.INIT, 1, arg0=WORDS) == 0
        assert host.doorbell.counters.reclaimed == 1
        assert guest.call(101, Op.ENABLE, 1) == 0
        guest.trace(102, 5, task=1)
        assert guest.call(102, Op.DISABLE, 5, task=1) == 0
        assert guest.call(102, Op.ENABLE, 5) == errno.EBUSY, "the task is another's owner"
        host.words[REQUESTS + 101 * abi.SLOT_WORDS + RequestWord.GENERATION] = 0
        assert guest.call(102, Op.ENABLE, 5) == 0
