# SPDX-License-Identifier: Apache-2.0
"""How much slower coverage makes a service that is bound to the processor.

    python -m tests.bench.bench_native_service

One program (``native_service.c``) is built without coverage, with callbacks that do nothing in
place of the run time's, and with the run time; the last also runs while the bridge looks every
2 ms. They take turns. It prints the medians of the processor time of a line, and their ratios to
the first and to the second.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from bridge.sources.native.build import build_runtime
from bridge.sources.native.source import NativeSource

SOURCE = Path(__file__).parent / "native_service.c"
GUARDS = "-fsanitize-coverage=trace-pc-guard,pc-table"
ROUNDS = 15
LINES = 3_000_000
EMPTY = """
#include <stdint.h>
void __sanitizer_cov_trace_pc_guard(uint32_t *guard) { (void)guard; }
void __sanitizer_cov_trace_pc_guard_init(uint32_t *start, uint32_t *stop)
{
	(void)start, (void)stop;
}
void __sanitizer_cov_pcs_init(const uintptr_t *start, const uintptr_t *stop)
{
	(void)start, (void)stop;
}
"""


def build(directory: Path) -> dict[str, Path]:
    """Build the program in each way; by the name of the way."""
    empty = directory / "empty.c"
    empty.write_text(EMPTY)
    subprocess.run(["clang", "-O2", "-c", "-o", str(directory / "empty.o"), str(empty)], check=True)
    flags = {
        "without coverage": (),
        "callbacks that do nothing": (GUARDS, str(directory / "empty.o")),
        "run time": (GUARDS, *build_runtime().link_flags),
    }
    programs = {}
    for index, (name, each) in enumerate(flags.items()):
        programs[name] = directory / str(index)
        linked = ("-fno-sanitize-link-runtime", *each) if each else ()
        command = ["clang", "-O2", str(SOURCE), *linked, "-o", str(programs[name])]
        subprocess.run(command, check=True)
    return programs


def run(program: Path, environment: dict[str, str]) -> float:
    """Return the nanoseconds of a line."""
    done = subprocess.run(
        [str(program), str(LINES)],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    return float(done.stdout)


def main() -> None:
    """Measure, and print a row for each way."""
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            programs = build(Path(scratch))
        except FileNotFoundError:
            sys.exit("clang is missing: apt-get install clang")
        for _ in range(ROUNDS):
            for name, program in programs.items():
                taken.setdefault(name, []).append(run(program, {}))
            source = NativeSource()
            source.start()
            over = threading.Event()

            def look(source: NativeSource = source, over: threading.Event = over) -> None:
                while not over.wait(0.002):
                    source.consume()

            thread = threading.Thread(target=look)
            thread.start()
            took = run(programs["run time"], dict(source.environment))
            taken.setdefault("run time, looked at", []).append(took)
            over.set()
            thread.join()
            assert source.blocks_covered
            source.stop()
    medians = {name: statistics.median(values) for name, values in taken.items()}
    plain, empty = medians["without coverage"], medians["callbacks that do nothing"]
    for name, median in medians.items():
        print(f"{name:<28}{median:8.1f} ns a line{median / plain:8.2f}x{median / empty:8.2f}x")


if __name__ == "__main__":
    main()
