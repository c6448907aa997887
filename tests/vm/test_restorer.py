# SPDX-License-Identifier: Apache-2.0
"""The plugin that restores a guest's memory, in a real QEMU without a guest's kernel."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path

import pytest

from bridge.errors import BootTimeoutError, BridgeError
from bridge.vm.agent import Ready
from bridge.vm.config import MachineConfig, MemoryFds
from bridge.vm.machine import Machine
from bridge.vm.restorer import RESTORER, Restored, compiled_restorer
from bridge.vm.snapshot import Snapshot, new_memory
from bridge.vm.vmstate import KEEPING_CODE, SNAPSHOT_NAME
from tests.vm.support import READY, TCG, boot_sector

MEMORY = 64 << 20
PAGE = 4096
WRITES = bytes.fromhex("b0ff e621 e6a1 b80080 8ed8 bf0000 ff05 ebfc")
"""mov al, 0xff; out 0x21, al; out 0xa1, al: no interrupts. mov ax, 0x8000; mov ds, ax; mov di, 0;
inc word [di]; jmp: without end."""
HOLE = 48 << 20


class Guest:
    """A machine that starts from a snapshot of a guest that has reported that it is ready."""

    def __init__(self, stack: ExitStack, directory: Path, config: MachineConfig) -> None:
        with ExitStack() as first:
            ram = new_memory(MEMORY)
            first.callback(os.close, ram)
            os.pwrite(ram, b"what was there", 32 << 20)
            machine = first.enter_context(Machine(config, memory=MemoryFds(ram)))
            machine.start()
            machine.wait_ready()
            Snapshot.save(directory, machine, ram)
        self.snapshot = stack.enter_context(Snapshot(directory))
        self.ram, states = new_memory(MEMORY), self.snapshot.states()
        stack.callback(os.close, self.ram)
        stack.callback(os.close, states)
        self.snapshot.restore(self.ram)
        fds = MemoryFds(
            self.ram,
            states,
            self.snapshot.devices,
            self.snapshot.memory,
            self.snapshot.keeps_code,
        )
        self.machine = stack.enter_context(Machine(config, memory=fds))
        self.machine.start()
        self.machine.adopt_ready(Ready("", "", 0, 0))

    def rewind(self) -> Restored:
        """Reset the guest, which reports nothing then; its memory is compared meanwhile."""
        answers: list[Restored] = []

        def restore() -> None:
            answer = self.machine.restore_memory()
            assert answer is not None
            answers.append(answer)
            size = os.fstat(self.ram).st_size
            assert os.pread(self.ram, size, 0) == os.pread(self.snapshot.memory, size, 0)

        with pytest.raises(BootTimeoutError):
            self.machine.rewind(restore, timeout=0.1)
        self.machine.adopt_ready(Ready("", "", 0, 0))
        return answers[0]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the human monitor is told."""
    told: list[str] = []
    monitor = Machine._monitor

    def tell(machine: Machine, command: str) -> str:
        told.append(command)
        return monitor(machine, command)

    monkeypatch.setattr(Machine, "_monitor", tell)
    return told


@pytest.fixture
def config(tmp_path: Path) -> MachineConfig:
    """A guest that writes into its memory without end once it has reported that it is ready."""
    plugin = compiled_restorer("qemu-system-x86_64")
    assert plugin is not None
    disk = tmp_path / "disk.img"
    disk.write_bytes(boot_sector(report=READY, action=WRITES))
    return MachineConfig(TCG, memory_mib=64, disk=disk, boot_timeout=120, restorer=plugin)


@pytest.fixture
def guest(tmp_path: Path, config: MachineConfig) -> Iterator[Guest]:
    with ExitStack() as stack:
        yield Guest(stack, tmp_path / "saved", config)


def test_restore_memory_all_pages_are_compared_before_any_is_tracked(
    guest: Guest, commands: list[str]
) -> None:
    before = os.fstat(guest.ram).st_blocks
    for at in (0x7000, 32 << 20, HOLE, MEMORY - PAGE):
        os.pwrite(guest.ram, b"what is new", at)
    answer = guest.rewind()
    assert answer.error == answer.hidden == answer.tracked == 0
    assert answer.restored == 4
    assert answer.freed >= 2 * PAGE
    assert os.fstat(guest.ram).st_blocks <= before + 8
    assert f"loadvm {KEEPING_CODE}" in commands


def test_restore_memory_tracked_pages_are_those_that_the_guest_wrote(guest: Guest) -> None:
    guest.machine.track_memory()
    for _ in range(3):
        guest.machine.execute("cont")
        time.sleep(0.2)
        answer = guest.rewind()
        assert answer.error == answer.hidden == 0
        assert answer.restored >= 1
        if answer.tracked:
            # The guest writes one page; QEMU's devices wrote few when they were loaded.
            assert answer.candidates < 100
        else:
            assert answer.candidates > 100


def test_restore_memory_page_out_of_qemus_sight_has_all_code_translated_again(
    guest: Guest, commands: list[str]
) -> None:
    # PAM0 of the chipset: no memory at 0xf0000 any more, as a guest would say it.
    guest.machine._monitor("o /w 0xcf8 0x80000090")
    guest.machine._monitor("o /b 0xcfc 0")
    os.pwrite(guest.ram, b"what is new", 0xF0000)
    answer = guest.rewind()
    assert answer.hidden == 1
    assert f"loadvm {SNAPSHOT_NAME}" in commands
    commands.clear()
    assert guest.rewind().hidden == 0
    assert f"loadvm {KEEPING_CODE}" in commands


def test_rewind_lost_guest_has_all_code_translated_again(guest: Guest, commands: list[str]) -> None:
    guest.machine.lose_silent(1.0)
    assert guest.rewind().hidden == 0
    assert f"loadvm {SNAPSHOT_NAME}" in commands
    guest.rewind()
    assert f"loadvm {KEEPING_CODE}" in commands


def test_restore_memory_qemu_gone_is_an_error(guest: Guest) -> None:
    guest.machine._process.kill()
    with pytest.raises(BridgeError, match="QEMU"):
        guest.machine.restore_memory()


def test_restore_memory_without_the_plugin_is_the_callers_work(
    tmp_path: Path, config: MachineConfig
) -> None:
    with ExitStack() as stack:
        guest = Guest(stack, tmp_path / "saved", replace(config, restorer=None))
        assert guest.machine.restore_memory() is None


def test_compiled_restorer_that_qemu_does_not_load_is_none(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho 'this QEMU has no plugins' >&2; exit 1\n")
    qemu.chmod(0o755)
    assert compiled_restorer(str(qemu)) is None


def test_restorer_for_each_api_compiles_without_a_warning(tmp_path: Path) -> None:
    for flags in ((), ("-DPLUGIN_API=7",)):
        RESTORER.compile(tmp_path / "plugin.so", "-Werror", *flags)


def test_answer_has_the_fields_of_the_plugin() -> None:
    (body,) = re.findall(r"struct answer \{(.*?)\};", RESTORER.source.read_text(), re.DOTALL)
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
    names = re.findall(r"\w+", body.replace("uint64_t", ""))
    assert names == [each.name for each in fields(Restored)]
