# SPDX-License-Identifier: Apache-2.0
"""How long it takes until a guest can be used: booted, from a snapshot, taken back.

    python tests/bench/bench_ready.py [ROUNDS [BASELINE ...]]

Each round does each once, in turn. "to a command" begins with the start of a process that imports
the bridge and ends when a shell's first command in the guest has answered. Baseline of every ratio:
a boot in the same round. A second baseline is any other command that boots a guest, runs a command
in it and ends, given as the words after ROUNDS, for example virtme-ng with the image's kernel:

    vng --run "$(kcov-bridge image path)/vmlinuz" --disable-kvm -- true
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import pytest

import bridge

pytestmark = [pytest.mark.bench, pytest.mark.vm]

_PROGRAM = """
import time
import bridge
with bridge.boot(target="none", source="python", snapshot={snapshot}) as guest:
    assert (guest.snapshot is not None) == {snapshot}
    guest.run("true", stdout=print)
    print(guest.ready.boot_seconds, time.monotonic(), flush=True)
"""


def start(snapshot: bool) -> tuple[float, float]:
    """Seconds from QEMU's start to "ready", and from the process's start to a command."""
    begun = time.monotonic()
    program = [sys.executable, "-c", _PROGRAM.format(snapshot=snapshot)]
    text = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    ready, answered = map(float, text.split())
    return ready, answered - begun


def seconds(function: Callable[[], object]) -> float:
    begun = time.monotonic()
    function()
    return time.monotonic() - begun


def row(name: str, figures: Sequence[float], baseline: float) -> str:
    """One line of the table: median, extremes, ratio of the medians."""
    middle = statistics.median(figures)
    return (
        f"{name:34} {middle:8.3f} {min(figures):8.3f} {max(figures):8.3f} {middle / baseline:7.2f}x"
    )


def main(rounds: int = 10, other: Sequence[str] = ()) -> str:
    """The table, seconds."""
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    with bridge.boot(target="none", source="python") as guest:
        assert guest.snapshot is not None, "this machine starts no guest from a snapshot"
        guest.run("true")
        for _ in range(rounds):
            ready, answered = start(snapshot=False)
            note("booted: ready", ready)
            note("booted: to a command", answered)
            ready, answered = start(snapshot=True)
            note("from a snapshot: ready", ready)
            note("from a snapshot: to a command", answered)
            guest.run("echo used >/etc/hostname; head -c 20000000 /dev/urandom >/tmp/used")
            note("taken back: reset()", seconds(guest.reset))
            note("taken back: the next command", seconds(lambda: guest.run("true")))
            if other:
                note("the other command", seconds(lambda: subprocess.run(other, check=True)))
    ready = statistics.median(figures["booted: ready"])
    answered = statistics.median(figures["booted: to a command"])
    lines = [f"{'seconds':34} {'median':>8} {'min':>8} {'max':>8} {'ratio':>8}"]
    for name, found in figures.items():
        to_ready = name.endswith(("ready", "reset()"))
        lines.append(row(name, found, ready if to_ready else answered))
    return "\n".join(lines)


def test_bench_ready(capsys: pytest.CaptureFixture[str]) -> None:
    table = main(rounds=2)
    with capsys.disabled():
        print(f"\n{table}")
    assert table.count("x") >= 6


if __name__ == "__main__":
    print(main(int(sys.argv[1]) if sys.argv[1:] else 10, sys.argv[2:]))
