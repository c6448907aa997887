# SPDX-License-Identifier: Apache-2.0
"""How long it takes to find the source lines of a kernel's PCs.

    python tests/bench/bench_lines.py VMLINUX [--pcs N] [--check]

``VMLINUX`` has debug information, for example that of Debian's package linux-image-…-dbg, in
/usr/lib/debug/boot. Printed are the processor's seconds for one PC and for N of them, all in
functions drawn by lot (the same each time), and the memory that was taken. ``--check`` compares
each with what llvm-symbolizer says (binutils' addr2line takes some files of DWARF 5 for others).
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from bridge.sources.guest_kernel.lines import Lines


def main() -> int:
    parser = argparse.ArgumentParser(description="The time for the lines of a kernel's PCs.")
    parser.add_argument("vmlinux", type=Path)
    parser.add_argument("--pcs", type=int, default=10_000)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    table = subprocess.run(
        ["nm", "-n", str(args.vmlinux)], capture_output=True, text=True, check=True
    ).stdout
    starts = [int(row[0], 16) for line in table.splitlines() if (row := line.split())[1] in "tT"]
    draw = random.Random(1)
    pcs = [draw.choice(starts) + draw.randrange(64) for _ in range(args.pcs)]

    begun = time.process_time()
    lines = Lines(args.vmlinux)
    found = [lines.lookup(pcs[0])]
    print(f"      1 PC   {time.process_time() - begun:.2f} s")
    found += [lines.lookup(pc) for pc in pcs[1:]]
    print(f"{len(pcs):7} PCs  {time.process_time() - begun:.2f} s")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10:7} MiB at most")
    return _compare(args.vmlinux, pcs, found) if args.check else 0


def _compare(vmlinux: Path, pcs: list[int], found: list[tuple[str, int] | None]) -> int:
    told = subprocess.run(
        ["llvm-symbolizer", f"--obj={vmlinux}", "--no-inlines", "--functions=none"],
        input="".join(f"{pc:#x}\n" for pc in pcs),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    wrong = 0
    for pc, ours, line in zip(pcs, found, told, strict=True):
        file, number, _ = line.rsplit(":", 2)
        theirs = None if number in "?0" else (Path(file).name, int(number))
        if theirs != (ours and (Path(ours[0]).name, ours[1])):
            wrong += 1
            print(f"{pc:#x}: {ours} here, {line} there")
    print(f"{wrong} of {len(pcs)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
