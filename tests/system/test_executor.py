# SPDX-License-Identifier: Apache-2.0
"""Clients of the fuzzer's kind in a real guest: many large instances, threads, forks, kills.

``KCOV_BRIDGE_EXECUTOR=100000`` makes the executor's run as long as that; ``make executor`` does.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import bridge
from bridge.session.session import Session
from bridge.sources.pcs import SYSCALL_SLOTS, Location, syscall_pc
from tests.support.guests import SEVERAL_CPUS, complaints
from tests.support.programs import guest_program

pytestmark = pytest.mark.vm

HERE = Path(__file__).parent
CALLS = int(os.environ.get("KCOV_BRIDGE_EXECUTOR", "2000"))
MOUNT = "/mnt/target"


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return {name: guest_program(HERE / f"{name}.c") for name in ("executor", "eight")}


def sessions(attribution: str) -> pytest.MarkDecorator:
    """Run a test with one and with several processors."""
    return pytest.mark.parametrize(
        "session",
        [(1, attribution), (SEVERAL_CPUS, attribution)],
        ids=["1cpu", "several-cpus"],
        indirect=True,
        scope="module",
    )


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest, programs: dict[str, Path]) -> Iterator[Session]:
    cpus, attribution = request.param
    with bridge.boot(
        target="plan9", source="python", syscall_pcs=True, cpus=cpus, attribution=attribution
    ) as session:
        for name, program in programs.items():
            session.put(program, f"/tmp/{name}", 0o755)
        yield session


def assert_nothing_is_left(session: Session) -> None:
    """No instance, no area, no complaint of the guest's kernel, no signal lost."""
    device, region, doorbell = session.device, session.region, session.doorbell
    assert device is not None
    assert region is not None
    assert doorbell is not None
    # The guest answers the wait for a process before it has closed all that the process had.
    end = time.monotonic() + 10
    while (device.instances or region.areas_in_use) and time.monotonic() < end:
        time.sleep(0.05)
    assert (device.instances, device.enabled, region.areas_in_use) == (0, 0, 0)
    assert complaints(session) == ""
    doorbell.call(doorbell.look_at_guest)
    assert (doorbell.guest_timeouts, doorbell.guest_skipped) == (0, 0)
    assert doorbell.failure is None
    assert device.totals.dropped == 0


@sessions("call")
def test_an_executor(session: Session) -> None:
    result = session.run(f"/tmp/executor --remote --dir {MOUNT} {CALLS}", timeout=120 + CALLS / 50)
    assert result.exit_status == 0, result.stderr.decode()
    figures = json.loads(result.text)
    assert figures["calls"] >= CALLS
    assert figures["pcs"] >= figures["calls"]
    assert figures["killed"] > 0
    # The target's blocks are among the signal, not only the calls' own numbers.
    assert figures["signal"] > 50
    assert figures["pkeys"] == ("pku" in session.run("grep -wo pku /proc/cpuinfo").text)
    assert_nothing_is_left(session)


# By call a thread is given what was covered during its own calls, not what its neighbours did.
@sessions("all")
def test_eight_instances_are_all_given_everything(session: Session) -> None:
    last = syscall_pc(SYSCALL_SLOTS - 1)
    assert last is not None
    # A client that is killed in a request flushes it, which pyroute2's server does not know: after
    # the executor's killed children its connection may be of no use any more. Take a new one.
    session.run(session.target.guest_teardown, timeout=60)
    session.guest.run(session.target.guest_setup, timeout=60, check=True)
    result = session.run(f"/tmp/eight {MOUNT} 8 {last + 1:x}", timeout=120)
    assert result.exit_status == 0, result.stderr.decode()
    lines = result.text.splitlines()
    found = [
        re.fullmatch(r"thread \d: (\d+) PCs, (\d+) different, 0 missing", x) for x in lines[:8]
    ]
    assert all(found), lines[:8]
    pcs = {int(line, 16) for line in lines[8:]}
    assert len(pcs) > 50
    for pc in pcs:
        location = session.symbolize(pc)
        assert isinstance(location, Location)
        assert location.file.startswith("pyroute2/")
    assert_nothing_is_left(session)
