# SPDX-License-Identifier: Apache-2.0
"""What the device adds to a system call: getppid(2) in a guest, off and on in turn.

    python tests/bench/bench_signal.py [ROUNDS [CALLS]]

Baseline of every ratio: the same call in the same round with kcov off. Measured with the host
staying awake after a request (the default) and asleep at once.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence

import pytest

import bridge
from bridge import session as sessions

pytestmark = [pytest.mark.bench, pytest.mark.vm]


def measure(busy_seconds: float, rounds: int, calls: int) -> tuple[list[float], list[float]]:
    """Microseconds a call in each round: off, on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "_BUSY_SECONDS", busy_seconds)
        with bridge.boot(target="none", syscall_pcs=True) as guest:
            result = guest.run(f"kcov-bench {rounds} {calls}")
            figures = json.loads(result.text)
            assert figures["pcs"] >= calls, "each call leaves a PC"
            assert guest.doorbell is not None
            guest.doorbell.call(guest.doorbell.look_at_guest)
            assert guest.doorbell.guest_timeouts == 0
    return [ns / 1e3 for ns in figures["off_ns"]], [ns / 1e3 for ns in figures["on_ns"]]


def row(name: str, off: Sequence[float], on: Sequence[float]) -> str:
    """One line of the table: medians, extremes, ratio of the medians."""
    ratio = statistics.median(on) / statistics.median(off)
    return (
        f"{name:22} {statistics.median(off):7.2f} {statistics.median(on):9.2f} "
        f"{min(on):9.2f} {max(on):9.2f} {ratio:8.1f}x"
    )


def main(rounds: int = 15, calls: int = 3000) -> str:
    """The table."""
    lines = [f"{'us a call':22} {'off':>7} {'on':>9} {'min':>9} {'max':>9} {'on/off':>9}"]
    for name, seconds in (("awake for 200 us", 200e-6), ("asleep at once", 0.0)):
        lines.append(row(name, *measure(seconds, rounds, calls)))
    return "\n".join(lines)


def test_bench_signal(capsys: pytest.CaptureFixture[str]) -> None:
    table = main(rounds=5, calls=1000)
    with capsys.disabled():
        print(f"\n{table}")
    assert table.count("x") >= 2


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
