# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests of machines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge.vm.accel import Accelerator
from bridge.vm.config import MachineConfig
from bridge.vm.machine import Machine
from tests.vm.support import EMPTY, TCG, boot_sector


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(EMPTY) as machine:
        machine.start()
        yield machine


@pytest.fixture
def booted(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """Starts a machine with such a guest."""
    with contextlib.ExitStack() as stack:

        def boot(*extra: str, accelerator: Accelerator = TCG, **content: bytes) -> Machine:
            image = tmp_path / "disk.img"
            image.write_bytes(boot_sector(**content))
            # Stopped at first: on a busy machine its end could come before we know it.
            config = MachineConfig(
                accelerator, memory_mib=64, image=image, boot_timeout=60, extra_args=("-S", *extra)
            )
            machine = Machine(config, console_path=tmp_path / "console.log")
            stack.enter_context(machine)
            machine.start()
            machine.execute("cont")
            return machine

        yield boot
