# SPDX-License-Identifier: Apache-2.0
"""Debug information of the guest's kernel: compile units, their code, their lines."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from ctypes import (
    CFUNCTYPE,
    POINTER,
    byref,
    c_bool,
    c_char_p,
    c_int,
    c_size_t,
    c_ubyte,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bridge.errors import SourceError, UsageError
from bridge.sources import libdw

__all__ = ["DebugFile", "Row", "Unit"]

_DWARF_C_READ: Final = 0
_DW_UT_COMPILE: Final = 0x01
_OMITTED: Final = (1 << 64) - 1
"""libdwfl's address of a section that is not in memory."""

Row = tuple[int, str | None, int]
"""A row of a line table: address, file as the compiler wrote it, line. A row without a file ends a
sequence and has no code at its address."""


_FIND = CFUNCTYPE(
    c_int, c_void_p, c_void_p, c_char_p, c_uint64, POINTER(c_void_p), POINTER(c_void_p)
)
_FIND_DEBUG = CFUNCTYPE(
    *(c_int, c_void_p, c_void_p, c_char_p, c_uint64),
    *(c_char_p, c_char_p, c_uint32, POINTER(c_void_p)),
)
_SECTION = CFUNCTYPE(
    *(c_int, c_void_p, c_void_p, c_char_p, c_uint64),
    *(c_char_p, c_uint32, c_void_p, POINTER(c_uint64)),
)


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A compile unit; valid while its file is open."""

    name: str
    """Its source file, as passed to the compiler."""
    directory: str
    """The compiler's working directory."""
    ranges: tuple[tuple[int, int], ...]
    """Its code: start and end addresses."""
    die: libdw.Die


class DebugFile:
    """An ELF file with debug information. Not thread-safe."""

    def __init__(
        self, path: Path, sections: Mapping[str, int] | None = None, *, size: int = 0
    ) -> None:
        """Open a file.

        Args:
            sections: for a relocatable file (a kernel module), the address of each section, lowest
                first. Sections that are not named are ignored.
            size: bytes of all these sections.

        Raises:
            UsageError: the file has no debug information.
            SourceError: it cannot be read.
            MissingDependencyError: the library is not installed.
        """
        self.path = path
        self._descriptor = -1
        self._dwfl: int | None = None
        self._dwarf: int | None = None
        self._dw = libdw.load()
        try:
            with path.open("rb") as file:
                if file.read(4) != b"\x7fELF":
                    raise self.damaged("no ELF file")
                descriptor = os.dup(file.fileno())
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        try:
            if sections is None:
                self._descriptor = descriptor
                self._dwarf = self._dw.dwarf_begin(descriptor, _DWARF_C_READ)
                said = b"" if self._dwarf else self._dw.dwarf_errmsg(-1)
            else:
                self._dwarf = self._relocated(descriptor, sections, size)
                said = b"" if self._dwarf else self._dw.dwfl_errmsg(-1)
            if not self._dwarf:
                raise UsageError(
                    f"{path} has no debug information",
                    evidence=(said or b"").decode(errors="replace"),
                )
        except BaseException:
            self.close()
            raise

    def _relocated(self, descriptor: int, sections: Mapping[str, int], size: int) -> int | None:
        """Return a relocatable file's debug information, at the addresses of its sections.

        libdwfl takes over the descriptor.
        """

        def find(*_: object) -> int:
            return descriptor

        def find_debug(*_: object) -> int:
            return -1

        def address(*arguments: Any) -> int:
            arguments[-1][0] = sections.get(arguments[4].decode(errors="replace"), _OMITTED)
            return 0

        # Kept alive, because the Dwfl may call them.
        self._called = (_FIND(find), _FIND_DEBUG(find_debug), _SECTION(address))
        self._callbacks = libdw.Callbacks(
            *(ctypes.cast(each, c_void_p).value for each in self._called), None
        )
        self._dwfl = self._dw.dwfl_begin(byref(self._callbacks))
        start = min(sections.values(), default=0)
        module = self._dw.dwfl_report_module(self._dwfl, b"module", start, start + size)
        if not module:
            os.close(descriptor)
            return None
        self._dw.dwfl_report_end(self._dwfl, None, None)
        bias = c_uint64()
        dwarf: int | None = self._dw.dwfl_module_getdwarf(module, byref(bias))
        if bias.value:
            raise self.damaged(f"moved by {bias.value:#x}")
        return dwarf

    def close(self) -> None:
        """Close the file, which invalidates its units. Safe to call twice."""
        if self._dwfl is not None:
            self._dw.dwfl_end(self._dwfl)
        elif self._dwarf:
            self._dw.dwarf_end(self._dwarf)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._dwfl, self._dwarf, self._descriptor = None, None, -1

    def __enter__(self) -> DebugFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def damaged(self, evidence: str = "") -> SourceError:
        """Return the error for an unreadable file; the default evidence is libdw's last error."""
        if not evidence:
            evidence = (self._dw.dwarf_errmsg(-1) or b"").decode(errors="replace")
        return SourceError(f"the debug information in {self.path} can't be read", evidence=evidence)

    def units(self) -> Iterator[Unit]:
        """Return all compile units that have code; raises SourceError."""
        cu, version, kind = c_void_p(), c_uint16(), c_ubyte()
        while True:
            die = libdw.Die()
            more = self._dw.dwarf_get_units(
                self._dwarf, cu, byref(cu), byref(version), byref(kind), byref(die), None
            )
            if more > 0:
                return
            if more < 0:
                raise self.damaged()
            if kind.value == _DW_UT_COMPILE and (
                ranges := tuple(libdw.ranges(byref(die), self.damaged))
            ):
                yield Unit(
                    libdw.decoded(self._dw.dwarf_diename(byref(die))),
                    libdw.directory(byref(die)),
                    ranges,
                    die,
                )

    def line(self, unit: Unit, address: int) -> tuple[str, int] | None:
        """Return file and line of an address of a unit; None if the table has none.

        Raises:
            SourceError: the table is damaged.
        """
        found = self._dw.dwarf_getsrc_die(byref(unit.die), address)
        if not found:
            return None
        _, file, line = self._row(found)
        # Line 0 means that there is no line.
        return (file, line) if file is not None and line else None

    def rows(self, unit: Unit) -> Iterator[Row]:
        """Return the line table of a unit, sorted by address; raises as :meth:`line`."""
        lines, count = c_void_p(), c_size_t()
        if self._dw.dwarf_getsrclines(byref(unit.die), byref(lines), byref(count)) != 0:
            raise self.damaged()
        for index in range(count.value):
            yield self._row(self._dw.dwarf_onesrcline(lines, index))

    def _row(self, row: int) -> Row:
        dw = self._dw
        address, line, ends = c_uint64(), c_int(), c_bool()
        if (
            dw.dwarf_lineaddr(row, byref(address)) != 0
            or dw.dwarf_lineno(row, byref(line)) != 0
            or dw.dwarf_lineendsequence(row, byref(ends)) != 0
        ):
            raise self.damaged()
        file: bytes | None = None if ends.value else dw.dwarf_linesrc(row, None, None)
        return address.value, None if file is None else file.decode(errors="replace"), line.value
