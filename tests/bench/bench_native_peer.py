# SPDX-License-Identifier: Apache-2.0
"""What a return costs with coverage of a Go program: the bridge's way, and gVisor's.

    python -m tests.bench.bench_native_peer

gVisor's way by Go's public API (``go_peer/main.go``): the program writes all its counters, decodes
them and clears them (runtime/coverage). The bridge reads and clears them in place. The ways take
turns on the same program, after the same work. It prints the medians in microseconds: of time for
gVisor's way, of processor time and of time for the bridge's.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bridge.sources.native.source import NativeSource

HERE = Path(__file__).parent / "go_peer"
PACKAGES = "./...,encoding/...,net/http,reflect,fmt"
ROUNDS = 300


def build(go: str, directory: Path) -> Path:
    """Build the program with coverage of packages that a file server has too."""
    program = directory / "peer"
    flags = ("-p=1", "-cover", "-covermode=atomic", f"-coverpkg={PACKAGES}")
    subprocess.run([go, "build", *flags, "-o", str(program), "."], cwd=HERE, check=True)
    return program


def measure(program: Path) -> None:
    """Print a row for each of two amounts of work."""
    source = NativeSource()
    source.start()
    with subprocess.Popen(
        [str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GOCOVERDIR": str(program.parent)},
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def ask(line: str) -> str:
            stdin.write(f"{line}\n")
            stdin.flush()
            return stdout.readline().strip()

        ask("encode")
        source.add_process(process.pid)
        source.consume()
        for work in ("little", "encode"):
            theirs, cpu, ours, blocks, found = [], [], [], 0, 0
            for _ in range(ROUNDS):
                took, number = ask(f"{work} peer").split()
                theirs.append(int(took) / 1000)
                found = int(number)
                ask(work)
                start, start_cpu = time.perf_counter_ns(), time.thread_time_ns()
                blocks = len(source.consume())
                cpu.append((time.thread_time_ns() - start_cpu) / 1000)
                ours.append((time.perf_counter_ns() - start) / 1000)
            peer, mine = statistics.median(theirs), statistics.median(ours)
            print(
                f"{source.blocks_total:,} blocks, {found} and {blocks} covered at a return: "
                f"gVisor's way {peer:.1f} us, ours {mine:.1f} us "
                f"({statistics.median(cpu):.1f} us of processor time): {peer / mine:.1f}x"
            )
        stdin.close()
    source.stop()


def main() -> None:
    """Build the program, and measure it."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        sys.exit("go is missing: apt-get install golang-go")
    with tempfile.TemporaryDirectory() as scratch:
        measure(build(go, Path(scratch)))


if __name__ == "__main__":
    main()
