# SPDX-License-Identifier: Apache-2.0
"""Stability: how often the same case covers the same, and drift: whether the guest has changed.

Stability is what engines show under that name: of all that cases covered, the part that they cover
again when they are executed once more. Drift compares a case, the *reference*, with what it covered
right after the last reset.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

__all__ = ["Stability"]

_INTERVAL_SECONDS = 1.0
"""The least time between two measurements."""
_DECAY = 0.98
"""How much earlier measurements count at each new one."""
_TIMEOUT_SECONDS = 10.0

Traces = Sequence[Sequence[int]]
"""The PCs of each task, in order."""


class Stability:
    """Both figures of one slot.

    Args:
        drift: the part of the reference's coverage that may change before the guest counts as
            drifted.

    Attributes:
        timeout: how long a case may take when it is executed again, in seconds.
        measured: how many cases were executed again.
        reference: the case by which drift is measured; None before there is one.
    """

    def __init__(self, drift: float) -> None:
        self.timeout = _TIMEOUT_SECONDS
        self.measured = 0
        self.reference: bytes | None = None
        self._drift = drift
        self._covered: frozenset[int] = frozenset()
        self._same = self._all = 0.0
        self._next = 0.0

    def due(self) -> bool:
        """Return whether a measurement is to be made now; then not for a while."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _INTERVAL_SECONDS
        return True

    @property
    def value(self) -> float | None:
        """The stability, 0 to 1; None before the first measurement."""
        return self._same / self._all if self._all else None

    def add(self, one: Traces, other: Traces) -> None:
        """Take two executions of the same case."""
        first, second = _covered(one), _covered(other)
        self.measured += 1
        self._same = self._same * _DECAY + len(first & second)
        self._all = self._all * _DECAY + len(first | second)

    def set_reference(self, case: bytes, pcs: Traces) -> None:
        """Take what the reference covers in a guest that was just reset."""
        self.reference, self._covered = case, _covered(pcs)

    def forget_reference(self) -> None:
        """Have no reference until the next one is set."""
        self.reference, self._covered = None, frozenset()

    def has_drifted(self, pcs: Traces) -> bool:
        """Return whether the reference covers too little of the same now.

        What differs from one execution to the next anyway is no drift.
        """
        now = _covered(pcs)
        union = len(now | self._covered)
        if not union:
            return False
        expected = self.value if self.value is not None else 1.0
        return len(now & self._covered) / union < expected - self._drift


def _covered(pcs: Iterable[Iterable[int]]) -> frozenset[int]:
    return frozenset(pc for trace in pcs for pc in trace)
