# SPDX-License-Identifier: Apache-2.0
"""Records what Python code compares.

:mod:`bridge.sources.python.instrument` makes the code under coverage call the functions of
:data:`HELPERS` where it compares. They note the operands that Linux' record can hold, for each
:class:`Recorder` that is on and wants them.

These are integers of 64 bits (``int`` and its subclasses, such as an IntEnum, but not ``bool``),
and bytes of length 1, 2, 4 or 8 as the integers that a little-endian machine would load. The
helpers call no code of the target, raise nothing and change nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any, Final, TypeVar

from bridge.device.abi import KCOV_CMP_CONST
from bridge.sources.comparisons import LIMIT

__all__ = ["HELPERS", "STRING_BYTES", "Noted", "Recorder", "Site", "number_of", "site", "site_at"]

STRING_BYTES: Final = frozenset({1, 2, 4, 8})
"""Lengths of bytes that are noted: the sizes KCOV_CMP_SIZE(0) to (3)."""

Site = tuple[str, int]
"""A comparison's place: canonical path of the source file, and line."""

Noted = tuple[int, int, int, int]
"""A noted comparison: number of the site, two signed operands, KCOV_CMP_CONST or 0."""

T = TypeVar("T")

_LOW: Final = -(1 << 63)
_HIGH: Final = 1 << 64

# Guards writes to what follows: several threads may import, several sources start and stop.
_lock = Lock()
# All sites ever instrumented in this process, because code outlives its source.
_sites: list[Site] = []
_numbers: dict[Site, int] = {}
# The recorders that are on; instrumented code finds them here. Replaced, never changed.
_recorders: tuple[Recorder, ...] = ()


class Recorder:
    """Notes what threads of this process compare, up to :data:`LIMIT` at a time.

    Args:
        wants: returns, on the comparing thread, whether to note a comparison at the site with this
            number; None notes all.
    """

    __slots__ = ("_apart", "_lost", "_noted", "_wants")

    def __init__(self, wants: Callable[[int], bool] | None = None) -> None:
        self._wants = wants
        self._noted: list[Noted] = []
        # Approximate: two threads that count at the same moment may count as one.
        self._lost = 0
        # Threads that work on behalf of a handle; their comparisons are not noted.
        self._apart: set[int] = set()

    def record(self, on: bool) -> None:
        """Start to note comparisons, or stop and forget them."""
        global _recorders
        with _lock:
            others = tuple(each for each in _recorders if each is not self)
            _recorders = (*others, self) if on else others
        self._noted.clear()
        self._lost = 0

    def take(self) -> tuple[list[Noted], int]:
        """Return the comparisons since the last call, in order, and how many were dropped."""
        noted = self._noted
        # Each step is atomic under the interpreter lock; what comes in between stays.
        taken = noted[:]
        del noted[: len(taken)]
        lost, self._lost = self._lost, 0
        return taken, lost

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While inside, do not note what this thread compares. Blocks nest."""
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
        if self._wants is not None and not self._wants(site):
            return
        first = number_of(left)
        if first is None:
            return
        second = number_of(right)
        if second is None:
            return
        if type(left) in _STRINGS or type(right) in _STRINGS:
            # A number and bytes, or bytes of different length, are never equal.
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
    """Return the number for a value in a record; None if a record cannot hold it."""
    kind = type(value)
    if kind is int:
        number: int = value  # type: ignore[assignment]
    elif kind in _STRINGS:
        if len(value) not in STRING_BYTES:  # type: ignore[arg-type]
            return None
        return int.from_bytes(value, "little")  # type: ignore[arg-type]
    elif kind is not bool and issubclass(kind, int):
        # int's own method, because a subclass may override it.
        number = int.__index__(value)  # type: ignore[arg-type]
    else:
        return None
    return number if _LOW <= number < _HIGH else None


def site_at(path: str, line: int) -> int:
    """Return the number of a site, for the helpers."""
    place = (path, line)
    with _lock:
        number = _numbers.get(place)
        if number is None:
            number = _numbers[place] = len(_sites)
            _sites.append(place)
        return number


def site(number: int) -> Site:
    """Return the site with a number of :func:`site_at`."""
    return _sites[number]


# ---- what instrumented code calls


def _observe(value: T, constants: tuple[int | bytes, ...], site: int) -> T:
    """Return ``value``, which is about to be compared with literals."""
    for recorder in _recorders:
        for constant in constants:
            # The literal first, as __sanitizer_cov_trace_const_cmp1 and _switch in kernel/kcov.c.
            recorder.note(constant, value, KCOV_CMP_CONST, site)
    return value


def _within(
    value: T, first: int, holds: Callable[[int, object], bool], second: int, site: int
) -> T:
    """Return ``value``, the middle of ``first OP value OP second``.

    The second comparison takes place if the first one holds. ``holds`` is called for plain integers
    alone, where it has the result of the target's own operator.
    """
    for recorder in _recorders:
        recorder.note(first, value, KCOV_CMP_CONST, site)
        if type(value) is int and holds(first, value):
            recorder.note(second, value, KCOV_CMP_CONST, site)
    return value


def _pair(left: object, right: object, site: int) -> tuple[object, object]:
    """Return both operands, which are about to be compared with each other."""
    for recorder in _recorders:
        recorder.note(left, right, 0, site)
    return left, right


HELPERS: Final[dict[str, Callable[..., Any]]] = {
    "__kcov_bridge_observe__": _observe,
    "__kcov_bridge_within__": _within,
    "__kcov_bridge_pair__": _pair,
    # Built-in functions have no frame that a traceback or a tracer could show.
    "__kcov_bridge_eq__": operator.eq,
    "__kcov_bridge_ne__": operator.ne,
    "__kcov_bridge_lt__": operator.lt,
    "__kcov_bridge_le__": operator.le,
    "__kcov_bridge_gt__": operator.gt,
    "__kcov_bridge_ge__": operator.ge,
    "__kcov_bridge_truth__": operator.truth,
}
"""The helpers, by the names that instrumented code uses."""
