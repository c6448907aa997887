# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a benchmark: medians, quartiles, and which comparisons are refused.

Two series that were taken in turn are compared turn by turn, so that other work of the machine
affects both. A ratio is the median of the turns' ratios, its spread the distance of their
quartiles. A comparison with too few turns, or with quartiles that are too far apart, is refused
with the reason. An aim is met or missed only if both quartiles agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

__all__ = [
    "MOST_SPREAD",
    "Aim",
    "Comparison",
    "Of",
    "Outcome",
    "Series",
    "Summary",
    "Verdict",
    "quantile",
]

MOST_SPREAD = 0.3
"""Largest distance of a ratio's quartiles, as a part of its median, at which it is still shown."""


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value below which this part (0 to 1) of the values lies, interpolated.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class Summary:
    """A summary of ``runs`` values: median, quartiles, extremes."""

    runs: int
    median: float
    q1: float
    q3: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise at least one value. Raises ValueError for none."""
        middle, first, third = (quantile(values, part) for part in (0.5, 0.25, 0.75))
        return cls(len(values), middle, first, third, min(values), max(values))

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a part of the median; infinite for a median of 0."""
        if self.q1 == self.q3:
            return 0.0
        return abs((self.q3 - self.q1) / self.median) if self.median else math.inf


@dataclass(frozen=True)
class Series:
    """The values of each turn of one way, which ``name`` names."""

    name: str
    values: tuple[float, ...]

    @property
    def summary(self) -> Summary:
        """The summary. Raises ValueError for a series without values."""
        return Summary.of(self.values)


class Of(Enum):
    """How two series are compared; the texts are for the table.

    ``TIMES``: ours divided by the baseline. ``FASTER``: the baseline divided by ours.
    ``MORE``: ours less the baseline, in their unit. ``VALUE``: ours alone.
    """

    TIMES = "x"
    FASTER = "x faster"
    MORE = "more"
    VALUE = ""


class Verdict(Enum):
    """Whether a figure meets its aim."""

    MET = "met"
    MISSED = "MISSED"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Aim:
    """A limit for the result of a comparison, or for a ``VALUE``.

    ``at_most`` False means at least.
    """

    limit: float
    at_most: bool = True
    of: Of = Of.TIMES

    def judge(self, figure: Summary) -> Verdict:
        """Return MET or MISSED if both quartiles agree."""
        good = [self._holds(each) for each in (figure.q1, figure.q3)]
        if all(good):
            return Verdict.MET
        return Verdict.UNCLEAR if any(good) else Verdict.MISSED

    def _holds(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True)
class Outcome:
    """The result of a comparison: a figure, or in ``refused`` why there is none."""

    figure: Summary | None
    refused: str = ""


@dataclass(frozen=True)
class Comparison:
    """A figure beside its baseline.

    The two series were taken in turn. Without a baseline there is only a ``VALUE``.

    Attributes:
        unit: the unit of the values.
        needed: the least number of turns of each.
        of: how they are compared.
        aims: limits for the comparison, or for the value.
        parameters: the numbers in the case, for programs.
    """

    case: str
    unit: str
    ours: Series
    baseline: Series | None
    needed: int
    of: Of = Of.TIMES
    aims: tuple[Aim, ...] = ()
    parameters: Mapping[str, int] = field(default_factory=dict)

    def outcome(self) -> Outcome:
        """Return the figure of the two series, or why it is refused."""
        return self._outcome(self.of)

    def verdict(self, aim: Aim) -> Verdict | None:
        """Return whether it meets one of its aims; None if the figure is refused."""
        figure = self._outcome(aim.of).figure
        return aim.judge(figure) if figure is not None else None

    def _outcome(self, of: Of) -> Outcome:
        ours, baseline = self.ours, self.baseline
        if of is not Of.VALUE and baseline is None:
            return Outcome(None, "there is no baseline")
        for each in (ours, baseline):
            if each is not None and len(each.values) < self.needed:
                return Outcome(None, f"{len(each.values)} of {self.needed} runs: {each.name}")
        if of is Of.VALUE or baseline is None:
            return _unless_wide(ours.summary, ours.summary.median)
        if len(ours.values) != len(baseline.values):
            return Outcome(None, "not taken in turn: the two differ in their number of runs")
        try:
            pairs = zip(ours.values, baseline.values, strict=True)
            figure = Summary.of([_compare(of, *pair) for pair in pairs])
        except ZeroDivisionError:
            return Outcome(None, "a value of 0 cannot be divided by")
        # A difference may be about 0, so its spread is measured by the values themselves.
        return _unless_wide(figure, baseline.summary.median if of is Of.MORE else figure.median)


def _unless_wide(figure: Summary, measure: float) -> Outcome:
    width = abs((figure.q3 - figure.q1) / measure) if measure else math.inf
    if figure.q1 != figure.q3 and width > MOST_SPREAD:
        return Outcome(None, f"quartiles {width:.0%} apart, {MOST_SPREAD:.0%} at most")
    return Outcome(figure)


def _compare(of: Of, ours: float, baseline: float) -> float:
    if of is Of.MORE:
        return ours - baseline
    return ours / baseline if of is Of.TIMES else baseline / ours
