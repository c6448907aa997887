# SPDX-License-Identifier: Apache-2.0
"""What native coverage costs: a look of the bridge, and a block in the program.

    python tests/bench/bench_native.py

By number of known and of new blocks it prints the median of the looks, in microseconds of processor
time of this thread; and the processor time in nanoseconds of a block that was covered before.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from bridge.sources.native.build import build_runtime
from bridge.sources.native.source import NativeSource

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
    with subprocess.Popen(
        [str(program), str(blocks)],
        env={**os.environ, **source.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def ask(line: str) -> str:
            stdin.write(f"{line}\n")
            stdin.flush()
            return stdout.readline().strip()

        ask("0")
        assert len(source.consume()) == blocks
        for new in (0, 1, 10, 100, 1000):
            taken = []
            for _ in range(ROUNDS):
                ask(str(new))
                took, count = look(source)
                assert count == new, (count, new)
                taken.append(took)
            print(f"{blocks:>9,} known, {new:>5,} new: {statistics.median(taken):8.2f} us a look")
        ask("1024")
        print(f"{blocks:>9,} known: {ask('hits')} ns a block that was covered before")
        stdin.close()
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
