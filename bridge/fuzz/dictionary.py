# SPDX-License-Identifier: Apache-2.0
"""A dictionary for the engine from what the target compares its input with.

A target that compares a field of its input with a constant shows the engine a word that it would
hardly find by chance. The words come from KCOV_TRACE_CMP: ``LaneFlag.COMPARISONS`` of a lane, or
:meth:`bridge.session.session.Session.compare`. The file is of the form that ``afl-fuzz -x`` reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

from bridge.device.abi import KCOV_CMP_CONST, Comparison
from bridge.fuzz.lane import Execution, LaneFlag
from bridge.util.files import write_atomically

__all__ = ["WORDS_LIMIT", "Dictionary", "Executor"]

WORDS_LIMIT: Final = 200
"""Words of a dictionary; the engine tries all of up to so many at each place of a case."""

_CONSTANTS_LIMIT = 1 << 16
_PRINTABLE = frozenset(range(0x20, 0x7F)) - set(b'"\\')


class Executor(Protocol):
    """What executes cases: :class:`bridge.fuzz.slot.Slot`."""

    def execute(self, case: bytes, timeout: float, flags: LaneFlag | None = None) -> Execution:
        """Execute a case."""


class _Place:
    """The comparisons of two values at one place of the code."""

    __slots__ = ("first", "second", "size", "times")

    def __init__(self, first: int, second: int) -> None:
        # None: several values were seen there.
        self.first: int | None = first
        self.second: int | None = second
        self.size = 1
        self.times = 0

    def add(self, first: int, second: int, size: int) -> None:
        self.times += 1
        self.size = max(self.size, size)
        if first != self.first:
            self.first = None
        if second != self.second:
            self.second = None

    def constants(self) -> Iterator[int]:
        """Yield the side that stayed the same; both if both did."""
        for side in (self.first, self.second):
            if side is not None:
                yield side


class Dictionary:
    """Constants with which the target compared, and how often it did.

    A literal is told as such. Where two values are compared, such as a field and a named constant
    of Python, the value that was the same each time counts as the constant.

    Attributes:
        dropped: comparisons that were not counted, since there were too many different ones.
    """

    def __init__(self) -> None:
        self._literals: Counter[tuple[int, int]] = Counter()  # (value, size)
        self._places: dict[int, _Place] = {}
        self.dropped = 0

    def add(self, comparisons: Iterable[Comparison]) -> None:
        """Count the constants of some comparisons."""
        for kind, first, second, pc in comparisons:
            size = 1 << (kind >> 1 & 3)
            mask = (1 << 8 * size) - 1
            if kind & KCOV_CMP_CONST:
                key = first & mask, size
                if key in self._literals or len(self._literals) < _CONSTANTS_LIMIT:
                    self._literals[key] += 1
                    continue
            else:
                place = self._places.get(pc)
                if place is None and len(self._places) < _CONSTANTS_LIMIT:
                    place = self._places[pc] = _Place(first & mask, second & mask)
                if place is not None:
                    place.add(first & mask, second & mask, size)
                    continue
            self.dropped += 1

    def _constants(self) -> Counter[tuple[int, int]]:
        constants = self._literals.copy()
        for place in self._places.values():
            for value in place.constants():
                constants[value, place.size] += place.times
        return constants

    def learn(self, executor: Executor, cases: Iterable[bytes], timeout: float) -> None:
        """Execute cases, and count what the target compares meanwhile.

        It stops at a case that does not end well, after which the guest must be reset.

        Raises:
            BridgeError: as the executor.
        """
        for case in cases:
            done = executor.execute(case, timeout, LaneFlag.COMPARISONS)
            self.add(done.comparisons)
            if done.status != 0:
                break

    def words(self, limit: int = WORDS_LIMIT) -> list[tuple[bytes, int]]:
        """Return the words and how often their constants were seen, the most frequent first."""
        words: Counter[bytes] = Counter()
        for (value, size), times in self._constants().items():
            for word in set(_forms(value, size)):
                words[word] += times
        return sorted(words.items(), key=lambda each: (-each[1], each[0]))[:limit]

    def write(self, path: Path, limit: int = WORDS_LIMIT) -> int:
        """Write the words for ``afl-fuzz -x``; return their number. Without words, no file.

        Raises:
            InfrastructureError: the file cannot be written.
        """
        words = self.words(limit)
        if words:
            lines = (f'seen_{times}="{_quoted(word)}"\n' for word, times in words)
            write_atomically(path, "".join(lines))
        return len(words)


def _forms(value: int, size: int) -> Iterator[bytes]:
    """Yield how a constant may stand in an input: as a number of its size or less, and as text."""
    least = next(each for each in (1, 2, 4, 8) if value < 1 << 8 * each)
    for length in {least, size}:
        yield value.to_bytes(length, "little")
        yield value.to_bytes(length, "big")
    # A word of readable bytes is text itself, and one digit is no news to the engine.
    signed = value - (1 << 8 * size) if value >> (8 * size - 1) else value
    if size > 1 and least > 1 and all(byte in _PRINTABLE for byte in value.to_bytes(least, "big")):
        return
    if not 0 <= signed < 10:
        yield str(signed).encode()


def _quoted(word: bytes) -> str:
    return "".join(chr(byte) if byte in _PRINTABLE else f"\\x{byte:02x}" for byte in word)
