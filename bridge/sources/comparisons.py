# SPDX-License-Identifier: Apache-2.0
"""The operands of comparisons: KCOV_TRACE_CMP's records, from Python code.

:mod:`bridge.sources.python.instrument` has the code under coverage call the functions of
:data:`HELPERS` where it compares. They note operands that Linux' record can hold, while a
:class:`Recorder` is on; :class:`ComparisonLedger` hands the records to those who traced at the
time.

What is noted: integers of 64 bits (of ``int`` and its subclasses, an IntEnum for example, but not
``bool``), and strings of 1, 2, 4 or 8 bytes as the integers that a little-endian machine would
load. The helpers call no code of the target's, raise nothing and change nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any, Final, Protocol, TypeVar

from bridge.device.abi import KCOV_CMP_CONST, KCOV_CMP_SIZE, Comparison
from bridge.sources import PC

__all__ = [
    "HELPERS",
    "LIMIT",
    "STRING_BYTES",
    "Comparing",
    "Comparison",
    "ComparisonCursor",
    "ComparisonLedger",
    "Recorder",
    "Site",
    "comparison",
    "number_of",
    "site",
    "site_at",
]

LIMIT: Final = 1 << 16
"""How many comparisons are kept for somebody to fetch; more are dropped, and counted."""

STRING_BYTES: Final = frozenset({1, 2, 4, 8})
"""Lengths of bytes that are noted: those of the operands of KCOV_CMP_SIZE(0) to (3)."""

Site = tuple[str, int]
"""Where a comparison stands: canonical path of the source file, and line."""

Noted = tuple[int, int, int, int]
"""As the helpers note it: number of the site, two operands with their sign, KCOV_CMP_CONST or 0."""

T = TypeVar("T")

_LOW: Final = -(1 << 63)
_HIGH: Final = 1 << 64

# All sites that were ever instrumented in this process; code outlives the source that asked for it.
# Under the lock, because several threads may import.
_sites_lock = Lock()
_sites: list[Site] = []
_numbers: dict[Site, int] = {}

# Whose the notes are, None while nobody wants any. Set by Recorder.record().
_recorder: Recorder | None = None


class Recorder:
    """Takes notes of what all threads of this process compare, up to :data:`LIMIT` at a time."""

    __slots__ = ("_apart", "_lost", "_noted")

    def __init__(self) -> None:
        self._noted: list[Noted] = []
        # Two threads may count at the same moment as one; it is for people to read.
        self._lost = 0
        # Threads that work on somebody's behalf now: nothing of theirs is noted.
        self._apart: set[int] = set()

    def record(self, on: bool) -> None:
        """Begin to take notes, or end it and forget them. One recorder is on in a process."""
        global _recorder
        _recorder = self if on else None
        self._noted.clear()
        self._lost = 0

    def take(self) -> tuple[list[Noted], int]:
        """The notes since the last call, in order, and how many more there was no room for."""
        noted = self._noted
        # Two steps that the interpreter lock makes whole: what comes in between stays.
        taken = noted[:]
        del noted[: len(taken)]
        lost, self._lost = self._lost, 0
        return taken, lost

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Nothing that this thread compares inside is noted. Blocks nest."""
        thread = get_ident()
        if thread in self._apart:
            yield
            return
        self._apart.add(thread)
        try:
            yield
        finally:
            self._apart.discard(thread)

    def note(self, left: object, right: object, constant: int, site: int) -> None:
        """Note a comparison if a record can hold it."""
        if self._apart and get_ident() in self._apart:
            return
        first = number_of(left)
        if first is None:
            return
        second = number_of(right)
        if second is None:
            return
        if type(left) in _STRINGS or type(right) in _STRINGS:
            # One of which is a number, or longer: never equal.
            if type(left) not in _STRINGS or type(right) not in _STRINGS:
                return
            if len(left) != len(right):  # type: ignore[arg-type]
                return
        if len(self._noted) < LIMIT:
            self._noted.append((site, first, second, constant))
        else:
            self._lost += 1


_STRINGS: Final = frozenset({bytes, bytearray})


def number_of(value: object) -> int | None:
    """The number that a record has for a value; None where it can have none."""
    kind = type(value)
    if kind is int:
        number: int = value  # type: ignore[assignment]
    elif kind in _STRINGS:
        if len(value) not in STRING_BYTES:  # type: ignore[arg-type]
            return None
        return int.from_bytes(value, "little")  # type: ignore[arg-type]
    elif kind is not bool and issubclass(kind, int):
        # int's own method: a subclass could have any other.
        number = int.__index__(value)  # type: ignore[arg-type]
    else:
        return None
    return number if _LOW <= number < _HIGH else None


def site_at(path: str, line: int) -> int:
    """The number of a site, for the helpers."""
    place = (path, line)
    with _sites_lock:
        number = _numbers.get(place)
        if number is None:
            number = _numbers[place] = len(_sites)
            _sites.append(place)
        return number


def site(number: int) -> Site:
    """The site with a number that :func:`site_at` gave."""
    return _sites[number]


def comparison(noted: Noted, pc: PC) -> Comparison | None:
    """The record of a note; None where 64 bits cannot hold both operands with their signs.

    The size is the smallest that holds both, signed if one is negative; operands are cut to it
    and filled up with zeros, as the arguments of ``__sanitizer_cov_trace_cmp1`` to ``cmp8`` in
    Linux' ``kernel/kcov.c`` are.
    """
    _, left, right, constant = noted
    low, high = (left, right) if left < right else (right, left)
    # With a sign, -1 - low has the bits of a low below zero but for that of the sign.
    bits = high.bit_length() if low >= 0 else max((-1 - low).bit_length(), high.bit_length()) + 1
    for log, size in enumerate((8, 16, 32, 64)):
        if bits <= size:
            mask = (1 << size) - 1
            return KCOV_CMP_SIZE(log) | constant, left & mask, right & mask, pc
    return None


# ---- what instrumented code calls


def _observe(value: T, constants: tuple[int | bytes, ...], site: int) -> T:
    """``value``, which is about to be compared with literals."""
    recorder = _recorder
    if recorder is not None:
        for constant in constants:
            # The literal first: __sanitizer_cov_trace_const_cmp1 and _switch in kernel/kcov.c.
            recorder.note(constant, value, KCOV_CMP_CONST, site)
    return value


def _within(
    value: T, first: int, holds: Callable[[int, object], bool], second: int, site: int
) -> T:
    """``value`` in the middle of ``first OP value OP second``.

    The second comparison takes place where the first one holds; ``holds`` is asked for plain
    integers alone, of which it tells no more than the target's own operator will.
    """
    recorder = _recorder
    if recorder is not None:
        recorder.note(first, value, KCOV_CMP_CONST, site)
        if type(value) is int and holds(first, value):
            recorder.note(second, value, KCOV_CMP_CONST, site)
    return value


def _pair(left: object, right: object, site: int) -> tuple[object, object]:
    """Both operands, which are about to be compared with each other."""
    recorder = _recorder
    if recorder is not None:
        recorder.note(left, right, 0, site)
    return left, right


HELPERS: Final[dict[str, Callable[..., Any]]] = {
    "__kcov_bridge_observe__": _observe,
    "__kcov_bridge_within__": _within,
    "__kcov_bridge_pair__": _pair,
    # Built in: they have no frame that a traceback or a tracer could show.
    "__kcov_bridge_eq__": operator.eq,
    "__kcov_bridge_ne__": operator.ne,
    "__kcov_bridge_lt__": operator.lt,
    "__kcov_bridge_le__": operator.le,
    "__kcov_bridge_gt__": operator.gt,
    "__kcov_bridge_ge__": operator.ge,
    "__kcov_bridge_truth__": operator.truth,
}
"""By the names under which instrumented code finds them."""


# ---- who has been given which


class Comparing(Protocol):
    """A source that has comparisons: :class:`bridge.sources.python.source.PythonSource`."""

    def record_comparisons(self, on: bool) -> None:
        """Somebody wants comparisons from now on, or nobody does any more."""

    def consume_comparisons(self) -> tuple[Sequence[Comparison], int]:
        """The comparisons since the last call, in order, and how many were dropped."""


class ComparisonCursor:
    """What one reader has been given so far; made by :meth:`ComparisonLedger.open_cursor`."""

    __slots__ = ("_lost", "_position")

    def __init__(self, position: int, lost: int) -> None:
        self._position = position
        self._lost = lost


class ComparisonLedger:
    """Hands the comparisons of a source to several readers, each in order to each.

    Not thread-safe: it is used on the doorbell thread only. It keeps at most :data:`LIMIT`
    comparisons: a reader that does not ask loses the oldest of what it has not fetched.
    """

    def __init__(
        self, source: Comparing, on_failure: Callable[[Exception], object] | None = None
    ) -> None:
        """``on_failure`` as for :class:`bridge.sources.ledger.Ledger`."""
        self._source = source
        self._on_failure = on_failure
        # What some open cursor has not been given; the first one has the number _first.
        self._kept: list[Comparison] = []
        self._first = 0
        self._lost = 0
        self._cursors: set[ComparisonCursor] = set()

    def open_cursor(self) -> ComparisonCursor:
        """A new reader, who is given what is compared from now on and nothing of before."""
        if self._cursors:
            self._drain()
        else:
            self._source.record_comparisons(True)
        cursor = ComparisonCursor(self._first + len(self._kept), self._lost)
        self._cursors.add(cursor)
        return cursor

    def close_cursor(self, cursor: ComparisonCursor) -> None:
        """Forget a reader; allowed more than once. Without any the source takes no notes."""
        self._cursors.discard(cursor)
        if self._cursors:
            self._forget()
        else:
            self._first += len(self._kept)
            self._kept.clear()
            self._source.record_comparisons(False)

    def collect(self, cursor: ComparisonCursor) -> tuple[list[Comparison], int]:
        """What was compared since this cursor last asked, and how many of it were dropped.

        Raises what the source raises, and ValueError for a cursor that is not open.
        """
        if cursor not in self._cursors:
            raise ValueError("the cursor is not open")
        self._drain()
        start = max(cursor._position, self._first)
        lost = start - cursor._position + self._lost - cursor._lost
        news = self._kept[start - self._first :]
        cursor._position = self._first + len(self._kept)
        cursor._lost = self._lost
        self._forget()
        return news, lost

    def _drain(self) -> None:
        try:
            news, lost = self._source.consume_comparisons()
        except Exception as error:
            if self._on_failure is None:
                raise
            self._on_failure(error)
            return
        self._kept += news
        self._lost += lost
        self._drop(len(self._kept) - LIMIT)

    def _forget(self) -> None:
        """Drop what every cursor has been given."""
        self._drop(min(cursor._position for cursor in self._cursors) - self._first)

    def _drop(self, oldest: int) -> None:
        if oldest > 0:
            del self._kept[:oldest]
            self._first += oldest
