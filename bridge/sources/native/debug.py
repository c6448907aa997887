# SPDX-License-Identifier: Apache-2.0
"""Functions and lines of native code, by elfutils' libdw.

Also of inlined code, and of stripped files whose debug information is installed by its build id.
"""

from __future__ import annotations

import ctypes
import functools
from bisect import bisect_right
from ctypes import POINTER, byref, c_char_p, c_int, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bridge.sources import libdw
from bridge.sources.native.rust import demangle_legacy, demangle_v0

__all__ = ["SOURCE_ROOT", "Frame", "NativeSymbols"]

SOURCE_ROOT: Final = "/kcov-bridge/source"
"""What debug information of programs that the bridge builds calls the directory ``source`` that the
program's file is in: build ids, and so PCs, depend on no place of a cache."""
_NO_FILE: Final = "???"
"""What libdw has at index 0 of a table that begins at 1."""
_TAG_INLINED: Final = 0x1D
_TAG_FUNCTION: Final = 0x2E
_TAG_CATCH: Final = 0x25
_TAG_LEXICAL_BLOCK: Final = 0x0B
_TAG_TRY: Final = 0x32
_INSIDE: Final = frozenset({_TAG_INLINED, _TAG_CATCH, _TAG_LEXICAL_BLOCK, _TAG_TRY})
"""What functions are inlined into, beside functions."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A function that an address belongs to; inlined into the next one, if there is one."""

    function: str
    file: str
    """As the compiler wrote it, absolute if the compiler said where it worked; empty: not known."""
    line: int
    column: int


_free = ctypes.CDLL(None).free
_free.argtypes = (c_void_p,)


class NativeSymbols:
    """Functions and lines of one file; none if the file is gone or has none. Not thread-safe.

    Raises:
        MissingDependencyError: libdw is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._dw = dw = libdw.load()
        self._source_root = next((each for each in path.parents if each.name == "source"), None)

        def of(name: str) -> int | None:
            return ctypes.cast(getattr(dw, name), c_void_p).value

        # Kept alive for the library.
        self._callbacks = libdw.Callbacks(
            of("dwfl_build_id_find_elf"),
            of("dwfl_standard_find_debuginfo"),
            of("dwfl_offline_section_address"),
            None,
        )
        self._dwfl: int | None = dw.dwfl_begin(byref(self._callbacks))
        self._module: int | None = None
        self._bias = self._debug_bias = 0
        if self._dwfl:
            name = str(path).encode(errors="surrogateescape")
            self._module = dw.dwfl_report_offline(self._dwfl, name, name, -1)
            dw.dwfl_report_end(self._dwfl, None, None)
        if self._module:
            bias = c_uint64()
            if dw.dwfl_module_getelf(self._module, byref(bias)):
                self._bias = bias.value
            else:
                self._module = None
        self._starts, self._units = self._code()
        # Of each unit: starts of its functions' code, and end and function of each.
        self._functions: dict[int, tuple[list[int], list[tuple[int, libdw.Die]]]] = {}

    @property
    def build_id(self) -> bytes:
        """The file's build id; empty if it has none, or is gone."""
        start, at = c_void_p(), c_uint64()
        if not self._module:
            return b""
        size = self._dw.dwfl_module_build_id(self._module, byref(start), byref(at))
        return ctypes.string_at(start.value, size) if size > 0 and start.value else b""

    def close(self) -> None:
        """Give the file back. Safe to call twice."""
        dwfl, self._dwfl, self._module = self._dwfl, None, None
        if dwfl:
            self._dw.dwfl_end(dwfl)

    def __del__(self) -> None:
        self.close()

    def _code(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Return starts of the units' code, as in the debug information, and end and unit of each.

        clang writes no table of them (.debug_aranges), which libdw itself relies on.
        """
        dw, bias = self._dw, c_uint64()
        found: list[tuple[int, int, int]] = []
        unit: int | None = None
        while self._module:
            unit = dw.dwfl_module_nextcu(self._module, unit, byref(bias))
            if not unit:
                break
            self._debug_bias = bias.value
            # Code that the linker left out is at 0.
            found += ((start, end, unit) for start, end in libdw.ranges(unit) if start)
        found.sort()
        return [each[0] for each in found], [each[1:] for each in found]

    def frames(self, address: int) -> list[Frame]:
        """Return the functions that an address of the file belongs to, the innermost first.

        Empty if nothing is known of it.
        """
        if not self._module:
            return []
        at = address + self._bias
        # Debug information of a file of its own may have been moved (prelink).
        in_debug = at - self._debug_bias
        index = bisect_right(self._starts, in_debug) - 1
        unit = None
        if index >= 0 and in_debug < self._units[index][0]:
            unit = self._units[index][1]
        file, line, column = self._source(unit, in_debug) if unit else ("", 0, 0)
        scopes = self._scopes(unit, in_debug) if unit else []
        if not scopes:
            name = _demangled(libdw.decoded(self._dw.dwfl_module_addrname(self._module, at)))
            return [Frame(name or "?", file, line, column)] if name or line else []
        frames = []
        for name, called_from in scopes:
            frames.append(Frame(name, file, line, column))
            file, line, column = called_from
        return frames

    def _source(self, unit: int, at: int) -> tuple[str, int, int]:
        dw = self._dw
        found = dw.dwarf_getsrc_die(unit, at)
        if not found:
            return "", 0, 0
        line, column = c_int(), c_int()
        dw.dwarf_lineno(found, byref(line))
        dw.dwarf_linecol(found, byref(column))
        file = libdw.decoded(dw.dwarf_linesrc(found, None, None))
        return self._absolute(unit, file), line.value, column.value

    def _absolute(self, unit: int, file: str) -> str:
        if file and not file.startswith("/"):
            directory = libdw.directory(unit)
            file = f"{directory}/{file}" if directory else file
        if self._source_root is not None and file.startswith(f"{SOURCE_ROOT}/"):
            return f"{self._source_root}{file[len(SOURCE_ROOT) :]}"
        return file

    def _scopes(self, unit: int, at: int) -> list[tuple[str, tuple[str, int, int]]]:
        """Return the functions around an address, each with the place that it was inlined at."""
        dw = self._dw
        die = self._function(unit, at)
        if die is None:
            return []
        found: list[tuple[str, tuple[str, int, int]]] = []
        while die is not None:
            tag = dw.dwarf_tag(byref(die))
            if tag == _TAG_FUNCTION:
                found.append((self._name(die), ("", 0, 0)))
            elif tag == _TAG_INLINED:
                place = (
                    self._absolute(
                        unit, self._file(unit, libdw.number(byref(die), libdw.AT_CALL_FILE))
                    ),
                    libdw.number(byref(die), libdw.AT_CALL_LINE),
                    libdw.number(byref(die), libdw.AT_CALL_COLUMN),
                )
                found.append((self._name(die), place))
            die = next(
                (
                    child
                    for child in libdw.children(die)
                    if dw.dwarf_tag(byref(child)) in _INSIDE
                    and dw.dwarf_haspc(byref(child), at) > 0
                ),
                None,
            )
        return found[::-1]

    def _function(self, unit: int, at: int) -> libdw.Die | None:
        """Return the function of a unit that has an address, as ``dwarf_getscopes`` would.

        That does not look into namespaces, where clang and rustc have functions.
        """
        if unit not in self._functions:
            functions: list[tuple[int, int, libdw.Die]] = []

            def add(die: Any, _: object) -> int:
                copy = libdw.Die.from_buffer_copy(die.contents)
                functions.extend((*each, copy) for each in libdw.ranges(die) if each[0])
                return 0

            self._dw.dwarf_getfuncs(unit, libdw.FUNCTION_CALLBACK(add), None, 0)
            functions.sort(key=lambda each: each[:2])
            self._functions[unit] = (
                [start for start, _, _ in functions],
                [(end, die) for _, end, die in functions],
            )
        starts, functions_of = self._functions[unit]
        index = bisect_right(starts, at) - 1
        if index < 0 or at >= functions_of[index][0]:
            return None
        return functions_of[index][1]

    def _name(self, die: libdw.Die) -> str:
        """Return a function's name, with its namespaces and classes if that can be told."""
        linkage = libdw.text(byref(die), libdw.AT_LINKAGE_NAME)
        name = _demangled(linkage)
        if not name or name == linkage:
            name = libdw.decoded(self._dw.dwarf_diename(byref(die)))
        return name or "?"

    def _file(self, unit: int, index: int) -> str:
        """Return a file of a unit's table, which begins at 1 up to DWARF 4, and at 0 since then."""
        files, count = c_void_p(), ctypes.c_size_t()
        if self._dw.dwarf_getsrcfiles(unit, byref(files), byref(count)) != 0:
            return ""
        if index >= count.value:
            return ""
        file = libdw.decoded(self._dw.dwarf_filesrc(files, index, None, None))
        return "" if file == _NO_FILE else file


@functools.cache
def _demangler() -> Any:
    """Return the function of the C++ library; None without one."""
    try:
        function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    except (OSError, AttributeError):
        return None
    function.restype = c_void_p
    function.argtypes = (c_char_p, c_void_p, c_void_p, POINTER(c_int))
    return function


@functools.lru_cache(maxsize=1 << 14)
def _demangled(name: str) -> str:
    """Return the name of a C++ or Rust function as its source has it, if that can be told."""
    if name.startswith("_R"):
        return demangle_v0(name) or name
    function = _demangler() if name.startswith("_Z") else None
    if function is None:
        return name
    status = c_int()
    found = function(name.encode(), None, None, byref(status))
    if not found:
        return name
    try:
        text = ctypes.string_at(found).decode(errors="replace")
    finally:
        _free(found)
    return demangle_legacy(text)
