# SPDX-License-Identifier: Apache-2.0
"""What a case covers that no case before it did: PCs, and edges between PCs."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Coverage", "CoverageSet", "edge"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def edge(before: int, after: int) -> int:
    """Return a number of 64 bits for the step from one PC to the next."""
    mixed = ((before * _GOLDEN & _MASK) ^ after) * _GOLDEN & _MASK
    return mixed ^ mixed >> 32


@dataclass(frozen=True, slots=True)
class Coverage:
    """PCs and edges; words of 64 bits."""

    pcs: array[int]
    edges: array[int]

    @classmethod
    def of(cls, pcs: Iterable[int] = (), edges: Iterable[int] = ()) -> Coverage:
        """Return a coverage of these numbers."""
        return cls(array("Q", pcs), array("Q", edges))

    def __bool__(self) -> bool:
        return bool(self.pcs or self.edges)


Traces = Sequence[Sequence[int]]
"""The PCs of each task, in order."""


def _pairs(traces: Traces) -> set[tuple[int, int]]:
    return set(itertools.chain.from_iterable(map(itertools.pairwise, traces)))


class CoverageSet:
    """All that was covered so far."""

    def __init__(self, pcs: set[int] | None = None) -> None:
        """``pcs`` is used, not copied."""
        self.pcs = set() if pcs is None else pcs
        self.edges: set[int] = set()

    def new(self, coverage: Coverage) -> Coverage:
        """Return the part that is not in the set, without repeats."""
        return Coverage.of(
            dict.fromkeys(pc for pc in coverage.pcs if pc not in self.pcs),
            dict.fromkeys(each for each in coverage.edges if each not in self.edges),
        )

    def update(self, coverage: Coverage) -> None:
        """Add to the set."""
        self.pcs.update(coverage.pcs)
        self.edges.update(coverage.edges)

    def take(self, traces: Traces, *, ordered: bool, again: Traces | None = None) -> Coverage:
        """Add what a case covered, and return the part that was new.

        Args:
            traces: for each task its PCs.
            ordered: they are in the order in which they ran, so edges count.
            again: what it covered when it was executed once more: edges of one execution alone do
                not count, since the interrupts and tasks of a guest make new ones without end. PCs
                do, as there are not many.
        """
        pairs = _pairs(traces) if ordered else set()
        if pairs and again is not None:
            pairs &= _pairs(again)
        found = self.new(
            Coverage.of(
                {pc for trace in traces for pc in trace},
                {edge(first, then) for first, then in pairs},
            )
        )
        self.update(found)
        return found
