# SPDX-License-Identifier: Apache-2.0
"""Ways in which a native program may tell the bridge what ran, against each other.

    python -m tests.bench.bench_native_designs [ROUNDS]

By number of known and of new blocks it prints for each way (``native_designs.c``) the medians of
ROUNDS turns: what the first run of a block since the last look costs the program, and a
repeated one, in nanoseconds; a look of the bridge, and one after 100,000 runs of those blocks, in
microseconds; and how many of these runs were lost. All ways take turns in one process, on one
thread.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bridge.sources.native.build import READER, build_runtime

SOURCE = Path(__file__).parent / "native_designs.c"
ROUNDS = 200
HEAD = ("way", "first ns", "again ns", "look us", "busy look us", "lost")


def build(directory: Path) -> Path:
    """Compile the program into a directory."""
    program, reader = directory / "native_designs", str(READER.build())
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(SOURCE)]
    linked = (*build_runtime().link_flags, reader, f"-Wl,-rpath,{Path(reader).parent}")
    subprocess.run([*command, *linked], check=True)
    return program


def measure(program: Path, blocks: int, new: int, rounds: int) -> list[list[str]]:
    """Return a row for each way: its name, then the figures of ``HEAD``."""
    done = subprocess.run(
        [str(program), str(blocks), str(new), str(rounds)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [line.split("\t") for line in done.stdout.splitlines()]


def main() -> None:
    """Print a table for each number of known and of new blocks."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as scratch:
        program = build(Path(scratch))
        for blocks in (10_000, 1_000_000):
            for new in (0, 10, 1000):
                print(f"{blocks:,} blocks known, {new:,} new")
                for row in (HEAD, *measure(program, blocks, new, rounds)):
                    print(f"  {row[0]:<28}" + "".join(f"{each:>14}" for each in row[1:]))


if __name__ == "__main__":
    main()
