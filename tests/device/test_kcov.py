# SPDX-License-Identifier: Apache-2.0
"""The device's state machine, row by row of the contract, in both personalities."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

import pytest

from bridge.device.abi import (
    ENOTSUPP,
    GVISOR_MAX_WORDS,
    KCOV_TRACE_CMP,
    KCOV_TRACE_PC,
    LINUX_MAX_WORDS,
    Comparison,
)
from bridge.device.kcov import Device, Kcov, Mode, Personality
from bridge.device.region import Area, Region
from bridge.sources.comparisons import ComparisonCursor, syscall_comparison
from bridge.sources.pcs import syscall_pc

WORDS = 512
"""One page: right for both personalities."""
ALICE, BOB = 0x1_0000_0064, 0x2_0000_0065


class ListCoverage:
    """A coverage that the test fills: each cursor sees what came after it."""

    def __init__(self) -> None:
        self.covered: list[int] = []
        self.cursors: list[list[int]] = []

    def open_cursor(self) -> list[int]:
        self.cursors.append([len(self.covered)])
        return self.cursors[-1]

    def collect(self, cursor: list[int], since: int = 0) -> Sequence[int]:
        news = self.covered[cursor[0] :]
        cursor[0] = len(self.covered)
        return news

    def close_cursor(self, cursor: list[int]) -> None:
        self.cursors.remove(cursor)


class Fixture:
    def __init__(self, personality: Personality, syscall_pcs: bool = False) -> None:
        self.region = Region(64 << 20)
        self.coverage = ListCoverage()
        self.device = Device(
            self.region,
            self.coverage,
            personality,
            (lambda nr: 0xF000 + nr if nr < 10 else None) if syscall_pcs else None,
        )

    def ready(self, words: int = WORDS) -> Kcov[list[int]]:
        """An instance that has been initialised and mapped."""
        kcov = self.device.open()
        assert self.device.init_trace(kcov, words) == 0
        assert self.device.map(kcov, words * 8, 0)[0] == 0
        return kcov

    def traced(self, task: int = ALICE) -> Kcov[list[int]]:
        kcov = self.ready()
        assert self.device.enable(kcov, task, KCOV_TRACE_PC) == 0
        return kcov

    def read(self, kcov: Kcov[list[int]]) -> list[int]:
        assert kcov.area is not None
        return kcov.area.read()

    def write_count(self, kcov: Kcov[list[int]], value: int) -> None:
        assert kcov.area is not None
        kcov.area._words[0] = value


def _fixture(personality: Personality) -> Iterator[Fixture]:
    fixture = Fixture(personality)
    yield fixture
    fixture.region.close()


@pytest.fixture
def linux() -> Iterator[Fixture]:
    yield from _fixture(Personality.LINUX)


@pytest.fixture
def gvisor() -> Iterator[Fixture]:
    yield from _fixture(Personality.GVISOR)


@pytest.fixture(params=list(Personality), ids=lambda p: p.value)
def both(request: pytest.FixtureRequest) -> Iterator[Fixture]:
    yield from _fixture(request.param)


class TestInit:
    @pytest.mark.parametrize("words", [0, 1, LINUX_MAX_WORDS + 1, 2**64 - 1])
    def test_linux_bounds(self, linux: Fixture, words: int) -> None:
        kcov = linux.device.open()
        assert linux.device.init_trace(kcov, words) == errno.EINVAL
        assert kcov.mode is Mode.DISABLED

    def test_linux_takes_any_size_within(self, linux: Fixture) -> None:
        for words in (2, 3, 511, 513, 100_001):
            assert linux.device.init_trace(linux.device.open(), words) == 0

    def test_linux_no_room(self, linux: Fixture) -> None:
        assert linux.device.init_trace(linux.device.open(), LINUX_MAX_WORDS) == errno.ENOMEM

    def test_linux_checks_size_then_room_then_use(self, linux: Fixture) -> None:
        kcov = linux.ready()
        assert linux.device.init_trace(kcov, 0) == errno.EINVAL
        assert linux.device.init_trace(kcov, LINUX_MAX_WORDS) == errno.ENOMEM
        assert linux.device.init_trace(kcov, WORDS) == errno.EBUSY

    @pytest.mark.parametrize("words", [0, 1, 511, 513, GVISOR_MAX_WORDS + 512])
    def test_gvisor_bounds(self, gvisor: Fixture, words: int) -> None:
        assert gvisor.device.init_trace(gvisor.device.open(), words) == errno.EINVAL

    def test_gvisor_checks_use_first(self, gvisor: Fixture) -> None:
        kcov = gvisor.ready()
        assert gvisor.device.init_trace(kcov, 0) == errno.EBUSY

    def test_gvisor_makes_the_area_at_the_first_mmap(self, gvisor: Fixture) -> None:
        kcov = gvisor.device.open()
        assert gvisor.device.init_trace(kcov, GVISOR_MAX_WORDS) == 0
        assert gvisor.region.areas_in_use == 0
        assert gvisor.device.map(kcov, GVISOR_MAX_WORDS * 8, 0)[0] == errno.ENOMEM

    def test_not_again_after_disable(self, both: Fixture) -> None:
        kcov = both.traced()
        assert both.device.disable(kcov, ALICE, 0) == 0
        assert both.device.init_trace(kcov, WORDS) == errno.EBUSY


class TestMap:
    def test_not_before_init(self, both: Fixture) -> None:
        assert both.device.map(both.device.open(), 4096, 0)[0] == errno.EINVAL

    @pytest.mark.parametrize(("length", "offset"), [(0, 0), (8192, 0), (4095, 0), (4096, 1)])
    def test_map_other_length_or_offset_is_invalid(
        self, both: Fixture, length: int, offset: int
    ) -> None:
        kcov = both.device.open()
        assert both.device.init_trace(kcov, WORDS) == 0
        assert both.device.map(kcov, length, offset)[0] == errno.EINVAL

    def test_map_odd_size_is_invalid(self, linux: Fixture) -> None:
        kcov = linux.device.open()
        assert linux.device.init_trace(kcov, 513) == 0
        assert linux.device.map(kcov, 8192, 0)[0] == errno.EINVAL

    def test_again_gives_the_same_area(self, both: Fixture) -> None:
        kcov = both.ready()
        assert both.device.map(kcov, 4096, 0) == both.device.map(kcov, 4096, 0)

    def test_while_enabled(self, linux: Fixture, gvisor: Fixture) -> None:
        assert linux.device.map(linux.traced(), 4096, 0)[0] == 0
        assert gvisor.device.map(gvisor.traced(), 4096, 0)[0] == errno.EINVAL


class TestEnable:
    def test_not_before_init(self, both: Fixture) -> None:
        assert both.device.enable(both.device.open(), ALICE, 0) == errno.EINVAL

    def test_gvisor_not_before_mmap(self, linux: Fixture, gvisor: Fixture) -> None:
        for fixture, expected in ((linux, 0), (gvisor, errno.EINVAL)):
            kcov = fixture.device.open()
            assert fixture.device.init_trace(kcov, WORDS) == 0
            assert fixture.device.enable(kcov, ALICE, 0) == expected

    def test_enable_enabled_instance_is_invalid(self, both: Fixture) -> None:
        kcov = both.traced()
        for task in (ALICE, BOB):
            assert both.device.enable(kcov, task, 0) == errno.EINVAL

    def test_enable_second_instance_of_a_task_is_busy(self, both: Fixture) -> None:
        both.traced(ALICE)
        other = both.ready()
        assert both.device.enable(other, ALICE, 0) == errno.EBUSY
        assert both.device.enable(other, BOB, 0) == 0

    def test_modes(self, linux: Fixture, gvisor: Fixture) -> None:
        assert linux.device.enable(linux.ready(), ALICE, KCOV_TRACE_CMP) == ENOTSUPP
        assert gvisor.device.enable(gvisor.ready(), ALICE, KCOV_TRACE_CMP) == errno.EOPNOTSUPP
        for fixture in (linux, gvisor):
            assert fixture.device.enable(fixture.ready(), ALICE, 2) == errno.EINVAL

    def test_gvisor_reads_one_byte_of_the_mode(self, linux: Fixture, gvisor: Fixture) -> None:
        assert linux.device.enable(linux.ready(), ALICE, 0x100) == errno.EINVAL
        assert gvisor.device.enable(gvisor.ready(), ALICE, 0x100) == 0

    def test_which_check_comes_first(self, linux: Fixture, gvisor: Fixture) -> None:
        for fixture, expected in ((linux, errno.EBUSY), (gvisor, errno.EINVAL)):
            fixture.traced(ALICE)
            assert fixture.device.enable(fixture.ready(), ALICE, 7) == expected

    def test_earlier_coverage_is_dropped_and_word_0_left_alone(self, both: Fixture) -> None:
        kcov = both.ready()
        both.write_count(kcov, 3)
        both.coverage.covered += [1, 2]
        assert both.device.enable(kcov, ALICE, 0) == 0
        both.coverage.covered.append(9)
        assert both.device.syscall_return(kcov, ALICE, 0) == 0
        assert both.read(kcov) == [0, 0, 0, 9]


class TestDisable:
    def test_disable_other_task_or_argument_is_invalid(self, both: Fixture) -> None:
        kcov = both.traced()
        assert both.device.disable(kcov, BOB, 0) == errno.EINVAL
        assert both.device.disable(kcov, ALICE, 1) == errno.EINVAL
        assert both.device.disable(kcov, ALICE, 0) == 0
        assert kcov.mode is Mode.INIT
        assert both.device.disable(kcov, ALICE, 0) == errno.EINVAL

    def test_linux_keeps_the_area(self, linux: Fixture) -> None:
        kcov = linux.traced()
        area = kcov.area
        assert linux.device.disable(kcov, ALICE, 0) == 0
        assert kcov.area is area
        assert linux.device.enable(kcov, BOB, 0) == 0

    def test_gvisor_drops_the_area(self, gvisor: Fixture) -> None:
        kcov = gvisor.traced()
        first = gvisor.device.map(kcov, 4096, 0)
        assert first[0] == errno.EINVAL
        assert gvisor.device.disable(kcov, ALICE, 0) == 0
        assert gvisor.device.enable(kcov, ALICE, 0) == errno.EINVAL
        assert gvisor.device.map(kcov, 4096, 0)[0] == 0
        assert gvisor.device.enable(kcov, ALICE, 0) == 0

    def test_gvisor_gives_dropped_areas_back_once_unmapped(self, gvisor: Fixture) -> None:
        kcov = gvisor.device.open()
        assert gvisor.device.init_trace(kcov, WORDS) == 0
        for mappings in (0, 1, 2, 0, 1):
            assert gvisor.device.map(kcov, 4096, 0, mappings)[0] == 0
            assert gvisor.region.areas_in_use == mappings + 1
            assert gvisor.device.enable(kcov, ALICE, 0) == 0
            assert gvisor.device.disable(kcov, ALICE, 0) == 0
        gvisor.device.release(kcov)
        assert gvisor.region.areas_in_use == 0


class TestReturn:
    def test_appends_after_what_is_there(self, both: Fixture) -> None:
        kcov = both.traced()
        both.coverage.covered += [10, 20]
        assert both.device.syscall_return(kcov, ALICE, 0) == 0
        both.coverage.covered += [20, 30]
        assert both.device.syscall_return(kcov, ALICE, 0) == 0
        assert both.device.syscall_return(kcov, ALICE, 0) == 0
        assert both.read(kcov) == [10, 20, 20, 30]
        assert both.device.totals.returns == 3
        assert both.device.totals.appended == kcov.appended == 4
        assert both.device.unique == {10, 20, 30}

    def test_disable_remote_instance_counts_no_returns(self, linux: Fixture) -> None:
        kcov = linux.traced()
        assert linux.device.disable(kcov, ALICE, 0, 3) == 0
        assert linux.device.totals.returns == 3
        assert linux.device.remote_enable(kcov, ALICE, 0, [], 9) == 0
        assert linux.device.disable(kcov, ALICE, 0, 3) == 0
        assert linux.device.totals.returns == 3

    def test_append_word_0_is_cleared_starts_again(self, both: Fixture) -> None:
        kcov = both.traced()
        both.coverage.covered += [1, 2, 3]
        both.device.syscall_return(kcov, ALICE, 0)
        both.write_count(kcov, 0)
        both.coverage.covered += [4]
        both.device.syscall_return(kcov, ALICE, 0)
        assert both.read(kcov) == [4]

    def test_append_full_area_counts_the_rest(self, both: Fixture) -> None:
        kcov = both.traced()
        both.coverage.covered += range(1, WORDS + 100)
        both.device.syscall_return(kcov, ALICE, 0)
        assert both.read(kcov) == list(range(1, WORDS))
        assert kcov.dropped == both.device.totals.dropped == 100
        assert WORDS not in both.device.unique

    @pytest.mark.parametrize("count", [WORDS - 1, WORDS, 2**31, 2**61 - 1, 2**63, 2**64 - 1])
    def test_append_count_outside_writes_nothing(self, both: Fixture, count: int) -> None:
        kcov = both.traced()
        both.write_count(kcov, count)
        both.coverage.covered += [5, 6]
        assert both.device.syscall_return(kcov, ALICE, 0) == 0
        assert kcov.area is not None
        assert kcov.area.count == count
        assert kcov.dropped == 2

    def test_others_are_refused(self, both: Fixture) -> None:
        kcov = both.traced()
        both.coverage.covered.append(1)
        assert both.device.syscall_return(kcov, BOB, 0) == errno.EINVAL
        assert both.device.syscall_return(both.ready(), ALICE, 0) == errno.EINVAL
        assert both.read(kcov) == []

    def test_return_each_instance_gets_everything(self, both: Fixture) -> None:
        first, second = both.traced(ALICE), both.traced(BOB)
        both.coverage.covered += [1, 2]
        both.device.syscall_return(first, ALICE, 0)
        both.coverage.covered += [3]
        both.device.syscall_return(second, BOB, 0)
        assert both.read(first) == [1, 2]
        assert both.read(second) == [1, 2, 3]

    def test_syscall_pcs_come_first(self) -> None:
        fixture = Fixture(Personality.LINUX, syscall_pcs=True)
        kcov = fixture.traced()
        fixture.coverage.covered += [1]
        fixture.device.syscall_return(kcov, ALICE, 3)
        fixture.device.syscall_return(kcov, ALICE, 9)
        fixture.device.syscall_return(kcov, ALICE, 2**64 - 1)
        assert fixture.read(kcov) == [0xF003, 1, 0xF009]
        fixture.region.close()


class TestUniqueAndReset:
    """As the patches proposed for Linux do it."""

    def unique(self, fixture: Fixture, bitmap: int = 8) -> Kcov[list[int]]:
        kcov = fixture.ready()
        assert fixture.device.unique_enable(kcov, ALICE, bitmap) == 0
        return kcov

    def give(self, fixture: Fixture, kcov: Kcov[list[int]], *pcs: int) -> list[int]:
        fixture.coverage.covered += pcs
        assert fixture.device.syscall_return(kcov, ALICE, 0) == 0
        return fixture.read(kcov)

    def test_gvisor_has_neither(self, gvisor: Fixture) -> None:
        kcov = gvisor.ready()
        assert gvisor.device.unique_enable(kcov, ALICE, 8) == errno.ENOTTY
        assert gvisor.device.reset_trace(kcov, ALICE, 0) == errno.ENOTTY

    def test_checks_of_unique(self, linux: Fixture) -> None:
        device = linux.device
        assert device.unique_enable(device.open(), ALICE, 8) == errno.EINVAL
        kcov = linux.ready()
        for bitmap in (0, WORDS - 1, WORDS, 2**64 - 1):
            assert device.unique_enable(kcov, ALICE, bitmap) == errno.EINVAL
        assert device.unique_enable(kcov, ALICE, WORDS - 2) == 0
        assert device.unique_enable(kcov, BOB, 8) == errno.EINVAL
        assert device.unique_enable(linux.ready(), ALICE, 0) == errno.EBUSY

    def test_unique_each_pc_once_until_reset(self, linux: Fixture) -> None:
        kcov = self.unique(linux)
        assert self.give(linux, kcov, 10, 20) == [10, 20]
        assert self.give(linux, kcov, 20, 30) == [10, 20, 30]
        assert linux.device.reset_trace(kcov, ALICE, 0) == 0
        assert linux.read(kcov) == []
        assert self.give(linux, kcov, 20) == [20]

    def test_unique_user_clears_the_bitmap_pcs_are_new(self, linux: Fixture) -> None:
        kcov = self.unique(linux, bitmap=4)
        self.give(linux, kcov, 10, 20, 30)
        assert kcov.area is not None
        words = kcov.area._words
        assert words[0] == 0b1010100, "even numbers from 2 on"
        assert words[4:8].tolist() == [3, 10, 20, 30]
        words[0] = 0
        words[4] = 0
        assert self.give(linux, kcov, 10) == [10]

    def test_pcs_behind_the_bitmap_are_given_each_time(self, linux: Fixture) -> None:
        kcov = self.unique(linux, bitmap=1)
        many = range(100, 200)
        assert len(self.give(linux, kcov, *many)) == 100
        # 31 have a bit, the others none.
        assert len(self.give(linux, kcov, *many)) == 100 + 69

    def test_unique_full_area_counts_the_rest(self, linux: Fixture) -> None:
        kcov = self.unique(linux, bitmap=WORDS - 3)
        assert self.give(linux, kcov, 1, 2, 3, 4) == [1, 2]
        assert kcov.dropped == 2

    def test_disable_makes_it_a_plain_area_again(self, linux: Fixture) -> None:
        kcov = self.unique(linux)
        self.give(linux, kcov, 10)
        assert linux.device.disable(kcov, ALICE, 0) == 0
        assert linux.device.enable(kcov, ALICE, KCOV_TRACE_PC) == 0
        linux.write_count(kcov, 0)
        assert self.give(linux, kcov, 10) == [10]
        assert self.give(linux, kcov, 10) == [10, 10]

    def test_reset_is_the_owners(self, linux: Fixture) -> None:
        kcov = linux.traced()
        self.give(linux, kcov, 1, 2)
        assert linux.device.reset_trace(kcov, BOB, 0) == errno.EINVAL
        assert linux.device.reset_trace(kcov, ALICE, 1) == errno.EINVAL
        assert linux.read(kcov) == [1, 2]
        assert linux.device.reset_trace(kcov, ALICE, 0) == 0
        assert linux.read(kcov) == []
        assert linux.device.reset_trace(linux.ready(), ALICE, 0) == errno.EINVAL


USB = 1 << 56


class TestRemote:
    """KCOV_REMOTE_ENABLE: the order of checks is kcov_ioctl's and kcov_ioctl_locked's."""

    def test_gvisor_has_none(self, gvisor: Fixture) -> None:
        assert gvisor.device.remote_enable(gvisor.ready(), ALICE, 0, None) == errno.ENOTTY

    def test_checks_in_order(self, linux: Fixture) -> None:
        device = linux.device
        fresh = device.open()
        assert device.remote_enable(fresh, ALICE, 0, None) == errno.EFAULT
        assert device.remote_enable(fresh, ALICE, 0, [USB] * 257) == errno.EINVAL
        assert device.remote_enable(fresh, ALICE, 0, [USB]) == errno.EINVAL
        linux.traced(ALICE)
        assert device.remote_enable(linux.ready(), ALICE, 7, [5]) == errno.EBUSY
        assert device.remote_enable(linux.ready(), BOB, KCOV_TRACE_CMP, [5]) == ENOTSUPP
        assert device.remote_enable(linux.ready(), BOB, 7, [5]) == errno.EINVAL

    @pytest.mark.parametrize("handle", [0, 5, 2 << 56, USB | 1 << 32, 2**64 - 1])
    def test_bad_handles(self, linux: Fixture, handle: int) -> None:
        kcov = linux.ready()
        assert linux.device.remote_enable(kcov, ALICE, 0, [USB | 7, handle]) == errno.EINVAL
        assert kcov.owner is None
        assert linux.device.remote_enable(kcov, ALICE, 0, [USB | 7]) == 0, "nothing was taken"

    @pytest.mark.parametrize("common", [1 << 32, USB | 1, 2**64 - 1])
    def test_bad_common_handles(self, linux: Fixture, common: int) -> None:
        kcov = linux.ready()
        assert linux.device.remote_enable(kcov, ALICE, 0, [], common) == errno.EINVAL
        assert linux.device.remote_enable(kcov, ALICE, 0, [], 1) == 0

    def test_remote_taken_handle_exists(self, linux: Fixture) -> None:
        device = linux.device
        first = linux.ready()
        assert device.remote_enable(first, ALICE, 0, [USB | 1, USB | 2], 9) == 0
        for handles, common in (([USB | 2], 0), ([USB | 3, USB | 3], 0), ([USB | 4], 9)):
            assert device.remote_enable(linux.ready(), BOB, 0, handles, common) == errno.EEXIST
        assert device.disable(first, ALICE, 0) == 0
        assert device.remote_enable(linux.ready(), BOB, 0, [USB | 2], 9) == 0

    def test_remote_gets_only_its_handles_coverage(self, linux: Fixture) -> None:
        device = linux.device
        remote, plain = linux.ready(), linux.traced(BOB)
        assert device.remote_enable(remote, ALICE, 0, [USB | 1], 9) == 0
        linux.coverage.covered += [1, 2]
        assert device.syscall_return(remote, ALICE, 0) == errno.EINVAL
        assert device.remote_coverage(USB | 1, [10, 20])
        assert device.remote_coverage(9, [30])
        assert not device.remote_coverage(USB | 5, [40])
        assert device.syscall_return(plain, BOB, 0) == 0
        assert linux.read(remote) == [10, 20, 30]
        assert linux.read(plain) == [1, 2]

    @pytest.mark.parametrize("end", ["disable", "exit", "release"])
    def test_handles_end_with_their_owner(self, linux: Fixture, end: str) -> None:
        device = linux.device
        kcov = linux.ready()
        assert device.remote_enable(kcov, ALICE, 0, [USB | 1], 9) == 0
        if end == "disable":
            assert device.disable(kcov, ALICE, 0) == 0
        elif end == "exit":
            assert device.task_exit(kcov, ALICE) == 0
        else:
            assert device.release(kcov) == 0
        assert not device.remote_coverage(USB | 1, [10])
        assert device.remote_enable(linux.ready(), ALICE, 0, [USB | 1], 9) == 0


class TestEnds:
    def test_exit_frees_the_instance_for_others(self, both: Fixture) -> None:
        kcov = both.traced()
        assert both.device.task_exit(kcov, BOB) == 0
        assert kcov.owner == ALICE
        assert both.device.task_exit(kcov, ALICE) == 0
        assert kcov.mode is Mode.INIT
        assert both.device.enabled == 0
        assert both.device.enable(kcov, BOB, 0) == 0

    def test_exit_keeps_area_and_contents(self, both: Fixture) -> None:
        kcov = both.traced()
        both.coverage.covered += [1, 2]
        assert both.device.syscall_return(kcov, ALICE, 0) == 0
        before = kcov.area
        assert both.device.task_exit(kcov, ALICE) == 0
        assert kcov.area is before
        assert both.read(kcov) == [1, 2]
        error, offset = both.device.map(kcov, 4096, 0)
        assert error == 0
        assert kcov.area is before
        assert kcov.area is not None
        assert offset == kcov.area.offset

    def test_last_close_ends_the_instance_only_in_gvisor(self, both: Fixture) -> None:
        kcov = both.traced()
        if both.device.personality is Personality.LINUX:
            assert both.device.last_close(kcov, ALICE) == errno.EPERM
            assert kcov.owner == ALICE
        else:
            assert both.device.last_close(kcov, BOB) == 0
            assert kcov.owner == ALICE
            assert both.device.last_close(kcov, ALICE) == 0
            assert kcov.owner is None
            assert kcov.area is None
            assert both.device.enabled == 0

    def test_release_while_enabled(self, both: Fixture) -> None:
        kcov = both.traced()
        assert both.device.release(kcov) == 0
        assert both.region.areas_in_use == 0
        assert both.device.instances == 0
        assert both.coverage.cursors == []
        assert both.device.enable(both.ready(), ALICE, 0) == 0

    def test_ten_thousand_rounds_leave_nothing(self, both: Fixture) -> None:
        free = both.region.bytes_free
        for _ in range(10_000):
            both.device.release(both.ready())
        assert both.region.bytes_free == free
        assert both.device.instances == 0


class ListComparisons:
    """Comparisons that the test makes; a cursor is a place in the list of all."""

    def __init__(self) -> None:
        self.made: list[Comparison] = []
        self.dropped = 0
        self.open: dict[ComparisonCursor, int] = {}

    def make(self, *operands: int) -> None:
        self.made += [(6, operand, operand + 1, 0xFF) for operand in operands]

    def open_cursor(self) -> ComparisonCursor:
        cursor = ComparisonCursor(0, 0)
        self.open[cursor] = len(self.made)
        return cursor

    def collect(self, cursor: ComparisonCursor) -> tuple[Sequence[Comparison], int]:
        news = self.made[self.open[cursor] :]
        self.open[cursor] = len(self.made)
        return news, self.dropped

    def close_cursor(self, cursor: ComparisonCursor) -> None:
        del self.open[cursor]


class ListWatcher:
    """Who would write the guest kernel's PCs."""

    def __init__(self) -> None:
        self.attached: list[int] = []

    def attach(self, slot: int, area: Area, task: int) -> None:
        self.attached.append(slot)

    def counts(self, slot: int) -> tuple[int, int]:
        assert slot in self.attached
        return 0, 0

    def detach(self, slot: int) -> tuple[int, int]:
        self.attached.remove(slot)
        return 0, 0


class TestComparisons:
    """KCOV_TRACE_CMP: as write_comp_data in Linux' kernel/kcov.c."""

    @pytest.fixture
    def fixture(self) -> Iterator[Fixture]:
        fixture = Fixture(Personality.LINUX, syscall_pcs=True)
        self.comparisons = ListComparisons()
        self.watcher = ListWatcher()
        fixture.device._comparisons = self.comparisons
        fixture.device._watcher = self.watcher
        yield fixture
        fixture.region.close()

    def comparing(self, fixture: Fixture, task: int = ALICE, words: int = WORDS) -> Kcov[list[int]]:
        kcov = fixture.ready(words)
        assert fixture.device.enable(kcov, task, KCOV_TRACE_CMP) == 0
        assert kcov.mode is Mode.TRACE_CMP
        return kcov

    def words(self, kcov: Kcov[list[int]]) -> list[int]:
        assert kcov.area is not None
        return kcov.area._words.tolist()

    def test_records_and_nothing_else(self, fixture: Fixture) -> None:
        self.comparisons.make(1)
        kcov = self.comparing(fixture)
        plain = fixture.traced(BOB)
        assert self.watcher.attached == [plain.slot]
        self.comparisons.make(5, 5)
        fixture.coverage.covered.append(10)
        assert fixture.device.syscall_return(kcov, ALICE, 1) == 0
        assert fixture.device.syscall_return(plain, BOB, 1) == 0
        self.comparisons.make(7)
        assert fixture.device.syscall_return(kcov, ALICE, 1) == 0
        record = [6, 5, 6, 0xFF]
        assert self.words(kcov)[:14] == [3, *record, *record, 6, 7, 8, 0xFF, 0]
        assert fixture.read(plain) == [0xF001, 10]
        assert (kcov.appended, kcov.dropped) == (3, 0)
        totals = fixture.device.totals
        assert (totals.returns, totals.appended, totals.comparisons) == (3, 2, 3)
        assert fixture.device.unique == {0xF001, 10}

    def test_comparisons_enable_follows_the_rules(self, fixture: Fixture) -> None:
        kcov = self.comparing(fixture)
        device = fixture.device
        assert device.enable(kcov, BOB, KCOV_TRACE_CMP) == errno.EINVAL
        assert device.enable(fixture.ready(), ALICE, KCOV_TRACE_CMP) == errno.EBUSY
        assert device.enable(fixture.ready(), ALICE, KCOV_TRACE_PC) == errno.EBUSY
        assert device.enable(device.open(), BOB, KCOV_TRACE_CMP) == errno.EINVAL
        assert device.enable(fixture.ready(), BOB, KCOV_TRACE_CMP | 1 << 32) == errno.EINVAL
        assert device.syscall_return(kcov, BOB, 1) == errno.EINVAL
        assert device.remote_enable(fixture.ready(), BOB, KCOV_TRACE_CMP, []) == ENOTSUPP

    def test_comparisons_and_pcs_in_turn_work(self, fixture: Fixture) -> None:
        kcov = self.comparing(fixture)
        device = fixture.device
        self.comparisons.make(1)
        assert device.syscall_return(kcov, ALICE, 1) == 0
        assert device.disable(kcov, ALICE, 0) == 0
        assert self.comparisons.open == {}
        assert self.words(kcov)[:5] == [1, 6, 1, 2, 0xFF], "the area stays"
        assert device.syscall_return(kcov, ALICE, 1) == errno.EINVAL
        fixture.write_count(kcov, 0)
        assert device.enable(kcov, BOB, KCOV_TRACE_PC) == 0
        fixture.coverage.covered.append(10)
        assert device.syscall_return(kcov, BOB, 99) == 0
        assert fixture.read(kcov) == [10]
        assert device.task_exit(kcov, BOB) == 0
        assert device.enable(kcov, ALICE, KCOV_TRACE_CMP) == 0
        assert device.release(kcov) == 0
        assert self.comparisons.open == {}
        assert fixture.region.areas_in_use == 0

    def test_reset(self, fixture: Fixture) -> None:
        kcov = self.comparing(fixture)
        self.comparisons.make(1, 2)
        assert fixture.device.syscall_return(kcov, ALICE, 1) == 0
        assert fixture.device.reset_trace(kcov, ALICE, 0) == 0
        self.comparisons.make(3)
        assert fixture.device.syscall_return(kcov, ALICE, 1) == 0
        assert self.words(kcov)[:5] == [1, 6, 3, 4, 0xFF]

    def test_comparison_of_the_call_comes_first(self, fixture: Fixture) -> None:
        device = fixture.device
        device._syscall_comparison = syscall_comparison
        kcov = self.comparing(fixture)
        assert device.needs_each_return(kcov)
        assert not device.needs_each_return(fixture.traced(BOB))
        assert device.syscall_return(kcov, ALICE, 39) == 0
        self.comparisons.make(5)
        assert device.syscall_return(kcov, ALICE, 0) == 0
        assert device.syscall_return(kcov, ALICE, 4096) == 0
        count, *words = self.words(kcov)
        assert count == 3
        (kind, constant, other, pc), second, third = (tuple(words[n : n + 4]) for n in (0, 4, 8))
        assert (kind, constant, pc) == (7, 40, syscall_pc(39))
        # Kept by ``convert`` in syzkaller's executor.
        assert other not in (0, constant)
        assert second == (7, 1, other, syscall_pc(0))
        assert third == (6, 5, 6, 0xFF)

    def test_comparisons_dropped_by_the_source_are_counted(self, fixture: Fixture) -> None:
        kcov = self.comparing(fixture)
        self.comparisons.make(1)
        self.comparisons.dropped = 5
        assert fixture.device.syscall_return(kcov, ALICE, 1) == 0
        assert (kcov.appended, kcov.dropped) == (1, 5)
        assert fixture.device.totals.comparisons_dropped == 5
        assert fixture.device.totals.dropped == 0

    @pytest.mark.parametrize("words", [2, 4, 5, 6, 8, 9, 12, 13, 512])
    @pytest.mark.parametrize("made", [1, 2, 3, 200])
    @pytest.mark.parametrize(
        "count", [0, 1, 2, 126, 127, 128, 510, 2**31, 2**62, 2**62 - 1, 2**63, 2**64 - 1]
    )
    def test_bounds(self, fixture: Fixture, words: int, made: int, count: int) -> None:
        kcov = fixture.device.open()
        assert fixture.device.init_trace(kcov, words) == 0
        assert fixture.device.enable(kcov, ALICE, KCOV_TRACE_CMP) == 0
        fixture.write_count(kcov, count)
        self.comparisons.make(*range(made))
        assert fixture.device.syscall_return(kcov, ALICE, 1) == 0
        # One record after the other, as Linux has it: only where its end lies inside.
        expected = [count, *([0] * (words - 1))]
        for record in self.comparisons.made:
            start = 1 + expected[0] * 4
            if (start + 4) * 8 <= words * 8:
                expected[0] += 1
                expected[start : start + 4] = record
        assert self.words(kcov) == expected
        assert kcov.appended == expected[0] - count
        assert kcov.appended + kcov.dropped == made
