# SPDX-License-Identifier: Apache-2.0
"""The device against a model of kcov's contract, in long random lives of several instances.

The model is naive on purpose and shares no code with the device: it knows the whole region as one
string of bytes, finds room page by page, and spells each rule out. After each step errno, offsets,
counters and every byte of the areas' part of the region must be the same.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bridge.device import abi
from bridge.device.kcov import Device, Kcov, Mode, Personality
from bridge.device.region import Region
from bridge.sources.ledger import Cursor, Ledger
from tests.support.examples import examples

REGION = 1 << 20
PAGE = 4096
PAGES = (REGION - abi.AREAS_OFFSET) // PAGE
ENOTSUPP = 524
TASKS = [0, 1, 0x1_0000_0010, 0x2_0000_0010, 2**64 - 1]
INSTANCES = 6


def syscall_pc(number: int) -> int | None:
    return 0xFFFFFFFFF0000008 + number * 16 if number < 400 else None


class Lines:
    """A source that covers what it is told to."""

    name = "lines"
    blocks_total = blocks_covered = 0

    def __init__(self) -> None:
        self.pending: dict[int, None] = {}

    def start(self) -> None:
        raise AssertionError("not the device's business")

    stop = start

    def consume(self) -> Sequence[int]:
        taken = list(self.pending)
        self.pending.clear()
        return taken


@dataclass
class Model:
    """One open descriptor, as its user knows it."""

    kcov: Kcov[Cursor]
    initialised: bool = False
    size: int = 0
    owner: int | None = None
    # Offset in the areas' part; None where there is no area.
    area: int | None = None
    dropped_areas: list[int] = field(default_factory=list)
    bitmap_words: int | None = None
    news: list[int] = field(default_factory=list)
    appended: int = 0
    dropped: int = 0


class Lives(RuleBasedStateMachine):
    """The device of ``personality`` and its model, step by step."""

    personality: Personality

    def __init__(self) -> None:
        super().__init__()
        self.gvisor = self.personality is Personality.GVISOR
        self.region = Region(REGION)
        self.source = Lines()
        self.device = Device(self.region, Ledger([self.source]), self.personality, syscall_pc)
        self.all: list[Model] = []
        self.memory = bytearray(PAGES * PAGE)
        self.taken = [False] * PAGES
        self.guard_numbers: dict[int, int] = {}

    def teardown(self) -> None:
        for model in self.all:
            assert self.device.release(model.kcov) == 0
        assert self.region.areas_in_use == 0
        assert self.region.bytes_free == PAGES * PAGE
        assert self.device.enabled == self.device.instances == 0
        assert os.pread(self.region.fd, PAGES * PAGE, abi.AREAS_OFFSET) == bytes(PAGES * PAGE)
        self.region.close()

    # What the model knows about memory

    def find_room(self, size: int) -> int | None:
        need = (size * 8 + PAGE - 1) // PAGE
        for first in range(PAGES - need + 1):
            if not any(self.taken[first : first + need]):
                return first * PAGE
        return None

    def set_taken(self, offset: int, size: int, taken: bool) -> None:
        need = (size * 8 + PAGE - 1) // PAGE
        for page in range(offset // PAGE, offset // PAGE + need):
            assert self.taken[page] is not taken
            self.taken[page] = taken
        if not taken:
            self.memory[offset : offset + need * PAGE] = bytes(need * PAGE)

    def word(self, model: Model, index: int) -> int:
        assert model.area is not None
        assert index < model.size
        (value,) = struct.unpack_from("<Q", self.memory, model.area + index * 8)
        assert isinstance(value, int)
        return value

    def set_word(self, model: Model, index: int, value: int) -> None:
        assert model.area is not None
        assert index < model.size
        struct.pack_into("<Q", self.memory, model.area + index * 8, value)

    def pick(self, index: int) -> Model:
        return self.all[index % len(self.all)]

    def traces_elsewhere(self, task: int) -> bool:
        return any(model.owner == task for model in self.all)

    def ends_tracing(self, model: Model, drops_area: bool) -> None:
        model.owner = model.bitmap_words = None
        model.news.clear()
        if drops_area and model.area is not None:
            model.dropped_areas.append(model.area)
            model.area = None

    # The rules

    index = st.integers(0, INSTANCES - 1)
    task = st.sampled_from(TASKS)

    @precondition(lambda self: len(self.all) < INSTANCES)
    @rule()
    def open(self) -> None:
        self.all.append(Model(self.device.open()))

    @precondition(lambda self: self.all)
    @rule(
        index=index,
        size=st.sampled_from([2, 3, 512, 512, 513, 1024, 1024, 4096, 20480, 102400])
        | st.sampled_from([0, 1, 2**28 - 1, 2**28, 10 * 1024 * 1024, 10 * 1024 * 1024 + 512])
        | st.integers(0, 2**64 - 1),
    )
    def init_trace(self, index: int, size: int) -> None:
        model = self.pick(index)
        if self.gvisor:
            expected = 0
            if model.initialised:
                expected = errno.EBUSY
            elif size < 2 or size % 512 or size > 10 * 1024 * 1024:
                expected = errno.EINVAL
        else:
            room = None
            if size < 2 or size > 0x7FFFFFFF // 8:
                expected = errno.EINVAL
            elif (room := self.find_room(size)) is None:
                expected = errno.ENOMEM
            elif model.initialised:
                expected = errno.EBUSY
            else:
                expected = 0
                model.area = room
                assert room is not None
                self.set_taken(room, size, True)
        if expected == 0:
            model.initialised = True
            model.size = size
        assert self.device.init_trace(model.kcov, size) == expected

    @precondition(lambda self: self.all)
    @rule(
        index=index,
        off=st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, 2**52]),
        more=st.sampled_from([0, 0, 0, 0, 0, 0, 8, -8, 4096]),
        live=st.integers(0, 2),
    )
    def map(self, index: int, off: int, more: int, live: int) -> None:
        model = self.pick(index)
        length = max(0, model.size * 8 + more)
        error, offset = 0, 0
        if (
            not model.initialised
            or (self.gvisor and model.owner is not None)
            or off != 0
            or length != model.size * 8
        ):
            error = errno.EINVAL
        elif model.area is None:
            if live == 0:
                for area in model.dropped_areas:
                    self.set_taken(area, model.size, False)
                model.dropped_areas.clear()
            model.area = self.find_room(model.size)
            if model.area is None:
                error = errno.ENOMEM
            else:
                self.set_taken(model.area, model.size, True)
        if error == 0:
            assert model.area is not None
            offset = abi.AREAS_OFFSET + model.area
        assert self.device.map(model.kcov, length, off, live) == (error, offset)

    @precondition(lambda self: len(self.all) < INSTANCES)
    @rule(size=st.sampled_from([2, 3, 4, 512, 512, 1024]))
    def open_and_map(self, size: int) -> None:
        """What takes three steps by chance, so that most lives get beyond them."""
        self.open()
        self.init_trace(len(self.all) - 1, size)
        self.map(len(self.all) - 1, 0, 0, 1)

    @precondition(lambda self: any(model.initialised and not model.owner for model in self.all))
    @rule(
        index=index,
        task=task,
        mode=st.sampled_from([0, 0, 1, 256, 257]),
        bitmap=st.sampled_from([None, None, 1, 2, 8]),
    )
    def an_idle_one_is_enabled(self, index: int, task: int, mode: int, bitmap: int | None) -> None:
        idle = [at for at, model in enumerate(self.all) if model.initialised and not model.owner]
        at = idle[index % len(idle)]
        self.map(at, 0, 0, 1)
        if bitmap is None:
            self.enable(at, task, mode)
        else:
            self.unique_enable(at, task, bitmap)

    @precondition(lambda self: any(model.owner is not None for model in self.all))
    @rule(index=index, how=st.sampled_from(["again", "disable", "exit", "close", "reset"]))
    def an_owner_acts(self, index: int, how: str) -> None:
        owned = [at for at, model in enumerate(self.all) if model.owner is not None]
        at = owned[index % len(owned)]
        task = self.all[at].owner
        assert task is not None
        if how == "again":
            self.disable(at, task, 0)
            self.map(at, 0, 0, 1)
            self.enable(at, task, 0)
            self.returns(self.all[at], task, 39)
        elif how == "disable":
            self.disable(at, task, 0)
        elif how == "exit":
            self.task_exit(at, task)
        elif how == "close":
            self.last_close(at, task)
        else:
            self.reset_trace(at, task, 0)

    @precondition(lambda self: self.all)
    @rule(index=index, task=task, mode=st.sampled_from([0, 0, 0, 0, 0, 1, 2, 255, 256, 257]))
    def enable(self, index: int, task: int, mode: int) -> None:
        model = self.pick(index)
        busy = self.traces_elsewhere(task)
        expected = 0
        if self.gvisor:
            if not model.initialised or model.owner is not None or model.area is None:
                expected = errno.EINVAL
            elif mode % 256 == 1:
                expected = errno.EOPNOTSUPP
            elif mode % 256 != 0:
                expected = errno.EINVAL
            elif busy:
                expected = errno.EBUSY
        elif not model.initialised or model.owner is not None:
            expected = errno.EINVAL
        elif busy:
            expected = errno.EBUSY
        elif mode == 1:
            expected = ENOTSUPP
        elif mode != 0:
            expected = errno.EINVAL
        if expected == 0:
            model.owner = task
        assert self.device.enable(model.kcov, task, mode) == expected

    @precondition(lambda self: self.all)
    @rule(
        index=index, task=task, bitmap=st.sampled_from([0, 1, 1, 2, 8, 511, 512, 1022, 1023, 2**63])
    )
    def unique_enable(self, index: int, task: int, bitmap: int) -> None:
        model = self.pick(index)
        if self.gvisor:
            expected = errno.ENOTTY
        elif not model.initialised or model.owner is not None:
            expected = errno.EINVAL
        elif self.traces_elsewhere(task):
            expected = errno.EBUSY
        elif bitmap == 0 or bitmap + 2 > model.size:
            # A count and a PC must be left.
            expected = errno.EINVAL
        else:
            expected = 0
            model.owner = task
            model.bitmap_words = bitmap
        assert self.device.unique_enable(model.kcov, task, bitmap) == expected

    @precondition(lambda self: self.all)
    @rule(index=index, task=task, argument=st.sampled_from([0, 0, 0, 1, 2**64 - 1]))
    def reset_trace(self, index: int, task: int, argument: int) -> None:
        model = self.pick(index)
        if self.gvisor:
            expected = errno.ENOTTY
        elif argument != 0 or model.owner is None or model.owner != task:
            expected = errno.EINVAL
        else:
            expected = 0
            for word in range((model.bitmap_words or 0) + 1):
                self.set_word(model, word, 0)
        assert self.device.reset_trace(model.kcov, task, argument) == expected

    @precondition(lambda self: self.all)
    @rule(index=index, task=task, argument=st.sampled_from([0, 0, 0, 1, 2**64 - 1]))
    def disable(self, index: int, task: int, argument: int) -> None:
        model = self.pick(index)
        expected = errno.EINVAL
        if argument == 0 and model.owner is not None and model.owner == task:
            expected = 0
            self.ends_tracing(model, drops_area=self.gvisor)
        assert self.device.disable(model.kcov, task, argument) == expected

    @precondition(lambda self: self.all)
    @rule(index=index, task=task)
    def task_exit(self, index: int, task: int) -> None:
        model = self.pick(index)
        if model.owner is not None and model.owner == task:
            self.ends_tracing(model, drops_area=False)
        assert self.device.task_exit(model.kcov, task) == 0

    @precondition(lambda self: self.all)
    @rule(index=index, task=task)
    def last_close(self, index: int, task: int) -> None:
        model = self.pick(index)
        if self.gvisor and model.owner is not None and model.owner == task:
            self.ends_tracing(model, drops_area=True)
        expected = 0 if self.gvisor else errno.EPERM
        assert self.device.last_close(model.kcov, task) == expected

    @precondition(lambda self: self.all)
    @rule(index=index)
    def release(self, index: int) -> None:
        model = self.pick(index)
        assert self.device.release(model.kcov) == 0
        for area in [model.area, *model.dropped_areas]:
            if area is not None:
                self.set_taken(area, model.size, False)
        self.all.remove(model)

    @rule(pcs=st.lists(st.integers(1, 40), max_size=30))
    def code_runs(self, pcs: list[int]) -> None:
        for pc in pcs:
            self.source.pending.pop(pc, None)
            self.source.pending[pc] = None
            for model in self.all:
                if model.owner is not None:
                    if pc in model.news:
                        model.news.remove(pc)
                    model.news.append(pc)

    @precondition(lambda self: self.all)
    @rule(index=index, task=task, number=st.sampled_from([0, 1, 39, 399, 400, 2**64 - 1]))
    def anybody_returns(self, index: int, task: int, number: int) -> None:
        self.returns(self.pick(index), task, number)

    @precondition(lambda self: any(model.owner is not None for model in self.all))
    @rule(index=index, number=st.sampled_from([0, 1, 39, 399, 400, 2**64 - 1]))
    def an_owner_returns(self, index: int, number: int) -> None:
        owners = [model for model in self.all if model.owner is not None]
        model = owners[index % len(owners)]
        assert model.owner is not None
        self.returns(model, model.owner, number)

    def returns(self, model: Model, task: int, number: int) -> None:
        if model.owner is None or model.owner != task:
            assert self.device.syscall_return(model.kcov, task, number) == errno.EINVAL
            return
        plain = syscall_pc(number)
        pcs = ([] if plain is None else [plain]) + model.news
        model.news.clear()
        head = 0
        if model.bitmap_words is not None:
            head = model.bitmap_words
            pcs = [pc for pc in pcs if self.is_new(model, pc)]
        for pc in pcs:
            count = self.word(model, head)
            if head + 1 + count < model.size:
                self.set_word(model, head + 1 + count, pc)
                self.set_word(model, head, count + 1)
                model.appended += 1
            else:
                model.dropped += 1
        assert self.device.syscall_return(model.kcov, task, number) == 0

    def is_new(self, model: Model, pc: int) -> bool:
        assert model.bitmap_words is not None
        number = self.guard_numbers.setdefault(pc, 2 * len(self.guard_numbers) + 2)
        if number >= model.bitmap_words * 64:
            return True
        word = self.word(model, number // 64)
        self.set_word(model, number // 64, word | 1 << number % 64)
        return not word >> number % 64 & 1

    @precondition(lambda self: any(model.area is not None for model in self.all))
    @rule(
        index=index,
        where=st.sampled_from([0, 0, 0, 0, 1, 8, 511, 512]),
        value=st.sampled_from([0, 0, 1, 507, 510, 511, 512, 1022, 2**63, 2**64 - 1]),
    )
    def the_user_writes(self, index: int, where: int, value: int) -> None:
        mapped = [model for model in self.all if model.area is not None]
        model = mapped[index % len(mapped)]
        where = min(where, model.size - 1)
        self.set_word(model, where, value)
        assert model.area is not None
        at = abi.AREAS_OFFSET + model.area + where * 8
        os.pwrite(self.region.fd, value.to_bytes(8, "little"), at)

    # What must hold after every step

    @invariant()
    def the_memory_is_the_same(self) -> None:
        found = os.pread(self.region.fd, PAGES * PAGE, abi.AREAS_OFFSET)
        assert found == self.memory

    @invariant()
    def the_counts_are_the_same(self) -> None:
        areas = [model.area for model in self.all if model.area is not None]
        dropped = [area for model in self.all for area in model.dropped_areas]
        assert self.region.areas_in_use == len(areas) + len(dropped)
        assert self.region.bytes_free == self.taken.count(False) * PAGE
        assert self.device.instances == len(self.all)
        assert self.device.enabled == sum(model.owner is not None for model in self.all)
        for model in self.all:
            kcov = model.kcov
            assert (kcov.appended, kcov.dropped) == (model.appended, model.dropped)
            assert kcov.owner == model.owner
            if not model.initialised:
                assert kcov.mode is Mode.DISABLED
            elif model.owner is None:
                assert kcov.mode is Mode.INIT
            else:
                unique = model.bitmap_words is not None
                assert kcov.mode is (Mode.UNIQUE_PC if unique else Mode.TRACE_PC)


@pytest.mark.parametrize("personality", list(Personality), ids=lambda which: which.value)
def test_any_life_is_as_the_contract_says(personality: Personality) -> None:
    machine = type("Lives", (Lives,), {"personality": personality})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples(60),
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
