# SPDX-License-Identifier: Apache-2.0
"""The results of several guests that served one after the other, as those of one run."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bridge.errors import InfrastructureError
from bridge.results.kernel_export import read_blocks
from bridge.results.run_directory import load_native
from bridge.session.stats import Stats
from bridge.sources import PC
from bridge.sources.guest_kernel import BLOCKS_FILE as KERNEL_BLOCKS_FILE
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.native.modules import ModuleTable
from bridge.sources.pcs import BlockTable
from bridge.sources.symbolize import BLOCKS_FILE, NATIVE_FILE
from bridge.util.files import cannot_write, write_atomically

__all__ = [
    "COVERAGE_FILE",
    "Blocks",
    "add_native",
    "covered_blocks",
    "merge_results",
    "merge_stats",
]

_log = logging.getLogger(__name__)

COVERAGE_FILE = ".coverage"
"""coverage.py's data in a run's directory."""

_COUNTED = (
    *("returns", "pcs", "lost_pcs", "untraced", "comparisons", "lost_comparisons"),
    *("guest_timeouts", "guest_skipped", "source_failures", "tracer_faults", "resets"),
)
"""Figures that are sums over all guests. The others are those of the last one."""


def merge_results(part: Path, run: Path) -> None:
    """Move the results of one guest into a run's directory, which may have those of others.

    The block table and the kernel's symbols are those of the newest guest, unless an earlier one
    had loaded more modules.

    Raises:
        InfrastructureError: a file cannot be read or written; the rest of ``part`` stays.
        SourceError: one is damaged.
    """
    try:
        _merge_coverage(part / COVERAGE_FILE, run / COVERAGE_FILE)
        _move(part / BLOCKS_FILE, run / BLOCKS_FILE)
        _merge_native(part / NATIVE_FILE, run / NATIVE_FILE)
        _merge_kernel_blocks(part / KERNEL_BLOCKS_FILE, run / KERNEL_BLOCKS_FILE)
        symbols, kept = part / SYMBOLS_FILE, run / SYMBOLS_FILE
        if kept.is_file() and symbols.is_file() and kept.stat().st_size > symbols.stat().st_size:
            symbols.unlink()
        _move(symbols, kept)
    except OSError as error:
        raise cannot_write(run, error) from error


def _move(file: Path, destination: Path) -> None:
    if file.is_file():
        file.replace(destination)


def _merge_native(file: Path, destination: Path) -> None:
    if not file.is_file() or not destination.is_file():
        _move(file, destination)
        return
    add_native(ModuleTable.load(file), destination)
    file.unlink()


def add_native(table: ModuleTable, destination: Path) -> None:
    """Add native modules, and what was covered of them, to those in a file, which may be missing.

    Several processes may do so at once.

    Raises:
        SourceError: the file is damaged.
        InfrastructureError: it cannot be written.
    """
    try:
        directory = os.open(destination.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise cannot_write(destination, error) from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        merged = ModuleTable.load(destination) if destination.is_file() else ModuleTable()
        for module in merged.merge(table):
            _log.warning(
                "what a guest covered of %s is left out: its PCs are those of another module of "
                "an earlier guest",
                module.path,
            )
        merged.save(destination)
    finally:
        os.close(directory)


def _merge_kernel_blocks(file: Path, destination: Path) -> None:
    if not file.is_file() or not destination.is_file():
        _move(file, destination)
        return
    sizes: dict[PC, int] = {}
    for block in (*read_blocks(destination), *read_blocks(file)):
        sizes[block.start] = max(block.size, sizes.get(block.start, 0))
    text = "".join(f"{start:#x}\t{size}\n" for start, size in sorted(sizes.items()))
    write_atomically(destination, text)
    file.unlink()


def _merge_coverage(file: Path, destination: Path) -> None:
    if not file.is_file() or not destination.is_file():
        _move(file, destination)
        return
    import coverage
    from coverage.exceptions import CoverageException

    try:
        # Into the newer file, which replaces the other when it is whole.
        data, before = (coverage.CoverageData(str(each)) for each in (file, destination))
        data.read()
        before.read()
        data.update(before)
        data.close()
        before.close()
    except CoverageException as error:
        raise InfrastructureError(
            f"the coverage data {destination} and {file} cannot be merged", evidence=str(error)
        ) from error
    _move(file, destination)


class Blocks(NamedTuple):
    """Figures of a run's directory."""

    covered: int
    """Of the target: in Python and native."""
    total: int
    """Of the target."""
    kernel: int | None
    """Covered ones of the guest's kernel; None if that was no source."""


def covered_blocks(run: Path) -> Blocks:
    """Return how many blocks a run covered.

    Raises:
        SourceError: a file is damaged.
        InfrastructureError: the coverage data cannot be read.
    """
    kernel = run / KERNEL_BLOCKS_FILE
    of_kernel = len(read_blocks(kernel)) if kernel.is_file() else None
    covered = total = 0
    if (native := load_native(run)) is not None:
        covered = sum(module.covered.count(1) for module in native.table)
        total = len(native.table)
    if not (run / BLOCKS_FILE).is_file():
        return Blocks(covered, total, of_kernel)
    table = BlockTable.load(run / BLOCKS_FILE)
    total += len(table)
    if not (run / COVERAGE_FILE).is_file():
        return Blocks(covered, total, of_kernel)
    import coverage
    from coverage.exceptions import CoverageException

    data = coverage.CoverageData(str(run / COVERAGE_FILE))
    found: set[PC] = set()
    try:
        data.read()
        # A file's name in the table is the end of its path.
        paths = sorted(data.measured_files())
        for name in table.files:
            for path in paths:
                if path.endswith(f"/{name}"):
                    pcs = (table.line_pc(name, line) for line in data.lines(path) or ())
                    found.update(pc for pc in pcs if pc is not None)
        data.close()
    except CoverageException as error:
        raise InfrastructureError(
            f"{run / COVERAGE_FILE} cannot be read as coverage data", evidence=str(error)
        ) from error
    return Blocks(covered + len(found), total, of_kernel)


def merge_stats(each: Iterable[Stats]) -> Stats:
    """Return the figures of several guests: sums of what is counted, the last guest's else."""
    merged = Stats()
    before: dict[str, int] = dict.fromkeys(_COUNTED, 0)
    for stats in each:
        before = {name: before[name] + getattr(stats, name) for name in _COUNTED}
        merged = replace(
            stats,
            instances=[],
            blocks_total=max(stats.blocks_total, merged.blocks_total),
            target_answered=stats.target_answered or merged.target_answered,
            problem=stats.problem or merged.problem,
        )
    return replace(merged, **before)  # type: ignore[arg-type]
