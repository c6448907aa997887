# SPDX-License-Identifier: Apache-2.0
"""The memory that instrumented programs share with the bridge.

``runtime/layout.h`` defines it and ``runtime/reader.c`` reads it: it bounds every value, because
programs that the bridge does not trust may write anywhere in it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from array import array
from ctypes import c_char, c_char_p, c_int, c_long, c_size_t, c_uint8, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from bridge.errors import SourceError
from bridge.sources import PC
from bridge.sources.native.build import READER
from bridge.sources.python.threads import TABLE_END

__all__ = ["PATH_BYTES", "VARIABLE", "Kind", "NativeMemory", "Range", "Said", "find_calls"]

VARIABLE: Final = "KCOV_BRIDGE_NATIVE"
"""The environment variable that leads a program to the memory: ``KBN_VARIABLE``."""

_BUILD_ID: Final = 32
_PATH: Final = 256
PATH_BYTES: Final = _PATH - 1
"""A module's path is cut there: ``KBN_PATH``, which has room for the end of the string."""
_MOST_BLOCKS: Final = 1 << 24


class Kind(IntEnum):
    """How the blocks of a module are counted: ``enum kbn_kind``."""

    GUARDS = 1
    COUNTERS = 2
    TEXT = 3


class _Said(ctypes.Structure):
    """``struct kbn_said``."""

    _fields_ = (
        ("kind", c_uint32),
        ("first", c_uint32),
        ("count", c_uint32),
        ("has_pcs", c_uint32),
        ("id_bytes", c_uint32),
        ("call_target", c_uint32),
        ("call_bytes", c_uint32),
        ("spare", c_uint32),
        ("text_start", c_uint64),
        ("id", c_uint8 * _BUILD_ID),
        ("path", c_char * _PATH),
    )


_RANGES: Final = 64
"""Counters of so many processes and modules are looked at in one go."""
_COMPARES: Final = 1 << 14
_KINDS: Final = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class Said:
    """What a program says of a module that it has loaded; bounded, but perhaps not true."""

    kind: Kind
    first: int
    """Number of its first block in the memory."""
    count: int
    """Its blocks; for ``Kind.TEXT`` a fourth of the bytes of its code."""
    has_places: bool
    """Whether the place of each block is known, run or not."""
    build_id: bytes
    path: str
    call_target: int
    """Where calls of gcc's callback lead to, as addresses of the file go."""
    call_bytes: int
    """Bytes of such a call, 5 or 6; 0: not known."""
    text_start: int
    """Address of the first byte of its code, for ``Kind.TEXT``."""


@dataclass(frozen=True, slots=True)
class Range:
    """Counters that lie in the memory of a process, as that says."""

    entry: int
    process: int
    address: int
    count: int
    module: int


_PROTOTYPES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "kbn_open": (pointer, (c_int, c_char_p, c_uint64, c_char_p)),
    "kbn_close": (None, (pointer,)),
    "kbn_modules": (c_uint32, (pointer,)),
    "kbn_said": (c_int, (pointer, c_uint32, pointer)),
    "kbn_place": (None, (pointer, c_uint32, c_uint32, c_uint64, pointer)),
    "kbn_places": (pointer, (pointer,)),
    "kbn_covered": (c_uint64, (pointer,)),
    "kbn_ever": (pointer, (pointer,)),
    "kbn_taken": (pointer, (pointer,)),
    "kbn_lost": (c_uint64, (pointer,)),
    "kbn_other_layout": (c_uint32, (pointer,)),
    "kbn_new_ranges": (c_uint32, (pointer, pointer, c_uint32)),
    "kbn_add_range": (c_int, (pointer, c_int, c_uint32, c_uint32, c_uint64, c_uint32, c_uint32)),
    "kbn_calls": (
        c_uint32,
        (c_char_p, c_uint64, c_uint64, c_uint64, c_uint32, pointer, pointer, c_uint32),
    ),
    "kbn_add_words": (
        c_uint32,
        (
            *(pointer, c_int, c_uint32, c_uint64, c_uint32, c_int, pointer),
            *(c_uint32, c_uint32, c_uint64),
        ),
    ),
    "kbn_apart": (c_uint32, (pointer, pointer, c_uint32, pointer)),
    "kbn_unknown": (c_uint32, (pointer,)),
    "kbn_compare": (None, (pointer, c_uint32)),
    "kbn_take_compares": (c_uint32, (pointer, pointer, c_uint32, pointer)),
    "kbn_drain": (c_long, (pointer, pointer, c_size_t, c_int, c_int)),
}


@functools.cache
def _library() -> Any:
    """Load the reader; raises as :meth:`bridge.util.compile.CProgram.build`."""
    # Calls keep the interpreter lock: they take a microsecond.
    library = ctypes.PyDLL(str(READER.build()), use_errno=True)
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def find_calls(
    code: bytes, start: int, target: int, call_bytes: int
) -> tuple[array[int], array[int]]:
    """Find the calls of gcc's callback in a module's code.

    Args:
        code: its bytes, which lie at ``start``.
        target: as :attr:`Said.call_target`.

    Returns:
        Where each returns to, in order; and for each four bytes of code the number of the call that
        returns into them, or -1.
    """
    most = len(code) // 5 + 1
    places = array("I", bytes(4 * most))
    slots = array("i", b"\xff" * (4 * (len(code) // 4 + 1)))
    found = _library().kbn_calls(
        code,
        len(code),
        start,
        target,
        call_bytes,
        places.buffer_info()[0],
        slots.buffer_info()[0],
        most,
    )
    return places[:found], slots


class NativeMemory:
    """The memory of one source. Not thread-safe.

    Args:
        epoch: the file with the coverage epoch, and the word's offset in it.
        handles: name of the abstract socket that takes coverage on behalf of handles.

    Raises:
        SourceError: there is no memory.
        BridgeError: the reader cannot be built.
    """

    def __init__(self, epoch: tuple[str, int] | None = None, handles: str = "") -> None:
        self._library = _library()
        self._drain = self._library.kbn_drain
        self.descriptor = os.memfd_create(
            "kcov-bridge-native", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        )
        file, offset = epoch if epoch is not None else ("", 0)
        reader = self._library.kbn_open(
            self.descriptor, os.fsencode(file), offset, os.fsencode(handles)
        )
        if not reader:
            reason = os.strerror(ctypes.get_errno())
            os.close(self.descriptor)
            raise SourceError(f"no memory for native coverage: {reason}")
        self._reader: int | None = reader
        self.buffer = mmap.mmap(self.descriptor, TABLE_END)
        """The threads, for :class:`bridge.sources.by_thread.ThreadOfPc`."""
        # Untouched memory costs nothing.
        self._room = _MOST_BLOCKS
        self._out = mmap.mmap(-1, 8 * self._room)
        self._words = memoryview(self._out).cast("Q")
        self._out_address = ctypes.addressof(c_char.from_buffer(self._out))
        self._slots: list[array[int]] = []
        # Of processes of Go programs, by their entry in the reader.
        self._slots_of_words: dict[int, array[int]] = {}
        self._placed = 0
        # Blocks of Go programs are numbered from the end on.
        self._go_first = _MOST_BLOCKS

    @property
    def path(self) -> str:
        """Path by which programs of this user map the memory."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    @property
    def closed(self) -> bool:
        """Whether the memory was given back."""
        return self._reader is None

    def close(self) -> None:
        """Give the memory back; programs keep their mappings. Safe to call twice."""
        reader, self._reader = self._reader, None
        if reader is not None:
            self._library.kbn_close(reader)
            os.close(self.descriptor)

    def drain(self, *, force: bool = False, everything: bool = False) -> list[PC] | None:
        """Return the PCs of the blocks covered since the last call, and forget them.

        Args:
            force: also if there are modules without PCs, whose blocks are kept for the next call.
            everything: look at each block.

        Returns:
            The PCs; None if there is a new module, and nothing was taken.
        """
        if self._reader is None:
            return []
        taken = self._drain(self._reader, self._out_address, self._room, force, everything)
        if taken < 0:
            return None
        return self._words[:taken].tolist() if taken else []

    def new_modules(self) -> list[Said | None]:
        """Return the modules that are not placed yet; None for one that makes no sense.

        Each must be given to :meth:`place`, in this order.
        """
        if self._reader is None:
            return []
        count = self._library.kbn_modules(self._reader)
        return [self.said(index) for index in range(self._placed, count)]

    def said(self, index: int) -> Said | None:
        """Return what is said of a module now; None if it makes no sense.

        The blocks of one that is placed are no longer checked, and are not to be used.
        """
        said = _Said()
        right = self._library.kbn_said(self._reader, index, ctypes.byref(said))
        if not right and (index >= self._placed or said.kind not in _KINDS):
            return None
        return Said(
            Kind(said.kind),
            said.first,
            said.count,
            bool(said.has_pcs),
            bytes(said.id[: said.id_bytes]),
            os.fsdecode(said.path),
            said.call_target,
            said.call_bytes,
            said.text_start,
        )

    def place(self, said: Said | None, first_pc: PC, slots: array[int] | None = None) -> None:
        """Give the blocks of the next module PCs, from ``first_pc`` on.

        Args:
            slots: for each block the number of its PC, or -1; None: all of them, in order.
        """
        self._placed += 1
        address = None
        if slots is not None:
            self._slots.append(slots)
            address = slots.buffer_info()[0]
        first, count = (said.first, said.count) if said is not None else (0, 0)
        self._library.kbn_place(self._reader, first, count, first_pc, address)

    def new_ranges(self) -> list[Range]:
        """Return the counters that the reader was not told of yet, or whose process is another."""
        if self._reader is None:
            return []
        words = array("Q", bytes(8 * 5 * _RANGES))
        count = self._library.kbn_new_ranges(self._reader, words.buffer_info()[0], _RANGES)
        return [Range(*words[5 * at : 5 * at + 5]) for at in range(count)]

    def add_range(self, descriptor: int, found: Range, first: int) -> bool:
        """Read these counters from now on, through a descriptor of ``/proc/PID/mem``.

        The descriptor becomes the memory's own if there is room, which is the answer.
        """
        return self._reader is not None and bool(
            self._library.kbn_add_range(
                self._reader,
                descriptor,
                found.process,
                found.entry,
                found.address,
                first,
                found.count,
            )
        )

    def add_words(
        self,
        descriptor: int,
        process: int,
        address: int,
        slots: array[int],
        blocks: int,
        first_pc: PC,
        *,
        flags: bool,
        first: int | None = None,
    ) -> int | None:
        """Read the counters of a Go program from now on.

        Args:
            descriptor: of its ``/proc/PID/mem``; becomes the memory's own if there is room.
            process: its number.
            address: of the first word.
            slots: of each word the number of its block; -1: no counter; -2: not known yet. May be
                changed, as long as its length stays.
            blocks: their number.
            flags: the program sets its counters, and does not count up; so they are cleared.
            first: the answer for another process of the same program; None without one.

        Returns:
            The first block's number for :meth:`ever`; None if there is no room.
        """
        if first is None:
            first = self._go_first - blocks
        if self._reader is None or first < 0:
            return None
        added = self._library.kbn_add_words(
            self._reader,
            descriptor,
            process,
            address,
            len(slots),
            flags,
            slots.buffer_info()[0],
            first,
            blocks,
            first_pc,
        )
        if not added:
            return None
        self._slots_of_words[added] = slots
        self._go_first = min(first, self._go_first)
        return first

    def apart(self, blocks: array[int]) -> list[PC]:
        """Return the PCs of blocks that ran on behalf of a handle, by their numbers."""
        if self._reader is None or not blocks:
            return []
        out = array("Q", bytes(8 * len(blocks)))
        count = self._library.kbn_apart(
            self._reader, blocks.buffer_info()[0], len(blocks), out.buffer_info()[0]
        )
        return out[:count].tolist()

    def found_unknown(self) -> bool:
        """Return whether the last :meth:`drain` met words of a Go program that are not known."""
        return self._reader is not None and bool(self._library.kbn_unknown(self._reader))

    def record_comparisons(self, on: bool) -> None:
        """Start or stop to have programs record comparisons."""
        if self._reader is not None:
            self._library.kbn_compare(self._reader, on)

    def take_comparisons(self) -> tuple[list[tuple[int, ...]], int]:
        """Return type, operands, module and place of comparisons since the last call; and how many
        were lost.
        """
        if self._reader is None:
            return [], 0
        words, lost = array("Q", bytes(8 * 5 * _COMPARES)), c_uint64()
        count = self._library.kbn_take_compares(
            self._reader, words.buffer_info()[0], _COMPARES, ctypes.byref(lost)
        )
        return [tuple(words[5 * at : 5 * at + 5]) for at in range(count)], lost.value

    def places(self, first: int, count: int) -> array[int]:
        """Return the places of blocks in their module; 0 where it is not known."""
        if self._reader is None:
            return array("I", bytes(4 * count))
        start = self._library.kbn_places(self._reader) + 4 * first
        return array("I", ctypes.string_at(start, 4 * count))

    def ever(self, first: int, count: int) -> bytes:
        """Return a byte for each of these blocks: 1 if it was ever drained, or taken."""
        if self._reader is None:
            return bytes(count)
        return ctypes.string_at(self._library.kbn_ever(self._reader) + first, count)

    def taken(self, first: int, count: int) -> bytes:
        """Return a byte for each of these blocks: not 0 if its program recorded it itself."""
        if self._reader is None:
            return bytes(count)
        return ctypes.string_at(self._library.kbn_taken(self._reader) + first, count)

    @property
    def covered(self) -> int:
        """Number of different blocks that were drained, or taken by their program."""
        return int(self._library.kbn_covered(self._reader)) if self._reader is not None else 0

    @property
    def lost_blocks(self) -> int:
        """Blocks of modules that found no room, as programs say."""
        return int(self._library.kbn_lost(self._reader)) if self._reader is not None else 0

    @property
    def other_layout(self) -> int:
        """The layout of a program's run time that is another than this one's; 0 without any."""
        if self._reader is None:
            return 0
        return int(self._library.kbn_other_layout(self._reader))
