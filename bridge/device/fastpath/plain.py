# SPDX-License-Identifier: Apache-2.0
"""What is done for each signal, in Python: the definition, and what runs without a C compiler."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from sys import getrefcount
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.device.region import Area
    from bridge.sources import PC

__all__ = ["UNTOLD_MASK", "AreaWords", "FindLines", "KcovState", "LineSets", "LineTap", "Totals"]

UNTOLD_MASK = (1 << 32) - 1
"""How many returns a guest may say that it did not tell of."""

LineSets = dict[str, set[int]]
"""The lines that ran, by file: what coverage.py's C tracer fills."""

FindLines = Callable[[str], "tuple[str, list[PC]] | None"]
"""A file's name to sort by and the PC of each of its lines (0: none), or None: it has no blocks."""


class AreaWords:
    """The words of an area: ``bitmap_words`` of a bitmap, the count, the PCs.

    ``size`` is the number of words, all of which are in ``words``.
    """

    __slots__ = ("_words", "bitmap_words", "size")

    def __init__(self, words: memoryview, size: int) -> None:
        if not 1 <= size <= len(words):
            raise ValueError(f"an area of {size} words in {len(words)}")
        self._words = words
        self.size = size
        self.bitmap_words = 0

    def append(self, pcs: Sequence[int]) -> int:
        """Append PCs after those that the count counts; returns how many fitted.

        As ``write_comp_data``/``__sanitizer_cov_trace_pc`` in Linux' ``kernel/kcov.c`` do: where
        word 0 points outside the area nothing is written, and the count never passes ``size - 1``.
        """
        words = self._words
        head = self.bitmap_words
        count = words[head]
        room = self.size - 1 - head - count
        if room <= 0:
            return 0
        fitting = len(pcs)
        if fitting > room:
            fitting = room
            pcs = pcs[:room]
        start = head + count + 1
        if fitting == 1:
            words[start] = pcs[0]
        else:
            words[start : start + fitting] = memoryview(array("Q", pcs))
        words[head] = count + fitting
        return fitting

    def release(self) -> None:
        """Let go of the words; the area is not used any more."""
        self._words.release()


class KcovState:
    """What a system call's return needs of an instance; see :class:`bridge.device.kcov.Kcov`."""

    __slots__ = ("appended", "area", "cursor", "dropped", "generation", "owner")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.owner: int | None = None
        self.area: Area | None = None
        self.cursor: Any = None
        self.appended = 0
        self.dropped = 0


@dataclass(slots=True)
class Totals:
    """Sums over all instances, also those released.

    ``returns``: system call returns of owners, also those that the guest had no need to tell of
    when they came: it counts them and tells with its next request; ``appended``: PCs written into
    areas; ``dropped``: PCs that did not fit; ``comparisons`` and ``comparisons_dropped``: the same
    of comparisons.
    """

    returns: int = 0
    appended: int = 0
    dropped: int = 0
    comparisons: int = 0
    comparisons_dropped: int = 0


class LineTap:
    """Takes lines out of a collector's sets while tracers add to them, and makes PCs of them.

    ``find`` is asked once for each file that lines come from. Not thread-safe.

    What makes it sound, as far as it is the interpreter that makes it so:

    * A set is emptied in place, by two calls that the interpreter lock makes atomic: copy, then
      subtract the copy. A line that is added between the two stays; one that is executed again
      between the two is in the copy.
    * A set that no frame refers to is taken out of ``data``, so that a look costs what is new and
      what is running, not what ever ran. Should a frame take the set between the look at its
      reference count and its removal, the removal finds out, and the set is kept and emptied
      beside ``data`` until the frame is gone.
    """

    def __init__(self, data: LineSets, find: FindLines) -> None:
        self._data = data
        self._find = find
        # The name and the line's PCs of each file, None where it has no blocks.
        self._files: dict[str, tuple[str, list[PC]] | None] = {}
        # All lines that were ever taken, by file.
        self._taken: LineSets = {}
        # Sets that are not in data any more while a frame still adds to them.
        self._apart: list[tuple[str, set[int]]] = []
        # What was taken and not handed over, because finding out about a file raised.
        self._fresh: list[tuple[str, set[int]]] = []
        self._covered: set[PC] = set()
        self._unshared = _references_of_unshared()

    @property
    def covered(self) -> int:
        """How many different PCs have been given."""
        return len(self._covered)

    @property
    def apart(self) -> int:
        """How many sets are emptied beside the collector's data."""
        return len(self._apart)

    def drain(self) -> list[PC]:
        """Take all lines and give their PCs, each once: by the files' names, then sorted."""
        data, unshared = self._data, self._unshared
        if self._apart:
            apart = []
            for path, lines in self._apart:
                if lines:
                    self._take(path, lines)
                if lines or getrefcount(lines) > unshared:
                    apart.append((path, lines))
            self._apart = apart
        for path in list(data):
            lines = data[path]
            if lines:
                self._take(path, lines)
            if getrefcount(lines) <= unshared:
                del data[path]
                if lines or getrefcount(lines) >= unshared:
                    # A frame was faster.
                    self._apart.append((path, lines))
        return self._hand_over()

    def adopt(self, sets: LineSets) -> list[PC]:
        """As :meth:`drain` for sets that no frame adds to any more."""
        for path, lines in sets.items():
            if lines:
                self._take(path, lines)
        return self._hand_over()

    def put_back(self) -> None:
        """Give the collector all lines again, for coverage.py to save."""
        for path, lines in self._taken.items():
            self._data.setdefault(path, set()).update(lines)

    def _take(self, path: str, lines: set[int]) -> None:
        taken = lines.copy()
        # In this order an interrupt (Ctrl-C) in between shows lines twice rather than never.
        try:
            self._taken[path].update(taken)
        except KeyError:
            self._taken[path] = taken.copy()
        self._fresh.append((path, taken))
        lines -= taken

    def _hand_over(self) -> list[PC]:
        fresh = self._fresh
        pcs: list[PC] = []
        for path, _ in fresh:
            if path not in self._files:
                self._files[path] = self._find(path)
        if len(fresh) > 1:
            merged: LineSets = {}
            for path, lines in fresh:
                merged.setdefault(path, lines).update(lines)
            fresh = sorted(merged.items(), key=self._name_of)
        for path, lines in fresh:
            file = self._files[path]
            if file is None:
                continue
            line_pcs = file[1]
            try:
                blocks = set(map(line_pcs.__getitem__, lines))
            except IndexError:
                # The file has changed since it was read, or code was compiled in its name.
                blocks = {line_pcs[line] for line in lines if line < len(line_pcs)}
            blocks.discard(0)
            pcs += sorted(blocks)
        self._covered.update(pcs)
        self._fresh = []
        return pcs

    def _name_of(self, fresh: tuple[str, set[int]]) -> str:
        file = self._files[fresh[0]]
        return file[0] if file is not None else fresh[0]


def _references_of_unshared() -> int:
    """What getrefcount() says in :meth:`LineTap.drain` of a set that only its dict refers to."""
    data: LineSets = {}
    data["file"] = set()
    for path in list(data):
        lines = data[path]
        count = getrefcount(lines)
    return count
