# SPDX-License-Identifier: Apache-2.0
"""What the kcov device adds to system calls, measured in the guest by ``kcov-bench``.

``signal``: each call's return finds new coverage, a block of Python code and the PC of the call's
number; ``native-signal``: a block of native code, and that PC. The baseline is the floor
(:mod:`bridge.bench.floor`) in the same guest, with a host that is awake and with one that always
sleeps. For the quantiles above the median there is also a floor whose answers take as long as the
bridge's: the longer a call takes, the more of them are hit by what stops a processor now and then,
like its timer. ``idle``: the return finds no coverage; the baseline is the same call with kcov off.
``trace``: calls of a command whose system calls are traced (``run --trace``); the baseline is the
same command without a trace. ``others``: calls of a task that owns nothing, while another task
does; the baseline is a guest without the module.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bridge.bench.floor import FLOOR, floor
from bridge.bench.measurement import Bench, Measurement, take_turns
from bridge.bench.stats import Aim, Comparison, Of, Series
from bridge.bench.targets import (
    COVERED_TARGET,
    NATIVE_TARGET,
    cover_before_each_look,
    cover_native_before_each_look,
)
from bridge.errors import InfrastructureError
from bridge.session.session import Session
from bridge.sources.python.source import PythonSource

__all__ = ["IDLE", "NATIVE_SIGNAL", "OTHERS", "SIGNAL", "TRACE", "stay_awake"]

_NEEDED = 5
_SIGNAL_AIM = Aim(2.0)
_IDLE_AIM = Aim(0.5, of=Of.MORE)
_OTHERS_AIM = Aim(1.02)
_QUANTILES = ("p50", "p99", "p99.9")
_BUSY = "floor, busy"
_AS_SLOW = "floor, as slow"
_ASLEEP = "floor, asleep"
_TRACE_SECONDS = 120.0
_MODULE = "/usr/lib/modules/$(uname -r)/extra/kcov_bridge.ko"

_Figures = dict[str, Any]
"""What kcov-bench prints."""


def stay_awake(session: Session, seconds: float) -> None:
    """Set how long the doorbell stays awake after a request; 0: not at all."""
    doorbell = session.doorbell
    doorbell.call(functools.partial(setattr, doorbell.polling, "poll_ns", int(seconds * 1e9)))


def _run(session: Session, *words: str) -> _Figures:
    figures: _Figures = json.loads(session.guest.run(["kcov-bench", *words], check=True).text)
    return figures


def _check(session: Session) -> None:
    """Raise if the guest gave up signals, because those were not measured."""
    timeouts, failure = session.stats().guest_timeouts, session.doorbell.failure
    if timeouts or failure:
        raise InfrastructureError(
            f"the guest gave up {timeouts} signals"
            + (f"; the source raised {failure!r}" if failure else ""),
            hint="the machine is too busy to measure on",
        )


def _cover_python(session: Session, scratch: Path) -> None:
    if isinstance(session.source, PythonSource):
        cover_before_each_look(session.source)


def _cover_native(session: Session, scratch: Path) -> None:
    if session.native is not None:
        cover_native_before_each_look(session.native, scratch)


def _measure_signal(target: str, cover: Callable[[Session, Path], None], bench: Bench) -> None:
    FLOOR.build()
    settings = bench.settings(target=target, syscall_pcs=True)
    count = 1_000 if bench.quick else 10_000
    bench.progress("booting a guest")
    with TemporaryDirectory() as scratch, Session(settings, None) as session:
        cover(session, Path(scratch))

        def ours(seconds: float) -> _Figures:
            stay_awake(session, seconds)
            figures = _run(session, "calls", str(count))
            # Reading the clock may be a system call, too.
            if not 2 * count <= figures["pcs"] <= 2 * (count + 4):
                raise InfrastructureError(f"{count} calls left {figures['pcs']} PCs, not two each")
            return figures

        def least(asleep: bool = False, answer_ns: int = 0) -> _Figures:
            with floor(session, asleep=asleep, answer_ns=answer_ns):
                return _run(session, "calls", str(count))

        latest: dict[str, float] = {}

        def keep(name: str, figures: _Figures) -> _Figures:
            latest[name] = figures["on"]["p50"]
            return figures

        bench.progress("calls in turn: the bridge and the floor, awake and asleep")
        ways: dict[str, Callable[[], _Figures]] = {
            "awake": lambda: keep("awake", ours(settings.awake)),
            _BUSY: lambda: keep(_BUSY, least()),
            _AS_SLOW: lambda: least(answer_ns=max(0, round(latest["awake"] - latest[_BUSY]))),
            "asleep": lambda: ours(0),
            _ASLEEP: lambda: least(asleep=True),
        }
        taken = take_turns(ways, _NEEDED if bench.quick else 15)
        _check(session)
    for way, baseline in (("awake", _BUSY), ("awake", _AS_SLOW), ("asleep", _ASLEEP)):
        for part in _QUANTILES:
            if baseline == _AS_SLOW and part == "p50":
                continue
            aims = (_SIGNAL_AIM,) if (way, part) == ("awake", "p50") else ()
            pair = (_series(taken, way, "on", part), _series(taken, baseline, "on", part))
            bench.add(Comparison(f"host {way}, {part}", "us", *pair, _NEEDED, aims=aims))
    off = Series("kcov off", _series(taken, "awake", "off", "p50").values)
    on = _series(taken, "awake", "on", "p50")
    bench.add(Comparison("host awake, p50", "us", on, off, _NEEDED))


def _series(taken: Mapping[str, list[_Figures]], way: str, state: str, part: str) -> Series:
    """Return the series in microseconds."""
    return Series(way, tuple(figures[state][part] / 1e3 for figures in taken[way]))


def _measure_idle(bench: Bench) -> None:
    settings = bench.settings(target=COVERED_TARGET, syscall_pcs=False)
    count = 1_000 if bench.quick else 10_000
    bench.progress("booting a guest")
    with Session(settings, None) as session:

        def calls() -> _Figures:
            figures = _run(session, "calls", str(count))
            if figures["pcs"]:
                raise InfrastructureError(f"calls that reach nothing left {figures['pcs']} PCs")
            return figures

        bench.progress("calls with kcov off and on")
        taken = take_turns(
            {"kcov on": calls},
            _NEEDED if bench.quick else 25,
        )
        _check(session)
    for part in ("p50", "mean"):
        on = _series(taken, "kcov on", "on", part)
        off = Series("kcov off", _series(taken, "kcov on", "off", part).values)
        aims = (_IDLE_AIM,) if part == "p50" else ()
        bench.add(Comparison(part, "us", on, off, _NEEDED, Of.MORE, aims))


def _measure_trace(bench: Bench) -> None:
    count = 1_000 if bench.quick else 10_000
    for case, syscall_pcs in (("finds nothing", False), ("finds coverage", True)):
        settings = bench.settings(target=COVERED_TARGET, syscall_pcs=syscall_pcs)
        bench.progress(f"booting a guest: the return {case}")
        with Session(settings, None) as session:
            if syscall_pcs:
                assert isinstance(session.source, PythonSource)
                cover_before_each_look(session.source)

            def command(session: Session, trace: bool) -> _Figures:
                words = ["kcov-bench", "plain", str(count)]
                done = session.kcov(words, trace=trace, timeout=_TRACE_SECONDS)
                listed = sum(call.name == "getppid" for call in done.calls)
                if done.exit_status or listed != (count if trace else 0):
                    raise InfrastructureError(
                        f"of {count} calls {listed} were traced (exit status {done.exit_status})",
                        evidence=done.stderr.decode(errors="replace"),
                    )
                figures: _Figures = json.loads(done.stdout)
                return figures

            bench.progress("a command with and without a trace")
            taken = take_turns(
                {
                    "traced": functools.partial(command, session, True),
                    "no trace": functools.partial(command, session, False),
                },
                _NEEDED if bench.quick else 15,
            )
            _check(session)
        for part in ("p50", "mean"):
            ours, baseline = (_series(taken, way, "plain", part) for way in ("traced", "no trace"))
            bench.add(Comparison(f"{case}, {part}", "us", ours, baseline, _NEEDED, Of.MORE))


def _measure_others(bench: Bench) -> None:
    settings = bench.settings(target="none")
    count = 20_000 if bench.quick else 100_000
    words = f"kcov-bench others {count}"
    bench.progress("booting a guest")
    with Session(settings, None) as session:

        def without_module() -> _Figures:
            script = f"rmmod kcov_bridge && {words}; status=$?; insmod {_MODULE} && exit $status"
            figures: _Figures = json.loads(session.guest.run(script, check=True).text)
            return figures

        bench.progress("calls with an owner elsewhere, and without the module")
        taken = take_turns(
            {
                "an owner sleeps": lambda: _run(session, "others", str(count), "owner"),
                "no module": without_module,
            },
            _NEEDED if bench.quick else 25,
        )
    for call in ("getppid", "open, close"):
        ours, baseline = (
            Series(way, tuple(figures[call] / 1e3 for figures in taken[way]))
            for way in ("an owner sleeps", "no module")
        )
        bench.add(Comparison(call, "us", ours, baseline, _NEEDED, aims=(_OTHERS_AIM,)))


SIGNAL = Measurement(
    "signal",
    "a system call whose return finds new coverage",
    functools.partial(_measure_signal, COVERED_TARGET, _cover_python),
)
NATIVE_SIGNAL = Measurement(
    "native-signal",
    "a system call whose return finds new coverage of a native program",
    functools.partial(_measure_signal, NATIVE_TARGET, _cover_native),
)
IDLE = Measurement("idle", "a system call of an owner whose return finds nothing", _measure_idle)
TRACE = Measurement("trace", "a system call in a command that is traced", _measure_trace)
OTHERS = Measurement("others", "system calls of tasks that own nothing", _measure_others)
