# SPDX-License-Identifier: Apache-2.0
"""The shim between an engine and a slot: each word of both protocols, and whatever may die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.fuzz import messages
from bridge.fuzz.board import BoardState, BoardWord, Fold
from bridge.fuzz.lane import LaneWord
from bridge.fuzz.messages import Hello, NewCells, ResetWanted, ShimFailed, SuspectCase, TimedOut
from bridge.fuzz.shim import shim_program
from tests.support.engine_driver import EngineDriver
from tests.support.null_slot import NullSlot


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[NullSlot]:
    with NullSlot(tmp_path) as slot:
        yield slot


@pytest.fixture
def engine(slot: NullSlot) -> Iterator[EngineDriver]:
    with EngineDriver(slot.environment()) as engine:
        yield engine


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends in time; one that only waits to be collected has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


# ---- the engine's protocols


def test_hello_old_protocol_has_map_size_and_shared_cases(engine: EngineDriver) -> None:
    assert engine.hello == 0x80000001 | 0x40000000 | 0x01000000 | (65535 << 1)


def test_hello_old_protocol_without_shared_cases_offers_none(slot: NullSlot) -> None:
    with EngineDriver(slot.environment(), shared_cases=False) as engine:
        assert engine.hello == 0x80000001 | 0x40000000 | (65535 << 1)
        assert engine.run(b"KC") == 0
        assert slot.wait_for(NewCells) == b"KC"


def test_hello_new_protocol_says_options_and_itself_again(slot: NullSlot) -> None:
    with EngineDriver(slot.environment(), new=True) as engine:
        assert engine.hello == 0x41464C01
        assert engine.options == (1 | 2, 1 << 16, 0x41464C01)
        assert engine.run(b"KC") == 0
        assert len(engine.cells()) == 3


@pytest.mark.parametrize(("wanted", "segment", "cells"), [("", 4096, 4096), ("1000", 8192, 1000)])
def test_map_size_smallest_of_board_engine_and_memory(
    slot: NullSlot, wanted: str, segment: int, cells: int
) -> None:
    environment = slot.environment(**{"AFL_MAP_SIZE": wanted} if wanted else {})
    with EngineDriver(environment, map_size=segment, new=True) as engine:
        assert engine.options[1] == cells
        engine.run(b"KCOVabcdefghijklmnopqrstuvwxyz" * 8)
        assert max(engine.cells()) < cells


def test_program_is_what_engines_look_for() -> None:
    content = shim_program().read_bytes()
    assert content.startswith(b"\x7fELF")
    assert b"__AFL_SHM_ID" in content


# ---- the fold


def test_fold_same_case_same_cells(engine: EngineDriver) -> None:
    engine.run(b"KCOVabz")
    first = engine.cells()
    engine.run(b"none")
    assert engine.cells() != first
    engine.run(b"KCOVabz")
    assert engine.cells() == first


def test_fold_edges_order_matters(engine: EngineDriver) -> None:
    engine.run(b"KCOVa1")
    first = set(engine.cells())
    engine.run(b"KCOV1a")
    assert set(engine.cells()) != first


def test_fold_blocks_order_does_not_matter(tmp_path: Path) -> None:
    with NullSlot(tmp_path, fold=Fold.BLOCKS) as slot, EngineDriver(slot.environment()) as engine:
        engine.run(b"KCOVa1")
        first = engine.cells()
        engine.run(b"KCOV1a")
        assert engine.cells() == first
        assert len(first) == 7


def test_fold_count_never_returns_to_zero(tmp_path: Path) -> None:
    with NullSlot(tmp_path, fold=Fold.BLOCKS) as slot, EngineDriver(slot.environment()) as engine:
        engine.run(b"KCOV" + b"a" * 255)
        assert max(engine.cells().values()) == 255
        engine.run(b"KCOV" + b"a" * 256)
        assert sorted(engine.cells().values()) == [1] * 6


def test_fold_full_area_is_counted(slot: NullSlot, engine: EngineDriver) -> None:
    assert engine.run(b"KCOV" + b"a" * 900) == 0
    assert slot.board[BoardWord.OVERFLOWS] == 1
    # 511 PCs in a row, of which the first comes from nowhere.
    assert sum(engine.cells().values()) >= 5 + 2


def test_fold_each_case_starts_anew(slot: NullSlot, engine: EngineDriver) -> None:
    engine.run(b"")
    assert len(engine.cells()) == 1
    assert list(engine.cells().values()) == [1]
    assert slot.board[BoardWord.CELLS] == 1


def test_fold_case_that_covers_nothing_has_one_cell_once_another_covered(
    slot: NullSlot, engine: EngineDriver
) -> None:
    engine.run(b"-")
    assert engine.cells() == {}
    engine.run(b"K")
    assert len(engine.cells()) == 2
    engine.run(b"-")
    assert engine.cells() == {0: 1}


def test_fold_blind_engine_sees_one_cell_and_the_slot_all(tmp_path: Path) -> None:
    with NullSlot(tmp_path, blind=True) as slot, EngineDriver(slot.environment()) as engine:
        for case in (b"K", b"KC", b"KCO", b""):
            engine.run(case)
            assert engine.cells() == {0: 1}
        assert slot.cases(NewCells) == [b"K", b"KC", b"KCO"]
        assert slot.board[BoardWord.CELLS] == 4


# ---- what the slot learns


def test_new_cells_are_reported_once(slot: NullSlot, engine: EngineDriver) -> None:
    for case in (b"K", b"K", b"KC", b"K", b"KC", b"KCO"):
        engine.run(case)
    engine.run(b"")  # each report ends before the next execution
    assert slot.cases(NewCells) == [b"K", b"KC", b"KCO"]
    assert slot.board[BoardWord.NEW_CASES] == 3
    assert slot.board[BoardWord.EXECUTIONS] == 7
    assert slot.board[BoardWord.CELLS] == 4


def test_hello_names_the_shim(slot: NullSlot, engine: EngineDriver) -> None:
    assert slot.received[0][0] == Hello(1, engine.shim.pid)


def test_signal_of_harness_is_a_crash_and_a_suspect(slot: NullSlot, engine: EngineDriver) -> None:
    assert engine.run(b"KCOV!") == signal.SIGABRT
    assert engine.run(b"K") == 0
    assert [each for each in slot.received if isinstance(each[0], SuspectCase)] == [
        (SuspectCase(1, int(signal.SIGABRT)), b"KCOV!")
    ]
    assert slot.resets == 1


def test_exit_status_of_harness_is_no_suspect(slot: NullSlot, engine: EngineDriver) -> None:
    assert engine.run(b"KCOVx") == 1 << 8
    engine.run(b"")
    assert slot.cases(SuspectCase) == []
    assert slot.cases(NewCells) == [b"KCOVx"]


def test_exit_status_that_is_suspect_is_a_crash(tmp_path: Path) -> None:
    with (
        NullSlot(tmp_path, exit_is_suspect=True) as slot,
        EngineDriver(slot.environment()) as engine,
    ):
        assert engine.run(b"KCOVx") == signal.SIGABRT
        assert engine.run(b"") == 0
        assert (SuspectCase(1, 1 << 8), b"KCOVx") in slot.received


def test_fault_while_a_case_runs_is_a_crash(slot: NullSlot, engine: EngineDriver) -> None:
    engine.run(b"K")
    engine.begin(b"KCOV^")  # the machine dies, which NullSlot counts as a fault
    assert engine.end() == signal.SIGABRT
    assert engine.run(b"K") == 0
    (suspect,) = (each for each in slot.received if isinstance(each[0], SuspectCase))
    assert suspect == (SuspectCase(2, None), b"KCOV^")


def test_fault_after_a_case_is_reported_with_it(slot: NullSlot, engine: EngineDriver) -> None:
    assert engine.run(b"KC") == 0
    slot.wait_for(NewCells)
    time.sleep(0.1)  # the shim waits for the engine now
    slot.board.add_fault()
    assert engine.run(b"K") == 0
    assert slot.cases(SuspectCase) == [b"KC"]
    assert slot.board[BoardWord.SUSPECTS] == 1


def test_fault_that_the_target_counts_is_blamed_on_its_case_at_full_speed(
    slot: NullSlot, engine: EngineDriver
) -> None:
    """Each case ends within microseconds; nothing looks at the target but the shim."""
    ends = {}
    for number in range(2000):
        case = b"KCOV%s%d" % (b"*" if number % 100 == 50 else b"-", number)
        ends[case] = engine.run(case)
    bad = [case for case in ends if b"*" in case]
    assert [case for case, status in ends.items() if status] == bad
    suspects = [(each, case) for each, case in slot.received if isinstance(each, SuspectCase)]
    assert [case for _, case in suspects] == bad
    assert {each.status for each, _ in suspects} == {0}


def test_timeout_kill_of_the_stand_in_resets_the_guest(
    slot: NullSlot, engine: EngineDriver
) -> None:
    engine.begin(b"KCOV?")
    first = engine.stand_in
    while slot.counts() != [5, 1]:
        time.sleep(0.01)
    engine.kill_stand_in()
    assert engine.end() == signal.SIGKILL
    assert len(engine.cells()) == 6  # what was covered until then
    assert engine.run(b"KC", timed_out=True) == 0
    assert engine.stand_in != first
    assert slot.cases(TimedOut) == [b"KCOV?"]
    assert slot.resets == 1
    assert slot.board[BoardWord.TIMEOUTS] == 1


def test_kill_after_the_end_of_a_case_is_no_timeout(slot: NullSlot, engine: EngineDriver) -> None:
    engine.begin(b"KC")
    time.sleep(0.2)
    engine.kill_stand_in()
    assert engine.end() == 0
    first = engine.stand_in
    assert engine.run(b"KC", timed_out=True) == 0
    assert engine.stand_in != first
    assert not slot.cases(TimedOut)


def test_reset_every_counts_executions(tmp_path: Path) -> None:
    with NullSlot(tmp_path, reset_every=4) as slot, EngineDriver(slot.environment()) as engine:
        for _ in range(13):
            assert engine.run(b"K") == 0
        assert len(slot.cases(ResetWanted)) == 3
        assert slot.resets == 3
        assert slot.board[BoardWord.RESETS] == 3


def test_another_machine_goes_on_in_another_region(tmp_path: Path) -> None:
    with NullSlot(tmp_path, reset_every=3) as slot, EngineDriver(slot.environment()) as engine:
        slot.replace_machine = True
        for _ in range(8):
            assert engine.run(b"KC") == 0
            assert len(engine.cells()) == 3
        assert slot.resets == 2
        assert slot.present_case() == b"KC"
        assert slot.word(LaneWord.CASE_NUMBER) == 2


def test_reset_by_the_slot_while_a_case_runs_repeats_it(
    slot: NullSlot, engine: EngineDriver
) -> None:
    engine.begin(b"KCOV?")
    time.sleep(0.1)
    slot.reset()
    time.sleep(0.1)
    assert slot.board[BoardWord.REPEATED] == 1
    engine.kill_stand_in()
    assert engine.end() == signal.SIGKILL
    assert slot.present_case() == b"KCOV?"


# ---- a hostile guest, odd cases


def test_guest_words_that_make_no_sense_are_bounded(slot: NullSlot, engine: EngineDriver) -> None:
    status = engine.run(b"KCOV#")
    assert status == signal.SIGABRT
    assert sum(engine.cells().values()) <= 2 * 511
    assert engine.run(b"K") == 0


def test_case_longer_than_the_engine_may_send_is_cut(slot: NullSlot, engine: EngineDriver) -> None:
    engine.run(b"K")
    engine.claim_length(0xFFFFFFFF)
    assert engine.run_again() == 0
    assert len(slot.present_case()) == 1 << 20


def test_case_of_no_bytes_is_executed(slot: NullSlot, engine: EngineDriver) -> None:
    assert engine.run(b"") == 0
    assert slot.present_case() == b""


def test_case_of_a_mebibyte_arrives_whole(slot: NullSlot) -> None:
    case = os.urandom(1 << 20)
    with EngineDriver(slot.environment(), shared_cases=False) as engine:
        assert engine.run(case) == 0
        assert slot.present_case() == case
        assert slot.board[BoardWord.INPUT_CUT] == 0
        assert engine.run(case + b"x") == 0
        assert slot.board[BoardWord.INPUT_CUT] == 1


# ---- without a fork server


@pytest.mark.parametrize(
    ("case", "status"), [(b"KC", 0), (b"KCOVx", 1), (b"KCOV!", -signal.SIGABRT)]
)
def test_direct_run_ends_as_the_case(slot: NullSlot, case: bytes, status: int) -> None:
    done = subprocess.run([shim_program()], input=case, env=slot.environment(), check=False)
    assert done.returncode == status
    assert slot.present_case() == case


def test_direct_run_takes_a_file(slot: NullSlot, tmp_path: Path) -> None:
    (tmp_path / "case").write_bytes(b"KCO")
    command: list[str | Path] = [shim_program(), tmp_path / "case"]
    subprocess.run(command, env=slot.environment(), check=True)
    assert slot.cases(NewCells) == [b"KCO"]


def test_direct_run_without_a_slot_says_what_is_missing() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "KCOV_BRIDGE_SLOT"}
    done = subprocess.run(
        [shim_program()], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "KCOV_BRIDGE_SLOT is not set" in done.stderr


def test_direct_run_file_that_is_missing_is_told_to_the_slot(slot: NullSlot) -> None:
    command: list[str | Path] = [shim_program(), "/nowhere/case"]
    done = subprocess.run(command, env=slot.environment(), capture_output=True, check=False)
    assert done.returncode == 2
    slot.wait_for(ShimFailed)
    (failed,) = (each for each, _ in slot.received if isinstance(each, ShimFailed))
    assert "/nowhere/case" in failed.reason


def test_board_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slot"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(1)
        shim = subprocess.Popen(
            [shim_program()],
            env={**os.environ, "KCOV_BRIDGE_SLOT": str(path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = listener.accept()
        memory = os.memfd_create("memory")
        os.ftruncate(memory, 4096)
        with connection, shim:
            assert isinstance(messages.receive(connection), Hello)
            messages.send_welcome(connection, memory, memory)
            assert isinstance(messages.receive(connection), ShimFailed)
            assert "version" in shim.communicate(timeout=30)[1]
        os.close(memory)


# ---- whoever dies


def test_end_of_the_engine_ends_the_shim_in_order(slot: NullSlot, engine: EngineDriver) -> None:
    engine.run(b"K")
    engine.hang_up()
    assert engine.shim.wait(10) == 0
    assert gone(engine.stand_in)


def test_kill_of_the_shim_ends_the_stand_in(slot: NullSlot, engine: EngineDriver) -> None:
    engine.run(b"K")
    engine.shim.kill()
    assert gone(engine.stand_in)


@pytest.mark.parametrize("case", [b"K", b"KCOV?"])
def test_end_of_the_slot_ends_the_shim(slot: NullSlot, engine: EngineDriver, case: bytes) -> None:
    engine.begin(case)
    if case == b"K":
        engine.end()
    slot.close()
    assert engine.shim.wait(10) == 0
    assert gone(engine.stand_in)


def test_state_gone_ends_the_shim(slot: NullSlot, engine: EngineDriver) -> None:
    engine.run(b"K")
    slot.board.state = BoardState.GONE
    with pytest.raises(AssertionError, match="the shim ended"):
        engine.run(b"K")
    assert engine.shim.wait(10) == 0


def test_next_shim_after_one_that_was_killed_finds_a_guest(slot: NullSlot) -> None:
    with EngineDriver(slot.environment()) as engine:
        engine.begin(b"KCOV?")
        while slot.counts() != [5, 1]:
            time.sleep(0.01)
    with EngineDriver(slot.environment()) as engine:
        assert engine.run(b"KC") == 0
        assert len(engine.cells()) == 3
    assert slot.resets == 1
