# SPDX-License-Identifier: Apache-2.0
"""PCs into an area: :meth:`bridge.device.region.Area.append` against memcpy of the same bytes.

An area of 4 MiB, the size that syzkaller requests, is filled in batches of one size. The baseline
copies the same bytes in the same batches to another such area with the slice assignment of a
memoryview, which is memcpy(3). Sources written in Python give lists of numbers, each an object that
has to be unpacked; other sources can give an array.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from contextlib import ExitStack

from bridge.bench.measurement import Bench, Measurement, best_of, series, take_turns
from bridge.bench.stats import Aim, Comparison, Series
from bridge.device.region import Area, Region
from bridge.sources.pcs import PC_BASE, SLOT_BYTES

__all__ = ["MEASUREMENT"]

_WORDS = 512 << 10
"""Words of an area: ``kCoverSize`` in syzkaller's ``executor/executor.cc``."""
_BATCHES = (1, 100, 10_000, _WORDS - 1)
_LARGE = 10_000
_MOST_CALLS = 20_000
"""The most batches in a round; small batches need many, for the clock's sake."""
_NEEDED = 9


def _measure(bench: Bench) -> None:
    with ExitStack() as stack:
        region = Region(16 << 20)
        stack.callback(region.close)
        area = region.allocate(_WORDS)
        assert area is not None
        copy = memoryview(bytearray(_WORDS * 8)).cast("Q")
        for batch in _BATCHES:
            bench.progress(f"batches of {batch:,}")
            listed = [PC_BASE + SLOT_BYTES * number for number in range(batch)]
            packed = array("Q", listed)
            calls = min((_WORDS - 1) // batch, _MOST_CALLS)
            taken = take_turns(
                {
                    "a list": best_of(_append, area, listed, calls),
                    "an array": best_of(_append, area, packed, calls),
                    "memcpy": best_of(_copy, copy, memoryview(packed), calls),
                },
                _NEEDED if bench.quick else 25,
            )
            aims = (Aim(0.5, at_most=False),) if batch >= _LARGE else ()
            for way in ("a list", "an array"):
                case = f"{batch:,} PCs a batch, {way}"
                ours, baseline = (_rates(series(taken, name)) for name in (way, "memcpy"))
                bench.add(Comparison(case, "M PCs/s", ours, baseline, _NEEDED, aims=aims))


def _rates(seconds: Series) -> Series:
    """Convert seconds for a PC into millions of PCs a second."""
    return Series(seconds.name, tuple(1e-6 / each for each in seconds.values))


def _append(area: Area, pcs: Sequence[int], calls: int) -> float:
    """Append to an empty area, and return the seconds for a PC."""
    area.reset()
    append = area.append
    begun = time.perf_counter()
    for _ in range(calls):
        append(pcs)
    seconds = time.perf_counter() - begun
    assert area.count == calls * len(pcs)
    return seconds / area.count


def _copy(words: memoryview, pcs: memoryview, calls: int) -> float:
    """Copy the same bytes, and return the seconds for a PC."""
    batch = len(pcs)
    begun = time.perf_counter()
    for start in range(1, 1 + calls * batch, batch):
        words[start : start + batch] = pcs
    return (time.perf_counter() - begun) / (calls * batch)


MEASUREMENT = Measurement("append", "PCs into an area of 4 MiB, against memcpy", _measure)
