# SPDX-License-Identifier: Apache-2.0
"""What a measurement is: a name, what it is about, and a function that takes turns.

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
    """What a measurement found. ``notes`` say what the figures do not, such as a baseline that
    could not be had and why; ``failure`` is not empty where it was cut short."""

    name: str
    about: str
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failure: str = ""


class Bench:
    """What a measurement is given: settings to boot with, and where to put what it finds.

    ``quick`` asks for as little as can be said to have been measured.
    """

    def __init__(self, settings: Settings, result: Result, *, quick: bool = False) -> None:
        self.quick = quick
        self._settings = settings
        self._result = result

    def settings(self, **changes: Any) -> Settings:
        """The user's settings for the machine; what a run is about is the measurement's to say."""
        fixed = {
            "source": "python",
            "isolate": False,
            "comparisons": False,
            "personality": "linux",
            "timeout": None,
        }
        return self._settings.replace(**{**fixed, **changes})

    def progress(self, what: str) -> None:
        """Tell whoever waits what is being done."""
        _log.info("%s: %s", self._result.name, what)

    def add(self, comparison: Comparison) -> None:
        """Put a figure down."""
        self._result.comparisons.append(comparison)

    def note(self, text: str) -> None:
        """Put down what a reader of the figures has to know."""
        self._result.notes.append(text)


@dataclass(frozen=True)
class Measurement:
    """One entry of ``kcov-bridge bench --list``. ``run`` raises what it cannot measure for."""

    name: str
    about: str
    run: Callable[[Bench], None]


def perform(measurement: Measurement, settings: Settings, *, quick: bool = False) -> Result:
    """Take a measurement. A :class:`bridge.errors.BridgeError` ends it, not the others: it is
    the result's failure, beside what was measured until then."""
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
    """Do each of these once, then each again, ...: what each gave, by its name, in order.

    ``warm_up`` rounds come first and are thrown away.
    """
    taken: dict[str, list[T]] = {name: [] for name in ways}
    for turn in range(-warm_up, rounds):
        for name, way in ways.items():
            value = way()
            if turn >= 0:
                taken[name].append(value)
    return taken


def series(taken: Mapping[str, Sequence[float]], name: str, scale: float = 1.0) -> Series:
    """One of the ways of :func:`take_turns`, its values multiplied by ``scale``."""
    return Series(name, tuple(value * scale for value in taken[name]))


def best_of(function: Callable[P, float], *args: P.args, **kwargs: P.kwargs) -> Callable[[], float]:
    """One turn of something that takes milliseconds on the processor alone: the least of a few
    times. What else the machine does can only make it slower."""
    return lambda: min(function(*args, **kwargs) for _ in range(_BURSTS))
