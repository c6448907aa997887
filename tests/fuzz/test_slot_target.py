# SPDX-License-Identifier: Apache-2.0
"""A slot with a target: what is a finding only the second time, and what needs no reset."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.fuzz.board import BoardWord
from bridge.fuzz.campaign_job import CampaignJob
from bridge.fuzz.lane import LaneWord
from bridge.fuzz.messages import GO, NewCells, SuspectCase, TimedOut
from bridge.fuzz.monitor import MachineMonitor
from bridge.fuzz.slot import Slot, SlotOptions
from bridge.fuzz.slot_events import NewCase, Suspect
from bridge.fuzz.titles import Kind, faults_of
from bridge.session.target_host import TargetState
from tests.fuzz.planted_target import PlantedTarget
from tests.fuzz.test_slot import SECONDS, File, Harness, Heard, Server, Shim
from tests.fuzz.test_slot import program as program

pytestmark = pytest.mark.vm

PACKAGES = ("tests.fuzz.planted",)
KNOWN = 3
"""Faults that need no reset, in a row."""


class Judge(Heard):
    """A listener that keeps everything, and judges as a campaign's job does."""

    def __init__(self) -> None:
        super().__init__()
        self.job = CampaignJob()
        self.job._packages = PACKAGES

    def new_case(self, event: NewCase) -> None:
        super().new_case(event)
        self.job.new_case(event)

    def suspect(self, event: Suspect) -> bool:
        super().suspect(event)
        return self.job.suspect(event)


def run_to_its_end(shim: Shim, case: bytes) -> None:
    """Run a case that the slot may notice a fault of before it ends; so does the real shim."""
    end = time.monotonic() + SECONDS
    if shim.run(case) is None:
        while shim.lane[LaneWord.DONE] != shim.number:
            assert time.monotonic() < end
            time.sleep(0.001)
    assert shim.lane[LaneWord.STATUS] == 0


@pytest.fixture(scope="module")
def everything(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slot]:
    with (
        MachineMonitor() as monitor,
        Slot(
            Settings(source="python", diagnose=True),
            Harness([File(program)]),
            tmp_path_factory.mktemp("slot"),
            target=PlantedTarget,
            target_state=TargetState.FORK,
            options=SlotOptions(confirm_seconds=1, known_faults=KNOWN),
            monitor=monitor,
        ) as slot,
    ):
        yield slot


@pytest.fixture
def judge() -> Judge:
    return Judge()


@pytest.fixture
def slot(everything: Slot, judge: Judge) -> Slot:
    everything._listeners = ()
    everything.reset("between tests")
    everything._listeners = (judge,)
    everything.case_seconds = 0.0
    everything.slow = everything.spared = 0
    return everything


def test_serve_case_that_is_slow_once_is_no_finding(
    slot: Slot, judge: Judge, tmp_path: Path
) -> None:
    # So that the second time may take a minute.
    slot.case_seconds = 60.0
    case = b"cslow %s" % str(tmp_path / "mark").encode()

    def work(shim: Shim) -> None:
        assert shim.run(case, 0.5) is None
        assert shim.say(TimedOut(shim.number)) == GO
        # The engine goes on, and the case is quick from now on.
        assert shim.run(case) == 0
        assert shim.run(b"chello") == 0

    Server(slot).while_served(work)
    assert (tmp_path / "mark").exists()
    assert judge.suspects == []
    assert judge.resets == ["time-out"]
    assert slot.slow == 1


def test_serve_case_that_hangs_is_a_finding_of_the_second_time(slot: Slot, judge: Judge) -> None:
    def work(shim: Shim) -> None:
        assert shim.run(b"chang", 0.5) is None
        assert shim.say(TimedOut(shim.number)) == GO
        assert shim.run(b"chello") == 0

    Server(slot).while_served(work)
    (event,) = judge.suspects
    assert (event.case, event.status, event.timed_out) == (b"chang", None, True)
    for stacks in (event.evidence.stacks, event.evidence.later):
        assert "in loop_forever" in stacks
    fault = faults_of(event, PACKAGES)[0]
    assert fault.kind is Kind.TARGET_HANG
    assert fault.title == "the target hangs in loop_forever (fuzz/planted.py)"
    assert judge.resets == ["time-out", "time-out"]
    assert slot.slow == 0


def test_serve_exception_that_is_known_needs_no_reset(slot: Slot, judge: Judge) -> None:
    def work(shim: Shim) -> None:
        assert shim.run(b"chello") == 0
        assert shim.say(NewCells(shim.number)) == GO
        assert slot.stability.reference == b"chello"
        for times in range(1 + KNOWN + 1):
            epoch = shim.board[BoardWord.EPOCH]
            run_to_its_end(shim, b"craise")
            assert shim.say(SuspectCase(shim.number, 0)) == GO
            # The first one is new, and the last one of too many in a row.
            reset = times in (0, KNOWN + 1)
            assert shim.board[BoardWord.EPOCH] == epoch + reset, times
            assert not slot.trouble()
            assert shim.run(b"chello") == 0

    Server(slot).while_served(work)
    assert [event.case for event in judge.suspects] == [b"craise"] * (KNOWN + 2)
    assert judge.resets == ["finding", "finding"]
    assert slot.spared == KNOWN
    # Each counts.
    findings = judge.job.take_news().findings
    assert len(findings) == KNOWN + 2
    assert {each.name for each in findings} == {findings[0].name}
    assert b"AssertionError in check_header" in findings[0].files["finding.json"]


def test_serve_harness_that_dies_again_needs_a_reset(slot: Slot, judge: Judge) -> None:
    def work(shim: Shim) -> None:
        assert shim.run(b"chello") == 0
        assert shim.say(NewCells(shim.number)) == GO
        for _ in range(2):
            status = shim.run(b"abort")
            assert status is not None
            assert os.WTERMSIG(status) == signal.SIGABRT
            assert shim.say(SuspectCase(shim.number, status)) == GO

    Server(slot).while_served(work)
    assert judge.resets == ["finding", "finding"]
    assert slot.spared == 0
