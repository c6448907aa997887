# SPDX-License-Identifier: Apache-2.0
"""A measurement: a name, a description, and a function that runs the ways in turn.

def _measure(bench: Bench) -> None:
    taken = take_turns({"ours": ours, "memcpy": baseline}, rounds=15)
    bench.add(Comparison("1,000 PCs", "us", series(taken, "ours"), series(taken, "memcpy"), 9))

MEASUREMENT = Measurement("append", "PCs into an area", _measure)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from bridge.bench.stats import Comparison, Series
from bridge.config import Settings
from bridge.errors import BridgeError

__all__ = ["Bench", "Measurement", "Result", "best_of", "perform", "series", "take_turns"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

_BURSTS = 5


@dataclass
class Result:
    """What a measurement found.

    Attributes:
        notes: remarks for readers of the figures, such as why there is no baseline.
        failure: why it was cut short; "" if it was not.
    """

    name: str
    about: str
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failure: str = ""


class Bench:
    """What a measurement works with: settings to boot with, and a place for its figures.

    ``quick`` asks for the least number of runs.
    """

    def __init__(self, settings: Settings, result: Result, *, quick: bool = False) -> None:
        self.quick = quick
        self._settings = settings
        self._result = result

    def settings(self, **changes: Any) -> Settings:
        """Return the user's settings for the machine, with those that the measurement sets."""
        fixed = {
            "source": "python",
            "isolate": False,
            "comparisons": False,
            "personality": "linux",
            "timeout": None,
        }
        return self._settings.replace(**{**fixed, **changes})

    def progress(self, what: str) -> None:
        """Log what is being done."""
        _log.info("%s: %s", self._result.name, what)

    def add(self, comparison: Comparison) -> None:
        """Add a figure."""
        self._result.comparisons.append(comparison)

    def note(self, text: str) -> None:
        """Add a remark for readers of the figures."""
        self._result.notes.append(text)


@dataclass(frozen=True)
class Measurement:
    """One entry of ``kcov-bridge bench --list``. ``run`` raises what keeps it from measuring."""

    name: str
    about: str
    run: Callable[[Bench], None]


def perform(measurement: Measurement, settings: Settings, *, quick: bool = False) -> Result:
    """Make a measurement.

    A :class:`bridge.errors.BridgeError` ends only this measurement: it becomes the result's
    failure, beside the figures so far.
    """
    result = Result(measurement.name, measurement.about)
    begun = time.monotonic()
    try:
        measurement.run(Bench(settings, result, quick=quick))
    except BridgeError as error:
        result.failure = error.report()
    except TimeoutError as error:
        result.failure = f"no answer in time: {error}"
    result.seconds = time.monotonic() - begun
    return result


def take_turns(
    ways: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    warm_up: int = 1,
) -> dict[str, list[T]]:
    """Run each of the ways once, then each again, and so on.

    Args:
        rounds: how often each way is run.
        warm_up: rounds before these, whose results are dropped.

    Returns:
        The results of each way by its name, in order.
    """
    taken: dict[str, list[T]] = {name: [] for name in ways}
    for turn in range(-warm_up, rounds):
        for name, way in ways.items():
            value = way()
            if turn >= 0:
                taken[name].append(value)
    return taken


def series(taken: Mapping[str, Sequence[float]], name: str, scale: float = 1.0) -> Series:
    """Return the series of one way of :func:`take_turns`, multiplied by ``scale``."""
    return Series(name, tuple(value * scale for value in taken[name]))


def best_of(function: Callable[P, float], *args: P.args, **kwargs: P.kwargs) -> Callable[[], float]:
    """Make a turn of a function that takes milliseconds of processor time: the least of a few.

    Other work of the machine can only make it slower.
    """
    return lambda: min(function(*args, **kwargs) for _ in range(_BURSTS))
