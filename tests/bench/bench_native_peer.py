# SPDX-License-Identifier: Apache-2.0
"""What a return costs with coverage of a Go program: the bridge's way, and gVisor's.

    python -m tests.bench.bench_native_peer

gVisor's way by Go's public API (``go_peer/main.go``): the program writes all its counters, decodes
them and clears them (runtime/coverage). The bridge reads them in place. The ways take
turns, each with a process of the program, after the same work. It prints the medians in
microseconds: of time for gVisor's way, of time and of processor time for the bridge's.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bridge.sources.native.source import NativeSource
from tests.support.line_program import line_program

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
    environment = {"GOCOVERDIR": str(program.parent)}
    with line_program([program], environment) as peer, line_program([program]) as running:
        peer.ask("encode")
        running.ask("encode")
        source.add_process(running.process.pid)
        source.consume()
        for work in ("little", "encode"):
            theirs, ours, cpu, idle = [], [], [], []
            blocks = found = 0
            for _ in range(ROUNDS):
                took, number = peer.ask(f"{work} peer").split()
                theirs.append(int(took) / 1000)
                found = int(number)
                running.ask(work)
                start, start_cpu = time.perf_counter_ns(), time.thread_time_ns()
                blocks = len(source.consume())
                cpu.append((time.thread_time_ns() - start_cpu) / 1000)
                ours.append((time.perf_counter_ns() - start) / 1000)
                start_cpu = time.thread_time_ns()
                source.consume()
                idle.append((time.thread_time_ns() - start_cpu) / 1000)
            way, mine = statistics.median(theirs), statistics.median(ours)
            print(
                f"{source.blocks_total:,} blocks, {found} and {blocks} covered at a return: "
                f"gVisor's way {way:.1f} us, ours {mine:.1f} us "
                f"({statistics.median(cpu):.1f} us of processor time): {way / mine:.1f}x; a look "
                f"without news {statistics.median(idle):.1f} us"
            )
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
