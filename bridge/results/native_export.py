# SPDX-License-Identifier: Apache-2.0
"""Native coverage of a finished run as LCOV, for genhtml and editors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bridge.errors import UsageError
from bridge.results.code_file import CodeFile
from bridge.results.run_directory import load_native
from bridge.sources.native.places import NativePlaces

__all__ = ["MANY_BLOCKS", "NO_LINES_HINT", "add_files", "lcov_of", "native_lcov"]

NO_LINES_HINT: Final = "build the programs with -g, and keep their files until the export"

MANY_BLOCKS: Final = 20_000
"""Their lines take longer than two seconds to read."""


def native_lcov(run: Path) -> bytes:
    """Return an LCOV tracefile of the native modules of a run.

    A block counts where it begins; one of a Go program counts for all of its lines. A count is 1
    or 0: the bridge does not count how often a block ran.

    Raises:
        UsageError: the run has no native modules, or none of their blocks has a line.
        SourceError: the table is damaged.
    """
    places = load_native(run)
    if places is None:
        raise UsageError(
            f"{run} has no native coverage",
            hint="run with a target that starts native programs; see docs/native.md",
        )
    if not len(places.table):
        raise UsageError(
            "no native program of the run has told of its blocks",
            hint="build the target's programs with coverage; see docs/native.md",
        )
    files: dict[str, CodeFile] = {}
    add_files(files, places)
    if not files:
        raise UsageError(
            "no native block of the run has a line",
            hint=NO_LINES_HINT,
        )
    return lcov_of(files).encode(errors="surrogateescape")


def lcov_of(files: Mapping[str, CodeFile]) -> str:
    """Return files as LCOV, sorted by name."""
    return "".join(files[name].lcov(name) for name in sorted(files))


def add_files(files: dict[str, CodeFile], places: NativePlaces) -> None:
    """Add the files of a run's native modules, by path, to those of other runs."""
    for module in places.table:
        for index in range(module.count):
            ran = index < len(module.covered) and module.covered[index] != 0
            if module.blocks:
                block = module.blocks[index]
                file = files.setdefault(block.file, CodeFile())
                file.add(block.line, block.end_line, block.function, ran)
                continue
            for frame in places.frames(module, index):
                if frame.file and frame.line:
                    file = files.setdefault(frame.file, CodeFile())
                    file.add(frame.line, frame.line, frame.function, ran)
