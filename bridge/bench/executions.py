# SPDX-License-Identifier: Apache-2.0
"""What an execution of a test case costs, without an engine: through the lane to the runner.

A C program (``lane.c``) gives cases to the runner of a slot as fast as it takes them. Cases do the
same whatever their bytes are: nothing, ten system calls that reach the guest's kernel alone, ten
that reach a server on the host by 9p. Where the time goes is told apart in turns of their own: the
runner's clock around the harness, which includes what the calls wait for; the rest is transport.
For the 9p calls the same calls on a file of the guest's own memory are the guest's part, the rest
is the connection and the target. The processor time of the bridge, in which the target runs, is
measured beside it.
"""

from __future__ import annotations

import functools
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bridge.bench.measurement import Bench, Measurement, take_turns
from bridge.bench.stats import Aim, Comparison, Of, Series
from bridge.config import Settings
from bridge.errors import InfrastructureError
from bridge.fuzz.lane import LANE_INPUT_OFFSET, LaneFlag, LaneWord
from bridge.fuzz.slot import BuiltIn, Slot, SlotOptions
from bridge.targets import MOUNT_POINT
from bridge.util.compile import CProgram

__all__ = ["LANE_LOOP", "MEASUREMENT", "Turn", "cases_of_a_turn", "run_cases"]

LANE_LOOP = CProgram(
    name="the cases of a benchmark",
    source=Path(__file__).with_name("lane.c"),
    flags=(
        *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"),
        f"-DINPUT_OFFSET={LANE_INPUT_OFFSET}",
        *(f"-D{word.name}={word.value}" for word in LaneWord),
    ),
    folder="bench",
)
"""The program that gives cases to a runner: :meth:`bridge.util.compile.CProgram.build`."""

_NEEDED = 5
_AIM = Aim(10_000.0, at_most=False, of=Of.VALUE)
_SPIN_NS = 1_000_000
_LOOP_SECONDS = 300.0
_CASE_BYTES = 64
_TURN_SECONDS = 0.5
_QUICK_TURN_SECONDS = 0.25
"""A turn takes about so long: a shorter one would fall into one time slice, and say little."""
_WARM = 10
"""Cases that come first and do not count: their code is translated meanwhile."""
_MOST = 1 << 22
"""Cases of a turn at most."""


@dataclass(frozen=True)
class Turn:
    """Many executions.

    Attributes:
        rate: executions a second.
        total: microseconds of each.
        inside: microseconds of each that the harness took; 0 if that was not measured.
        host: processor time of this process in microseconds for each.
    """

    rate: float
    total: float
    inside: float
    host: float


def run_cases(slot: Slot, count: int, *, timed: bool = False) -> Turn:
    """Have a slot's runner execute ``count`` cases.

    Raises:
        InfrastructureError: a case does not end, or the harness says that one went wrong.
    """
    lane, region = slot.lane, slot.session.region
    numbers = (
        region.fd,
        region.size,
        lane.areas.areas[0].offset,
        lane.last_case + 1,
        count,
        _CASE_BYTES,
        int(LaneFlag.TIMED if timed else 0),
        _SPIN_NS,
    )
    used = time.process_time()
    done = subprocess.run(
        [LANE_LOOP.build(), *map(str, numbers)],
        capture_output=True,
        check=False,
        pass_fds=(region.fd,),
        timeout=_LOOP_SECONDS,
    )
    used = time.process_time() - used
    lane.last_case += count
    figures = json.loads(done.stdout) if done.returncode == 0 else {"bad": count}
    if figures["bad"]:
        raise InfrastructureError(
            f"{figures['bad']} of {count} cases went wrong",
            evidence=done.stderr.decode(errors="replace"),
        )
    seconds = figures["seconds"]
    return Turn(
        rate=count / seconds,
        total=seconds / count * 1e6,
        inside=figures["inside_ns"] / count / 1e3 if timed else 0.0,
        host=used / count * 1e6,
    )


def cases_of_a_turn(run: Callable[[int], Turn], seconds: float) -> int:
    """Return how many cases take about so long when nothing else disturbs them."""
    run(_WARM)
    count = _WARM
    while True:
        # The quicker of two: other work can only make one slower.
        took = min(run(count).total for _ in range(2)) * count / 1e6
        fitting = round(count * seconds / max(took, 1e-6))
        if took >= seconds / 2 or count >= _MOST:
            return min(max(fitting, 1), _MOST)
        # A try with few cases says little: at most eight times as many follow.
        count = min(max(fitting, 2 * count), 8 * count, _MOST)


def _turns(bench: Bench, settings: Settings, harness: BuiltIn) -> dict[str, list[Turn]]:
    """Return turns without and with the runner's clock."""
    options = SlotOptions(areas=1, spin_ns=_SPIN_NS, drift=0.0)
    with (
        TemporaryDirectory(prefix="kcov-bridge-bench-") as directory,
        Slot(settings, harness, Path(directory), options=options) as slot,
    ):
        seconds = _QUICK_TURN_SECONDS if bench.quick else _TURN_SECONDS
        count = cases_of_a_turn(functools.partial(run_cases, slot), seconds)
        ways = {
            "plain": functools.partial(run_cases, slot, count),
            "timed": functools.partial(run_cases, slot, count, timed=True),
        }
        return take_turns(ways, _NEEDED if bench.quick else 15)


def _measure(bench: Bench) -> None:
    LANE_LOOP.build()
    kernel = bench.settings(target="none", source="kernel")
    bench.progress("an empty harness")
    empty = _turns(bench, kernel, BuiltIn("empty"))
    _add_rate(bench, "empty", empty, (_AIM,))
    _add_split(bench, "empty", empty)
    bench.progress("ten system calls, with the guest kernel as the source")
    calls = _turns(bench, kernel, BuiltIn("calls"))
    _add_rate(bench, "10 calls, kernel", calls)
    _add_split(bench, "10 calls, kernel", calls)
    served = bench.settings(source="python")
    bench.progress("ten system calls on the 9p target")
    path = f"{MOUNT_POINT}/README"
    there = _turns(bench, served, BuiltIn("file", (path,)))
    bench.progress("the same, with the connection by the region")
    by_region = bench.settings(source="python", transport="region")
    near = _turns(bench, by_region, BuiltIn("file", (path,)))
    bench.progress("the same calls on a file of the guest")
    here = _turns(bench, served, BuiltIn("file", ("/etc/hostname",)))
    _add_rate(bench, "10 calls, 9p", there)
    _add_split(bench, "10 calls, 9p", there)
    _add_rate(bench, "10 calls, 9p, by the region", near)
    _add_split(bench, "10 calls, 9p, by the region", near)
    guest = _series("in the guest's memory", here, "inside", "timed")
    whole = _series("on 9p", there, "inside", "timed")
    bench.add(
        Comparison("10 calls, 9p, connection and target", "us", whole, guest, _NEEDED, Of.MORE)
    )
    host = _series("bridge", there, "host", "plain")
    bench.add(Comparison("10 calls, 9p, processor", "us", host, None, _NEEDED, Of.VALUE))


def _series(name: str, turns: dict[str, list[Turn]], figure: str, way: str) -> Series:
    return Series(name, tuple(getattr(turn, figure) for turn in turns[way]))


def _add_rate(
    bench: Bench, case: str, turns: dict[str, list[Turn]], aims: tuple[Aim, ...] = ()
) -> None:
    rate = _series("executions", turns, "rate", "plain")
    bench.add(Comparison(case, "/s", rate, None, _NEEDED, Of.VALUE, aims))


def _add_split(bench: Bench, case: str, turns: dict[str, list[Turn]]) -> None:
    inside = _series("harness", turns, "inside", "timed")
    bench.add(Comparison(f"{case}, harness", "us", inside, None, _NEEDED, Of.VALUE))
    rest = Series("transport", tuple(max(turn.total - turn.inside, 0.0) for turn in turns["timed"]))
    bench.add(Comparison(f"{case}, transport", "us", rest, None, _NEEDED, Of.VALUE))


MEASUREMENT = Measurement("fuzz", "executions of test cases, without an engine", _measure)
