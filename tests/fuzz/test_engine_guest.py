# SPDX-License-Identifier: Apache-2.0
"""The real engine on a real guest: it finds its way by what the guest's system calls cover."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.fuzz.engine import (
    JobOptions,
    find_engine,
    prepare_seeds,
    start_job,
    time_limit_ms,
)
from bridge.fuzz.shim import shim_program
from bridge.fuzz.slot import Slot, SlotOptions
from bridge.sources.pcs import syscall_pc
from bridge.util.resources import guest_directory
from bridge.vm.process import spawn
from tests.fuzz.test_slot import File, Harness, Heard

pytestmark = pytest.mark.vm

MKDIR, GETDENTS = 83, 217
SECONDS = 120.0
"""For what takes a few on a quiet machine."""


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory, heard: Heard) -> Iterator[Slot]:
    tmp_path = tmp_path_factory.mktemp("slot")
    agent, program = guest_directory() / "agent", tmp_path / "runner"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-s"]
    sources = [agent / "kcov-runner.c", Path(__file__).with_name("engine_harness.c")]
    subprocess.run(["cc", *flags, "-I", agent, "-o", program, *sources], check=True)
    settings = Settings(target="none", source="python", syscall_pcs=True, region=64)
    with Slot(
        settings,
        Harness([File(program)], ("operations",)),
        tmp_path / "slot",
        options=SlotOptions(areas=1, area_words=4096),
        listeners=[heard],
    ) as slot:
        yield slot


def test_engine_on_a_guest_finds_new_cases_and_a_crash(
    slot: Slot, heard: Heard, tmp_path: Path
) -> None:
    seconds = [slot.execute(b"lw", SECONDS).seconds for _ in range(20)]
    prepare_seeds(None, tmp_path / "seeds", defaults=(b"rr",))
    options = JobOptions(time_limit_ms=time_limit_ms(seconds) * 4)
    with start_job(
        find_engine(), slot.socket, tmp_path / "seeds", tmp_path / "out", options
    ) as job:
        end = time.monotonic() + SECONDS

        def enough() -> bool:
            if time.monotonic() > end or not job.running:
                return True
            return len(heard.new) >= 4 and any(job.crashes.glob("id:*"))

        slot.serve(enough)
        job.check()
        assert len(heard.new) >= 4, f"{slot.executions} executions in {SECONDS} s"
        job.stop()
        figures = job.figures()
    assert heard.new[0].case == b"rr"
    # Each new case covers what none before it did.
    covered: set[int] = set()
    for event in heard.new[1:]:
        pcs = {pc for area in event.pcs for pc in area}
        assert pcs
        covered |= pcs
    assert len(covered) > len({pc for area in heard.new[0].pcs for pc in area})
    crash = next(each for each in heard.suspects if each.status)
    assert crash.status == signal.SIGABRT
    assert b"!" in crash.case[:8]
    assert heard.errors == []
    assert figures is not None
    assert figures.crashes >= 1
    assert figures.corpus > 1
    # The guest takes cases as before.
    done = slot.execute(b"d", SECONDS)
    assert syscall_pc(MKDIR) in done.pcs[0]
    assert syscall_pc(GETDENTS) not in done.pcs[0]


def test_showmap_on_a_guest_writes_a_map_a_case(slot: Slot, tmp_path: Path) -> None:
    cases, maps = tmp_path / "cases", tmp_path / "maps"
    cases.mkdir()
    for case in (b"r", b"rl", b"rld"):
        (cases / case.decode()).write_bytes(case)
    engine = find_engine()
    with spawn(
        [
            engine.tool("afl-showmap"),
            *("-t", "20000"),
            *("-i", cases),
            *("-o", maps),
            "--",
            shim_program(),
        ],
        env=engine.environment(slot.socket, slot.options.map_size),
        join_output=True,
    ) as process:
        slot.serve(lambda: not process.running)
        assert process.returncode == 0, process.stderr_text
    cells = {path.name: len(path.read_text().splitlines()) for path in maps.iterdir()}
    assert 0 < cells["r"] < cells["rl"] < cells["rld"]
