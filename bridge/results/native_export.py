# SPDX-License-Identifier: Apache-2.0
"""Native coverage of a finished run as LCOV, for genhtml and editors."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bridge.errors import UsageError
from bridge.results.run_directory import load_native
from bridge.sources.native.places import NativePlaces

__all__ = ["NO_LINES_HINT", "native_lcov"]

NO_LINES_HINT: Final = "build the programs with -g, and keep their files until the export"


class _File:
    """Lines and functions of a source file, with whether they ran."""

    def __init__(self) -> None:
        self.lines: dict[int, bool] = {}
        self.functions: dict[str, tuple[int, bool]] = {}

    def add(self, first: int, last: int, function: str, ran: bool) -> None:
        for line in range(first, last + 1):
            self.lines[line] = self.lines.get(line, False) or ran
        start, before = self.functions.get(function, (first, False))
        self.functions[function] = min(start, first), before or ran


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
    files = _files(places)
    if not files:
        raise UsageError(
            "no native block of the run has a line",
            hint=NO_LINES_HINT,
        )
    return "".join(_record(name, files[name]) for name in sorted(files)).encode(
        errors="surrogateescape"
    )


def _files(places: NativePlaces) -> dict[str, _File]:
    files: dict[str, _File] = {}
    for module in places.table:
        for index in range(module.count):
            ran = index < len(module.covered) and module.covered[index] != 0
            if module.blocks:
                block = module.blocks[index]
                file = files.setdefault(block.file, _File())
                file.add(block.line, block.end_line, block.function, ran)
                continue
            for frame in places.frames(module, index):
                if frame.file and frame.line:
                    file = files.setdefault(frame.file, _File())
                    file.add(frame.line, frame.line, frame.function, ran)
    return files


def _record(name: str, file: _File) -> str:
    functions = sorted((line, function, ran) for function, (line, ran) in file.functions.items())
    lines = sorted(file.lines.items())
    return "\n".join(
        [
            "TN:",
            f"SF:{name}",
            *(f"FN:{line},{function}" for line, function, _ in functions),
            *(f"FNDA:{int(ran)},{function}" for _, function, ran in functions),
            f"FNF:{len(functions)}",
            f"FNH:{sum(ran for _, _, ran in functions)}",
            *(f"DA:{line},{int(ran)}" for line, ran in lines),
            f"LF:{len(lines)}",
            f"LH:{sum(ran for _, ran in lines)}",
            "end_of_record\n",
        ]
    )
