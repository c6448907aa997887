# SPDX-License-Identifier: Apache-2.0
"""What comparisons cost the target: pyroute2's 9P server, one Tstat request after the other.

Under coverage.py in each case: without the setting ``comparisons``, with it while nobody traces
comparisons, and with it while somebody does; all in turn. Run it alone with
``python tests/bench/bench_comparisons.py``, or with ``pytest -m bench``.
"""

from __future__ import annotations

import importlib
import os
import struct
import sys
import threading
import time
from statistics import median
from types import ModuleType
from typing import Any

import pytest

from bridge.sources.comparisons import ComparisonLedger
from bridge.sources.ledger import Ledger
from bridge.sources.python.source import PythonSource
from bridge.targets.plan9 import Plan9Target

REQUESTS = 2_000
ROUNDS = 5
CASES = ("without", "with, nobody traces", "with, one traces")

# size[4] type[1] tag[2] fid[4] and what follows; the fid 1 becomes that of the root.
TATTACH = struct.pack("<IBHII", 19, 104, 1, 1, 2**32 - 1) + bytes(4)
TSTAT = struct.pack("<IBHI", 11, 124, 1, 1)


class Answers:
    """The server's transport."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: bytes) -> None:
        self.bytes += len(data)


def take_away() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "pyroute2"]
    return {name: sys.modules.pop(name) for name in names}


def measure(case: str) -> float:
    """Microseconds of CPU time that one request takes, with the look at its coverage."""
    before = take_away()
    source = PythonSource(Plan9Target.packages, data_file=None, comparisons=case != CASES[0])
    seconds: list[float] = []

    def work() -> None:
        source.start()
        try:
            seconds.append(serve(source, case == CASES[2]))
        finally:
            source.stop()

    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        take_away()
        sys.modules.update(before)
    return seconds[0] / REQUESTS * 1e6


def serve(source: PythonSource, traced: bool) -> float:
    server: Any = importlib.import_module("pyroute2.plan9.server")
    plan9: Any = importlib.import_module("pyroute2.plan9")
    filesystem: Any = importlib.import_module("pyroute2.plan9.filesystem")
    protocol = server.Plan9ServerProtocol(None, plan9.Marshal9P(), filesystem.Filesystem())
    answers = Answers()
    protocol.connection_made(answers)
    protocol.data_received(TATTACH)
    ledger = Ledger([source])
    cursor = ledger.open_cursor()
    comparing = ComparisonLedger(source) if traced else None
    reader = comparing.open_cursor() if comparing else None
    found = 0
    start = time.thread_time()
    for _ in range(REQUESTS):
        protocol.data_received(TSTAT)
        ledger.collect(cursor)
        if comparing and reader:
            found += len(comparing.collect(reader)[0])
    seconds = time.thread_time() - start
    assert answers.bytes > REQUESTS * 11
    assert (found >= REQUESTS * 3) is traced
    if comparing and reader:
        comparing.close_cursor(reader)
    return seconds


def run(rounds: int = ROUNDS) -> dict[str, float]:
    """Medians in microseconds by case."""
    figures: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            figures[case].append(measure(case))
    return {case: median(each) for case, each in figures.items()}


def table(figures: dict[str, float]) -> str:
    base = figures[CASES[0]]
    return "\n".join(
        f"{case:<20} {figure:>8.1f} us {figure / base:>6.2f}x" for case, figure in figures.items()
    )


@pytest.mark.bench
def test_comparisons_cost_little() -> None:
    figures = run(3)
    print("\n" + table(figures))
    assert figures[CASES[1]] < 2 * figures[CASES[0]]


if __name__ == "__main__":
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPUs, medians of CPU time a request")
    print(table(run()))
