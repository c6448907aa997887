# SPDX-License-Identifier: Apache-2.0
"""Several guests at once on one machine: a pool, each with its own bridge process.

The figures are the time until all have answered a command, the memory of each, and the signals a
second of all together: with doorbells that stay awake for a moment after a signal, and with
doorbells that always sleep.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bridge.bench.measurement import Bench, Measurement, take_turns
from bridge.bench.stats import Comparison, Of, Series
from bridge.bench.worker import SERVICE
from bridge.config import Settings
from bridge.session.pool import Pool

__all__ = ["ADAPTIVE", "MEASUREMENT", "MEMORY", "READY"]

READY = "until all are ready"
MEMORY = "memory of each"
ADAPTIVE = "adaptive"

_COUNTS = (1, 2, 4, 8)
_WARM_UP_SECONDS = 0.3
_NEEDED = 3


@dataclass(frozen=True)
class _Figures:
    """The figures of one turn: seconds, MiB for each guest, signals a second in all."""

    ready: float
    memory: float
    adaptive: float
    asleep: float
    from_snapshot: bool


def _case(count: int, what: str) -> str:
    """Return the case's name in the table."""
    return f"{count} VM{'s' if count > 1 else ''}, {what}"


def _measure(bench: Bench) -> None:
    settings = bench.settings(target="none", syscall_pcs=True)
    counts = _COUNTS[:2] if bench.quick else _COUNTS
    seconds = 1.0 if bench.quick else 2.0
    taken = take_turns(
        {
            str(count): functools.partial(_together, bench, settings, count, seconds)
            for count in counts
        },
        _NEEDED,
        warm_up=0,
    )

    def series(name: str, count: int, figure: str) -> Series:
        return Series(name, tuple(getattr(each, figure) for each in taken[str(count)]))

    # The first guest may have been booted, to make the snapshot.
    snapshots = all(each.from_snapshot for each in taken[str(counts[-1])])
    bench.note(f"the guests were {'started from a snapshot' if snapshots else 'booted'}")
    for what, figure, unit in ((READY, "ready", "s"), (MEMORY, "memory", "MiB")):
        for count in counts:
            alone = series("1 VM", 1, figure) if count > 1 else None
            of = Of.TIMES if alone is not None else Of.VALUE
            ours = series(what, count, figure)
            case, parameters = _case(count, what), {"vms": count}
            bench.add(Comparison(case, unit, ours, alone, _NEEDED, of, parameters=parameters))
    for count in counts:
        pair = series(ADAPTIVE, count, "adaptive"), series("always asleep", count, "asleep")
        case, parameters = _case(count, "signals in all"), {"vms": count}
        bench.add(Comparison(case, "/s", *pair, _NEEDED, parameters=parameters))


def _together(bench: Bench, settings: Settings, count: int, seconds: float) -> _Figures:
    bench.progress(f"{count} at once")
    with Pool(count, settings, service=SERVICE) as pool:
        ready = pool.wait_ready()

        def rate(seconds: float, adaptive: bool) -> float:
            return float(sum(pool.all("stream", seconds, adaptive)))

        # QEMU has to translate the code of the first calls.
        rate(_WARM_UP_SECONDS, True)
        adaptive, asleep = rate(seconds, True), rate(seconds, False)
        memory = sum(sum(each) for each in pool.all("memory"))
        from_snapshot = all(stats.from_snapshot for stats in ready)
        slowest = max(worker.seconds for worker in pool.workers if worker.seconds is not None)
        return _Figures(slowest, memory / count, adaptive, asleep, from_snapshot)


MEASUREMENT = Measurement("vms", "several guests at once", _measure)
