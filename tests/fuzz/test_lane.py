# SPDX-License-Identifier: Apache-2.0
"""The lane: its layout, as Python and the runner have it, and the host's side of an execution."""

from __future__ import annotations

import mmap
import random
import shutil
import subprocess
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge.device.abi import WORD
from bridge.device.lanes import LaneAreas
from bridge.device.region import Region
from bridge.errors import GuestLostError, UsageError
from bridge.fuzz import lane
from bridge.fuzz.lane import Execution, Lane, LaneFlag, LaneWord

WORDS = 512
HEADER = Path(__file__).resolve().parents[2] / "guest" / "agent" / "lane.h"
CONSTANTS = [name for name in lane.__all__ if name.startswith("LANE_")]


def expected() -> dict[str, int]:
    """C expression -> what lane.py says. Fields are compared as byte offsets."""
    return {
        **{name: getattr(lane, name) for name in CONSTANTS},
        **{f"offsetof(struct lane, {word.name.lower()})": word * WORD for word in LaneWord},
        **{f"LANE_{flag.name}": int(flag) for flag in LaneFlag},
        "sizeof(struct lane)": (LaneWord.KEEP + 1) * WORD,
    }


def test_layout_header_of_the_runner_is_the_same(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler, "a C compiler is needed (Debian: gcc libc6-dev linux-libc-dev)"
    names = list(expected())
    prints = "\n".join(f'\tprintf("%llu\\n", (unsigned long long)({name}));' for name in names)
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{HEADER}"\n\nint main(void)\n{{\n{prints}\n\treturn 0;\n}}\n'
    )
    program = tmp_path / "layout"
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert dict(zip(names, map(int, output.split()), strict=True)) == expected()


def test_layout_everything_fits_in_the_control_page() -> None:
    assert LaneWord.AREA_COUNTS + lane.LANE_MOST_AREAS == LaneWord.KEEP
    assert (LaneWord.KEEP + 1) * WORD <= lane.LANE_CONTROL_BYTES


@pytest.mark.parametrize("word", [word for word in LaneWord if word < LaneWord.DONE])
def test_layout_two_writers_never_share_a_cache_line(word: LaneWord) -> None:
    guest = {other // 8 for other in LaneWord if other >= LaneWord.DONE}
    assert word // 8 not in guest


class Runner:
    """Writes what a runner in the guest would, honest or not, through a mapping of its own."""

    def __init__(self, region: Region, areas: LaneAreas) -> None:
        control, *traces = areas.areas
        memory = mmap.mmap(region.fd, region.size)
        self.view = memoryview(memory)
        self.control = self.view[control.offset :][: control.bytes].cast("Q")
        self.traces = [self.view[area.offset :][: area.bytes].cast("Q") for area in traces]

    def close(self) -> None:
        for words in (self.control, *self.traces):
            words.release()
        self.view.release()

    def put(self, word: int, value: int) -> None:
        self.control[word] = value

    def serve(self, work: Callable[[bytes], int]) -> threading.Thread:
        """Run the next case on a thread."""
        before = self.control[LaneWord.CASE_NUMBER]

        def run() -> None:
            end = time.monotonic() + 60
            while self.control[LaneWord.CASE_NUMBER] == before and time.monotonic() < end:
                time.sleep(0)
            length = self.control[LaneWord.LENGTH]
            data = self.control.cast("B")[lane.LANE_INPUT_OFFSET :][:length].tobytes()
            self.put(LaneWord.STATUS, work(data))
            self.put(LaneWord.DONE, self.control[LaneWord.CASE_NUMBER])

        thread = threading.Thread(target=run)
        thread.start()
        return thread


class Bench:
    def __init__(self) -> None:
        self.region = Region(8 << 20)
        areas = LaneAreas.allocate(Lane.sizes(2, WORDS), self.region)
        assert areas is not None
        self.lane = Lane(areas)
        self.lane.prepare()
        self.runner = Runner(self.region, areas)

    def execute(self, case: bytes, work: Callable[[bytes], int], flags: int = 0) -> Execution:
        thread = self.runner.serve(work)
        try:
            return self.lane.execute(case, 60, flags=LaneFlag(flags))
        finally:
            thread.join()

    def close(self) -> None:
        self.runner.close()
        self.lane.close()
        self.lane.close()
        self.region.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.mark.parametrize("size", [0, 1, 4096, lane.LANE_INPUT_BYTES])
def test_execute_case_arrives_whole(bench: Bench, size: int) -> None:
    case, seen = random.Random(size).randbytes(size), []

    def work(data: bytes) -> int:
        seen.append(data)
        return 0

    # What an earlier, longer case left behind is no part of it.
    bench.execute(b"\xff" * lane.LANE_INPUT_BYTES, work)
    assert bench.execute(case, work).status == 0
    assert seen[1] == case
    assert bench.lane.read_case() == case


def test_execute_case_that_is_too_long_is_refused(bench: Bench) -> None:
    with pytest.raises(UsageError, match="too long"):
        bench.lane.execute(bytes(lane.LANE_INPUT_BYTES + 1), 1)
    assert bench.lane.last_case == 0


def test_execute_returns_pcs_by_area_status_and_output(bench: Bench) -> None:
    def work(_: bytes) -> int:
        runner = bench.runner
        runner.traces[0][1:4] = array("Q", [7, 8, 7])
        # The runner was in the kernel since: these are not the case's.
        runner.traces[0][0] = 9
        runner.traces[1][1] = 2**64 - 1
        runner.put(LaneWord.AREA_COUNTS, 3)
        runner.put(LaneWord.AREA_COUNTS + 1, 1)
        runner.put(LaneWord.AREAS_USED, 2)
        runner.put(LaneWord.OUTPUT_LENGTH, 4)
        runner.control.cast("B")[lane.LANE_OUTPUT_OFFSET :][:4] = b"oops"
        return 134

    done = bench.execute(b"x", work)
    assert (done.status, done.output) == (134, b"oops")
    assert done.pcs == ((7, 8, 7), (2**64 - 1,))
    assert not done.overflowed


def test_execute_comparisons_of_the_first_area(bench: Bench) -> None:
    def work(_: bytes) -> int:
        assert bench.runner.control[LaneWord.FLAGS] == LaneFlag.COMPARISONS | LaneFlag.TIMED
        bench.runner.traces[0][1:9] = array("Q", [6, 1, 2, 0xF1, 7, 3, 4, 0xF2])
        bench.runner.put(LaneWord.AREA_COUNTS, 2)
        bench.runner.put(LaneWord.AREAS_USED, 1)
        bench.runner.put(LaneWord.NS, 1234)
        return 0

    done = bench.execute(b"", work, LaneFlag.COMPARISONS | LaneFlag.TIMED)
    assert done.comparisons == ((6, 1, 2, 0xF1), (7, 3, 4, 0xF2))
    assert done.pcs == ((),)
    assert done.harness_ns == 1234


@pytest.mark.parametrize("value", [WORDS - 1, WORDS, 2**32, 2**63, 2**64 - 1])
def test_execute_hostile_counts_are_bounded(bench: Bench, value: int) -> None:
    def work(_: bytes) -> int:
        for word in range(LaneWord.STATUS, LaneWord.AREA_COUNTS + lane.LANE_MOST_AREAS):
            bench.runner.put(word, value)
        bench.runner.put(LaneWord.LENGTH, value)
        return value

    done = bench.execute(b"", work, LaneFlag.COMPARISONS)
    assert done.status == value & 0xFFFFFFFF
    assert [len(pcs) for pcs in done.pcs] == [0, WORDS - 1]
    assert len(done.comparisons) == (WORDS - 1) // 4
    assert len(done.output) == min(value, lane.LANE_OUTPUT_BYTES)
    assert len(bench.lane.read_case()) <= lane.LANE_INPUT_BYTES
    assert done.overflowed


def test_execute_case_that_does_not_end_has_no_status(bench: Bench) -> None:
    done = bench.lane.execute(b"x", 0.01)
    assert done.status is None
    assert done.seconds >= 0.01
    # A word that says that another case is done is of no account.
    bench.runner.put(LaneWord.DONE, 2**64 - 1)
    assert bench.lane.execute(b"x", 0.01).status is None


def test_execute_lost_guest_breaks_off(bench: Bench) -> None:
    def check() -> None:
        raise GuestLostError("gone")

    with pytest.raises(GuestLostError, match="gone"):
        bench.lane.execute(b"x", 60, check=check)


def test_prepare_forgets_the_runner_before_and_counts_on(bench: Bench) -> None:
    bench.runner.put(LaneWord.READY, bench.runner.control[LaneWord.GENERATION])
    assert bench.lane.ready
    bench.execute(b"x", lambda _: 1)
    bench.lane.prepare()
    assert not bench.lane.ready
    assert bench.runner.control[LaneWord.DONE] == bench.runner.control[LaneWord.CASE_NUMBER] == 0
    assert bench.runner.control[LaneWord.AREAS] == 2
    assert bench.runner.control[LaneWord.AREA_WORDS] == WORDS
    bench.execute(b"x", lambda _: 0)
    assert bench.lane.last_case == 2


@pytest.mark.parametrize("areas", [0, lane.LANE_MOST_AREAS + 1])
def test_sizes_impossible_number_of_areas_is_refused(areas: int) -> None:
    with pytest.raises(UsageError, match="trace areas"):
        Lane.sizes(areas, WORDS)


def test_catch_up_numbers_of_a_shim_are_not_used_again(bench: Bench) -> None:
    bench.runner.put(LaneWord.CASE_NUMBER, 41)
    bench.runner.put(LaneWord.DONE, 41)
    assert bench.lane.catch_up()
    assert bench.lane.last_case == 41
    assert bench.execute(b"x", lambda _: 0).status == 0
    bench.runner.put(LaneWord.DONE, 2**64 - 1)
    assert not bench.lane.catch_up()
    assert bench.lane.last_case == 42


def test_keep_what_the_first_runner_kept_is_there_for_each_later_one(bench: Bench) -> None:
    kept = slice(lane.LANE_KEPT_OFFSET, lane.LANE_KEPT_OFFSET + 5)
    memory = bench.runner.control.cast("B")
    assert bench.runner.control[LaneWord.KEPT] == 0
    memory[kept] = b"tree\n"
    bench.runner.put(LaneWord.KEEP, 5)
    bench.lane.keep()
    # What a case writes there later is nothing that stays.
    memory[kept] = b"wrong"
    bench.runner.put(LaneWord.KEEP, 3)
    for _ in range(2):
        bench.lane.prepare()
        assert (bench.runner.control[LaneWord.KEPT], memory[kept].tobytes()) == (5, b"tree\n")
        bench.lane.keep()
    memory.release()


def test_keep_length_beyond_the_memory_is_bounded(bench: Bench) -> None:
    bench.runner.put(LaneWord.KEEP, 2**64 - 1)
    bench.lane.keep()
    bench.lane.prepare()
    assert bench.runner.control[LaneWord.KEPT] == lane.LANE_KEPT_BYTES
