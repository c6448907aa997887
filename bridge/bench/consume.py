# SPDX-License-Identifier: Apache-2.0
"""The cost of reading the coverage, and how much that slows the target.

``consume`` asks which blocks were covered since the last time, for several numbers of blocks and of
the target's files. The baseline is coverage.py's public ``get_data()`` and ``lines()``, of a
coverage.py that measures the same code. ``target`` measures Python code that answers requests,
under the source with a ``consume()`` after each request, and under plain coverage.py without.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import coverage

from bridge.bench.measurement import Bench, Measurement, best_of, series, take_turns
from bridge.bench.stats import Aim, Comparison, Of
from bridge.sources.python.source import PythonSource

__all__ = ["CONSUME", "TARGET"]

_FILES = (10, 1_000, 10_000)
_BLOCKS = (1, 10, 1_000)
_NEEDED = 7
_OURS = "consume()"
_BASELINE = "get_data(), lines()"
_AIM = Aim(20, at_most=False, of=Of.FASTER)
_TARGET_AIM = Aim(1.2)
_REQUESTS = 20
_DOCUMENT = "".join(
    f'[table-{number}]\nname = "a text"\nvalues = [1, 2.5, true, "four"]\n'
    f"when = 2024-01-0{1 + number % 9}\nnested = {{ a = {number}, b = 'c' }}\n"
    for number in range(10)
)


def _measure_consume(bench: Bench) -> None:
    with tempfile.TemporaryDirectory(prefix="kcov-bridge-bench-") as directory:
        for files in _FILES[:-1] if bench.quick else _FILES:
            bench.progress(f"a target of {files:,} files")
            _measure_size(bench, files, Path(directory))


def _measure_size(bench: Bench, files: int, directory: Path) -> None:
    """Measure a target of one size."""
    name = f"benched{files}"
    _write_package(directory, name, files)
    with contextlib.ExitStack() as stack:
        sys.path.insert(0, str(directory))
        stack.callback(sys.path.remove, str(directory))
        stack.callback(_forget, name)
        # coverage.py starts first, so that the source runs beside it.
        measurement = coverage.Coverage(
            data_file=str(directory / f"coverage{files}"), config_file=False, source_pkgs=[name]
        )
        measurement.set_option("run:disable_warnings", ["module-not-imported"])
        measurement.start()
        stack.callback(measurement.stop)
        source = PythonSource([name], data_file=None)
        source.start()
        stack.callback(source.stop)
        modules = [importlib.import_module(f"{name}.m{number}") for number in range(files)]
        per_module = [
            [value for key, value in vars(module).items() if key[0] == "f"] for module in modules
        ]
        # Consecutive functions are in different files, if there are enough files.
        functions = [function for group in zip(*per_module, strict=True) for function in group]
        paths = [str(Path(str(module.__file__)).resolve()) for module in modules]
        turns = cycle(functions)
        source.consume()
        gc.collect()
        for blocks in _BLOCKS:
            touched = paths[: min(blocks, files)]

            def cover(blocks: int = blocks) -> None:
                for function in islice(turns, blocks):
                    function()

            def ours(blocks: int = blocks, cover: Callable[[], None] = cover) -> float:
                cover()
                begun = time.perf_counter()
                pcs = source.consume()
                seconds = time.perf_counter() - begun
                assert len(pcs) == blocks
                return seconds

            def theirs(touched: list[str] = touched, cover: Callable[[], None] = cover) -> float:
                cover()
                begun = time.perf_counter()
                data = measurement.get_data()
                for path in touched:
                    # In the baseline's favour, it is told which files to ask for.
                    data.lines(path)
                seconds = time.perf_counter() - begun
                source.consume()
                return seconds

            # The baseline searches the whole package each time for files that never ran, which
            # takes a good part of a second with 10,000 files.
            baseline = theirs if files > _FILES[0] else best_of(theirs)
            taken = take_turns(
                {_OURS: best_of(ours), _BASELINE: baseline},
                _NEEDED if bench.quick or files > _FILES[1] else 15,
            )
            pair = (series(taken, _OURS, 1e6), series(taken, _BASELINE, 1e6))
            case = f"{files:,} files, {blocks:,} block{'s' if blocks > 1 else ''}"
            parameters = {"files": files, "blocks": blocks}
            bench.add(Comparison(case, "us", *pair, _NEEDED, Of.FASTER, (_AIM,), parameters))


def _write_package(root: Path, name: str, files: int) -> None:
    """Write a package with a thousand or more functions, to be covered one by one."""
    functions = max(4, 1_000 // files)
    text = "".join(f"def f{number}():\n    return {number}\n" for number in range(functions))
    package = root / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    for number in range(files):
        (package / f"m{number}.py").write_text(text)


def _forget(name: str) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def _measure_target(bench: Bench) -> None:
    bench.progress("a parser under coverage")
    # Each time a measurement starts and stops, which takes longer than the requests.
    ways: dict[str, Callable[[], float]] = {
        "a look a request": _under_source,
        "plain coverage.py": _under_coverage,
        "no coverage": _requests,
    }
    taken = take_turns(
        ways if bench.quick else {name: best_of(way) for name, way in ways.items()},
        _NEEDED if bench.quick else 15,
    )
    for baseline, aims in (("plain coverage.py", (_TARGET_AIM,)), ("no coverage", ())):
        pair = (series(taken, "a look a request", 1e6), series(taken, baseline, 1e6))
        bench.add(Comparison("parsing 1.1 kB of TOML", "us", *pair, _NEEDED, aims=aims))
    bench.note(f"plain coverage.py is {coverage.__version__}, with its own choice of core")


def _requests(after_each: Callable[[], object] = lambda: None) -> float:
    """Return the seconds for a request."""
    begun = time.perf_counter()
    for _ in range(_REQUESTS):
        tomllib.loads(_DOCUMENT)
        after_each()
    return (time.perf_counter() - begun) / _REQUESTS


def _under_source() -> float:
    source = PythonSource(["tomllib"], data_file=None)
    with _silent("bridge.sources.python.source"):
        source.start()
    try:
        return _requests(source.consume)
    finally:
        source.stop()


def _under_coverage() -> float:
    measurement = coverage.Coverage(data_file=None, config_file=False, source_pkgs=["tomllib"])
    measurement.set_option("run:disable_warnings", ["module-not-measured", "already-imported"])
    measurement.start()
    try:
        return _requests()
    finally:
        measurement.stop()


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Silence the warning that the package is already imported, which is expected here."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


CONSUME = Measurement("consume", "which blocks were covered since the last look", _measure_consume)
TARGET = Measurement("target", "the code under test, being looked at", _measure_target)
