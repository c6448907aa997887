# SPDX-License-Identifier: Apache-2.0
"""The devices' part of a QEMU migration stream, and a disk that QEMU's ``loadvm`` reads it from.

QEMU has no command that saves only the devices and works in every version, but a migration stream
has them after the memory. The memory is skipped: a saved guest's memory is a file of ours, and the
region that it shares with us is no part of its state.

Formats: ``migration/savevm.c`` and ``migration/ram.c`` in QEMU for the stream (big-endian, the same
since QEMU 2.4), ``docs/interop/qcow2.txt`` for the disk.
"""

from __future__ import annotations

import enum
import io
import os
import select
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from bridge.errors import QemuError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = [
    "KEEPING_CODE",
    "SNAPSHOT_NAME",
    "StreamReader",
    "devices_of",
    "keeping_code",
    "state_disk",
]

SNAPSHOT_NAME = "ready"
"""The name that ``loadvm`` gets for the state on a :func:`state_disk`."""
KEEPING_CODE = "ready-with-code"
"""The name of the same state without what has QEMU forget the code that it has translated."""

_MAGIC = struct.pack(">II", 0x5145564D, 3)
_PAGE_BYTES = 4096
_PAGES_BETWEEN_CALLS = (16 << 20) // _PAGE_BYTES
_COPY_BYTES = 1 << 20
_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_ENTRIES = _CLUSTER // 8
_QCOW2_MAGIC = b"QFI\xfb"

_word = struct.Struct(">Q")
_zero_page = struct.Struct(">QB")


class StreamReader(io.BufferedReader):
    """The reading end of a pipe that QEMU writes a migration stream to.

    Raises:
        QemuError: QEMU writes nothing for ``seconds``.
    """

    def __init__(self, fd: int, seconds: float) -> None:
        super().__init__(_PatientFile(fd, seconds), _COPY_BYTES)


class _PatientFile(io.FileIO):
    """A file that waits for each part at most ``seconds``."""

    def __init__(self, fd: int, seconds: float) -> None:
        super().__init__(fd, "rb")
        self._seconds = seconds

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        if not select.select([self], [], [], self._seconds)[0]:
            raise QemuError(f"QEMU's migration stream has stalled for {self._seconds:g} s")
        return super().readinto(buffer)


class _Section(enum.IntEnum):
    """``QEMU_VM_*``: the first byte of a section of the stream."""

    START = 1
    PART = 2
    END = 3
    FULL = 4
    CONFIGURATION = 7
    COMMAND = 8
    FOOTER = 0x7E


class _Ram(enum.IntFlag):
    """``RAM_SAVE_FLAG_*``: the low bits of each record of the memory's sections."""

    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    END = 0x10
    CONTINUE = 0x20


def devices_of(
    stream: io.BufferedReader,
    *,
    addresses: bool,
    on_progress: Callable[[], object] = lambda: None,
) -> bytes:
    """Read a migration stream to its end and return it without the memory.

    Args:
        addresses: whether the stream has the address of each block of memory, as with the
            capability ``x-ignore-shared``.
        on_progress: called about every 16 MiB of memory in the stream.

    Returns:
        A stream that QEMU takes as an incoming migration, or from a :func:`state_disk`.

    Raises:
        QemuError: the stream ends early, or has a part that is not understood.
    """
    reader = _Reader(stream)
    if reader.take(len(_MAGIC)) != _MAGIC:
        raise QemuError("QEMU sent no migration stream")
    while True:
        kind = reader.byte()
        if kind == _Section.FULL:
            # The devices are all that is left.
            return b"".join((_MAGIC, bytes([kind]), reader.rest()))
        if kind in (_Section.START, _Section.PART, _Section.END):
            reader.take(4)
            if kind == _Section.START:
                name = reader.text()
                if name != "ram":
                    raise QemuError(f"QEMU's migration stream has an unknown section: {name}")
                reader.take(8)
            _skip_memory(reader, addresses, on_progress)
        elif kind == _Section.FOOTER:
            reader.take(4)
        elif kind == _Section.CONFIGURATION:
            reader.take(reader.number(4))
        elif kind == _Section.COMMAND:
            reader.take(2)
            reader.take(reader.number(2))
        else:
            raise QemuError(f"QEMU's migration stream has a section of unknown type {kind}")


def _skip_memory(reader: _Reader, addresses: bool, on_progress: Callable[[], object]) -> None:
    """Skip the records of one of the memory's sections."""
    pages = 0
    while True:
        record = reader.number(8)
        flags, offset = record & (_PAGE_BYTES - 1), record & ~(_PAGE_BYTES - 1)
        if flags == _Ram.END:
            return
        if flags == _Ram.MEM_SIZE:
            while offset > 0:
                reader.text()
                offset -= reader.number(8)
                if addresses:
                    reader.take(8)
            continue
        if flags & ~_Ram.CONTINUE not in (_Ram.ZERO, _Ram.PAGE):
            raise QemuError(f"QEMU's migration stream has memory of unknown kind {flags:#x}")
        if not flags & _Ram.CONTINUE:
            reader.text()
        reader.take(_PAGE_BYTES if flags & _Ram.PAGE else 1)
        pages += 1 + reader.skip_zeroes()
        if pages >= _PAGES_BETWEEN_CALLS:
            pages = 0
            on_progress()


class _Reader:
    """Reads exact numbers of bytes from a stream."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def take(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) != size:
            raise QemuError("QEMU's migration stream ends early")
        return data

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def text(self) -> str:
        return self.take(self.byte()).decode(errors="replace")

    def skip_zeroes(self) -> int:
        """Skip the buffered records that are pages of zeros, and return how many there were.

        An empty region has one for each of its pages.
        """
        buffered = memoryview(self._stream.peek())
        count = 0
        for record, _ in _zero_page.iter_unpack(
            buffered[: len(buffered) // _zero_page.size * _zero_page.size]
        ):
            if record & (_PAGE_BYTES - 1) != _Ram.ZERO | _Ram.CONTINUE:
                break
            count += 1
        self.take(_zero_page.size * count)
        return count

    def rest(self) -> bytes:
        return b"".join(iter(lambda: self._stream.read(_COPY_BYTES), b""))


_CPU_SECTION = bytes([len("cpu_common")]) + b"cpu_common"
"""``vmstate_cpu_common`` in QEMU's ``cpu.c`` (later ``cpu-target.c``, ``system/cpus``). Whatever
loads it has all translated code forgotten."""
_cpu_head = struct.Struct(">BI")
_cpu_rest = struct.Struct(">IIIIBI")


def keeping_code(devices: bytes) -> bytes | None:
    """Return what :func:`devices_of` returned without what has QEMU forget translated code.

    Left out is a section for each vCPU, which says whether it is halted and what interrupts it. A
    reset, which comes before the state is loaded, leaves the first one running and the others
    halted, with no interrupt. A first one that was halted then runs as after an interrupt: the
    loop around the instruction halts it again.

    Returns:
        None if the saved state differs from that.
    """
    parts, done, at = [], 0, 0
    while (at := devices.find(_CPU_SECTION, at)) >= 0:
        start, at = at - _cpu_head.size, at + len(_CPU_SECTION)
        kind, section = _cpu_head.unpack_from(devices, start)
        number, version, halted, interrupt, footer, closes = _cpu_rest.unpack_from(devices, at)
        if (kind, version, footer, closes) != (_Section.FULL, 1, _Section.FOOTER, section):
            return None
        if interrupt or (number and not halted):
            return None
        parts.append(devices[done:start])
        done = at = at + _cpu_rest.size
    return b"".join([*parts, devices[done:]]) if parts else None


def state_disk(devices: bytes, with_code: bytes | None = None) -> int:
    """Make a disk in memory that holds what :func:`devices_of` returned, for ``loadvm``.

    The disk is an empty qcow2 of one cluster with one or two internal snapshots, as QEMU's
    ``savevm`` leaves them. Its clusters, in this order: header, table of reference counts, one
    block of them, the active L1 table, the table of snapshots; then of each snapshot its L1 table,
    its L2 table, and the state.

    Args:
        devices: the state :data:`SNAPSHOT_NAME`.
        with_code: the state :data:`KEEPING_CODE`.

    Returns:
        A descriptor, which the caller closes.

    Raises:
        OSError: there is no memory.
        QemuError: the state is larger than one L2 table and one block of reference counts allow.
    """
    refcount_table, refcounts, active, snapshots, clusters = range(1, 6)
    # KEEPING_CODE comes first: what a disk is searched for is the end.
    states = {SNAPSHOT_NAME: devices}
    if with_code is not None:
        states = {KEEPING_CODE: with_code, **states}
    parts: dict[int, bytes] = {}
    table = b""
    for number, (snapshot, state) in enumerate(states.items(), 1):
        l1, l2, first = range(clusters, clusters + 3)
        data = -(-len(state) // _CLUSTER)
        if data > _ENTRIES or first + data > _CLUSTER // 2:
            raise QemuError(f"the devices' state is too large: {len(state)} bytes")
        identity, name = str(number).encode(), snapshot.encode()
        entry = struct.pack(
            ">QIHHIIQII",
            *(l1 * _CLUSTER, 2),
            *(len(identity), len(name)),
            *(0, 0, 0),  # when it was made
            *(len(state), 0),  # bytes of the state, no extra data
        )
        table += entry + identity + name
        table += bytes(-len(table) % 8)
        # Entry 0 of the L1 table is the disk, which is empty; entry 1 is the state after it.
        parts[l1] = _word.pack(0) + _word.pack(l2 * _CLUSTER)
        parts[l2] = b"".join(_word.pack((first + at) * _CLUSTER) for at in range(data))
        parts[first] = state
        clusters = first + data
    parts[0] = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(_QCOW2_MAGIC, 2),
        *(0, 0, _CLUSTER_BITS),  # no backing file
        *(_CLUSTER, 0),  # bytes of the disk, not encrypted
        *(1, active * _CLUSTER),  # L1 table: entries, offset
        *(refcount_table * _CLUSTER, 1),  # table of reference counts: offset, clusters
        *(len(states), snapshots * _CLUSTER),
    )
    parts[refcount_table] = _word.pack(refcounts * _CLUSTER)
    parts[refcounts] = struct.pack(f">{clusters}H", *[1] * clusters)
    parts[snapshots] = table
    fd = os.memfd_create("kcov-bridge-states", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, clusters * _CLUSTER)
        for cluster, content in parts.items():
            at, left = cluster * _CLUSTER, memoryview(content)
            while left:
                written = os.pwrite(fd, left, at)
                at, left = at + written, left[written:]
    except BaseException:
        os.close(fd)
        raise
    return fd
