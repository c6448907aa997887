# SPDX-License-Identifier: Apache-2.0
"""What native coverage costs: a look of the bridge, and a block in the program.

    python -m tests.bench.bench_native

By number of known and of new blocks it prints the median of the looks, in microseconds of processor
time of this thread; and the processor time in nanoseconds of a block that was covered before.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bridge.sources.native.build import build_runtime
from bridge.sources.native.source import NativeSource
from tests.support.line_program import line_program

HERE = Path(__file__).parent
ROUNDS = 500


def look(source: NativeSource) -> tuple[float, int]:
    """Consume once; return microseconds and the number of PCs."""
    start = time.thread_time_ns()
    pcs = source.consume()
    return (time.thread_time_ns() - start) / 1000, len(pcs)


def measure(program: Path, blocks: int) -> None:
    """Print a line for each number of new blocks."""
    source = NativeSource()
    source.start()
    with line_program([program, str(blocks)], source.environment) as running:
        ask = running.ask
        ask("0")
        if len(source.consume()) != blocks:
            sys.exit("not all blocks were covered at first")
        for new in (0, 1, 10, 100, 1000):
            taken = []
            for _ in range(ROUNDS):
                ask(str(new))
                took, count = look(source)
                if count != new:
                    sys.exit(f"{count} blocks were covered and not {new}")
                taken.append(took)
            print(f"{blocks:>9,} known, {new:>5,} new: {statistics.median(taken):8.2f} us a look")
        ask("1024")
        print(f"{blocks:>9,} known: {ask('hits')} ns a block that was covered before")
    source.stop()


def main() -> None:
    """Measure programs of two sizes."""
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch, "blocks")
        flags = build_runtime().link_flags
        source = str(HERE / "native_blocks.c")
        subprocess.run(["cc", "-O2", "-o", str(program), source, *flags], check=True)
        for blocks in (10_000, 1_000_000):
            measure(program, blocks)


if __name__ == "__main__":
    main()
