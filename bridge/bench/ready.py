# SPDX-License-Identifier: Apache-2.0
"""How long a guest takes to start and to be reset.

``ready`` runs ``kcov-bridge run -- echo`` as a process and measures from its start to the guest's
answer: with a boot (cold), and from a snapshot, as the bridge does by default (warm). The baseline
is virtme-ng with the same kernel under the same accelerator. ``reset`` is
:meth:`bridge.session.session.Session.reset`, against ending the guest and starting another; then
its parts, of a guest that has run a command, and of one that has written 5 MiB. ``guest`` is what
the agent does first, from the moment the guest goes on to its answer. The agent does the same once
more when it is asked to: what that takes less is ``translation``, because QEMU may have to
translate the guest's code again after a reset. ``whole`` is a reset without that.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from bridge.bench.commands import seconds_to_answer
from bridge.bench.measurement import Bench, Measurement, series, take_turns
from bridge.bench.stats import Aim, Comparison, Of, Series
from bridge.bench.virtme import Virtme
from bridge.config import ENVIRONMENT_PREFIX, Settings
from bridge.errors import BridgeError, InfrastructureError
from bridge.fuzz.slot import BuiltIn, Slot
from bridge.guest.guest_image import ProjectImage
from bridge.session.session import Session
from bridge.session.target_host import TargetState
from bridge.targets import MOUNT_POINT

__all__ = ["READY", "RESET", "environment_of", "virtme_of"]

_NEEDED = 3
_COLD_AIM = Aim(5.0, of=Of.VALUE)
_WARM_AIM = Aim(1.0, of=Of.VALUE)
_FASTER_AIM = Aim(15, at_most=False, of=Of.FASTER)
_RESET_AIM = Aim(150.0, of=Of.VALUE)
_WHOLE_AIM = Aim(30.0, of=Of.VALUE)
_MEMORY_AIM = Aim(10.0, of=Of.VALUE)
_SLOT_AIM = Aim(300.0, of=Of.VALUE)
_BARE_SLOT_AIM = Aim(100.0, of=Of.VALUE)
_CASE_SECONDS = 30.0
_USES = {
    "little": "true",
    "5 MiB": "dd if=/dev/zero bs=1M count=5 2>/dev/null | tr '\\0' x >/dev/shm/filled",
}
"""What a guest does before a reset whose parts are measured."""
_ANSWER = "answered-by-bridge"
_SECONDS = 300.0
_COLD, _WARM, _BASELINE = "cold", "warm", "virtme-ng"


def _measure_ready(bench: Bench) -> None:
    settings = bench.settings(target="none")
    with ExitStack() as stack:
        out = Path(stack.enter_context(TemporaryDirectory(prefix="kcov-bridge-bench-")))
        ways: dict[str, Callable[[], float]] = {}
        for way, changed in _ways(bench, settings).items():
            ways[way] = functools.partial(_run, changed, out)
        if (boot := virtme_of(bench, settings, stack)) is not None:
            ways[_BASELINE] = boot
        bench.progress(f"in turn: {', '.join(ways)}")
        # The baseline was tried before, and is slow.
        slow = _BASELINE in ways
        rounds = _NEEDED if bench.quick or slow else 2 * _NEEDED
        taken = take_turns(ways, rounds, warm_up=0 if slow else 1)
    baseline = series(taken, _BASELINE) if _BASELINE in taken else None
    of = Of.FASTER if baseline is not None else Of.VALUE
    for way, aim in ((_COLD, _COLD_AIM), (_WARM, _WARM_AIM)):
        if way in taken:
            usual = way == _WARM or _WARM not in taken
            aims = (aim, _FASTER_AIM) if usual and baseline is not None else (aim,)
            bench.add(Comparison(way, "s", series(taken, way), baseline, _NEEDED, of, aims))


def _ways(bench: Bench, settings: Settings) -> dict[str, Settings]:
    """Return the settings for each way that works here; this also makes the snapshot."""
    if not hasattr(Session, "reset"):
        bench.note("this version keeps no snapshot to start from: all starts are cold")
        return {_COLD: settings}
    ways = {_COLD: settings.replace(snapshot=False)}
    bench.progress("starting a guest, for the snapshot to be there")
    warm = settings.replace(snapshot=True)
    with Session(warm, None) as session:
        if session.snapshot is not None:
            ways[_WARM] = warm
        else:
            bench.note("this image cannot be started from a snapshot: all starts are cold")
    return ways


def _run(settings: Settings, out: Path) -> float:
    """Return the seconds until a run of its own answers."""
    command = [sys.executable, "-m", "bridge", "-q", "run", "--out", str(out)]
    return seconds_to_answer(
        [*command, "--", "echo", _ANSWER],
        _ANSWER.encode(),
        timeout=_SECONDS,
        env={**os.environ, **environment_of(settings)},
    )


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the variables that give a process these settings, except for ``out``."""
    values = {each.name: getattr(settings, each.name) for each in dataclasses.fields(Settings)}
    del values["out"]
    return {
        ENVIRONMENT_PREFIX + name.upper(): str(value)
        for name, value in values.items()
        if value is not None
    }


def virtme_of(bench: Bench, settings: Settings, stack: ExitStack) -> Callable[[], float] | None:
    """Return how to boot the baseline; None, with a note, if that is not possible."""
    if bench.quick:
        bench.note("virtme-ng as the baseline takes a minute or more: left out of --quick")
        return None
    bench.progress("booting a guest, for the kernel's modules")
    try:
        with Session(settings, None) as session:
            if not isinstance(session.image, ProjectImage):
                bench.note("no baseline: virtme-ng is given the kernel of an image of the project")
                return None
            virtme = stack.enter_context(Virtme(session, session.image.image))
        bench.progress("booting virtme-ng for a try")
        virtme.boot()
    except BridgeError as error:
        bench.note(f"no baseline: {' '.join(error.report().split())}")
        return None
    return virtme.boot


def _measure_reset(bench: Bench) -> None:
    reset = getattr(Session, "reset", None)
    if reset is None:
        bench.note("this version has no Session.reset(): a guest is made new by a restart alone")
        return
    settings = bench.settings(target="none")
    with ExitStack() as stack:
        current = _Restarted(settings)
        stack.callback(current.close)
        if not current.can_be_reset:
            bench.note("this image cannot be started from a snapshot, nor reset to one")
            return
        bench.progress("resets and restarts in turn")
        taken = take_turns(
            {"reset": lambda: current.reset(reset), "restart": current.restart},
            _NEEDED if bench.quick else 9,
        )
    pair = (series(taken, "reset", 1e3), series(taken, "restart", 1e3))
    bench.add(Comparison("reset", "ms", *pair, _NEEDED, Of.FASTER, (_RESET_AIM,)))
    bench.progress("the parts of a reset")
    with Session(settings, None) as session:
        rounds = 5 if bench.quick else 15
        ways = {use: functools.partial(_parts, session, use) for use in _USES}
        taken_apart = take_turns(ways, rounds)
        if (restored := session.restored) is None:
            bench.note("the memory was restored from outside of QEMU")
        else:
            bench.note(
                f"QEMU restored {restored.restored} of {restored.candidates} pages the last time, "
                + ("those that were written" if restored.tracked else "after it compared all")
            )
    for use, turns in taken_apart.items():
        for part in turns[0]:
            values = Series(part, tuple(each[part] for each in turns))
            aims = {"memory": (_MEMORY_AIM,), "whole": (_WHOLE_AIM,)}.get(part, ())
            bench.add(Comparison(f"{use}: {part}", "ms", values, None, _NEEDED, Of.VALUE, aims))
    _measure_slots(bench)


def _measure_slots(bench: Bench) -> None:
    """Measure what a reset takes in a campaign: until the next case can run."""
    kept, forked = TargetState.KEEP, TargetState.FORK
    for name, target, state, aim in (
        ("slot", "plan9", forked, _SLOT_AIM),
        ("slot, no target", "none", kept, _BARE_SLOT_AIM),
    ):
        harness = BuiltIn("files", (MOUNT_POINT,)) if target != "none" else BuiltIn("empty")
        settings = bench.settings(target=target).replace(diagnose=True)
        bench.progress(f"resets of a campaign: {name}")
        with (
            TemporaryDirectory(prefix="kcov-bridge-bench-") as directory,
            Slot(settings, harness, Path(directory), target_state=state) as slot,
        ):
            turns = [_slot_parts(slot) for _ in range(_NEEDED + 2 if bench.quick else 15)][2:]
        for part in turns[0]:
            values = Series(part, tuple(each[part] for each in turns))
            aims = (aim,) if part == "whole" else ()
            bench.add(Comparison(f"{name}: {part}", "ms", values, None, _NEEDED, Of.VALUE, aims))


def _slot_parts(slot: Slot) -> dict[str, float]:
    """Return the milliseconds of each part of a reset of a slot that executed some cases."""
    for _ in range(10):
        slot.execute(b"", _CASE_SECONDS)
    begun = time.perf_counter()
    slot.reset("bench")
    whole = time.perf_counter() - begun
    return {part: s * 1e3 for part, s in {**slot.reset_seconds, "whole": whole}.items()}


def _parts(session: Session, use: str) -> dict[str, float]:
    """Return the milliseconds of each part of a reset."""
    session.guest.run(["sh", "-c", _USES[use]], check=True)
    begun = time.perf_counter()
    session.reset()
    whole = (time.perf_counter() - begun) * 1e3
    parts = {part: seconds * 1e3 for part, seconds in session.reset_seconds.items()}
    begun = time.perf_counter()
    session.machine.greet()
    again = (time.perf_counter() - begun) * 1e3
    # The guest goes on while QEMU still answers that it does.
    guest = parts.pop("continue") + parts.pop("guest")
    translation = max(0.0, guest - again)
    return {**parts, "guest": guest, "translation": translation, "whole": whole - translation}


class _Restarted:
    """A guest that is reset, or ended and booted again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stack = ExitStack()
        self._session: Session
        self._boot()

    def _boot(self) -> None:
        self._session = self._stack.enter_context(Session(self._settings, None))

    @property
    def can_be_reset(self) -> bool:
        """Whether the guest was started from a snapshot."""
        return self._session.snapshot is not None

    def _answers(self) -> None:
        self._session.guest.run(["true"], check=True)

    def restart(self) -> float:
        """End the guest, boot another, and return the seconds until that answers."""
        begun = time.perf_counter()
        self.close()
        self._boot()
        self._answers()
        return time.perf_counter() - begun

    def reset(self, reset: Callable[[Session], object]) -> float:
        """Return the seconds of a reset that undoes what was done since the last one."""
        guest = self._session.guest
        guest.run("touch /tmp/changed", check=True)
        begun = time.perf_counter()
        reset(self._session)
        seconds = time.perf_counter() - begun
        if self._session.guest.run(["test", "-e", "/tmp/changed"]).exit_status == 0:
            raise InfrastructureError("a reset left what was done before it")
        return seconds

    def close(self) -> None:
        """End the guest."""
        self._stack.close()


READY = Measurement("ready", "from a command's start to the guest's answer", _measure_ready)
RESET = Measurement("reset", "a guest as it was when it was ready", _measure_reset)
