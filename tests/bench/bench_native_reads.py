# SPDX-License-Identifier: Apache-2.0
"""Ways to look at the counters of a running Go program, and to clear them.

    python -m tests.bench.bench_native_reads

For the size of the counters of a program of 12,000 blocks, and for one of 150,000, it prints the
median of each step in microseconds of processor time (``native_reads.c``).
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "native_reads.c"
KIBIBYTES = (85, 1024)


def main() -> None:
    """Measure both sizes."""
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch, "reads")
        flags = ("-O2", "-Wall", "-Wextra", "-Werror")
        subprocess.run(["cc", *flags, "-o", str(program), str(SOURCE)], check=True)
        for size in KIBIBYTES:
            print(f"{size} KiB of counters")
            subprocess.run([str(program), str(size)], check=True)


if __name__ == "__main__":
    main()
