# SPDX-License-Identifier: Apache-2.0
"""Source lines of the kernel's code and of its modules', from their debug information.

That is in a ``vmlinux`` and, for each module, in a ``.ko`` of its own, which is relocatable: its
sections are placed as the kernel's loader does, at the module's canonical base. A file is read when
an address of it is asked for, and of a file the lines of those compile units alone.
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
from bridge.sources.guest_kernel.libdw import DebugFile, Unit
from bridge.sources.guest_kernel.placement import MODULES_BASE, core_text_sections, module_name
from bridge.sources.guest_kernel.symbols import KernelSymbols

__all__ = ["Lines", "SourceUnit", "find_modules", "find_vmlinux"]

logger = logging.getLogger(__name__)

_DEBUG_ROOT: Final = Path("/usr/lib/debug")

_ANCHORS: Final = ("init/main.c", "arch/x86/entry/entry_64.S")
"""Files of every kernel, one of C and one of assembler (whose paths the build may write in another
way): where they are, the tree is."""

_PADDING: Final = 16
"""What x86's kernels have at most before a function: CONFIG_FUNCTION_PADDING_BYTES."""

_NOTHING: Final = 0xFFFF_FFFF
"""The number of a file, where a row of lines ends a sequence."""

_HINT: Final = (
    "install the package linux-image-…-dbg of the guest's kernel, or name a vmlinux that was "
    "built with CONFIG_DEBUG_INFO: --vmlinux FILE"
)


def find_vmlinux(
    release: str, explicit: Path | None = None, *, root: Path = _DEBUG_ROOT
) -> Path | None:
    """The file with a kernel's debug information: the explicit one, or where Debian's package
    ``linux-image-…-dbg`` puts it; None if there is none.

    Raises :class:`bridge.errors.UsageError` for an explicit one that is not there.
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
    """The directory below which modules with debug information are: that of the tree in which a
    ``vmlinux`` was built, or where a package has put it; None if there is none."""
    if (vmlinux.parent / "modules.order").is_file():
        return vmlinux.parent
    if not release:
        return None
    # Beside the vmlinux, where a package was unpacked elsewhere than in /.
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
        """``rows`` are address, number of the file and line, sorted by address."""
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
        # All that is at the start, else what goes on there.
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
        """Its source file, relative to the tree."""

    def line(self, pc: PC) -> tuple[str, int] | None:
        """The file and line of one of its addresses."""
        found = self._file.line(self._unit, pc)
        return (self._relative(found[0]), found[1]) if found is not None else None

    @functools.cached_property
    def rows(self) -> _Rows:
        """All its lines, but those of code that is thrown away (a module's ``.init.text``)."""
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
        """The path of a file in the tree; else below the compiler's directory; else whole."""
        directory = self._unit.directory
        tops = [*self._tops, *([posixpath.normpath(directory)] if directory else [])]
        for path in (name, posixpath.join(directory, name)):
            path = posixpath.normpath(path)
            for top in tops:
                if path.startswith(f"{top}/"):
                    return path[len(top) + 1 :]
        return path


class _Code:
    """What one file says: the kernel's or a module's."""

    def __init__(
        self, file: DebugFile, text: tuple[PC, PC], tops: Sequence[str] | None = None
    ) -> None:
        """``text`` are start and end of what counts; ``tops`` where the kernel's tree was when it
        was built, None to find that here."""
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
        # Asked for again with each module that comes, for the same few patterns.
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
        """Whether these are the lines of this code: nearly all units begin with a function there,
        and by chance one in ten would."""
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
    """Where the tree was for the compiler; other programs have none."""
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

    Not for several threads at once. Where a file turns out to be damaged, methods raise
    :class:`bridge.errors.SourceError`.
    """

    def __init__(
        self, vmlinux: Path, symbols: KernelSymbols | None = None, modules: Path | None = None
    ) -> None:
        """``symbols`` are those of the kernel whose lines these should be, and may come later, see
        :meth:`belong_to`; below the directory ``modules`` are its modules with debug information.

        Raises :class:`bridge.errors.UsageError` for a file without debug information or of another
        kernel than the symbols, :class:`bridge.errors.SourceError` for one that can't be read, and
        :class:`bridge.errors.MissingDependencyError` without the library that reads it.
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
        """The kernel whose lines these should be; its symbols also say where modules are.

        Raises :class:`bridge.errors.UsageError` where it is another one.
        """
        if not self._kernel.fits(symbols):
            raise UsageError(
                f"{self.path} is of another kernel than the guest's",
                hint="where its files begin, the guest's kernel has no functions; take the "
                "vmlinux of the very build",
            )
        self._symbols = symbols

    def lookup(self, pc: PC) -> tuple[str, int] | None:
        """The file and line of an address; None where nothing is known."""
        unit = self.unit_at(pc)
        return unit.line(pc) if unit is not None else None

    def function_line(self, start: PC) -> tuple[str, int] | None:
        """The file and line where the function is that begins at an address.

        :meth:`lookup` may give its first statement: that is the last of several lines that an
        address has.
        """
        unit = self.unit_at(start)
        if unit is None:
            return None
        return unit.rows.first(start) or unit.line(start)

    def unit_at(self, pc: PC) -> SourceUnit | None:
        """The compile unit of an address."""
        code = self._code_at(pc)
        return code.unit_at(pc) if code is not None else None

    def unit_lines(self, unit: SourceUnit) -> set[tuple[str, int]]:
        """All files and lines that a compile unit has code of."""
        return unit.rows.between(0, 1 << 64)

    def lines_in(self, start: PC, end: PC) -> set[tuple[str, int]]:
        """The files and lines of the code from one address up to another."""
        unit = self.unit_at(start)
        return unit.rows.between(start, end) if unit is not None else set()

    def files(self) -> set[str]:
        """The source files that have code of their own: those that were compiled, no headers."""
        return {unit.name for code in self._codes() for unit in code.owners}

    def file_ranges(self, pattern: str) -> list[tuple[PC, PC]]:
        """The code that was compiled from the files that match a pattern of :mod:`fnmatch`, with
        what they have included; sorted and disjoint, merged where they touch."""
        return [pair for code in self._codes() for pair in code.file_ranges(pattern)]

    # -- modules -----------------------------------------------------------------------------

    def _codes(self) -> Iterator[_Code]:
        """The kernel's, and those of the modules that are loaded, by address."""
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
        # Its symbols may come later than the module itself.
        if code is not None and key not in self._fitting and self._symbols.has_functions(module):
            if code.fits(self._symbols):
                self._fitting.add(key)
            else:
                logger.warning("the lines of the module %s are of another build", module)
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
            logger.warning("the lines of the module %s are not known: %s", module, error.message)
            return None

    @functools.cached_property
    def _module_files(self) -> dict[str, Path]:
        """The modules' files by name."""
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
