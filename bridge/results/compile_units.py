# SPDX-License-Identifier: Apache-2.0
"""The blocks of a run by source file, function and line: Python's, native ones, system calls.

They are what an object of :mod:`bridge.results.elf_export` has debug information for. Functions of
Python come from the source, those of native programs from their debug information, or from Go's
metadata.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from bridge.errors import SourceError
from bridge.results.native_export import MANY_BLOCKS, NO_LINES_HINT
from bridge.results.report.host import COVERAGE_FILE, find_paths, measured_files
from bridge.results.run_directory import load_blocks, load_native
from bridge.sources import PC
from bridge.sources.native.debug import Frame
from bridge.sources.pcs import SYSCALL_FILE, BlockTable, syscall_pc
from bridge.sources.python.blocks import decode_source
from bridge.sources.symbolize import BLOCKS_FILE
from bridge.trace.names import system_calls

__all__ = [
    "CompileUnit",
    "Inlined",
    "PlacedBlock",
    "has_blocks",
    "native_units",
    "python_units",
    "system_call_units",
]

_log = logging.getLogger(__name__)

_MODULE = "(module)"
"""Module-level code. ``<module>`` would be HTML on syzkaller's page ``/cover``, and not be seen."""


@dataclass(frozen=True, slots=True)
class Inlined:
    """A function that a block is inlined from, and the call that it replaced."""

    function: str
    call_file: str
    call_line: int
    call_column: int


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block: its PC, line and column, and the function that it belongs to."""

    pc: PC
    line: int
    """0 if it is not known."""
    column: int
    function: str
    """Python: dotted, from the top-level package."""
    function_line: int
    file: str = ""
    """Absolute, where ``line`` is; empty: the unit's own."""
    inlined: tuple[Inlined, ...] = ()
    """The functions that lie in ``function`` around the block, the outermost first."""


@dataclass(frozen=True, slots=True)
class CompileUnit:
    """A source file with blocks at consecutive slots."""

    name: str
    """The path below ``directory``."""
    directory: str
    """Absolute; empty if the file was not found, or the name says all."""
    blocks: tuple[PlacedBlock, ...]
    is_python: bool = True


@dataclass(frozen=True, slots=True)
class _Code:
    """A function or class of a source: its dotted name and the lines of its body."""

    name: str
    line: int
    first: int
    last: int


def has_blocks(run: Path) -> bool:
    """Return whether a run has blocks of a target, in Python or native.

    Raises:
        SourceError: a table is damaged.
    """
    native = load_native(run)
    if native is not None and len(native.table):
        return True
    return (run / BLOCKS_FILE).is_file() and len(load_blocks(run)) > 0


def python_units(run: Path) -> list[CompileUnit]:
    """Return the source files in Python of a run's target.

    A source that is missing has lines but no functions; a source that is newer than the run may
    have others. Both are said in a warning.

    Raises:
        SourceError: the block table is damaged.
    """
    if not (run / BLOCKS_FILE).is_file():
        return []
    table = load_blocks(run)
    data = run / COVERAGE_FILE
    paths = find_paths(table.files, measured_files([data]) if data.is_file() else ())
    written = (run / BLOCKS_FILE).stat().st_mtime
    units, missing, newer = [], [], []
    for name in table.files:
        path = Path(paths[name])
        try:
            text = path.read_bytes()
            if path.stat().st_mtime > written:
                newer.append(name)
        except OSError:
            text = None
            missing.append(name)
        if unit := _unit(table, name, path, text):
            units.append(unit)
    for names, problem in (
        (missing, "were not found: they have no functions, and relative paths"),
        (newer, "were changed after the run: their functions may be others now"),
    ):
        if names:
            _log.warning("%d source files %s (%s ...)", len(names), problem, names[0])
    return units


def native_units(run: Path) -> Iterator[CompileUnit]:
    """Yield the source files of a run's native programs: blocks of one file that lie together.

    A block is in the file of its outermost function; what is inlined there may come from others. A
    block without a place has the module as its file, and line 0.

    Raises:
        SourceError: the table of modules is damaged.
    """
    places = load_native(run)
    if places is None:
        return
    if len(places.table) > MANY_BLOCKS:
        _log.info("reading the lines of %d native blocks", len(places.table))
    without = 0
    for module in places.table:
        if not module.count:
            continue
        found = []
        for index in range(module.count):
            frames = places.frames(module, index)
            inner = frames[0] if frames else Frame(module.name, "", 0, 0)
            outer = frames[-1] if frames else inner
            without += not inner.line
            inlined = tuple(
                Inlined(each.function, around.file, around.line, around.column)
                for each, around in zip(frames[-2::-1], frames[:0:-1], strict=True)
            )
            block = PlacedBlock(
                module.pc(index),
                inner.line,
                inner.column,
                outer.function,
                outer.line,
                inner.file if inner.line else "",
                inlined,
            )
            found.append((outer.file or module.path, block))
        for name, group in groupby(found, key=lambda each: each[0]):
            yield CompileUnit(name, "", tuple(block for _, block in group), is_python=False)
    if without:
        _log.warning("%d native blocks have no line: %s", without, NO_LINES_HINT)


def _unit(table: BlockTable, name: str, path: Path, text: bytes | None) -> CompileUnit | None:
    """Return the unit of a file of the table; None if it has no block."""
    file = table.file(name)
    blocks = file.blocks() if file is not None else []
    if file is None or not blocks:
        return None
    module = name.rpartition(".")[0].replace("/", ".").removesuffix(".__init__")
    codes = _codes(text) if text is not None else []
    owners: list[_Code | None] = [None] * (blocks[-1].end_line + 1)
    # An inner function comes after the one that it lies in.
    for code in codes:
        for line in range(code.first, min(code.last + 1, len(owners))):
            owners[line] = code
    placed = []
    for index, block in enumerate(blocks):
        owner = owners[block.start_line]
        function = f"{module}.{owner.name if owner else _MODULE}"
        line = owner.line if owner else 1
        pc = file.pc(index)
        placed.append(PlacedBlock(pc, block.start_line, block.start_col, function, line))
    directory = str(path).removesuffix(f"/{name}") if text is not None else ""
    if directory == str(path):
        # Found elsewhere, or named by its absolute path.
        return CompileUnit(path.name, str(path.parent), tuple(placed))
    return CompileUnit(name, directory, tuple(placed))


def _codes(text: bytes) -> list[_Code]:
    """Return the functions and classes of a source, outer ones first; none if it is no Python."""
    try:
        tree = ast.parse(decode_source(text))
    except (SyntaxError, ValueError, RecursionError, SourceError):
        return []
    found = []
    todo: list[tuple[ast.AST, str]] = [(tree, "")]
    while todo:
        node, prefix = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # The header belongs to the code around it.
            first = min(
                each.lineno for each in (node.body[0], *getattr(node.body[0], "decorator_list", []))
            )
            found.append(
                _Code(f"{prefix}{node.name}", node.lineno, first, node.end_lineno or first)
            )
            prefix = f"{prefix}{node.name}."
        todo += ((child, prefix) for child in ast.iter_child_nodes(node))
    return sorted(found, key=lambda code: (code.first, -code.last))


def system_call_units() -> list[CompileUnit]:
    """Return a unit for each run of numbers that Linux has, by number."""
    units = []
    known = sorted(system_calls().items())
    for _, group in groupby(enumerate(known), key=lambda each: each[1][0] - each[0]):
        blocks = []
        for _, (number, call) in group:
            if (pc := syscall_pc(number)) is not None:
                blocks.append(PlacedBlock(pc, number, 1, f"syscall.{call.name}", number))
        units.append(CompileUnit(SYSCALL_FILE, "", tuple(blocks)))
    return units
