# SPDX-License-Identifier: Apache-2.0
"""The shared region: the memory that the guest sees as the BAR of its ivshmem device.

This module makes every view of shared memory, with bounds that the host chose itself, so no value
that a guest writes can move an access elsewhere. Everything after ``AREAS_OFFSET`` is handed out in
whole pages as :class:`Area`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from array import array
from bisect import insort
from collections.abc import Sequence
from itertools import chain

from bridge.device.abi import (
    AREAS_OFFSET,
    HOST_PEER,
    KCOV_WORDS_PER_CMP,
    MAGIC,
    PAGE_SIZE,
    REQUESTS_OFFSET,
    RESPONSES_OFFSET,
    SLOTS,
    VERSION,
    WORD,
    Comparison,
    HeaderWord,
)
from bridge.device.fastpath import AreaWords
from bridge.errors import RegionError, UsageError

__all__ = ["Area", "Region"]

_MIN_BYTES = 1 << 20
_MAX_BYTES = 1 << 40


class Area(AreaWords):
    """One kcov area: a count, then that many PCs, or comparisons of four words each.

    Attributes:
        offset: its place in the region, in bytes.
        bytes: its length in whole pages.
        size: its number of words, which may be smaller than its pages.
        bitmap_words: words of the bitmap before the count; see :meth:`unseen`.
        abandoned: somebody may still write into it, so its room is not allocated again.
        kept: it outlives :meth:`Region.clear`, which zeroes it.
    """

    __slots__ = ("_memory", "abandoned", "bytes", "kept", "offset")

    def __init__(
        self, memory: mmap.mmap, words: memoryview, offset: int, size: int, length: int
    ) -> None:
        super().__init__(words, size)
        self._memory = memory
        self.offset = offset
        self.bytes = length
        self.abandoned = False
        self.kept = False

    @property
    def words(self) -> memoryview:
        """All words, for those that use the area in another way; until it is freed."""
        return self._words

    @property
    def count(self) -> int:
        """The current count: whatever the guest wrote, 0 to 2**64-1."""
        value: int = self._words[self.bitmap_words]
        return value

    def append_comparisons(self, comparisons: Sequence[Comparison]) -> int:
        """Append records after those that word 0 counts, and return how many fitted.

        Like ``write_comp_data`` in Linux' ``kernel/kcov.c``, it writes only whole records, and
        nothing if word 0 points outside the area.
        """
        words = self._words
        count = words[0]
        fitting = min((self.size - 1) // KCOV_WORDS_PER_CMP - count, len(comparisons))
        if fitting <= 0:
            return 0
        start = 1 + count * KCOV_WORDS_PER_CMP
        flat = array("Q", chain.from_iterable(comparisons[:fitting]))
        words[start : start + len(flat)] = memoryview(flat)
        words[0] = count + fitting
        return fitting

    def unseen(self, pcs: Sequence[int], numbers: dict[int, int]) -> list[int]:
        """Return the PCs whose bits in the bitmap were not set, and set them.

        Like ``__sanitizer_cov_trace_pc_guard`` in the patches for Linux, a PC whose bit lies after
        the bitmap is always new.

        Args:
            numbers: the bit of each PC, for as long as the device lives; new PCs are added.
        """
        words = self._words
        bits = self.bitmap_words * 64
        new = []
        for pc in pcs:
            # Even numbers from 2 on; the guest kernel has the odd ones, see tcg/kcov_tcg.c.
            number = numbers.setdefault(pc, 2 * len(numbers) + 2)
            if number < bits:
                index, bit = number >> 6, 1 << (number & 63)
                word = words[index]
                if word & bit:
                    continue
                words[index] = word | bit
            new.append(pc)
        return new

    def reset(self) -> None:
        """Set the count to 0 and clear the bitmap."""
        head = self.bitmap_words
        pages = head * WORD // PAGE_SIZE * PAGE_SIZE
        if pages:
            # This takes neither time nor memory, however large a bitmap the guest chose.
            self._memory.madvise(mmap.MADV_REMOVE, self.offset, pages)
        rest = pages // WORD
        # The count after the bitmap is cleared with it.
        self._words[rest : head + 1] = memoryview(bytes((head + 1 - rest) * WORD)).cast("Q")

    def take(self, each: int = 1) -> bytes:
        """Return the words that the count counts, limited to the area, and set the count to 0.

        The bitmap remains.

        Args:
            each: words per counted item.
        """
        head = self.bitmap_words
        words = self._words
        count = min(words[head], (self.size - 1 - head) // each)
        taken = words[head + 1 : head + 1 + count * each].tobytes()
        words[head] = 0
        return taken

    def read(self, most: int | None = None) -> list[int]:
        """Return the PCs that the count counts, limited to the area and to ``most``."""
        head = self.bitmap_words
        count = min(self.count, self.size - 1 - head)
        if most is not None:
            count = min(count, most)
        return self._words[head + 1 : head + 1 + count].tolist()


class Region:
    """A mapped memfd of ``size`` bytes (a power of two), with its header written.

    It is sealed against resizing, so no process that has the descriptor can make an access fault.
    Pages exist only once they are touched, so a large region costs only address space.

    Raises:
        UsageError: the size is impossible.
        RegionError: the system has no room.
    """

    def __init__(self, size: int) -> None:
        if size & (size - 1) or not _MIN_BYTES <= size <= _MAX_BYTES:
            raise UsageError(
                f"a region of {size} bytes is not possible",
                hint="choose a power of two, 1 MiB or more: --region MIB",
            )
        self.size = size
        self.fd = -1
        try:
            self.fd = os.memfd_create("kcov-bridge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, size)
            fcntl.fcntl(
                self.fd,
                fcntl.F_ADD_SEALS,
                fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
            )
            self._map = mmap.mmap(self.fd, size)
        except OSError as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise RegionError(
                f"no shared region of {size >> 20} MiB could be made: {error.strerror}",
                hint="free memory, or take a smaller region: --region MIB",
            ) from error
        self._bytes = memoryview(self._map)
        self.control = self._bytes[:AREAS_OFFSET].cast("Q")
        """Header, requests and responses as 64-bit words."""
        self._areas: dict[int, Area] = {}
        # Free extents, sorted by offset, never adjacent: (offset, length) in bytes.
        self._free: list[tuple[int, int]] = [(AREAS_OFFSET, size - AREAS_OFFSET)]
        self._layout = {
            HeaderWord.VERSION: VERSION,
            HeaderWord.SLOTS: SLOTS,
            HeaderWord.REQUESTS_OFFSET: REQUESTS_OFFSET,
            HeaderWord.RESPONSES_OFFSET: RESPONSES_OFFSET,
            HeaderWord.AREAS_OFFSET: AREAS_OFFSET,
            HeaderWord.REGION_BYTES: size,
            HeaderWord.HOST_PEER: HOST_PEER,
            # Last: a guest that finds it finds a complete header.
            HeaderWord.MAGIC: MAGIC,
        }
        self.restore_header()

    def restore_header(self) -> int:
        """Rewrite the header's words about the layout that differ, and return how many did."""
        control = self.control
        different = 0
        for word, value in self._layout.items():
            if control[word] != value:
                control[word] = value
                different += 1
        return different

    @property
    def path(self) -> str:
        """The path by which other processes of the same user can open the region's memory."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @property
    def areas_in_use(self) -> int:
        """How many areas are in use."""
        return len(self._areas)

    @property
    def bytes_free(self) -> int:
        """Bytes left for areas, perhaps in pieces."""
        return sum(length for _, length in self._free)

    def has_room(self, size: int) -> bool:
        """Return whether an area of ``size`` words can be allocated now."""
        need = _page_bytes(size)
        return any(length >= need for _, length in self._free)

    def allocate(self, size: int) -> Area | None:
        """Return a zeroed area of ``size`` words (at least 1); None if there is no room."""
        if size < 1:
            raise ValueError(f"an area has at least one word, not {size}")
        need = _page_bytes(size)
        for index, (offset, length) in enumerate(self._free):
            if length < need:
                continue
            if length == need:
                del self._free[index]
            else:
                self._free[index] = (offset + need, length - need)
            # It was zeroed when it was freed, but a guest can write anywhere.
            self._map.madvise(mmap.MADV_REMOVE, offset, need)
            words = self._bytes[offset : offset + size * WORD].cast("Q")
            area = Area(self._map, words, offset, size, need)
            self._areas[offset] = area
            return area
        return None

    def free(self, area: Area) -> None:
        """Free an area. Its pages go back to the system, which also zeroes them."""
        if self._areas.pop(area.offset, None) is not area:
            raise ValueError("not an area of this region, or freed before")
        area.release()
        self._map.madvise(mmap.MADV_REMOVE, area.offset, area.bytes)
        if area.abandoned:
            return
        insort(self._free, (area.offset, area.bytes))
        self._merge_around(area.offset)

    def _merge_around(self, offset: int) -> None:
        free = self._free
        index = next(i for i, extent in enumerate(free) if extent[0] == offset)
        first = max(index - 1, 0)
        merged = [free[first]]
        for start, length in free[first + 1 : index + 2]:
            last_start, last_length = merged[-1]
            if last_start + last_length == start:
                merged[-1] = (last_start, last_length + length)
            else:
                merged.append((start, length))
        free[first : index + 2] = merged

    def clear(self) -> None:
        """Zero everything except the header, whatever a guest has written.

        Raises:
            ValueError: an area is in use that is not kept.
        """
        if not all(area.kept for area in self._areas.values()):
            raise ValueError("there are areas in use")
        self._map.madvise(mmap.MADV_REMOVE, 0, self.size)
        self.restore_header()

    def close(self) -> None:
        """Unmap and close. Safe to call twice; areas must not be used afterwards."""
        if self.fd < 0:
            return
        for area in self._areas.values():
            area.release()
        self._areas.clear()
        self.control.release()
        self._bytes.release()
        self._map.close()
        os.close(self.fd)
        self.fd = -1


def _page_bytes(size: int) -> int:
    return -(-size * WORD // PAGE_SIZE) * PAGE_SIZE
