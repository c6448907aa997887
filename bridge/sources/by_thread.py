# SPDX-License-Identifier: Apache-2.0
"""Which thread of the target ran a block last, as a Python source notes it while it is asked to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from bridge.device.calls import HostThread
from bridge.sources import PC
from bridge.sources.python import threads

if TYPE_CHECKING:
    import mmap

__all__ = ["ByThread", "ThreadOfPc"]

_NO_NUMBER: Final = 0xFF


class ByThread(Protocol):
    """A source that tells threads apart: :class:`bridge.sources.python.source.PythonSource`."""

    def record_threads(self, on: bool) -> None:
        """Start or stop to tell which thread ran a block; to start again forgets all."""

    @property
    def thread_of(self) -> Mapping[PC, HostThread]:
        """The thread that ran a block last, of blocks that were consumed; not of all."""


class ThreadOfPc:
    """The threads of the blocks that a source has given.

    Attributes:
        thread_of: as :class:`ByThread`.
    """

    def __init__(self) -> None:
        self.thread_of: dict[PC, HostThread] = {}
        self._known: dict[bytes, HostThread | None] = {}

    def record(self, buffer: mmap.mmap, on: bool) -> None:
        """Have the drains of a memory of lines say which thread ran a block, or end that."""
        self.thread_of.clear()
        self._known.clear()
        buffer[threads.BY_THREAD] = on

    @staticmethod
    def has_numbers(words: Sequence[int]) -> bool:
        """Return whether what was drained has numbers of threads; it is a fast look."""
        return bool(words) and min(words) >> threads.NUMBER_SHIFT != _NO_NUMBER

    def unpack(self, buffer: mmap.mmap, words: Sequence[int]) -> list[PC]:
        """Keep the threads of what was drained, and return the PCs."""
        by_number: dict[int, HostThread | None] = {}
        pcs: list[PC] = []
        thread_of = self.thread_of
        for word in words:
            number = word >> threads.NUMBER_SHIFT
            pc = word | _NO_NUMBER << threads.NUMBER_SHIFT
            pcs.append(pc)
            if number == _NO_NUMBER:
                continue
            if number not in by_number:
                by_number[number] = self._thread(threads.read(buffer, number))
            thread = by_number[number]
            if thread is not None:
                thread_of[pc] = thread
            else:
                thread_of.pop(pc, None)
        return pcs

    def _thread(self, entry: bytes) -> HostThread | None:
        if entry not in self._known:
            parsed = threads.parse(entry)
            self._known[entry] = HostThread(*parsed) if parsed is not None else None
        return self._known[entry]
