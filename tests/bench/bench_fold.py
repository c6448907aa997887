# SPDX-License-Identifier: Apache-2.0
"""How many edges and blocks share a cell of the engine's map, and what the fold costs.

    python -m tests.bench.bench_fold [--json FILE]

One guest runs programs of several kinds under kcov with the guest kernel and the Python target as
sources. Their PCs go through the shim's own code (``fold.c`` includes it), with maps of several
sizes. Printed are, for edges and blocks: how many different ones there were, how many cells they
set, the part that is lost because another one has the cell already, and the same part for a perfect
hash function, which is what chance alone costs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path

import bridge
from bridge.util.resources import guest_directory

WORK = {
    "9P target": "cd /mnt/target; ls -lR; cat README; echo x >x; mv x y; rm y; mkdir d; rmdir d",
    "files": "cp -r /etc/ssh /tmp/a; find /tmp/a -type f -exec cat {} +; rm -r /tmp/a",
    "processes": "for i in 1 2 3; do cat /proc/self/maps | wc -l; done",
    "other calls": "df; mount; cat /proc/1/status; ip a; sync; ls /sys/kernel",
}
"""What the guest's shell does."""
SIZES = (1 << 16, 1 << 17, 1 << 18, 1 << 20)


@dataclass(frozen=True)
class Row:
    """One map with all PCs of the work."""

    fold: str
    cells: int
    different: int
    set: int
    lost: float
    lost_by_chance: float
    ns_per_pc: float


def collect() -> dict[str, list[int]]:
    """Run the work in a guest; return the PCs of each kind in order."""
    traces = {}
    with bridge.boot(target="plan9", source="kernel,python", region=256) as session:
        for name, script in WORK.items():
            command = ["sh", "-c", f"{{ {script}; }} >/dev/null 2>&1; true"]
            result = session.kcov(command, unique=False)
            traces[name] = list(result.pcs)
            print(f"{name}: {len(result.pcs)} PCs, {len(set(result.pcs))} different")
    return traces


def fold_program(directory: Path) -> Path:
    """Compile ``fold.c``."""
    shim = Path(bridge.__file__).parent / "fuzz" / "shim"
    program = directory / "fold"
    source = Path(__file__).with_name("fold.c")
    includes = ["-I", str(shim), "-I", str(guest_directory() / "agent")]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    subprocess.run(["cc", *flags, *includes, "-o", program, source], check=True)
    return program


def measure(program: Path, pcs: Sequence[int], fold: str, cells: int) -> Row:
    """Fold some PCs into a map of a size."""
    done = subprocess.run(
        [program, fold, str(cells), "1"],
        input=array("Q", pcs).tobytes(),
        capture_output=True,
        check=True,
    )
    count, ns = done.stdout.split()
    different = len(set(pairwise([0, *pcs])) if fold == "edges" else set(pcs))
    by_chance = different - cells * -math.expm1(different * math.log1p(-1 / cells))
    return Row(
        fold,
        cells,
        different,
        int(count),
        1 - int(count) / different,
        by_chance / different,
        float(ns),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE")
    args = parser.parse_args(argv)
    traces = collect()
    with tempfile.TemporaryDirectory() as directory:
        program = fold_program(Path(directory))
        sets = {"9P target alone": traces["9P target"], "all": list(chain(*traces.values()))}
        rows = {
            name: [
                measure(program, pcs, fold, size) for fold in ("edges", "blocks") for size in SIZES
            ]
            for name, pcs in sets.items()
        }
    for name, measured in rows.items():
        print(f"\n{name}\nfold       cells  different       set    lost  by chance  ns a PC")
        for row in measured:
            print(
                f"{row.fold:6} {row.cells:9} {row.different:10} {row.set:9} {row.lost:7.2%} "
                f"{row.lost_by_chance:10.2%} {row.ns_per_pc:8.2f}"
            )
    if args.json:
        figures = {name: [asdict(row) for row in measured] for name, measured in rows.items()}
        args.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
