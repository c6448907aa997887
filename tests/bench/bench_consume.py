# SPDX-License-Identifier: Apache-2.0
"""What a look at the coverage costs: ``consume()`` against coverage.py's public ``get_data()``.

By the number of blocks covered since the last look, and by the number of files of the target; both
ways are taken in turn, on the same measurement. Run it alone with
``python tests/bench/bench_consume.py``, or with ``pytest -m bench tests/bench/bench_consume.py``.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import pytest

from bridge.sources.python import PythonSource

FILES = (10, 1_000, 10_000)
BLOCKS = (0, 1, 10, 1_000)
ROUNDS = {0: 300, 1: 300, 10: 200, 1_000: 40}
# get_data() looks for files that never ran in the whole package each time; of 10,000 that takes
# a good part of a second.
BASELINE_ROUNDS = {10: 30, 1_000: 7, 10_000: 3}


@dataclass
class Result:
    """Medians in microseconds; the baseline has no measurement where there is nothing new."""

    files: int
    blocks: int
    consume: float
    baseline: float

    @property
    def ratio(self) -> float:
        return self.baseline / self.consume


def write_package(root: Path, name: str, files: int) -> None:
    """A package in which a thousand functions or more can be covered one by one."""
    functions = max(4, 1_000 // files)
    text = "".join(f"def f{n}():\n    return {n}\n" for n in range(functions))
    package = root / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    for number in range(files):
        (package / f"m{number}.py").write_text(text)


def measure(files: int, directory: Path) -> list[Result]:
    """All figures for a target of one size."""
    name = f"benched{files}"
    write_package(directory, name, files)
    sys.path.insert(0, str(directory))
    source = PythonSource([name], data_file=directory / f"coverage{files}")
    before = time.perf_counter()
    source.start()
    print(
        f"# {files} files, {source.blocks_total} blocks: "
        f"start() took {time.perf_counter() - before:.2f} s",
        file=sys.stderr,
    )
    try:
        modules = [importlib.import_module(f"{name}.m{n}") for n in range(files)]
        source.consume()
        per_module = [
            [value for key, value in vars(module).items() if key[0] == "f"] for module in modules
        ]
        # Neighbours are in different files, as far as there are so many.
        functions = [function for group in zip(*per_module, strict=True) for function in group]
        paths = [str(Path(str(module.__file__)).resolve()) for module in modules]
        gc.collect()
        return [one(source, files, blocks, functions, paths) for blocks in BLOCKS]
    finally:
        source.stop()
        sys.path.remove(str(directory))
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]


def one(
    source: PythonSource,
    files: int,
    blocks: int,
    functions: list[Callable[[], object]],
    paths: list[str],
) -> Result:
    """Cover some blocks and look, in the one way and in the other."""
    measurement = source._coverage
    assert measurement is not None
    source.consume()
    ours: list[float] = []
    theirs: list[float] = []
    turns = cycle(functions)
    baseline_every = max(1, ROUNDS[blocks] // BASELINE_ROUNDS[files])
    for turn in range(ROUNDS[blocks]):
        for function in islice(turns, blocks):
            function()
        before = time.perf_counter()
        pcs = source.consume()
        ours.append(time.perf_counter() - before)
        assert len(pcs) == blocks
        if turn % baseline_every:
            continue
        for function in islice(turns, blocks):
            function()
        touched = paths[: min(blocks, files)]
        before = time.perf_counter()
        data = measurement.get_data()
        for path in touched:
            # To the benefit of the baseline it knows which files to ask for.
            data.lines(path)
        theirs.append(time.perf_counter() - before)
    return Result(files, blocks, median(ours) * 1e6, median(theirs) * 1e6)


def table(results: list[Result]) -> str:
    lines = [f"{'files':>7} {'blocks':>7} {'consume':>12} {'get_data+lines':>16} {'ratio':>8}"]
    for r in results:
        lines.append(
            f"{r.files:>7} {r.blocks:>7} {r.consume:>9.1f} us {r.baseline:>13.1f} us "
            f"{r.ratio:>7.0f}x"
        )
    return "\n".join(lines)


def run(sizes: tuple[int, ...] = FILES) -> list[Result]:
    with tempfile.TemporaryDirectory() as directory:
        return [result for files in sizes for result in measure(files, Path(directory))]


@pytest.mark.bench
def test_consume_is_cheaper_than_get_data_and_does_not_grow_with_the_target() -> None:
    results = run((10, 1_000))
    print("\n" + table(results))
    cost = {(r.files, r.blocks): r.consume for r in results}
    assert all(r.ratio > 1 for r in results)
    # A hundred times the files: far from a hundred times the cost, on a noisy machine too.
    assert cost[1_000, 1] < 10 * cost[10, 1]


if __name__ == "__main__":
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {version}, {os.cpu_count()} CPUs, medians")
    print(table(run()))
