# SPDX-License-Identifier: Apache-2.0
"""What many instances cost: the signal of one among them, the host's memory, the guest's.

    python tests/bench/bench_instances.py [ROUNDS]

The others are enabled, each by a thread that sleeps. Baseline of every ratio: the same calls in the
same run with no other instance. A round is short, and the quarter of the rounds that were quickest
counts, because what else the machine does only ever makes a round slower.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import pytest

import bridge
from bridge.guest.images import build, compile_for_guest
from bridge.session.session import Session

pytestmark = [pytest.mark.bench, pytest.mark.vm]

COUNTS = (1, 8, 64)
BURSTS = 50
CALLS = 200
HELD = 64
HELD_WORDS = 512 << 10
SMALL = 500
PROGRAM = "/tmp/instances"


def signals(guest: Session, rounds: int) -> dict[int, list[float]]:
    """Microseconds of a traced call in each round, by how many instances are enabled."""
    found: dict[int, list[float]] = {count: [] for count in COUNTS}
    for turn in range(rounds):
        # In another order each time, so that a change of the machine's pace hits all.
        for count in COUNTS[turn % len(COUNTS) :] + COUNTS[: turn % len(COUNTS)]:
            words = [PROGRAM, "signal", str(count), str(BURSTS), str(CALLS)]
            figures = json.loads(guest.guest.run(words, check=True).text)
            assert figures["pcs"] >= CALLS, "each call leaves a PC"
            found[count] += [ns / 1e3 for ns in figures["ns"]]
    return found


def host_memory(guest: Session) -> tuple[int, int]:
    """KiB now: this process' own memory, and the region's."""
    assert guest.region is not None
    (own,) = [
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon:")
    ]
    return own, os.fstat(guest.region.fd).st_blocks // 2


def held_memory(guest: Session) -> tuple[int, int]:
    """KiB, as :func:`host_memory` has it, while many instances of 4 MiB are enabled."""
    figures: list[tuple[int, int]] = []

    def look(output: bytes) -> None:
        if b"held" in output:
            assert guest.device is not None
            assert guest.device.enabled == HELD
            figures.append(host_memory(guest))

    words = [PROGRAM, "hold", str(HELD), str(HELD_WORDS), "3"]
    guest.guest.run(words, check=True, stdout=look)
    return figures[0]


def main(rounds: int = 9) -> str:
    """The tables."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "instances")
        compile_for_guest(build(), Path(__file__).with_name("instances.c"), program)
        with bridge.boot(target="plan9", syscall_pcs=True) as guest:
            guest.guest.put(program, PROGRAM, 0o755)
            found = signals(guest, rounds)
            # The first use of anything is not the instances' own.
            held_memory(guest)
            before, during = host_memory(guest), held_memory(guest)
            small = json.loads(guest.guest.run([PROGRAM, "memory", str(SMALL)], check=True).text)
    lines = [f"{'enabled':>9} {'us a call':>10} {'min':>7} {'median':>7} {'to 1':>7}"]
    quick = {count: statistics.quantiles(figures)[0] for count, figures in found.items()}
    for count, figures in found.items():
        lines.append(
            f"{count:9} {quick[count]:10.2f} {min(figures):7.2f} "
            f"{statistics.median(figures):7.2f} {quick[count] / quick[COUNTS[0]]:6.2f}x"
        )
    lines += ["", f"{'KiB on the host':24} {'none':>8} {f'{HELD} x 4 MiB':>11}"]
    for name, index in (("the bridge's own", 0), ("the region", 1)):
        lines.append(f"{name:24} {before[index]:8} {during[index]:11}")
    lines += ["", f"{'bytes in the guest':24} {'slabs':>8} {'available':>11}"]
    names = {
        "file": "any open file",
        "open": "open, INIT_TRACE",
        "map": "mmap",
        "enable": "ENABLE",
    }
    for step, name in names.items():
        slab, available = small[step]
        lines.append(f"{name:24} {slab:8} {available:11}")
    return "\n".join(lines)


def test_bench_instances(capsys: pytest.CaptureFixture[str]) -> None:
    tables = main(rounds=1)
    with capsys.disabled():
        print(f"\n{tables}")
    assert len(tables.splitlines()) == 4 + 4 + 6


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
