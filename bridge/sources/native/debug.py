# SPDX-License-Identifier: Apache-2.0
"""Functions and lines of native code, by elfutils' libdw.

Also of inlined code, and of stripped files whose debug information is installed by its build id.

The functions are declared here as in ``elfutils/libdwfl.h`` and ``libdw.h``.
"""

from __future__ import annotations

import ctypes
import functools
import re
from bisect import bisect_right
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bridge.errors import MissingDependencyError

__all__ = ["Frame", "NativeSymbols"]

_LIBRARY: Final = "libdw.so.1"
_RUST_HASH: Final = re.compile("::h[0-9a-f]{16}$")
_TAG_INLINED: Final = 0x1D
_TAG_FUNCTION: Final = 0x2E
_AT_CALL_LINE: Final = 0x59
_AT_CALL_FILE: Final = 0x58
_AT_CALL_COLUMN: Final = 0x57
_AT_COMP_DIR: Final = 0x1B


@dataclass(frozen=True, slots=True)
class Frame:
    """A function that an address belongs to; inlined into the next one, if there is one."""

    function: str
    file: str
    """As the compiler wrote it, absolute if the compiler said where it worked; empty: not known."""
    line: int
    column: int


class _Die(Structure):
    """``Dwarf_Die``."""

    _fields_ = (
        ("addr", c_void_p),
        ("cu", c_void_p),
        ("abbrev", c_void_p),
        ("padding", ctypes.c_long),
    )


class _Attribute(Structure):
    """``Dwarf_Attribute``."""

    _fields_ = (("code", c_uint), ("form", c_uint), ("value", c_void_p), ("cu", c_void_p))


class _Callbacks(Structure):
    """``Dwfl_Callbacks``."""

    _fields_ = (
        ("find_elf", c_void_p),
        ("find_debuginfo", c_void_p),
        ("section_address", c_void_p),
        ("debuginfo_path", c_void_p),
    )


_PROTOTYPES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "dwfl_begin": (c_void_p, (POINTER(_Callbacks),)),
    "dwfl_end": (None, (c_void_p,)),
    "dwfl_report_offline": (c_void_p, (c_void_p, c_char_p, c_char_p, c_int)),
    "dwfl_report_end": (c_int, (c_void_p, c_void_p, c_void_p)),
    "dwfl_module_getelf": (c_void_p, (c_void_p, POINTER(c_uint64))),
    "dwfl_module_build_id": (c_int, (c_void_p, POINTER(c_void_p), POINTER(c_uint64))),
    "dwfl_module_addrname": (c_char_p, (c_void_p, c_uint64)),
    "dwfl_module_nextcu": (c_void_p, (c_void_p, c_void_p, POINTER(c_uint64))),
    "dwarf_ranges": (
        ctypes.c_ssize_t,
        (
            *(c_void_p, ctypes.c_ssize_t),
            *(POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint64)),
        ),
    ),
    "dwarf_getsrc_die": (c_void_p, (c_void_p, c_uint64)),
    "dwarf_lineno": (c_int, (c_void_p, POINTER(c_int))),
    "dwarf_linecol": (c_int, (c_void_p, POINTER(c_int))),
    "dwarf_linesrc": (c_char_p, (c_void_p, c_void_p, c_void_p)),
    "dwarf_getscopes": (c_int, (c_void_p, c_uint64, POINTER(POINTER(_Die)))),
    "dwarf_getscopes_die": (c_int, (POINTER(_Die), POINTER(POINTER(_Die)))),
    "dwarf_tag": (c_int, (POINTER(_Die),)),
    "dwarf_diename": (c_char_p, (POINTER(_Die),)),
    "dwarf_attr": (c_void_p, (c_void_p, c_uint, POINTER(_Attribute))),
    "dwarf_formudata": (c_int, (POINTER(_Attribute), POINTER(c_uint64))),
    "dwarf_formstring": (c_char_p, (POINTER(_Attribute),)),
    "dwarf_getsrcfiles": (c_int, (c_void_p, POINTER(c_void_p), POINTER(ctypes.c_size_t))),
    "dwarf_filesrc": (
        c_char_p,
        (c_void_p, ctypes.c_size_t, POINTER(c_uint64), POINTER(c_uint64)),
    ),
}


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(_LIBRARY)
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"functions and lines of native code need elfutils' {_LIBRARY}",
            evidence=str(error),
            hint="apt-get install libdw1",
        ) from error
    return library


_free = ctypes.CDLL(None).free
_free.argtypes = (c_void_p,)


class NativeSymbols:
    """Functions and lines of one file; none if the file is gone or has none. Not thread-safe.

    Raises:
        MissingDependencyError: libdw is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._dw = dw = _library()

        def of(name: str) -> int | None:
            return ctypes.cast(getattr(dw, name), c_void_p).value

        # Kept alive for the library.
        self._callbacks = _Callbacks(
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
        base, start, end = c_uint64(), c_uint64(), c_uint64()
        found: list[tuple[int, int, int]] = []
        unit: int | None = None
        while self._module:
            unit = dw.dwfl_module_nextcu(self._module, unit, byref(bias))
            if not unit:
                break
            self._debug_bias = bias.value
            offset = 0
            while True:
                offset = dw.dwarf_ranges(unit, offset, byref(base), byref(start), byref(end))
                if offset <= 0:
                    break
                # Code that the linker left out is at 0.
                if 0 < start.value < end.value:
                    found.append((start.value, end.value, unit))
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
            name = _demangled(_text(self._dw.dwfl_module_addrname(self._module, at)))
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
        file = _text(dw.dwarf_linesrc(found, None, None))
        return self._absolute(unit, file), line.value, column.value

    def _absolute(self, unit: int, file: str) -> str:
        if not file or file.startswith("/"):
            return file
        attribute = _Attribute()
        if not self._dw.dwarf_attr(unit, _AT_COMP_DIR, byref(attribute)):
            return file
        directory = _text(self._dw.dwarf_formstring(byref(attribute)))
        return f"{directory}/{file}" if directory else file

    def _scopes(self, unit: int, at: int) -> list[tuple[str, tuple[str, int, int]]]:
        """Return the functions around an address, each with the place that it was inlined at."""
        dw = self._dw
        dies, around = POINTER(_Die)(), POINTER(_Die)()
        count = dw.dwarf_getscopes(unit, at, byref(dies))
        if count <= 0:
            return []
        # Those around inlined code are the scopes of its text; of the code itself they are these.
        inner = dw.dwarf_getscopes_die(dies, byref(around))
        if inner > 0:
            _free(dies)
            dies, count = around, inner
        found = []
        try:
            for index in range(count):
                die = dies[index]
                tag = dw.dwarf_tag(byref(die))
                if tag not in (_TAG_INLINED, _TAG_FUNCTION):
                    continue
                name = _text(dw.dwarf_diename(byref(die))) or "?"
                if tag == _TAG_FUNCTION:
                    found.append((name, ("", 0, 0)))
                    break
                place = (
                    self._absolute(unit, self._file(unit, self._number(die, _AT_CALL_FILE))),
                    self._number(die, _AT_CALL_LINE),
                    self._number(die, _AT_CALL_COLUMN),
                )
                found.append((name, place))
        finally:
            _free(dies)
        return found

    def _number(self, die: _Die, name: int) -> int:
        attribute, value = _Attribute(), c_uint64()
        if not self._dw.dwarf_attr(byref(die), name, byref(attribute)):
            return 0
        return value.value if self._dw.dwarf_formudata(byref(attribute), byref(value)) == 0 else 0

    def _file(self, unit: int, index: int) -> str:
        files, count = c_void_p(), ctypes.c_size_t()
        if not index or self._dw.dwarf_getsrcfiles(unit, byref(files), byref(count)) != 0:
            return ""
        if index >= count.value:
            return ""
        return _text(self._dw.dwarf_filesrc(files, index, None, None))


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


def _demangled(name: str) -> str:
    """Return the name of a C++ or Rust function as its source has it, if that can be told."""
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
    # rustc adds a hash.
    return _RUST_HASH.sub("", text)


def _text(value: bytes | None) -> str:
    return value.decode(errors="replace") if value else ""
