# SPDX-License-Identifier: Apache-2.0
"""Source lines of the kernel and its modules, from their debug information.

The kernel's is in a ``vmlinux``, each module's in a ``.ko``, which is relocatable: its sections are
placed at the module's canonical base as the kernel's loader would. Files, and the lines of single
compile units, are read when they are first needed.
"""

from __future__ import annotations

import functools
import logging
import os
import posixpath
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from fnmatch import translate
from pathlib import Path
from typing import Final

from bridge.errors import SourceError, UsageError
from bridge.sources import PC
from bridge.sources.guest_kernel.debug_file import DebugFile, Unit
from bridge.sources.guest_kernel.placement import MODULES_BASE, core_text_sections, module_name
from bridge.sources.guest_kernel.symbols import KernelSymbols

__all__ = ["Lines", "SourceUnit", "find_modules", "find_vmlinux"]

logger = logging.getLogger(__name__)

_DEBUG_ROOT: Final = Path("/usr/lib/debug")

_ANCHORS: Final = ("init/main.c", "arch/x86/entry/entry_64.S")
"""A C file and an assembler file that every kernel has; they locate its source tree. The build may
write the two kinds of paths differently."""

_PADDING: Final = 16
"""Upper bound of CONFIG_FUNCTION_PADDING_BYTES on x86: padding before a function."""

_NOTHING: Final = 0xFFFF_FFFF
"""The file number of a row that ends a sequence."""

_HINT: Final = (
    "install the package linux-image-…-dbg of the guest's kernel, or name a vmlinux that was "
    "built with CONFIG_DEBUG_INFO: --vmlinux FILE"
)


def find_vmlinux(
    release: str, explicit: Path | None = None, *, root: Path = _DEBUG_ROOT
) -> Path | None:
    """Return the file with a kernel's debug information, or None.

    It is the explicit one, or that of Debian's package ``linux-image-…-dbg``.

    Raises:
        UsageError: the explicit one does not exist.
    """
    if explicit is not None:
        if not explicit.is_file():
            raise UsageError(f"there is no file {explicit}", hint=_HINT)
        return explicit
    places = (
        root / "boot" / f"vmlinux-{release}",
        root / f"vmlinux-{release}",
        root / "lib" / "modules" / release / "vmlinux",
        root / "usr" / "lib" / "modules" / release / "vmlinux",
    )
    return next((place for place in places if place.is_file()), None)


def find_modules(release: str, vmlinux: Path, *, root: Path = _DEBUG_ROOT) -> Path | None:
    """Return the directory of modules with debug information, or None.

    It is the tree in which the ``vmlinux`` was built, or a package's directory.
    """
    if (vmlinux.parent / "modules.order").is_file():
        return vmlinux.parent
    if not release:
        return None
    # Beside the vmlinux, if a package was unpacked outside /.
    places = (
        top / sub / release
        for top in (vmlinux.parent.parent, vmlinux.parent, root)
        for sub in ("lib/modules", "usr/lib/modules")
    )
    return next((place for place in places if place.is_dir()), None)


class _Rows:
    """The lines of one compile unit, by address."""

    __slots__ = ("addresses", "files", "lines", "names")

    def __init__(self, rows: Sequence[tuple[int, int, int]], names: list[str]) -> None:
        """Take ``rows`` of address, file number and line, sorted by address."""
        self.addresses = array("Q", (row[0] for row in rows))
        self.files = array("I", (row[1] for row in rows))
        self.lines = array("I", (row[2] for row in rows))
        self.names = names

    def first(self, pc: PC) -> tuple[str, int] | None:
        for index in range(bisect_left(self.addresses, pc), bisect_right(self.addresses, pc)):
            if (row := self._row(index)) is not None:
                return row
        return None

    def between(self, start: PC, end: PC) -> set[tuple[str, int]]:
        # All rows at the start, else the row that covers it.
        first = bisect_left(self.addresses, start)
        if first == len(self.addresses) or self.addresses[first] != start:
            first = max(first - 1, 0)
        last = bisect_left(self.addresses, end)
        return {row for index in range(first, last) if (row := self._row(index)) is not None}

    def _row(self, index: int) -> tuple[str, int] | None:
        # Line 0: the compiler says that there is none.
        file, line = self.files[index], self.lines[index]
        return None if file == _NOTHING or line == 0 else (self.names[file], line)


class SourceUnit:
    """A compile unit and its lines."""

    def __init__(
        self, file: DebugFile, unit: Unit, text: tuple[PC, PC], tops: Sequence[str]
    ) -> None:
        self._file = file
        self._unit = unit
        self._text = text
        self._tops = tops
        self._relative = functools.cache(self._make_relative)
        self.name = self._relative(unit.name)
        """Its source file, relative to the source tree."""

    def line(self, pc: PC) -> tuple[str, int] | None:
        """Return the file and line of one of its addresses."""
        found = self._file.line(self._unit, pc)
        return (self._relative(found[0]), found[1]) if found is not None else None

    @functools.cached_property
    def rows(self) -> _Rows:
        """Return all its lines, except those of discarded code (a module's ``.init.text``)."""
        numbers: dict[str, int] = {}
        rows = []
        start, end = self._text
        for address, file, line in self._file.rows(self._unit):
            if not start <= address <= end:
                continue
            number = _NOTHING
            if file is not None:
                number = numbers.setdefault(self._relative(file), len(numbers))
            rows.append((address, number, line))
        return _Rows(rows, list(numbers))

    def _make_relative(self, name: str) -> str:
        """Return a file's path in the tree, else below the compiler's directory, else in full."""
        directory = self._unit.directory
        tops = [*self._tops, *([posixpath.normpath(directory)] if directory else [])]
        for path in (name, posixpath.join(directory, name)):
            path = posixpath.normpath(path)
            for top in tops:
                if path.startswith(f"{top}/"):
                    return path[len(top) + 1 :]
        return path


class _Code:
    """The debug information of one file, the kernel's or a module's."""

    def __init__(
        self, file: DebugFile, text: tuple[PC, PC], tops: Sequence[str] | None = None
    ) -> None:
        """Read the compile units of a file.

        Args:
            text: start and end of the code that counts.
            tops: directories of the kernel's source tree when it was built; None to detect them.
        """
        units = list(file.units())
        self.tops = _tops(units) if tops is None else tops
        found: list[tuple[PC, PC, SourceUnit]] = []
        for each in units:
            unit = SourceUnit(file, each, text, self.tops)
            found += [(a, b, unit) for a, b in each.ranges if text[0] <= a and b <= text[1]]
        found.sort(key=lambda row: row[:2])
        self.starts = array("Q", (row[0] for row in found))
        self.ends = array("Q", (row[1] for row in found))
        self.owners = [row[2] for row in found]
        self._by_pattern: dict[str, list[tuple[PC, PC]]] = {}

    def unit_at(self, pc: PC) -> SourceUnit | None:
        index = bisect_right(self.starts, pc) - 1
        return self.owners[index] if index >= 0 and pc < self.ends[index] else None

    def file_ranges(self, pattern: str) -> list[tuple[PC, PC]]:
        # Cached, because each new module asks for the same few patterns.
        if pattern not in self._by_pattern:
            self._by_pattern[pattern] = self._match(pattern)
        return self._by_pattern[pattern]

    def _match(self, pattern: str) -> list[tuple[PC, PC]]:
        match = re.compile(translate(pattern)).match
        found: list[tuple[PC, PC]] = []
        for start, end, owner in zip(self.starts, self.ends, self.owners, strict=True):
            if not match(owner.name):
                continue
            if found and found[-1][1] >= start:
                found[-1] = found[-1][0], max(found[-1][1], end)
            else:
                found.append((start, end))
        return found

    def fits(self, symbols: KernelSymbols) -> bool:
        """Return whether these are the lines of this code.

        Nearly all units then begin with a function; by chance one in ten would.
        """
        begins = fit = 0
        for start in self.starts:
            if symbols.text_at(start) is None:
                continue
            begins += 1
            for at in (start, start + _PADDING):
                symbol = symbols.lookup(at)
                if symbol is not None and symbol.start == at:
                    fit += 1
                    break
        return 2 * fit >= begins


def _tops(units: Sequence[Unit]) -> list[str]:
    """Return where the compiler had the source tree; empty for other programs."""
    tops = []
    for anchor in _ANCHORS:
        for unit in units:
            path = posixpath.normpath(posixpath.join(unit.directory, unit.name))
            if path.endswith(f"/{anchor}"):
                tops.append(path.removesuffix(f"/{anchor}"))
                break
    return tops


class Lines:
    """File and line by canonical address. Paths are relative to the kernel's source tree.

    Not thread-safe. Methods raise :class:`bridge.errors.SourceError` if a file is damaged.
    """

    def __init__(
        self, vmlinux: Path, symbols: KernelSymbols | None = None, modules: Path | None = None
    ) -> None:
        """Open a kernel's debug information.

        Args:
            vmlinux: the kernel with debug information.
            symbols: of the kernel that the lines should belong to; None if :meth:`belong_to` gets
                them later.
            modules: the directory of its modules with debug information.

        Raises:
            UsageError: the file has no debug information, or belongs to another kernel.
            SourceError: it cannot be read.
            MissingDependencyError: the library that reads it is not installed.
        """
        self.path = vmlinux
        self._kernel = _Code(_open(vmlinux), (0, MODULES_BASE))
        if not self._kernel.owners:
            raise UsageError(f"{vmlinux} has no debug information", hint=_HINT)
        self._directory = modules
        self._modules: dict[tuple[PC, str], _Code | None] = {}
        self._fitting: set[tuple[PC, str]] = set()
        self._symbols: KernelSymbols | None = None
        if symbols is not None:
            self.belong_to(symbols)

    def belong_to(self, symbols: KernelSymbols) -> None:
        """Set the symbols of the kernel and of its loaded modules.

        Raises:
            UsageError: the lines belong to another kernel.
        """
        if not self._kernel.fits(symbols):
            raise UsageError(
                f"{self.path} belongs to another kernel than the guest's",
                hint="the guest's kernel has no functions where its files begin; name the "
                "vmlinux of the same build: --vmlinux FILE",
            )
        self._symbols = symbols

    def lookup(self, pc: PC) -> tuple[str, int] | None:
        """Return the file and line of an address; None if unknown."""
        unit = self.unit_at(pc)
        return unit.line(pc) if unit is not None else None

    def function_line(self, start: PC) -> tuple[str, int] | None:
        """Return the file and line of the function that begins at an address.

        :meth:`lookup` may return its first statement instead, the last of several lines at that
        address.
        """
        unit = self.unit_at(start)
        if unit is None:
            return None
        return unit.rows.first(start) or unit.line(start)

    def unit_at(self, pc: PC) -> SourceUnit | None:
        """Return the compile unit of an address."""
        code = self._code_at(pc)
        return code.unit_at(pc) if code is not None else None

    def unit_lines(self, unit: SourceUnit) -> set[tuple[str, int]]:
        """Return all files and lines for which a compile unit has code."""
        return unit.rows.between(0, 1 << 64)

    def lines_in(self, start: PC, end: PC) -> set[tuple[str, int]]:
        """Return the files and lines of the code from one address up to another."""
        unit = self.unit_at(start)
        return unit.rows.between(start, end) if unit is not None else set()

    def files(self) -> set[str]:
        """Return the source files that were compiled, without headers."""
        return {unit.name for code in self._codes() for unit in code.owners}

    def file_ranges(self, pattern: str) -> list[tuple[PC, PC]]:
        """Return the code of files that match a pattern of :mod:`fnmatch`, included code too.

        The ranges are sorted and disjoint, and do not touch.
        """
        return [pair for code in self._codes() for pair in code.file_ranges(pattern)]

    # -- modules -----------------------------------------------------------------------------

    def _codes(self) -> Iterator[_Code]:
        """Return the compile units of the kernel and of the loaded modules, by address."""
        yield self._kernel
        if self._symbols is not None:
            for start, _, module in sorted(self._symbols.texts()):
                if module and (code := self._code_at(start)) is not None:
                    yield code

    def _code_at(self, pc: PC) -> _Code | None:
        if pc < MODULES_BASE:
            return self._kernel
        text = self._symbols.text_at(pc) if self._symbols is not None else None
        if text is None or self._symbols is None:
            return None
        start, end, module = text
        key = start, module
        if key not in self._modules:
            self._modules[key] = self._open_module(module, start, end)
        code = self._modules[key]
        # Its symbols may arrive after the module itself.
        if code is not None and key not in self._fitting and self._symbols.has_functions(module):
            if code.fits(self._symbols):
                self._fitting.add(key)
            else:
                logger.warning(
                    "the debug information of the module %s belongs to another build", module
                )
                code = self._modules[key] = None
        return code

    def _open_module(self, module: str, start: PC, end: PC) -> _Code | None:
        path = self._module_files.get(module)
        if path is None:
            return None
        try:
            places = {name: start + at for name, at in core_text_sections(path).items()}
            file = DebugFile(path, places, size=end - start)
            return _Code(file, (start, end), self._kernel.tops)
        except (UsageError, SourceError) as error:
            logger.warning("the lines of the module %s are unknown: %s", module, error.message)
            return None

    @functools.cached_property
    def _module_files(self) -> dict[str, Path]:
        """Return the modules' files by name."""
        found: dict[str, Path] = {}
        if self._directory is not None:
            for directory, _, names in os.walk(self._directory):
                for name in names:
                    stem, dot, rest = name.partition(".ko")
                    if dot and rest in ("", ".debug"):
                        found.setdefault(module_name(stem), Path(directory, name))
        return found


def _open(path: Path) -> DebugFile:
    try:
        return DebugFile(path)
    except UsageError as error:
        error.hint = _HINT
        raise
