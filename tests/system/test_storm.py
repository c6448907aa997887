# SPDX-License-Identifier: Apache-2.0
"""A hostile guest: a storm over the shared region and the doorbell, and what is left after it.

``KCOV_BRIDGE_STORM`` is the number of mutations (``make storm`` takes ten million).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bridge
from bridge.config import Settings
from bridge.errors import IncompleteError, RunTimeoutError
from bridge.guest.guest_image import ProjectImage
from bridge.session.session import Session
from bridge.vm.accel import Accelerator
from bridge.vm.config import MachineConfig
from tests.support.guests import complaints
from tests.support.programs import guest_program
from tests.system.conformance import compile_programs, run_program, table, upload

pytestmark = pytest.mark.vm

HERE = Path(__file__).parent
MUTATIONS = int(os.environ.get("KCOV_BRIDGE_STORM", "300000"))
SEED = int(os.environ.get("KCOV_BRIDGE_STORM_SEED", "1"))
COPIES = 2000
"""Of a byte, by the command that is traced."""
PATIENCE = 10
"""How long the guest may consider the host gone after the storm, seconds."""
AFTERWARDS = ["calls_append", "mmap_shared", "owner_ends", "threads", "area_reuse"]
"""What a fresh instance must be good for after the storm."""


@pytest.fixture
def open_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A guest whose root may map a device's memory that a driver uses."""

    def relaxed(self: ProjectImage, settings: Settings, accelerator: Accelerator) -> MachineConfig:
        config = original(self, settings, accelerator)
        return dataclasses.replace(config, cmdline=f"{config.cmdline} iomem=relaxed")

    original = ProjectImage.machine_config
    with monkeypatch.context() as patch:
        patch.setattr(ProjectImage, "machine_config", relaxed)
        yield


def own_memory() -> int:
    """What this process holds beside shared memory, bytes."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"^RssAnon:\s+(\d+) kB", status, re.M)
    return int(kilobytes) << 10


def program(name: str, session: Session) -> None:
    session.put(guest_program(HERE / f"{name}.c"), f"/tmp/{name}", 0o755)


def traced(session: Session) -> str:
    """Trace a command; return what is missing."""
    try:
        words = ["dd", "if=/dev/zero", "of=/dev/null", "bs=1", f"count={COPIES}"]
        calls = session.kcov(words, trace=True, timeout=120).calls
    except (IncompleteError, RunTimeoutError) as error:
        return str(error)
    reads = sum(call.name == "read" for call in calls)
    return "" if reads >= COPIES else f"{reads} of {COPIES} reads"


@pytest.mark.parametrize("personality", ["linux", "gvisor"])
def test_a_storm(personality: str, open_memory: None, caplog: pytest.LogCaptureFixture) -> None:
    linux = personality == "linux"
    # A small region, so that what the guest touches is not the host's memory.
    guest = bridge.boot(
        target="none",
        source="python",
        syscall_pcs=True,
        region=64,
        cpus=2,
        personality=personality,
    )
    with caplog.at_level(logging.INFO), guest as session:
        doorbell, device = session.doorbell, session.device
        assert doorbell is not None
        assert device is not None
        program("storm", session)
        upload(session, compile_programs(AFTERWARDS))
        said, held = len(caplog.records), own_memory()

        # The second personality is for what is its own; a quarter will do.
        mutations = MUTATIONS if linux else MUTATIONS // 4
        storm = session.run(["/tmp/storm", str(mutations), str(SEED)], timeout=60 + mutations / 2e3)
        grown, lines = own_memory() - held, len(caplog.records) - said
        report = storm.text + storm.stderr.decode()
        found = {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", report, re.M)}
        said_by_kernel = int(session.run("dmesg | grep -c kcov_bridge").text)
        print(report, f"host memory {grown}\nhost lines {lines}\nguest lines {said_by_kernel}")
        print(doorbell.counters)
        assert storm.exit_status == 0, report
        assert found["mutations"] >= mutations
        assert found["touched_canaries"] == 0
        assert doorbell.failure is None
        assert doorbell.counters.source_failures == 0
        assert doorbell.call(lambda: "alive") == "alive"
        assert grown < 32 << 20
        assert lines < 20
        assert complaints(session) == ""
        # Lost and back again, about once a second for each of the four that wait.
        assert said_by_kernel < 50 + found["milliseconds"] // 100

        # A fresh instance, and all that can be asked of one.
        fresh = session.run("kcov-doc")
        assert fresh.exit_status == 0, fresh.stderr.decode()
        assert fresh.text.splitlines()
        results = [run_program(session, name, personality) for name in AFTERWARDS]
        assert all(result.ok for result in results), table(results)

        # Another one, over the logs of commands whose system calls are traced.
        with ThreadPoolExecutor(1) as pool:
            storm_words = ["/tmp/storm", str(mutations // 4), str(SEED + 1)]
            second = pool.submit(session.run, storm_words, timeout=60 + mutations / 2e3)
            missing = [traced(session)]
            while not second.done():
                missing.append(traced(session))
        print(missing)
        assert second.result().exit_status == 0, second.result().text
        # The guest may consider the host gone for a moment, and must report what it did not trace.
        end = time.monotonic() + PATIENCE
        while (left := traced(session)).startswith(("the PCs are incomplete", "the command was")):
            assert time.monotonic() < end, left
        assert left == ""
        assert doorbell.call(lambda: "alive") == "alive"
        assert doorbell.counters.source_failures == 0
        assert complaints(session) == ""
