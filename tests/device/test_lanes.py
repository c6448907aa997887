# SPDX-License-Identifier: Apache-2.0
"""Lanes: areas that the host makes, which the guest takes one by one, and keeps no longer."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

import pytest

from bridge.device.abi import LANE_INDEX_SHIFT, REQUESTS_OFFSET, WORD, Op, RequestWord, ResponseWord
from bridge.device.doorbell import Doorbell
from bridge.device.ivshmem import IvshmemServer
from bridge.device.kcov import Device, Kcov, Mode, Personality
from bridge.device.lanes import LaneAreas
from bridge.device.region import Area, Region
from bridge.errors import RegionError, SourceError
from bridge.session.device_host import DeviceHost
from tests.support.doorbell import Counting, FakeGuest

ALICE, BOB = 0x1_0000_0064, 0x2_0000_0065
CONTROL, WORDS = 1024, 512


class Deaf:
    """Stands for a plugin in QEMU that no longer answers: it may still write."""

    def attach(self, slot: int, area: Area, task: int) -> None:
        pass

    def counts(self, slot: int) -> tuple[int, int]:
        return 0, 0

    def detach(self, slot: int) -> tuple[int, int]:
        raise SourceError("the plugin does not answer")


class Host:
    def __init__(self, personality: Personality, watcher: Deaf | None = None) -> None:
        self.region = Region(1 << 20)
        self.free = self.region.bytes_free
        self.device: Device[int] = Device(self.region, Counting(), personality, watcher=watcher)
        lane = self.device.open_lane([CONTROL, WORDS, WORDS])
        assert lane is not None
        self.lane: LaneAreas = lane

    def join(self, index: int) -> Kcov[int]:
        kcov = self.device.open(slot=index)
        assert self.device.join_lane(kcov, self.argument(index)) == 0
        return kcov

    def argument(self, index: int) -> int:
        return self.lane.number | index << LANE_INDEX_SHIFT


@pytest.fixture(params=list(Personality), ids=lambda which: which.value)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    host = Host(request.param)
    yield host
    host.region.close()


def test_lane_instance_maps_and_traces_into_the_area_of_the_host(host: Host) -> None:
    kcov = host.join(1)
    area = host.lane.areas[1]
    assert kcov.mode is Mode.INIT
    assert host.device.map(kcov, WORDS * WORD, 0) == (0, area.offset)
    assert host.device.enable(kcov, ALICE, 0) == 0
    assert host.device.syscall_return(kcov, ALICE, 1) == 0
    assert area.read() == [1]


def test_lane_control_area_is_mapped_and_never_enabled(host: Host) -> None:
    kcov = host.join(0)
    assert host.device.map(kcov, CONTROL * WORD, 0) == (0, host.lane.areas[0].offset)
    assert host.device.map(kcov, CONTROL * WORD, 1)[0] == errno.EINVAL
    assert host.device.map(kcov, WORDS * WORD, 0)[0] == errno.EINVAL
    assert host.device.enable(kcov, ALICE, 0) == errno.EINVAL
    linux = host.device.personality is Personality.LINUX
    refused = errno.EINVAL if linux else errno.ENOTTY
    assert host.device.unique_enable(kcov, ALICE, 1) == refused
    assert host.device.remote_enable(kcov, ALICE, 0, []) == refused
    assert host.device.enabled == 0


def test_lane_area_has_no_bitmap(host: Host) -> None:
    kcov = host.join(1)
    assert host.device.map(kcov, WORDS * WORD, 0)[0] == 0
    assert host.device.unique_enable(kcov, ALICE, 8) in (errno.EINVAL, errno.ENOTTY)
    assert host.lane.areas[1].bitmap_words == 0


def test_lane_that_does_not_exist_is_refused(host: Host) -> None:
    kcov = host.device.open()
    for number in (0, 1, host.lane.number ^ 2, 0xFFFFFFFF):
        if number != host.lane.number:
            assert host.device.join_lane(kcov, number) == errno.ESRCH
    assert kcov.mode is Mode.DISABLED
    assert kcov.area is None


@pytest.mark.parametrize("index", [3, 4, 2**31, 2**32 - 1])
def test_lane_index_beyond_its_areas_is_refused(host: Host, index: int) -> None:
    kcov = host.device.open()
    assert host.device.join_lane(kcov, host.argument(index)) == errno.EINVAL
    assert kcov.mode is Mode.DISABLED


def test_lane_index_taken_twice_is_refused_until_the_first_ends(host: Host) -> None:
    first, second = host.join(2), host.device.open(slot=9)
    assert host.device.join_lane(second, host.argument(2)) == errno.EBUSY
    assert host.device.release(first) == 0
    assert host.device.join_lane(second, host.argument(2)) == 0
    assert second.area is host.lane.areas[2]


def test_lane_instance_joins_once_and_is_not_initialised_again(host: Host) -> None:
    kcov = host.join(1)
    assert host.device.join_lane(kcov, host.argument(2)) == errno.EBUSY
    assert host.device.init_trace(kcov, WORDS) == errno.EBUSY
    initialised = host.device.open(slot=9)
    assert host.device.init_trace(initialised, WORDS) == 0
    assert host.device.join_lane(initialised, host.argument(2)) == errno.EBUSY
    assert kcov.area is host.lane.areas[1]


def test_lane_area_outlives_disable_and_the_end_of_its_instance(host: Host) -> None:
    area = host.lane.areas[1]
    for task in (ALICE, BOB):
        kcov = host.join(1)
        assert host.device.map(kcov, WORDS * WORD, 0) == (0, area.offset)
        for _ in range(2):
            assert host.device.enable(kcov, task, 0) == 0
            assert host.device.syscall_return(kcov, task, 1) == 0
            assert host.device.disable(kcov, task, 0) == 0
        assert host.device.release(kcov) == 0
    assert area.read() == [1, 2, 3, 4]


def test_lane_closed_while_mapped_frees_the_area_when_the_guest_lets_go(host: Host) -> None:
    kcov = host.join(1)
    used = host.lane.areas[1].bytes
    host.device.close_lane(host.lane)
    host.device.close_lane(host.lane)
    assert host.region.bytes_free == host.free - used
    late = host.device.open(slot=9)
    assert host.device.join_lane(late, host.argument(2)) == errno.ESRCH
    # The instance lives on, as one of any process would.
    assert host.device.enable(kcov, ALICE, 0) in (0, errno.EINVAL)
    assert host.device.release(kcov) == 0
    assert host.region.bytes_free == host.free
    assert host.region.areas_in_use == 0


def test_lane_area_whose_watcher_may_still_write_is_neither_taken_nor_reused() -> None:
    host = Host(Personality.LINUX, Deaf())
    kcov = host.join(1)
    assert host.device.enable(kcov, ALICE, 0) == 0
    with pytest.raises(SourceError):
        host.device.release(kcov)
    again = host.device.open(slot=9)
    assert host.device.join_lane(again, host.argument(1)) == errno.EIO
    host.device.close_lane(host.lane)
    assert host.region.bytes_free == host.free - host.lane.areas[1].bytes
    host.region.close()


def test_lane_without_room_takes_none(host: Host) -> None:
    before = host.region.bytes_free
    assert host.device.open_lane([WORDS, WORDS, before // WORD]) is None
    assert host.region.bytes_free == before


class Served:
    """A doorbell with a guest that is not honest."""

    def __init__(self) -> None:
        self.host = Host(Personality.LINUX)
        self.server = IvshmemServer(self.host.region)
        self.doorbell = Doorbell(self.host.region, self.host.device, self.server.bell)
        self.doorbell.start()
        self.guest = FakeGuest(self.host.region, self.server.bell)

    def close(self) -> None:
        self.doorbell.stop()
        self.server.close()
        self.host.region.close()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


def test_lane_request_through_the_doorbell_gives_the_area(served: Served) -> None:
    guest, host = served.guest, served.host
    assert guest.call(0, Op.LANE, arg0=host.argument(1)) == 0
    assert guest.call(0, Op.MAP, arg0=WORDS * WORD) == 0
    assert guest.answer(0, ResponseWord.AREA_OFFSET) == host.lane.areas[1].offset
    assert guest.call(0, Op.ENABLE) == 0
    assert guest.call(0, Op.RETURN) == 0
    assert host.lane.areas[1].read() == [1]


def test_lane_taken_by_an_instance_that_no_slot_names_is_freed(served: Served) -> None:
    guest, host = served.guest, served.host
    assert guest.call(0, Op.LANE, arg0=host.argument(1)) == 0
    assert guest.call(1, Op.LANE, arg0=host.argument(1)) == errno.EBUSY
    host.region.control[REQUESTS_OFFSET // WORD + RequestWord.GENERATION] = 0
    assert guest.call(1, Op.LANE, arg0=host.argument(1)) == 0
    assert served.doorbell.counters.reclaimed == 1


def test_lane_stays_over_a_reset_zeroed_at_its_place(served: Served) -> None:
    guest, host = served.guest, served.host
    offsets = [area.offset for area in host.lane.areas]
    assert guest.call(0, Op.LANE, arg0=host.argument(1)) == 0
    host.lane.areas[0].words[:] = memoryview(b"\xff" * CONTROL * WORD).cast("Q")
    served.doorbell.call(served.doorbell.reset)
    assert [area.offset for area in host.lane.areas] == offsets
    assert host.lane.areas[0].words.tobytes() == bytes(CONTROL * WORD)
    other = host.region.allocate(WORDS)
    assert other is not None
    assert other.offset not in offsets
    host.region.free(other)
    # Free to be taken by the guest as it was.
    assert guest.call(0, Op.LANE, arg0=host.argument(1)) == 0


def test_device_host_opens_and_closes_lanes() -> None:
    with DeviceHost(1 << 20) as device:
        free = device.region.bytes_free
        lane = device.open_lane([CONTROL, WORDS])
        sizes: Sequence[int] = [area.size for area in lane.areas]
        assert sizes == [CONTROL, WORDS]
        device.reset()
        device.close_lane(lane)
        device.close_lane(lane)
        assert device.region.bytes_free == free
        with pytest.raises(RegionError, match="no room for a lane") as refused:
            device.open_lane([1 << 20])
        assert "--region" in refused.value.hint
    device.close_lane(lane)
