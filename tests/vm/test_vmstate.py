# SPDX-License-Identifier: Apache-2.0
"""QEMU's migration stream, as it may come from versions that are not installed here."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from typing import cast

import pytest

from bridge.errors import QemuError
from bridge.vm.vmstate import StreamReader, devices_of, keeping_code, state_disk

MAGIC = struct.pack(">II", 0x5145564D, 3)
DEVICES = b"\x04" + b"all that is left, whatever it is \x01\x02" * 1000
FOOTER = b"\x7e\0\0\0\x02"
ZERO, MEM_SIZE, PAGE, END, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20


def text(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


def word(value: int) -> bytes:
    return struct.pack(">Q", value)


def start(name: str = "ram") -> bytes:
    return b"\x01\0\0\0\x02" + text(name) + struct.pack(">II", 0, 4)


def sizes(blocks: dict[str, int], *, addresses: bool) -> bytes:
    total = word(sum(blocks.values()) | MEM_SIZE)
    return total + b"".join(
        text(name) + word(size) + (word(0xFFFC0000) if addresses else b"")
        for name, size in blocks.items()
    )


def setup(*, addresses: bool = True) -> bytes:
    blocks = {"ram": 64 << 20, "pc.bios": 256 << 10, "dev/ivshmem.bar2": 1 << 30}
    return start() + sizes(blocks, addresses=addresses) + word(END) + FOOTER


def pages(*, zeroes: int, filled: int) -> bytes:
    first = word(0 | ZERO) + text("dev/ivshmem.bar2") + b"\0"
    more = b"".join(word(at << 12 | ZERO | CONTINUE) + b"\0" for at in range(1, zeroes))
    last = (word(at << 12 | PAGE | CONTINUE) + os.urandom(4096) for at in range(filled))
    return first + more + b"".join(last)


def part(content: bytes, kind: int = 2) -> bytes:
    return bytes([kind]) + b"\0\0\0\x02" + content + word(END) + FOOTER


def stream(content: bytes, size: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    return cast(io.BufferedReader, io.BufferedReader(io.BytesIO(content), size))


class TestDevicesOf:
    def test_devices_of_leaves_only_the_devices(self) -> None:
        content = MAGIC + setup() + part(pages(zeroes=9000, filled=20)) + part(b"", 3) + DEVICES
        assert devices_of(stream(content), addresses=True) == MAGIC + DEVICES

    def test_blocks_have_addresses_only_where_shared_memory_is_ignored(self) -> None:
        content = MAGIC + setup(addresses=False) + part(b"", 3) + DEVICES
        assert devices_of(stream(content), addresses=False) == MAGIC + DEVICES
        with pytest.raises(QemuError):
            devices_of(stream(content), addresses=True)

    def test_configuration_and_commands_are_stepped_over(self) -> None:
        configuration = b"\x07\0\0\0\x0apc-q35-7.2"
        command = b"\x08\0\x0b\0\x04\xff\xff\xff\xff"
        content = MAGIC + configuration + setup() + command + part(b"", 3) + DEVICES
        assert devices_of(stream(content), addresses=True) == MAGIC + DEVICES

    def test_progress_is_told_each_16_mib(self) -> None:
        told = []
        content = MAGIC + setup() + part(pages(zeroes=16 << 10, filled=0)) + DEVICES
        reader = stream(content, 4096)
        devices_of(reader, addresses=True, on_progress=lambda: told.append(reader.tell()))
        assert len(told) in (3, 4)

    @pytest.mark.parametrize("size", [0, 4, 8, 9, 40, 150, 500])
    def test_devices_of_stream_ends_early_is_an_error(self, size: int) -> None:
        content = (MAGIC + setup() + part(pages(zeroes=100, filled=0)))[:size]
        with pytest.raises(QemuError, match=r"ends early|does not begin"):
            devices_of(stream(content), addresses=True)

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"QEMU who?", "sent no migration stream"),
            (MAGIC + b"\x55", "unknown type 85"),
            (MAGIC + start("block"), "unknown section: block"),
            (MAGIC + start() + word(0x40) + bytes(100), "unknown kind 0x40"),
        ],
    )
    def test_devices_of_unknown_part_is_an_error(self, content: bytes, why: str) -> None:
        with pytest.raises(QemuError, match=why):
            devices_of(stream(content), addresses=True)


class TestStreamReader:
    @pytest.fixture
    def pipe(self) -> Iterator[tuple[int, int]]:
        reading, writing = os.pipe()
        yield reading, writing
        os.close(writing)

    def test_devices_of_stalled_writer_is_an_error(self, pipe: tuple[int, int]) -> None:
        reading, writing = pipe
        os.write(writing, b"some")
        with StreamReader(reading, 0.05) as reader:
            assert reader.read(4) == b"some"
            with pytest.raises(QemuError, match=r"has stalled for 0\.05 s"):
                reader.read(1)


class TestStateDisk:
    def test_state_disk_too_large_state_is_an_error(self) -> None:
        with pytest.raises(QemuError, match="too large"):
            state_disk(bytes((1 << 29) + 1))

    @pytest.mark.parametrize("size", [1, 65536, 65537, 1 << 20])
    def test_state_disk_has_the_state_in_its_last_clusters(self, size: int) -> None:
        state = os.urandom(size)
        fd = state_disk(state)
        content = os.pread(fd, os.fstat(fd).st_size, 0)
        os.close(fd)
        assert content.startswith(b"QFI\xfb")
        assert content[7 << 16 :].rstrip(b"\0") == state.rstrip(b"\0")
        # All clusters are counted, and none is there that is not.
        counts = struct.unpack(">32768H", content[2 << 16 : 3 << 16])
        assert sum(counts) == len(content) >> 16


def cpu(number: int, *, halted: int = 1, interrupt: int = 0, rest: bytes = b"") -> bytes:
    head = b"\x04\0\0\0" + bytes([number + 7]) + text("cpu_common")
    fields = struct.pack(">IIII", number, 1, halted, interrupt)
    return head + fields + rest + b"\x7e\0\0\0" + bytes([number + 7])


class TestKeepingCode:
    def test_keeping_code_leaves_out_the_sections_of_the_processors(self) -> None:
        parts = [b"\x04 a timer", b"\x04 between", b"\x04 at the end\0"]
        devices = MAGIC + parts[0] + cpu(0, halted=0) + parts[1] + cpu(1) + parts[2]
        assert keeping_code(devices) == MAGIC + b"".join(parts)

    @pytest.mark.parametrize(
        "section",
        [
            cpu(1, halted=0),
            cpu(0, interrupt=2),
            cpu(0, rest=b"\x05\x1acpu_common/exception_index\0\0\0\x01\0\0\0\x0e"),
        ],
        ids=["another that runs", "with an interrupt", "with a part more"],
    )
    def test_keeping_code_processor_that_a_reset_does_not_leave_so_is_none(
        self, section: bytes
    ) -> None:
        assert keeping_code(MAGIC + cpu(0) + section + b"\0") is None

    def test_keeping_code_no_processor_is_none(self) -> None:
        assert keeping_code(MAGIC + DEVICES) is None
