# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a real QEMU without a guest, and what they depend on."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import BridgeError, GuestLostError, ImageError, QemuError, UsageError
from bridge.guest.guest_image import CustomImage
from bridge.session import snapshots
from bridge.targets import Endpoint, QemuDevice
from bridge.vm.accel import Accelerator
from bridge.vm.agent import Ready
from bridge.vm.config import MachineConfig, MemoryFds
from bridge.vm.machine import Machine
from bridge.vm.network import EpochWord
from bridge.vm.snapshot import KEPT, Snapshot, fingerprint, new_memory, prune

TCG = Accelerator("tcg", "test")
EMPTY = MachineConfig(TCG, memory_mib=64)
MEMORY = 64 << 20
CPUINFO = (
    "processor\t: 0\nmodel name\t: One\nMHz\t: 1\nflags\t: a b\n\nprocessor\t: 1\nflags\t: c\n"
)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks


def wait_for_firmware(machine: Machine) -> None:
    """Until the firmware has found nothing to boot, and the processor rests."""
    command: dict[str, object] = {"command-line": "info registers"}
    deadline = time.monotonic() + 60
    while "HLT=1" not in str(machine.execute("human-monitor-command", command)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def fds() -> Iterator[MemoryFds]:
    fds = MemoryFds(new_memory(MEMORY))
    yield fds
    os.close(fds.ram)


@pytest.fixture
def saved(tmp_path: Path, fds: MemoryFds) -> Path:
    """What a machine left whose firmware has found nothing to boot."""
    directory = tmp_path / "snapshots" / "saved"
    os.pwrite(fds.ram, b"what was there", 32 << 20)
    with Machine(EMPTY, memory=fds) as machine:
        machine.start()
        wait_for_firmware(machine)
        Snapshot.save(directory, machine, fds.ram)
    return directory


def test_start_from_a_snapshot_continues_the_saved_guest(saved: Path, fds: MemoryFds) -> None:
    with Snapshot(saved) as snapshot:
        memory, states = new_memory(MEMORY), snapshot.states()
        snapshot.restore(memory)
        assert content(memory) == content(fds.ram)
        assert content(memory)[32 << 20 :].startswith(b"what was there")
        with Machine(EMPTY, memory=MemoryFds(memory, states, snapshot.devices)) as machine:
            machine.start()
            status = machine.execute("query-status")
            assert isinstance(status, dict)
            assert status["status"] == "paused"
            # As often as one likes, after running.
            machine.adopt_ready(Ready("", "", 0, 0))
            for _ in range(3):
                machine.execute("cont")
                os.pwrite(memory, b"what is new", 48 << 20)
                with pytest.raises(BridgeError, match="not ready"):
                    machine.rewind(lambda: snapshot.restore(memory), timeout=0.1)
                assert content(memory)[48 << 20 :].startswith(bytes(64))
                machine.adopt_ready(Ready("", "", 0, 0))
        os.close(memory)
        os.close(states)


def test_rewind_fails_machine_is_lost(saved: Path) -> None:
    def fails() -> None:
        raise ImageError("no memory any more")

    with Snapshot(saved) as snapshot:
        memory, states = new_memory(MEMORY), snapshot.states()
        snapshot.restore(memory)
        with Machine(EMPTY, memory=MemoryFds(memory, states, snapshot.devices)) as machine:
            machine.start()
            with pytest.raises(UsageError, match="not ready"):
                machine.rewind(fails)
            machine.adopt_ready(Ready("", "", 0, 0))
            with pytest.raises(ImageError):
                machine.rewind(fails)
            with pytest.raises(GuestLostError, match="no memory any more"):
                machine.check()
        os.close(memory)
        os.close(states)


def test_qemu_starts_while_the_memory_is_loaded(saved: Path, fds: MemoryFds) -> None:
    with Snapshot(saved) as snapshot:
        memory, states = new_memory(MEMORY), snapshot.states()
        with (
            snapshot.loading(memory) as loading,
            Machine(EMPTY, memory=MemoryFds(memory, states, loading.devices)) as machine,
        ):
            machine.start()
            loading.check()
            assert content(memory) == content(fds.ram)
        os.close(memory)
        os.close(states)


def test_memory_that_cannot_be_loaded(saved: Path) -> None:
    with Snapshot(saved) as snapshot:
        memory, states = new_memory(MEMORY), snapshot.states()
        os.truncate(saved / "memory", 4096)
        with snapshot.loading(memory) as loading:
            machine = Machine(EMPTY, memory=MemoryFds(memory, states, loading.devices))
            with machine, pytest.raises(QemuError):
                machine.start()
            with pytest.raises(ImageError, match="the file ends"):
                loading.check()
        os.close(memory)
        os.close(states)


def test_memory_that_is_loaded_for_nobody(saved: Path) -> None:
    with Snapshot(saved) as snapshot:
        memory = new_memory(MEMORY)
        with snapshot.loading(memory) as loading:
            loading.end()
            loading.check()
        os.close(memory)


def test_memory_that_was_zero_takes_none(saved: Path) -> None:
    with Snapshot(saved) as snapshot:
        memory = new_memory(MEMORY)
        snapshot.restore(memory)
        least = blocks(memory)
        os.pwrite(memory, b"\1" * MEMORY, 0)
        snapshot.restore(memory)
        assert blocks(memory) == least < MEMORY // 512 // 4
        assert (saved / "memory").stat().st_blocks < MEMORY // 512 // 4
        os.close(memory)


def test_nobody_else_may_read_it(saved: Path) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) == 0o700
    assert stat.S_IMODE(saved.parent.stat().st_mode) == 0o700
    for path in saved.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_snapshot_incomplete_is_refused(saved: Path) -> None:
    with (saved / "memory").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(ImageError, match="cannot be used"):
        Snapshot(saved)
    with pytest.raises(ImageError, match="cannot be used"):
        Snapshot(saved.parent / "no such")


@pytest.mark.parametrize("name", ["memory", "devices"])
def test_snapshot_content_changed_is_damaged(saved: Path, name: str) -> None:
    with Snapshot(saved) as snapshot:
        assert not snapshot.damaged
        with (saved / name).open("r+b") as file:
            file.seek(100)
            file.write(b"something else")
        assert snapshot.damaged
        assert snapshots.remove_if_damaged(snapshot)
        assert not saved.exists()
        assert not snapshot.damaged, "what is gone is not damaged"


def test_snapshot_does_not_load_ends_qemu(saved: Path) -> None:
    devices = saved / "devices"
    devices.write_bytes(devices.read_bytes()[:1000] + bytes(devices.stat().st_size - 1000))
    with Snapshot(saved) as snapshot:
        memory, states = new_memory(MEMORY), snapshot.states()
        with (
            Machine(EMPTY, memory=MemoryFds(memory, states, snapshot.devices)) as machine,
            pytest.raises(QemuError),
        ):
            machine.start()
        os.close(memory)
        os.close(states)


def test_save_no_room_is_an_image_error(tmp_path: Path, fds: MemoryFds) -> None:
    (tmp_path / "file").touch()
    with Machine(EMPTY, memory=fds) as machine:
        machine.start()
        with pytest.raises(ImageError, match="cannot be written") as caught:
            Snapshot.save(tmp_path / "file" / "saved", machine, fds.ram)
    assert "--no-snapshot" in caught.value.report()


def test_ready_snapshot_making_fails_is_tried_again_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason was, it may have been this run's."""
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path))
    tried = []

    def make(*_: object) -> None:
        tried.append(True)
        raise QemuError("QEMU was killed by SIGABRT")

    monkeypatch.setattr(snapshots, "_make", make)
    for name in ("disk.img", "key"):
        (tmp_path / name).write_text("none")
    image = CustomImage(tmp_path / "disk.img", tmp_path / "key")
    for count in (1, 2, 3):
        with pytest.raises(QemuError, match="SIGABRT"):
            snapshots.ready_snapshot(image, EMPTY, MEMORY)
        assert len(tried) == count
    assert {path.name for path in (tmp_path / "locks").iterdir()} == {f"snapshot-{image.name}"}


def test_those_not_used_for_long_are_thrown_away(tmp_path: Path) -> None:
    for number in range(KEPT + 3):
        (tmp_path / f"image-{number}").mkdir()
        os.utime(tmp_path / f"image-{number}", (number, number))
    prune(tmp_path, lambda name: name != f"image-{KEPT + 1}")
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {f"image-{number}" for number in range(3, KEPT + 3)} - {f"image-{KEPT + 1}"}
    prune(tmp_path / "no such")


WIRING: dict[str, Any] = {
    "endpoints": (Endpoint("9p", 4000, 564),),
    "connected": True,
    "coverage_epoch": EpochWord("/proc/1/fd/4", 256),
    "gate": Path("/proc/1/fd/3"),
    "datagrams": Path("/run/it"),
    "relay": Path("/relay"),
    "host_addresses": Path("/proc/1/fd/5"),
    "ssh_port": 2222,
    "plugin": Path("/plugin.so"),
    "restorer": Path("/restorer.so"),
    "boot_timeout": 3.0,
    "name": "another",
    "environment": (("KCOV_BRIDGE_NATIVE", "/proc/1/fd/6"),),
}
IDENTITY: dict[str, Any] = {
    "accelerator": Accelerator("kvm", "test"),
    "kernel": None,
    "initrd": None,
    "cmdline": "quiet kcov_bridge.spin_us=1",
    "disk": None,
    "image": Path(__file__),
    "memory_mib": 512,
    "cpus": 2,
    "cpu": "Nehalem",
    "devices": (QemuDevice("edu", ("-device", "edu")),),
    "channel": False,
    "network": False,
    "qemu": "qemu-system-x86_64",
    "sandbox": False,
    "extra_args": ("-device", "edu"),
}


class TestFingerprint:
    @pytest.fixture
    def config(self, tmp_path: Path) -> MachineConfig:
        for name in ("vmlinux", "initrd", "root", "qemu"):
            (tmp_path / name).write_text(name)
        (tmp_path / "qemu").chmod(0o755)
        return MachineConfig(
            TCG,
            kernel=tmp_path / "vmlinux",
            initrd=tmp_path / "initrd",
            disk=tmp_path / "root",
            cmdline="quiet",
            qemu=str(tmp_path / "qemu"),
        )

    def test_fingerprint_wiring_is_left_out(self, config: MachineConfig) -> None:
        before = fingerprint(config, 1 << 30, cpuinfo=CPUINFO)
        other = dataclasses.replace(config, **WIRING)
        assert other.identity == config.identity == config
        assert fingerprint(other, 1 << 30, cpuinfo=CPUINFO) == before
        assert fingerprint(config, 1 << 30, cpuinfo=CPUINFO, prepared="true") != before
        assert (
            fingerprint(config, 1 << 30, cpuinfo=CPUINFO.replace("MHz\t: 1", "MHz\t: 2")) == before
        )

    def test_config_each_field_is_identity_or_wiring(self) -> None:
        names = {each.name for each in dataclasses.fields(MachineConfig)}
        assert names == WIRING.keys() | IDENTITY.keys()
        assert not WIRING.keys() & IDENTITY.keys()

    @pytest.mark.parametrize("name", IDENTITY)
    def test_another_machine(self, config: MachineConfig, name: str) -> None:
        change = {name: IDENTITY[name]} | ({"initrd": None} if name == "kernel" else {})
        changed = dataclasses.replace(config, **change)
        assert fingerprint(changed, 1 << 30, cpuinfo=CPUINFO) != fingerprint(
            config, 1 << 30, cpuinfo=CPUINFO
        )

    def test_another_processor_by_the_accelerator(self, config: MachineConfig) -> None:
        prints = {
            fingerprint(dataclasses.replace(config, accelerator=each), 1 << 30, cpuinfo=CPUINFO)
            for each in (TCG, Accelerator("tcg", "why"), Accelerator("tcg", "why", "Nehalem"))
        }
        assert len(prints) == 2, "the reason is told and no more"

    def test_fingerprint_kvm_includes_the_hosts_kernel(
        self, config: MachineConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kvm = dataclasses.replace(config, accelerator=Accelerator("kvm", "test"))
        before = [fingerprint(each, 1 << 30, cpuinfo=CPUINFO) for each in (config, kvm)]
        monkeypatch.setattr(
            "bridge.vm.snapshot.os.uname",
            lambda: os.uname_result(("Linux", "here", "7.0-other", "#1", "x86_64")),
        )
        after = [fingerprint(each, 1 << 30, cpuinfo=CPUINFO) for each in (config, kvm)]
        assert after[0] == before[0]
        assert after[1] != before[1]

    @pytest.mark.parametrize("name", ["vmlinux", "initrd", "root", "qemu"])
    def test_fingerprint_replaced_file_changes_it(
        self, config: MachineConfig, tmp_path: Path, name: str
    ) -> None:
        before = fingerprint(config, 1 << 30, cpuinfo=CPUINFO)
        os.utime(tmp_path / name, (1, 1))
        assert fingerprint(config, 1 << 30, cpuinfo=CPUINFO) != before

    def test_another_qemu(self, config: MachineConfig, tmp_path: Path) -> None:
        shutil.copy2(tmp_path / "qemu", tmp_path / "other")
        other = dataclasses.replace(config, qemu=str(tmp_path / "other"))
        assert fingerprint(other, 1 << 30, cpuinfo=CPUINFO) != fingerprint(
            config, 1 << 30, cpuinfo=CPUINFO
        )

    def test_other_modules(self, config: MachineConfig) -> None:
        prints = {
            fingerprint(config, 1 << 30, modules, CPUINFO)
            for modules in ((), ("9p",), ("9p", "9pnet_fd"), ("9pnet_fd", "9p"))
        }
        assert len(prints) == 4

    def test_another_region(self, config: MachineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        before = fingerprint(config, 1 << 30, cpuinfo=CPUINFO)
        assert fingerprint(config, 1 << 29, cpuinfo=CPUINFO) != before
        monkeypatch.setattr("bridge.device.abi.VERSION", 1000)
        assert fingerprint(config, 1 << 30, cpuinfo=CPUINFO) != before

    @pytest.mark.parametrize(
        "change", [("One", "Two"), ("a b", "a"), ("\n\n", "\nmicrocode\t: 1\n\n")]
    )
    def test_another_processor(self, config: MachineConfig, change: tuple[str, str]) -> None:
        before = fingerprint(config, 1 << 30, cpuinfo=CPUINFO)
        assert fingerprint(config, 1 << 30, cpuinfo=CPUINFO.replace(*change)) != before
        assert fingerprint(config, 1 << 30) != before
