# SPDX-License-Identifier: Apache-2.0
"""Executions per second of the shim alone, with a no-op in the guest's place.

    python -m tests.bench.bench_shim [--rounds N] [--executions N] [--engine afl-fuzz]

Two engines drive it in turns: a small C program that only speaks the protocol (``engine.c``), and
the real one, which also mutates, and looks at the map. In the guest's place a C program covers one
block and is done (``tests/support/null_vm.c``). Printed are medians, slowest and fastest, and
where the time of an execution went by the shim's own clock.

Three processes take turns here, so two quiet cores are what it takes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bridge.fuzz.board import BoardWord
from bridge.fuzz.engine import JobOptions, find_engine, prepare_seeds, start_job
from bridge.fuzz.shim import shim_program
from tests.support.null_slot import NullSlot

MAP_SIZE = 1 << 16
PARTS = {
    "engine": BoardWord.NS_ENGINE,
    "guest": BoardWord.NS_GUEST,
    "fold": BoardWord.NS_FOLD,
    "slot": BoardWord.NS_SLOT,
}


def driver(directory: Path) -> Path:
    """Compile ``engine.c``."""
    program = directory / "engine"
    source = Path(__file__).with_name("engine.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program


def parts_of(slot: NullSlot) -> dict[str, float]:
    """Return the nanoseconds of an execution by part."""
    executions = max(slot.board[BoardWord.EXECUTIONS], 1)
    return {name: slot.board[word] / executions for name, word in PARTS.items()}


def drive(program: Path, executions: int) -> tuple[float, dict[str, float]]:
    """Return the executions per second with ``engine.c``, and the parts."""
    with tempfile.TemporaryDirectory() as directory, NullSlot(Path(directory), noop=True) as slot:
        command: list[str | Path] = [program, str(executions), str(MAP_SIZE), shim_program()]
        done = subprocess.run(command, env=slot.environment(), capture_output=True, check=True)
        return executions / float(done.stdout), parts_of(slot)


def fuzz(name: str, seconds: int) -> tuple[float, dict[str, float]]:
    """Return the executions per second with the real engine, and the parts."""
    engine = find_engine(name)
    with tempfile.TemporaryDirectory() as text, NullSlot(Path(text), noop=True) as slot:
        directory = Path(text)
        prepare_seeds(None, directory / "seeds", defaults=(b"A seed of about 32 bytes, or so.",))
        options = JobOptions(map_size=MAP_SIZE, seconds=seconds, random_seed=1)
        with start_job(engine, slot.socket, directory / "seeds", directory / "out", options) as job:
            job.process.wait()
            job.check()
            figures = job.figures()
        assert figures is not None
        return figures.executions_per_second, parts_of(slot)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--executions", type=int, default=200_000, help="of engine.c, a round")
    parser.add_argument("--seconds", type=int, default=5, help="of the real engine, a round")
    parser.add_argument("--engine", default="afl-fuzz", help="the real engine")
    args = parser.parse_args(argv)
    real = find_engine(args.engine)
    results: dict[str, list[tuple[float, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        program = driver(Path(directory))
        for _ in range(args.rounds):
            results.setdefault("engine.c", []).append(drive(program, args.executions))
            found = results.setdefault(f"AFL++ {real.version}", [])
            found.append(fuzz(args.engine, args.seconds))
    print("engine          executions/s   slowest   fastest   ns: " + "  ".join(PARTS))
    for name, rounds in results.items():
        rates = [rate for rate, _ in rounds]
        parts = (f"{statistics.median(each[part] for _, each in rounds):.0f}" for part in PARTS)
        print(
            f"{name:16}{statistics.median(rates):12,.0f}{min(rates):10,.0f}{max(rates):10,.0f}   "
            + "  ".join(parts)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
