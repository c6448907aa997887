# SPDX-License-Identifier: Apache-2.0
"""The plan: memory that the bridge and the plugin in QEMU share.

The guest cannot see it. It is an array of 64-bit words, each with one writer. ``tcg/plan.h`` is the
plugin's definition; ``tests/sources/guest_kernel/test_plan.py`` compares the two.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Sequence
from enum import IntEnum, IntFlag

from bridge.device.abi import REQUESTS_OFFSET, SLOT_WORDS, SLOTS, WORD, HeaderWord, RequestWord
from bridge.errors import SourceError

__all__ = ["CpuWord", "Plan", "PlanWord", "Ram", "RangeFlag", "SlotWord"]

MAGIC = 0x4E414C50564F434B  # "KCOVPLAN" in memory
VERSION = 5
CPUS = 256
VECTORS = 256
RANGES = 65536
BLOCKS = 1 << 20

CPU_WORDS = 8
PLAN_SLOT_WORDS = 8
RANGE_WORDS = 4
BLOCK_WORDS = 2

CPUS_OFFSET = 4096
SLOTS_OFFSET = CPUS_OFFSET + CPUS * CPU_WORDS * WORD
VECTORS_OFFSET = SLOTS_OFFSET + SLOTS * PLAN_SLOT_WORDS * WORD
RANGES_OFFSET = VECTORS_OFFSET + VECTORS * WORD
BLOCKS_OFFSET = RANGES_OFFSET + RANGES * RANGE_WORDS * WORD
BYTES = BLOCKS_OFFSET + BLOCKS * BLOCK_WORDS * WORD

MARKER_BYTES = 64
NOWHERE = 2**64 - 1

_BUSY_SECONDS = 1.0

_libc = ctypes.CDLL(None, use_errno=True)
# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/linux/membarrier.h in Linux.
_MEMBARRIER = 324
_MEMBARRIER_GLOBAL_EXPEDITED = 1 << 1


def _barrier_everywhere() -> bool:
    """Make this thread, and all threads of registered processes, pass a full memory barrier.

    Returns:
        Whether the system call exists: membarrier(2), from Linux 4.16 on.
    """
    return bool(_libc.syscall(_MEMBARRIER, _MEMBARRIER_GLOBAL_EXPEDITED, 0, 0) == 0)


class PlanWord(IntEnum):
    """Index of each word of the header."""

    MAGIC = 0
    VERSION = 1
    HIDDEN = 2
    HIDDEN_STRIDE = 3
    RAM_BYTES = 4
    BARRIERS = 5
    """1: the bridge can make the plugin's threads pass a memory barrier."""
    COVERAGE_EPOCH = 6
    """Offset of that word in the region; the plugin writes it when an area is half full."""
    WANT = 8
    EPOCH = 9
    RANGES_EPOCH = 10
    RANGES = 11
    SYSCALL_ENTRY = 12
    SLOTS = 13
    MARKER = 14
    MARKER_OFFSET = 15
    """Offset of the marker in the guest's memory."""
    HAVE = 16
    """Progress on WANT. The plugin writes this word and those after it."""
    API = 17
    RESETS = 18
    TRANSLATED = 19
    BLOCKS = 20
    BLOCKS_LOST = 21
    RAM = 22
    """A :class:`Ram`."""
    EXPEDITED = 23
    """1: the plugin relies on the bridge's barriers."""


class Ram(IntEnum):
    """Whether the plugin has found the guest's memory in QEMU."""

    UNKNOWN = 0
    FOUND = 1
    REFUSED = 2
    """The marker is not where the guest reported it."""


class CpuWord(IntEnum):
    """Index of each word of a vCPU. CURRENT and PREEMPT are offsets in the guest's memory."""

    CURRENT = 0
    PREEMPT = 1
    BUSY = 4
    """slot + 1 while the plugin writes to that slot's area; written by the plugin."""


class SlotWord(IntEnum):
    """Index of each word of a slot. AREA is an offset in the region, in bytes."""

    TASK = 0
    AREA = 1
    WORDS = 2
    BITMAP_WORDS = 3
    NUMBER = 4
    """Another one for each owner: a task's address may be used again."""
    APPENDED = 5
    """PLUGIN"""
    DROPPED = 6
    """PLUGIN"""


class RangeFlag(IntFlag):
    """Properties of the code in a range; see ``tcg/plan.h``."""

    RECORD = 1
    NOINSTR = 2
    SCHEDULE = 4
    SCHEDULE_END = 8
    SWITCH_START = 16
    INTERRUPT_COUNT = 32
    EXIT_WORK = 64
    EXIT_DONE = 128


class Plan:
    """The memory of one plan, created before QEMU starts.

    Args:
        memory: size of the guest's memory, in bytes.

    Raises:
        SourceError: there is no memory.
    """

    def __init__(self, memory: int) -> None:
        try:
            self.fd = os.memfd_create("kcov-bridge-plan", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, BYTES)
            self._map = mmap.mmap(self.fd, BYTES)
        except OSError as error:
            raise SourceError(
                f"no memory for the guest kernel's coverage: {error.strerror}"
            ) from error
        self._bytes = memoryview(self._map)
        self.words = self._bytes.cast("Q")
        self._barrier = threading.Lock()
        words = self.words
        words[PlanWord.VERSION] = VERSION
        words[PlanWord.HIDDEN] = REQUESTS_OFFSET + RequestWord.HIDDEN * WORD
        words[PlanWord.HIDDEN_STRIDE] = SLOT_WORDS * WORD
        words[PlanWord.RAM_BYTES] = memory
        words[PlanWord.COVERAGE_EPOCH] = HeaderWord.COVERAGE_EPOCH * WORD
        words[PlanWord.MARKER_OFFSET] = NOWHERE
        words[PlanWord.BARRIERS] = _barrier_everywhere()
        words[PlanWord.EPOCH] = 1
        words[PlanWord.RANGES_EPOCH] = 0
        for cpu in range(CPUS):
            self.set_cpu(cpu, NOWHERE, NOWHERE)
        words[PlanWord.MAGIC] = MAGIC

    def _next_epoch(self) -> None:
        self.words[PlanWord.EPOCH] += 1
        if not (self.words[PlanWord.EXPEDITED] and _barrier_everywhere()):
            # A locked instruction is a full barrier on x86; it pairs with the plugin's.
            with self._barrier:
                pass

    def set_cpu(self, cpu: int, current: int, preempt: int) -> None:
        """Set where vCPU ``cpu`` keeps its variables: offsets in the guest's memory."""
        at = CPUS_OFFSET // WORD + cpu * CPU_WORDS
        self.words[at + CpuWord.CURRENT] = current
        self.words[at + CpuWord.PREEMPT] = preempt

    def set_marker(self, address: int, offset: int) -> None:
        """Set the marker's address in the guest, and its offset in the guest's memory."""
        self.words[PlanWord.MARKER] = address
        self.words[PlanWord.MARKER_OFFSET] = offset

    def set_code(
        self,
        ranges: Sequence[tuple[int, int, int, RangeFlag]],
        vectors: Sequence[int],
        syscall_entry: int,
    ) -> None:
        """Set the code ranges: (start, end, canonical start, flags), sorted and disjoint."""
        if len(ranges) > RANGES:
            raise SourceError(
                f"the filter cuts the kernel into {len(ranges)} ranges, more than {RANGES}",
                hint="name whole files, modules or longer address ranges in --kernel-include",
            )
        words = self.words
        words[PlanWord.RANGES_EPOCH] += 1
        at = RANGES_OFFSET // WORD
        for start, end, canonical, flags in ranges:
            words[at] = start
            words[at + 1] = end
            words[at + 2] = (canonical - start) & (2**64 - 1)
            words[at + 3] = flags
            at += RANGE_WORDS
        for index, address in enumerate(vectors):
            words[VECTORS_OFFSET // WORD + index] = address
        words[PlanWord.SYSCALL_ENTRY] = syscall_entry
        words[PlanWord.RANGES] = len(ranges)
        words[PlanWord.RANGES_EPOCH] += 1

    def attach(self, slot: int, task: int, area: int, size: int, bitmap_words: int) -> None:
        """Have what ``task`` runs in the kernel recorded in the area."""
        words = self.words
        at = SLOTS_OFFSET // WORD + slot * PLAN_SLOT_WORDS
        words[at + SlotWord.APPENDED] = 0
        words[at + SlotWord.DROPPED] = 0
        words[at + SlotWord.AREA] = area
        words[at + SlotWord.WORDS] = size
        words[at + SlotWord.BITMAP_WORDS] = bitmap_words
        words[at + SlotWord.NUMBER] += 1
        words[at + SlotWord.TASK] = task
        if words[PlanWord.SLOTS] <= slot:
            words[PlanWord.SLOTS] = slot + 1
        self._next_epoch()

    def counts(self, slot: int) -> tuple[int, int]:
        """Return how many PCs the plugin appended in this slot, and how many it dropped."""
        at = SLOTS_OFFSET // WORD + slot * PLAN_SLOT_WORDS
        words = self.words
        return words[at + SlotWord.APPENDED], words[at + SlotWord.DROPPED]

    def detach(self, slot: int) -> tuple[int, int]:
        """Detach the slot; afterwards the plugin no longer writes to its area.

        Returns:
            As :meth:`counts`.

        Raises:
            SourceError: QEMU hangs while it writes to the area.
        """
        words = self.words
        words[SLOTS_OFFSET // WORD + slot * PLAN_SLOT_WORDS + SlotWord.TASK] = 0
        self._next_epoch()
        first = CPUS_OFFSET // WORD + CpuWord.BUSY
        busy = words[first : first + CPUS * CPU_WORDS : CPU_WORDS]
        deadline = 0.0
        while slot + 1 in busy.tolist():
            now = time.monotonic()
            deadline = deadline or now + _BUSY_SECONDS
            if now > deadline:
                raise SourceError("QEMU hangs while it writes coverage")
            time.sleep(1e-4)
        return self.counts(slot)

    def blocks(self, start: int = 0) -> list[tuple[int, int]]:
        """Return the recorded blocks from number ``start`` on: (canonical start, bytes)."""
        words = self.words
        count = min(words[PlanWord.BLOCKS], BLOCKS)
        at = BLOCKS_OFFSET // WORD
        found = words[at + start * BLOCK_WORDS : at + count * BLOCK_WORDS].tolist()
        return list(zip(found[::2], found[1::2], strict=True))

    def close(self) -> None:
        """Unmap and close. Safe to call twice."""
        if self.fd >= 0:
            self.words.release()
            self._bytes.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1
