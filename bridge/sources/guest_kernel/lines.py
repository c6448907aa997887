# SPDX-License-Identifier: Apache-2.0
"""Source lines of the kernel's code, from the debug information (DWARF 4 or 5) in a ``vmlinux``.

A kernel has thousands of compile units, so of each only its first entry is read at once, and the
table of its lines when an address of it is asked for. Modules are not in a ``vmlinux``.
"""

from __future__ import annotations

import posixpath
import re
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import Any, Final

from elftools.common.exceptions import DWARFError, ELFError
from elftools.elf.elffile import ELFFile

from bridge.errors import SourceError, UsageError
from bridge.sources import PC

__all__ = ["Lines", "find_vmlinux"]

_DEBUG_ROOT: Final = Path("/usr/lib/debug")

_AT_NAME: Final = 0x03
_AT_LOW_PC: Final = 0x11
_AT_COMP_DIR: Final = 0x1B
_AT_RANGES: Final = 0x55

# DWARF 5, 7.5.6: the bytes of a value by its form, in 32-bit DWARF of a 64-bit machine.
_FORM_SIZE: Final = {
    form: size
    for size, forms in {
        0: (0x19, 0x21),
        1: (0x0B, 0x0C, 0x11, 0x25, 0x29),
        2: (0x05, 0x12, 0x26, 0x2A),
        3: (0x27, 0x2B),
        4: (0x06, 0x0E, 0x10, 0x13, 0x17, 0x1D, 0x1F, 0x28, 0x2C),
        8: (0x01, 0x07, 0x14, 0x20),
        16: (0x1E,),
    }.items()
    for form in forms
}
_FORM_LEB: Final = frozenset((0x0D, 0x0F, 0x15, 0x1A, 0x1B, 0x22, 0x23))
_FORM_BLOCK: Final = {0x03: "<H", 0x04: "<I", 0x0A: "<B"}
_FORM_STRING: Final = 0x08
_FORM_STRP: Final = 0x0E
_FORM_LINE_STRP: Final = 0x1F
_FORM_IMPLICIT: Final = 0x21
_FORMS_LEB_BLOCK: Final = (0x09, 0x18)

_NOTHING: Final = 0xFFFF_FFFF
"""The number of a file, where a row of lines ends a sequence."""

_HINT: Final = (
    "install the package linux-image-…-dbg of the guest's kernel, or name a vmlinux that was "
    "built with CONFIG_DEBUG_INFO"
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


@dataclass(frozen=True, slots=True)
class _Unit:
    """A compile unit: where it is in .debug_info, and its file by its path in the tree."""

    offset: int
    name: str
    directory: str
    has_code: bool


class _Rows:
    """The lines of one compile unit, by address."""

    __slots__ = ("addresses", "files", "lines", "names")

    def __init__(self, rows: list[tuple[int, int, int]], names: list[str]) -> None:
        """``rows`` are address, number of the file and line, in the order of the program."""
        # Where one sequence ends another may begin: the end comes first.
        rows.sort(key=lambda row: (row[0], row[1] != _NOTHING))
        self.addresses = array("Q", (row[0] for row in rows))
        self.files = array("I", (row[1] for row in rows))
        self.lines = array("I", (row[2] for row in rows))
        self.names = names

    def lookup(self, pc: PC) -> tuple[str, int] | None:
        index = bisect_right(self.addresses, pc) - 1
        return self._row(index) if index >= 0 else None

    def first(self, pc: PC) -> tuple[str, int] | None:
        for index in range(bisect_left(self.addresses, pc), bisect_right(self.addresses, pc)):
            if (row := self._row(index)) is not None:
                return row
        return self.lookup(pc)

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
        if file == _NOTHING or line == 0 or file >= len(self.names):
            return None
        return self.names[file], line


class Lines:
    """File and line by address. Paths are relative to the top of the kernel's source tree."""

    def __init__(self, vmlinux: Path) -> None:
        """Raises :class:`bridge.errors.UsageError` for a file without debug information and
        :class:`bridge.errors.SourceError` for one that can't be read."""
        self.path = vmlinux
        try:
            # Both outlive this: sections are in memory after this.
            with vmlinux.open("rb") as file:
                elf: Any = ELFFile(file)
                # Not has_dwarf_info(): for that, unwind tables are enough.
                if elf.get_section_by_name(".debug_info") is None and (
                    elf.get_section_by_name(".zdebug_info") is None
                ):
                    raise UsageError(f"{vmlinux} has no debug information", hint=_HINT)
                # Linked code: relocations, if any were kept, have been applied.
                self._dwarf: Any = elf.get_dwarf_info(
                    relocate_dwarf_sections=elf["e_type"] == "ET_REL"
                )
            self._units = self._read_units()
            self._starts, self._ends, self._owners = self._read_ranges()
        except OSError as error:
            raise SourceError(f"cannot read {vmlinux}: {error.strerror}") from error
        except (ELFError, DWARFError, struct.error, ValueError, IndexError, KeyError) as error:
            raise self._damaged(error) from error
        self._rows: dict[int, _Rows] = {}

    def lookup(self, pc: PC) -> tuple[str, int] | None:
        """The file and line of an address of the kernel; None where nothing is known.

        Raises :class:`bridge.errors.SourceError` where the lines are damaged.
        """
        unit = self.unit_at(pc)
        return self._table(unit).lookup(pc) if unit is not None else None

    def function_line(self, start: PC) -> tuple[str, int] | None:
        """The file and line where the function is that begins at an address.

        :meth:`lookup` may give its first statement: that is the last of several lines that an
        address has.
        """
        unit = self.unit_at(start)
        return self._table(unit).first(start) if unit is not None else None

    def unit_at(self, pc: PC) -> int | None:
        """The compile unit of an address, as a number for :meth:`unit_lines`."""
        index = bisect_right(self._starts, pc) - 1
        return self._owners[index] if index >= 0 and pc < self._ends[index] else None

    def unit_lines(self, unit: int) -> set[tuple[str, int]]:
        """All files and lines that a compile unit has code of; errors as :meth:`lookup`."""
        return self._table(unit).between(0, 1 << 64)

    def lines_in(self, start: PC, end: PC) -> set[tuple[str, int]]:
        """The files and lines of the code from one address up to another; errors as
        :meth:`lookup`."""
        unit = self.unit_at(start)
        return self._table(unit).between(start, end) if unit is not None else set()

    def files(self) -> Collection[str]:
        """The source files that have code of their own: those that were compiled, no headers."""
        return {self._units[owner].name for owner in self._owners}

    def file_ranges(self, pattern: str) -> list[tuple[PC, PC]]:
        """The code that was compiled from the files that match a pattern of :mod:`fnmatch`, with
        what they have included; sorted and disjoint, merged where they touch."""
        match = re.compile(translate(pattern)).match
        wanted = {offset for offset, unit in self._units.items() if match(unit.name)}
        found: list[tuple[PC, PC]] = []
        for start, end, owner in zip(self._starts, self._ends, self._owners, strict=True):
            if owner not in wanted:
                continue
            if found and found[-1][1] >= start:
                found[-1] = found[-1][0], max(found[-1][1], end)
            else:
                found.append((start, end))
        return found

    def _table(self, unit: int) -> _Rows:
        rows = self._rows.get(unit)
        if rows is None:
            try:
                rows = self._rows[unit] = self._read_rows(self._units[unit])
            except (ELFError, DWARFError, struct.error, ValueError, LookupError) as error:
                raise self._damaged(error) from error
        return rows

    def _damaged(self, error: Exception) -> SourceError:
        return SourceError(
            f"the debug information in {self.path} can't be read",
            evidence=f"{type(error).__name__}: {error}",
        )

    # -- compile units -----------------------------------------------------------------------

    def _read_units(self) -> dict[int, _Unit]:
        """All compile units by their offset; names relative to the tree."""
        raw = list(self._raw_units())
        # The tree is where init/main.c is; other programs have the directory of their compiler.
        root = next(
            (
                path.removesuffix("init/main.c")
                for _, name, directory, _ in raw
                if (path := posixpath.join(directory, name)).endswith("/init/main.c")
            ),
            "",
        )
        self._root = posixpath.normpath(root) if root else ""
        return {
            offset: _Unit(offset, self._relative(directory, name), directory, has_code)
            for offset, name, directory, has_code in raw
        }

    def _relative(self, directory: str, name: str) -> str:
        """The path of a file in the tree; else below the compiler's directory; else whole."""
        path = posixpath.normpath(posixpath.join(directory, name))
        for top in (self._root, posixpath.normpath(directory) if directory else ""):
            if top and path.startswith(f"{top}/"):
                return path[len(top) + 1 :]
        return path

    def _raw_units(self) -> Iterator[tuple[int, str, str, bool]]:
        """Offset, name, directory and whether there is code, of all compile units.

        Only the first entry of each is read, and of its abbreviations only those up to the one in
        use: pyelftools reads them all, which takes forty times as long.
        """
        info = self._dwarf.debug_info_sec.stream.getbuffer()
        abbreviations = self._dwarf.debug_abbrev_sec.stream.getbuffer()
        offset = 0
        while offset < len(info):
            (length,) = struct.unpack_from("<I", info, offset)
            if length >= 0xFFFF_FFF0:
                raise ValueError("DWARF of 64 bits")
            (version,) = struct.unpack_from("<H", info, offset + 4)
            if version >= 5:
                kind, _, table = struct.unpack_from("<BBI", info, offset + 6)
                # DW_UT_compile; partial units and types have no code of their own.
                at = offset + 12 if kind == 1 else 0
            else:
                (table,) = struct.unpack_from("<I", info, offset + 6)
                at = offset + 11
            if at:
                yield offset, *self._first_entry(info, at, abbreviations, table)
            offset += 4 + length

    def _first_entry(
        self, info: memoryview, at: int, abbreviations: memoryview, table: int
    ) -> tuple[str, str, bool]:
        wanted, at = _leb(info, at)
        strings = {_AT_NAME: "", _AT_COMP_DIR: ""}
        has_code = False
        for attribute, form in _abbreviation(abbreviations, table, wanted):
            has_code |= attribute in (_AT_LOW_PC, _AT_RANGES)
            if attribute in strings:
                strings[attribute] = self._string(info, at, form)
            at = _skip(info, at, form)
        return strings[_AT_NAME], strings[_AT_COMP_DIR], has_code

    def _string(self, info: memoryview, at: int, form: int) -> str:
        if form == _FORM_STRING:
            return bytes(info[at : _skip(info, at, form) - 1]).decode("utf-8", "replace")
        sections = {
            _FORM_STRP: self._dwarf.debug_str_sec,
            _FORM_LINE_STRP: self._dwarf.debug_line_str_sec,
        }
        if form not in sections:
            raise ValueError(f"a name of form {form:#x}")
        stream = sections[form].stream
        (position,) = struct.unpack_from("<I", info, at)
        stream.seek(position)
        text: bytes = stream.read(4096)
        return text.partition(b"\0")[0].decode("utf-8", "replace")

    # -- addresses ---------------------------------------------------------------------------

    def _read_ranges(self) -> tuple[array[int], array[int], array[int]]:
        """Start, end and unit of all code, sorted."""
        found: list[tuple[int, int, int]] = []
        listed = set()
        aranges = self._dwarf.get_aranges()
        for entry in aranges.entries if aranges is not None else ():
            listed.add(entry.info_offset)
            if entry.length and entry.begin_addr and entry.info_offset in self._units:
                found.append((entry.begin_addr, entry.length, entry.info_offset))
        ranges = [(start, start + length, owner) for start, length, owner in found]
        for offset, unit in self._units.items():
            # Some compilers don't write .debug_aranges.
            if unit.has_code and offset not in listed:
                ranges += [(start, end, offset) for start, end in self._unit_ranges(offset)]
        ranges.sort()
        return (
            array("Q", (row[0] for row in ranges)),
            array("Q", (row[1] for row in ranges)),
            array("Q", (row[2] for row in ranges)),
        )

    def _unit_ranges(self, offset: int) -> Iterator[tuple[PC, PC]]:
        """Where the code of a unit is, as its first entry says."""
        unit = self._dwarf.get_CU_at(offset)
        entry = unit.get_top_DIE()
        attributes = entry.attributes
        low = attributes["DW_AT_low_pc"].value if "DW_AT_low_pc" in attributes else 0
        if "DW_AT_ranges" in attributes:
            lists = self._dwarf.range_lists()
            value = attributes["DW_AT_ranges"].value
            if attributes["DW_AT_ranges"].form == "DW_FORM_rnglistx":
                raw = lists.get_range_list_at_offset_ex(value)
            else:
                raw = lists.get_range_list_at_offset(value, cu=unit)
            base = low
            for item in raw:
                if hasattr(item, "base_address"):
                    base = item.base_address
                elif item.end_offset > item.begin_offset:
                    shift = 0 if getattr(item, "is_absolute", False) else base
                    yield item.begin_offset + shift, item.end_offset + shift
        elif "DW_AT_high_pc" in attributes:
            high = attributes["DW_AT_high_pc"]
            end = high.value if high.form == "DW_FORM_addr" else low + high.value
            if low and end > low:
                yield low, end

    # -- lines -------------------------------------------------------------------------------

    def _read_rows(self, unit: _Unit) -> _Rows:
        program = self._dwarf.line_program_for_CU(self._dwarf.get_CU_at(unit.offset))
        if program is None:
            return _Rows([], [])
        since_5 = program["version"] >= 5
        directories = [entry.decode("utf-8", "replace") for entry in program["include_directory"]]
        names = []
        if not since_5:
            # Directory 0 is the compiler's, and files are counted from 1.
            directories.insert(0, unit.directory)
            names.append("")
        for file in program["file_entry"]:
            index = file["dir_index"]
            directory = directories[index] if index < len(directories) else ""
            path = posixpath.join(directory, file["name"].decode("utf-8", "replace"))
            names.append(self._relative(unit.directory, path))
        rows = []
        for entry in program.get_entries():
            state = entry.state
            if state is not None:
                file = _NOTHING if state.end_sequence else state.file
                rows.append((state.address, file, state.line))
        return _Rows(rows, names)


def _leb(data: memoryview, at: int) -> tuple[int, int]:
    """An unsigned LEB128 number, and where it ends. A signed one ends at the same place."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _skip(info: memoryview, at: int, form: int) -> int:
    """Where a value of a form ends. Raises ValueError for an unknown form."""
    size = _FORM_SIZE.get(form)
    if size is not None:
        return at + size
    if form in _FORM_LEB:
        return _leb(info, at)[1]
    if form in _FORM_BLOCK:
        (length,) = struct.unpack_from(_FORM_BLOCK[form], info, at)
        return int(at + struct.calcsize(_FORM_BLOCK[form]) + length)
    if form in _FORMS_LEB_BLOCK:
        length, at = _leb(info, at)
        return at + length
    if form == _FORM_STRING:
        while info[at]:
            at += 1
        return at + 1
    raise ValueError(f"a value of the unknown form {form:#x}")


def _abbreviation(table: memoryview, at: int, wanted: int) -> list[tuple[int, int]]:
    """The attributes and forms of an abbreviation. Raises ValueError if it is not in the table."""
    while True:
        code, at = _leb(table, at)
        if code == 0:
            raise ValueError(f"no abbreviation {wanted}")
        _, at = _leb(table, at)
        at += 1  # whether there are children
        found = []
        while True:
            attribute, at = _leb(table, at)
            form, at = _leb(table, at)
            if form == _FORM_IMPLICIT:
                _, at = _leb(table, at)
            if attribute == 0 and form == 0:
                break
            found.append((attribute, form))
        if code == wanted:
            return found
