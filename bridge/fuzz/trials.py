# SPDX-License-Identifier: Apache-2.0
"""The statistics of repeated campaigns: two groups of trials, figure by figure.

A *trial* is one campaign. Fuzzing is random, so two single campaigns say little: evaluations in the
literature run several trials on each side and compare them by the Mann-Whitney U test, which asks
whether the values of one side tend to be larger, and by Vargha and Delaney's A12, which says how
often: the probability that a trial of the first side has the larger value, where equal values count
half. 0.5 is no difference; from 0.56, 0.64 and 0.71 on (or as far below 0.5) Vargha and Delaney
call it small, medium and large.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bridge.errors import MissingDependencyError
from bridge.fuzz.curves import Band, Curve, thin_out
from bridge.fuzz.progress import TCurve

__all__ = ["SIGNIFICANT", "Figure", "Spread", "a12", "band", "magnitude", "value_at"]

SIGNIFICANT: Final = 0.05
"""A smaller p is called a difference."""

_MAGNITUDES: Final = ((0.71, "large"), (0.64, "medium"), (0.56, "small"))


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of the trials of one side."""

    trials: int
    median: float
    q1: float
    q3: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        if len(values) == 1 or math.inf in values:
            # Between a number and "never" nothing is interpolated.
            ordered = sorted(values)
            last = len(ordered) - 1
            q1, middle, q3 = (ordered[round(part * last)] for part in (0.25, 0.5, 0.75))
        else:
            q1, middle, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(len(values), middle, q1, q3, min(values), max(values))


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of all trials of both sides.

    Values may be infinite: what never happened in a trial. The test only looks at their order.

    Attributes:
        u: Mann and Whitney's U of the first side.
        p: two-sided; None if the test cannot be made, see ``note``.
        a12: of the first side.
        note: what cannot be said, and why.
    """

    name: str
    unit: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    u: float
    p: float | None
    a12: float
    note: str = ""

    @classmethod
    def of(cls, name: str, unit: str, ours: Sequence[float], theirs: Sequence[float]) -> Figure:
        """Compare at least one value of each side.

        Raises:
            MissingDependencyError: scipy is not installed.
        """
        p, note = _test(ours, theirs)
        u = _u(ours, theirs)
        return cls(name, unit, tuple(ours), tuple(theirs), u, p, a12(ours, theirs), note)

    @property
    def verdict(self) -> str:
        """What can be said, in words."""
        if self.p is None:
            return self.note
        if self.p >= SIGNIFICANT:
            return "no difference that the trials could show"
        side = "larger" if self.a12 > 0.5 else "smaller"
        return f"{side}, {magnitude(self.a12)} effect"


def a12(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return Vargha and Delaney's A12: how often a value of ours is larger, equal ones count half.

    Raises ValueError for a side without values.
    """
    if not ours or not theirs:
        raise ValueError("a side has no values")
    return _u(ours, theirs) / (len(ours) * len(theirs))


def _u(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return how many pairs have the larger value in ours; equal ones count half."""
    ordered = sorted(theirs)
    return sum(bisect_left(ordered, each) + bisect_right(ordered, each) for each in ours) / 2


def magnitude(effect: float) -> str:
    """Return what Vargha and Delaney call an A12 of this size."""
    distance = max(effect, 1 - effect)
    return next((name for least, name in _MAGNITUDES if distance >= least), "negligible")


def value_at(points: TCurve, x: float) -> float:
    """Return a curve's value at a place; 0 before its first point."""
    index = bisect_right(points, x, key=lambda point: point[0]) - 1
    return points[index][1] if index >= 0 else 0.0


def band(label: str, curves: Sequence[TCurve], end: float) -> Curve:
    """Return the median of curves, with a band from quartile to quartile.

    Args:
        end: the last place; all curves reach that far.
    """
    places = {x for points in curves for x, _ in points if x <= end} | {end}
    xs = [x for x, _ in thin_out([(x, 0.0) for x in sorted(places)])]
    middle: TCurve = []
    low: TCurve = []
    high: TCurve = []
    for x in xs:
        spread = Spread.of([value_at(points, x) for points in curves])
        middle.append((x, spread.median))
        low.append((x, spread.q1))
        high.append((x, spread.q3))
    return Curve(label, middle, Band(low, high) if len(curves) > 1 else None)


def _test(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float | None, str]:
    """Return p of the test, or None and why there is none."""
    if len({*ours, *theirs}) == 1:
        return None, "all trials are equal"
    least = 2 / math.comb(len(ours) + len(theirs), len(ours))
    if least >= SIGNIFICANT:
        return None, (
            f"too few trials: with {len(ours)} and {len(theirs)} no result could have p below "
            f"{least:.2g}"
        )
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingDependencyError(
            "the comparison of campaigns needs scipy, which is not installed",
            hint="pip install 'kcov-bridge[fuzz]'",
        ) from error
    # Ranks say all that the test looks at, and "never" has one too.
    ranks = stats.rankdata([*ours, *theirs])
    found = stats.mannwhitneyu(ranks[: len(ours)], ranks[len(ours) :], alternative="two-sided")
    return float(found.pvalue), ""
