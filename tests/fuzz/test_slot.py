# SPDX-License-Identifier: Apache-2.0
"""A slot with a real guest: cases go in, what they did comes out, and nothing that they do lasts.

The device gives one PC for each system call here (``syscall_pcs``), so what a case covers can be
counted exactly, without any target.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bridge.bench.executions import run_cases
from bridge.config import Settings
from bridge.errors import GuestLostError
from bridge.fuzz import board as boards
from bridge.fuzz.board import BoardState, BoardWord
from bridge.fuzz.lane import (
    LANE_INPUT_BYTES,
    LANE_INPUT_OFFSET,
    LANE_OUTPUT_BYTES,
    Execution,
    LaneFlag,
    LaneWord,
)
from bridge.fuzz.messages import (
    GO,
    WELCOME,
    Hello,
    Message,
    NewCells,
    ResetWanted,
    ShimFailed,
    SuspectCase,
    TimedOut,
)
from bridge.fuzz.slot import BuiltIn, RunnerError, Slot, SlotOptions
from bridge.fuzz.slot_events import NewCase, Suspect
from bridge.sources.pcs import syscall_pc

pytestmark = pytest.mark.vm

HERE = Path(__file__).parent
AGENT = HERE.parents[1] / "guest" / "agent"
RUNNER = "/usr/local/bin/cases-runner"
GETPPID, GETUID, GETGID = (syscall_pc(number) for number in (110, 102, 104))
SECONDS = 60.0
"""For what takes milliseconds on a quiet machine."""


@dataclass(frozen=True)
class File:
    source: Path
    guest_path: str = RUNNER
    mode: int = 0o755


@dataclass(frozen=True)
class Harness:
    files: Sequence[File]
    arguments: Sequence[str] = ("cases",)
    runner: str = RUNNER


@dataclass
class Heard:
    """A listener that keeps everything."""

    new: list[NewCase] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)
    resets: list[str] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def new_case(self, event: NewCase) -> None:
        self.new.append(event)

    def suspect(self, event: Suspect) -> bool:
        self.suspects.append(event)
        return False

    def was_reset(self, reason: str, seconds: float) -> None:
        assert seconds > 0
        self.resets.append(reason)

    def lost(self, error: Exception) -> None:
        self.errors.append(error)

    def clear(self) -> None:
        for each in (self.new, self.suspects, self.resets, self.errors):
            each.clear()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("harness") / "runner"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-s"]
    sources = [AGENT / "kcov-runner.c", HERE / "case_harness.c"]
    subprocess.run(["cc", *flags, "-I", AGENT, "-o", program, *sources], check=True)
    return program


@pytest.fixture(scope="module")
def everything(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slot]:
    settings = Settings(target="none", source="python", syscall_pcs=True, region=64)
    heard = Heard()
    with Slot(
        settings,
        Harness([File(program)]),
        tmp_path_factory.mktemp("slot"),
        options=SlotOptions(areas=3, area_words=4096, confirm_seconds=1),
        listeners=[heard],
    ) as slot:
        yield slot
    assert heard.errors == []


@pytest.fixture
def heard(everything: Slot) -> Heard:
    (heard,) = everything._listeners
    assert isinstance(heard, Heard)
    return heard


@pytest.fixture
def slot(everything: Slot, heard: Heard) -> Slot:
    if everything.trouble() or not everything.lane.idle:
        everything.reset("between tests")
    heard.clear()
    return everything


def counted(pcs: Sequence[int]) -> Counter[int | None]:
    """How often each PC that the harness makes on purpose is there."""
    return Counter[int | None](pc for pc in pcs if pc in (GETPPID, GETUID, GETGID))


def fnv(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & (2**64 - 1)
    return f"{len(data)} {value:016x}"


# Cases one by one


def test_execute_pcs_are_those_of_the_case_alone(slot: Slot) -> None:
    for case, calls in ((b"", {GETPPID: 3}), (b"x", {GETPPID: 3, GETUID: 1})):
        done = slot.execute(case, SECONDS)
        assert done.status == 0
        assert [counted(pcs) for pcs in done.pcs] == [calls], "neither clean() nor sleeps count"
        # Each kind of call of the case is there, and no other.
        assert set(done.pcs[0]) == set(calls)


@pytest.mark.parametrize("size", [1, 2, 4095, 4096, 65_537, LANE_INPUT_BYTES])
def test_execute_bytes_of_a_case_arrive_as_they_are(slot: Slot, size: int) -> None:
    case = b"s" + random.Random(size).randbytes(size - 1)
    done = slot.execute(case, SECONDS)
    assert done.output.decode() == fnv(case)
    assert done.status == 0


def test_execute_harness_goes_on_from_case_to_case(slot: Slot) -> None:
    first = int(slot.execute(b"n", SECONDS).output)
    assert [int(slot.execute(b"n", SECONDS).output) for _ in range(3)] == [
        first + 1,
        first + 2,
        first + 3,
    ]


def test_execute_threads_have_their_own_areas(slot: Slot) -> None:
    for _ in range(3):
        done = slot.execute(b"t", SECONDS)
        assert (done.status, done.output) == (0, b"2")
        assert counted(done.pcs[0]) == {GETPPID: 2}
        assert counted(done.pcs[1]) == {GETUID: 3}


def test_execute_process_of_the_harness_has_its_own_area(slot: Slot) -> None:
    done = slot.execute(b"q", SECONDS)
    assert done.status == 0
    assert counted(done.pcs[1]) == {GETPPID: 4}
    # An area that was in use has nothing of earlier cases.
    assert counted(sum(slot.execute(b"", SECONDS).pcs, ())) == {GETPPID: 3}


@pytest.mark.parametrize(
    ("case", "status", "output"),
    [
        (b"a", signal.SIGABRT, b"assertion failed: this is wrong\n"),
        (b"l", signal.SIGSEGV, b""),
        (b"e", 3 << 8, b""),
        (b"w", 5 << 8, b"only a word\n"),
    ],
)
def test_execute_end_of_the_harness_is_the_status(
    slot: Slot, case: bytes, status: int, output: bytes
) -> None:
    done = slot.execute(case, SECONDS)
    assert (done.status, done.output) == (status, output)
    # The next child is there, and nothing of the last one.
    again = slot.execute(b"x", SECONDS)
    assert (again.status, again.output) == (0, b"")
    assert counted(again.pcs[0]) == {GETPPID: 3, GETUID: 1}
    assert slot.session.run("pgrep -c cases-runner").text.strip() == "3"


def test_execute_output_is_cut_at_the_end_of_its_memory(slot: Slot) -> None:
    done = slot.execute(b"o", SECONDS)
    assert done.output == b"o" * LANE_OUTPUT_BYTES


def test_execute_timed_case_says_what_the_harness_took(slot: Slot) -> None:
    done = slot.execute(b"x", SECONDS, LaneFlag.TIMED)
    assert 0 < done.harness_ns < done.seconds * 1e9


def test_reset_guest_is_as_new_and_takes_cases(slot: Slot, heard: Heard) -> None:
    slot.reset("first")
    heard.clear()
    assert [slot.execute(b"m", SECONDS).output for _ in range(2)] == [b"0", b"1"]
    machines = slot.machines
    slot.reset("test")
    assert slot.execute(b"m", SECONDS).output == b"0"
    assert int(slot.execute(b"n", SECONDS).output) == 2
    assert heard.resets == ["test"]
    assert slot.machines == machines


@pytest.mark.parametrize("case", [b"h", b"b"], ids=["hangs", "forks forever"])
def test_execute_case_that_does_not_end_is_over_after_a_reset(slot: Slot, case: bytes) -> None:
    done = slot.execute(case, 0.2)
    assert done.status is None
    assert not slot.lane.idle
    slot.reset("test")
    assert counted(slot.execute(b"x", SECONDS).pcs[0]) == {GETPPID: 3, GETUID: 1}


@pytest.mark.parametrize("case", [b"p", b"R"], ids=["panics", "reboots"])
def test_execute_guest_that_is_lost_is_replaced(slot: Slot, case: bytes) -> None:
    with pytest.raises(GuestLostError):
        slot.execute(case, SECONDS)
    assert slot.trouble()
    evidence = slot.collect()
    assert evidence.lost
    slot.reset("test")
    assert not slot.trouble()
    assert slot.execute(b"x", SECONDS).status == 0


def test_execute_case_that_ends_the_runner_is_over_after_a_reset(slot: Slot) -> None:
    with pytest.raises(RunnerError, match="ended with status"):
        slot.execute(b"r", SECONDS)
    assert "the runner in the guest ended" in slot.collect().lost
    machines = slot.machines
    slot.reset("test")
    assert slot.execute(b"x", SECONDS).status == 0
    assert slot.machines == machines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("refusing", "/no/such"), "no file /no/such"),
        (("dying",), "did not get ready"),
        (("unknown",), "there is no harness unknown"),
    ],
)
def test_enter_harness_that_does_not_load_says_why(
    slot: Slot, program: Path, arguments: tuple[str, ...], said: str
) -> None:
    vm = slot._ready
    harness = vm._harness
    vm._harness = Harness((), arguments)
    try:
        slot.session.reset()
        slot.session.put(program, RUNNER, 0o755)
        with pytest.raises(RunnerError, match="ended with status 125") as refused:
            vm.start_runner()
        assert said in refused.value.evidence
    finally:
        vm._harness = harness
        slot.reset("after")


def test_run_cases_of_the_benchmark_tells_the_harness_from_the_rest(slot: Slot) -> None:
    before = slot.lane.last_case
    turn = run_cases(slot, 200, timed=True)
    assert slot.lane.last_case == before + 200
    assert 0 < turn.inside < turn.total
    assert turn.rate == pytest.approx(1e6 / turn.total)
    assert run_cases(slot, 50).inside == 0
    # What Python executes next is numbered after them.
    assert slot.execute(b"x", SECONDS).status == 0


# With a shim


class Shim:
    """What a shim does: the lane through its own mapping, and words on the socket."""

    def __init__(self, path: str) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.settimeout(SECONDS)
        self.connection.connect(path)
        self.board: memoryview
        self.lane: memoryview
        self.number = 0
        self.welcomes = 0
        self.stack = ExitStack()
        assert self.say(Hello(boards.VERSION, os.getpid())) == WELCOME

    def say(self, message: Message) -> bytes:
        self.connection.send(message.encode())
        word, fds, _, _ = socket.recv_fds(self.connection, 64, 4)
        if word == WELCOME:
            self._map(*fds)
        self.number = self.board[BoardWord.LAST_CASE]
        return word

    def _map(self, region: int, board: int, *faults: int) -> None:
        self.stack.close()
        self.welcomes += 1
        pages = mmap.mmap(board, boards.BOARD_BYTES)
        memory = mmap.mmap(region, os.fstat(region).st_size)
        for fd in (region, board, *faults):
            os.close(fd)
        self.board = memoryview(pages).cast("Q")
        start, length = self.board[BoardWord.LANE_OFFSET], self.board[BoardWord.LANE_BYTES]
        whole = memoryview(memory)
        self.lane = whole[start : start + length].cast("Q")
        for view in (self.board, self.lane, whole):
            self.stack.callback(view.release)

    def run(self, case: bytes, seconds: float = SECONDS) -> int | None:
        """Run a case; None if it does not end in time, or a fault is counted meanwhile."""
        assert self.board[BoardWord.STATE] == BoardState.READY
        faults = self.board[BoardWord.FAULTS]
        with self.lane.cast("B") as whole:
            whole[LANE_INPUT_OFFSET : LANE_INPUT_OFFSET + len(case)] = case
        self.lane[LaneWord.LENGTH] = len(case)
        self.number += 1
        self.lane[LaneWord.CASE_NUMBER] = self.number
        end = time.monotonic() + seconds
        while self.lane[LaneWord.DONE] != self.number:
            if time.monotonic() > end or self.board[BoardWord.FAULTS] != faults:
                return None
            time.sleep(0.0002)
        self.board[BoardWord.EXECUTIONS] += 1
        return self.lane[LaneWord.STATUS]

    def close(self) -> None:
        self.stack.close()
        self.connection.close()


class Server:
    """The slot on its thread, which is this one; the shim's work on another."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def while_served(self, work: Callable[[Shim], object], shims: int = 1) -> None:
        failures: list[BaseException] = []
        over = threading.Event()

        def act() -> None:
            try:
                for _ in range(shims):
                    shim = Shim(self.slot.socket)
                    try:
                        work(shim)
                    finally:
                        shim.close()
            except BaseException as failure:
                failures.append(failure)
                over.set()

        thread = threading.Thread(target=act)
        thread.start()
        try:
            self.slot.serve(over.is_set, shims=shims)
        finally:
            thread.join()
        for failure in failures:
            raise failure


@pytest.fixture
def server(slot: Slot) -> Server:
    return Server(slot)


def test_serve_new_case_is_told_with_its_pcs(server: Server, heard: Heard) -> None:
    def work(shim: Shim) -> None:
        for case in (b"first", b"x"):
            assert shim.run(case) == 0
            assert shim.say(NewCells(shim.number)) == GO

    before = server.slot.executions
    server.while_served(work)
    assert [event.case for event in heard.new] == [b"first", b"x"]
    assert counted(heard.new[0].pcs[0]) == {GETPPID: 3, GETUID: 1}
    assert heard.new[0].again is not None
    assert counted(heard.new[0].again[0]) == {GETPPID: 3, GETUID: 1}
    assert heard.new[0].executions == before + 1
    assert server.slot.stability.value == 1.0
    assert server.slot.board is None
    assert heard.resets == []


def test_serve_crash_is_told_with_evidence_then_the_guest_is_as_new(
    server: Server, heard: Heard
) -> None:
    def work(shim: Shim) -> None:
        assert shim.run(b"m") == 0
        epoch = shim.board[BoardWord.EPOCH]
        assert shim.run(b"abort") == signal.SIGABRT
        assert shim.say(SuspectCase(shim.number, signal.SIGABRT)) == GO
        assert shim.board[BoardWord.EPOCH] == epoch + 1
        assert shim.run(b"m") == 0
        assert server.slot.lane.read_output() == b"0", "the mark is gone"

    server.while_served(work)
    (event,) = heard.suspects
    assert (event.case, event.status, event.timed_out) == (b"abort", signal.SIGABRT, False)
    assert event.output == b"assertion failed: this is wrong\n"
    assert heard.resets == ["finding"]


def test_serve_case_that_does_not_end_is_told_then_reset(server: Server, heard: Heard) -> None:
    def work(shim: Shim) -> None:
        assert shim.run(b"hang", 0.2) is None
        assert shim.say(TimedOut(shim.number)) == GO
        assert shim.run(b"x") == 0

    server.while_served(work)
    (event,) = heard.suspects
    assert (event.case, event.status, event.timed_out) == (b"hang", None, True)
    # Once before it was executed again, and once after that.
    assert heard.resets == ["time-out", "time-out"]
    assert server.slot.slow == 0


def test_serve_panic_is_a_fault_and_another_machine_goes_on(server: Server, heard: Heard) -> None:
    machines = server.slot.machines

    def work(shim: Shim) -> None:
        assert shim.run(b"panic") is None
        assert shim.board[BoardWord.FAULTS] == 1
        assert shim.say(SuspectCase(shim.number, None)) == WELCOME
        assert shim.welcomes == 2
        assert shim.run(b"x") == 0
        assert shim.say(NewCells(shim.number)) == GO

    server.while_served(work)
    (event,) = heard.suspects
    assert event.case == b"panic"
    assert event.status is None
    assert "sysrq" in event.evidence.console
    assert "panicked" in event.evidence.lost
    assert server.slot.machines == machines + 1
    assert [each.case for each in heard.new] == [b"x"]


def test_serve_reset_that_the_shim_asks_for(server: Server, heard: Heard) -> None:
    def work(shim: Shim) -> None:
        assert shim.run(b"m") == 0
        assert shim.say(ResetWanted("every")) == GO
        assert shim.run(b"m") == 0
        assert server.slot.lane.read_output() == b"0"

    server.while_served(work)
    assert heard.resets == ["every"]


def test_serve_several_shims_one_after_another(server: Server, heard: Heard) -> None:
    before = server.slot.executions

    def work(shim: Shim) -> None:
        assert shim.board[BoardWord.EXECUTIONS] == 0
        for _ in range(5):
            assert shim.run(b"x") == 0

    server.while_served(work, shims=3)
    assert server.slot.executions == before + 15
    assert heard.resets == []


def test_serve_shim_that_vanishes_in_a_case_leaves_nothing(server: Server, heard: Heard) -> None:
    def work(shim: Shim) -> None:
        if not heard.resets:
            assert shim.run(b"hang", 0.05) is None
        else:
            assert shim.run(b"x") == 0

    server.while_served(work, shims=2)
    assert heard.resets == ["shim"]


def test_serve_drift_of_the_guest_resets_it(server: Server, heard: Heard) -> None:
    slot = server.slot
    slot.stability.forget_reference()

    def work(shim: Shim) -> None:
        assert shim.run(b"x") == 0
        slot.stability._next = 0.0
        shim.say(NewCells(shim.number))
        assert slot.stability.reference == b"x"
        # As if the same case had covered something else right after the reset.
        slot.stability.set_reference(b"x", [[1, 2, 3]])
        assert shim.run(b"y") == 0
        slot.stability._next = 0.0
        assert shim.say(NewCells(shim.number)) == GO
        assert heard.resets == ["drift"]
        assert shim.run(b"x") == 0

    server.while_served(work)


def test_serve_shim_that_cannot_work_ends_it(server: Server) -> None:
    def work(shim: Shim) -> None:
        shim.connection.send(ShimFailed("no room").encode())

    with pytest.raises(Exception, match="the shim cannot work: no room"):
        server.while_served(work)


def test_built_in_harness_of_the_image_runs(slot: Slot) -> None:
    vm = slot._ready
    harness = vm._harness
    vm._harness = BuiltIn("calls")
    try:
        slot.session.reset()
        vm.start_runner()
        done: Execution = slot.execute(b"x", SECONDS)
        assert counted(done.pcs[0]) == {GETPPID: 10}
        vm._harness = BuiltIn("file", ("/etc/hostname",))
        slot.session.reset()
        vm.start_runner()
        assert slot.execute(b"x", SECONDS).status == 0
        assert len(slot.execute(b"x", SECONDS).pcs[0]) == 10
    finally:
        vm._harness = harness
        slot.reset("after")


def test_serve_shim_that_connects_ends_the_one_before(slot: Slot, heard: Heard) -> None:
    over = threading.Event()
    failures: list[BaseException] = []

    def act() -> None:
        try:
            first = Shim(slot.socket)
            assert first.run(b"x") == 0
            second = Shim(slot.socket)
            assert second.run(b"x") == 0
            assert second.say(NewCells(second.number)) == GO
            assert first.connection.recv(1) == b""
            assert first.board[BoardWord.STATE] == BoardState.GONE
            first.close()
            second.close()
        except BaseException as failure:
            failures.append(failure)
        finally:
            over.set()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        slot.serve(over.is_set)
    finally:
        thread.join()
    assert failures == []
    assert [event.case for event in heard.new] == [b"x"]
    assert heard.resets == []


@pytest.mark.parametrize("exit_is_suspect", [False, True])
def test_options_say_what_is_suspect(exit_is_suspect: bool) -> None:
    options = SlotOptions(exit_is_suspect=exit_is_suspect)
    assert not options.is_suspect(0)
    assert options.is_suspect(signal.SIGSEGV)
    assert options.is_suspect(0x80 | signal.SIGABRT)
    assert options.is_suspect(1 << 8) is exit_is_suspect
