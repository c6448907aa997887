# SPDX-License-Identifier: Apache-2.0
"""Fan-out of a source's comparisons to several readers, each with its own cursor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from bridge.device.abi import KCOV_CMP_CONST, KCOV_CMP_SIZE, Comparison
from bridge.sources.pcs import syscall_pc

__all__ = [
    "LIMIT",
    "Comparing",
    "ComparisonCursor",
    "ComparisonLedger",
    "NoComparisons",
    "syscall_comparison",
]

LIMIT: Final = 1 << 16
"""Limit of comparisons kept for readers; more are dropped and counted."""

_NO_OPERAND: Final = 0xC0DE_B41D_6E5A_97F3
"""An operand that no program passes by chance, in any of its widths."""


def syscall_comparison(nr: int) -> Comparison | None:
    """Return the comparison that stands for system call number ``nr``; None outside 0 to 4095.

    Its PC is :func:`bridge.sources.pcs.syscall_pc`. syzkaller's executor keeps it: ``convert`` in
    its ``executor/executor.cc`` drops equal operands, and 0 as the constant. It makes no mutation:
    ``prog/hints.go`` there replaces arguments that are equal to the operand that is no constant.
    """
    pc = syscall_pc(nr)
    if pc is None:
        return None
    return KCOV_CMP_CONST | KCOV_CMP_SIZE(3), nr + 1, _NO_OPERAND, pc


class Comparing(Protocol):
    """A source that has comparisons: :class:`bridge.sources.python.source.PythonSource`."""

    def record_comparisons(self, on: bool) -> None:
        """Start or stop to record comparisons."""

    def consume_comparisons(self) -> tuple[Sequence[Comparison], int]:
        """Return the comparisons since the last call, in order, and how many were dropped."""


class NoComparisons:
    """A source that compares nothing."""

    def record_comparisons(self, on: bool) -> None:
        """See :class:`Comparing`."""

    def consume_comparisons(self) -> tuple[Sequence[Comparison], int]:
        """See :class:`Comparing`."""
        return (), 0


class ComparisonCursor:
    """One reader's position; made by :meth:`ComparisonLedger.open_cursor`."""

    __slots__ = ("_lost", "_position")

    def __init__(self, position: int, lost: int) -> None:
        self._position = position
        self._lost = lost


class ComparisonLedger:
    """Gives each reader all comparisons of a source, in order.

    Not thread-safe: only the doorbell's thread uses it. It keeps at most :data:`LIMIT` comparisons;
    a slow reader loses the oldest ones.
    """

    def __init__(
        self, source: Comparing, on_failure: Callable[[Exception], object] | None = None
    ) -> None:
        """``on_failure`` as for :class:`bridge.sources.ledger.Ledger`."""
        self._source = source
        self._on_failure = on_failure
        # Comparisons that some open cursor has not been given; _first numbers the first one.
        self._kept: list[Comparison] = []
        self._first = 0
        self._lost = 0
        self._cursors: set[ComparisonCursor] = set()

    def open_cursor(self) -> ComparisonCursor:
        """Return a new reader, which gets what is compared from now on."""
        if self._cursors:
            self._drain()
        else:
            self._source.record_comparisons(True)
        cursor = ComparisonCursor(self._first + len(self._kept), self._lost)
        self._cursors.add(cursor)
        return cursor

    def close_cursor(self, cursor: ComparisonCursor) -> None:
        """Forget a reader; safe to call twice. Without readers the source records nothing."""
        self._cursors.discard(cursor)
        if self._cursors:
            self._forget()
        else:
            self._first += len(self._kept)
            self._kept.clear()
            self._source.record_comparisons(False)

    def collect(self, cursor: ComparisonCursor) -> tuple[list[Comparison], int]:
        """Return the comparisons since this cursor's last call, and how many were dropped.

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
        """Drop what all cursors have been given."""
        self._drop(min(cursor._position for cursor in self._cursors) - self._first)

    def _drop(self, oldest: int) -> None:
        if oldest > 0:
            del self._kept[:oldest]
            self._first += oldest
