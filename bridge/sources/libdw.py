# SPDX-License-Identifier: Apache-2.0
"""elfutils' libdw, as far as sources of coverage need it: the library, its structures, attributes.

The functions are declared here as in ``elfutils/libdw.h`` and ``libdwfl.h``. The library (Debian's
``libdw1``) is loaded when the first file is opened.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_int, c_uint, c_uint64, c_void_p
from typing import Any, Final

from bridge.errors import MissingDependencyError

__all__ = [
    "AT_CALL_COLUMN",
    "AT_CALL_FILE",
    "AT_CALL_LINE",
    "AT_LINKAGE_NAME",
    "FUNCTION_CALLBACK",
    "Callbacks",
    "Die",
    "children",
    "decoded",
    "directory",
    "load",
    "number",
    "ranges",
    "text",
]

_LIBRARY: Final = "libdw.so.1"

_AT_COMP_DIR: Final = 0x1B
AT_CALL_COLUMN: Final = 0x57
AT_CALL_FILE: Final = 0x58
AT_CALL_LINE: Final = 0x59
AT_LINKAGE_NAME: Final = 0x6E


class Die(Structure):
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


class Callbacks(Structure):
    """``Dwfl_Callbacks``: addresses of functions."""

    _fields_ = (
        ("find_elf", c_void_p),
        ("find_debuginfo", c_void_p),
        ("section_address", c_void_p),
        ("debuginfo_path", c_void_p),
    )


FUNCTION_CALLBACK: Final = CFUNCTYPE(c_int, POINTER(Die), c_void_p)
"""What ``dwarf_getfuncs`` calls with each function; it returns 0."""

_SIZE: Final = ctypes.c_size_t
_OFFSET: Final = ctypes.c_ssize_t
_ADDRESS: Final = POINTER(c_uint64)
_POINTER: Final = POINTER(c_void_p)
_PROTOTYPES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "dwarf_attr": (c_void_p, (c_void_p, c_uint, c_void_p)),
    "dwarf_attr_integrate": (c_void_p, (c_void_p, c_uint, c_void_p)),
    "dwarf_begin": (c_void_p, (c_int, c_int)),
    "dwarf_child": (c_int, (c_void_p, c_void_p)),
    "dwarf_diename": (c_char_p, (c_void_p,)),
    "dwarf_end": (c_int, (c_void_p,)),
    "dwarf_errmsg": (c_char_p, (c_int,)),
    "dwarf_filesrc": (c_char_p, (c_void_p, _SIZE, _ADDRESS, _ADDRESS)),
    "dwarf_formstring": (c_char_p, (c_void_p,)),
    "dwarf_formudata": (c_int, (c_void_p, _ADDRESS)),
    "dwarf_get_units": (
        c_int,
        (c_void_p, c_void_p, _POINTER, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "dwarf_getfuncs": (_OFFSET, (c_void_p, FUNCTION_CALLBACK, c_void_p, _OFFSET)),
    "dwarf_getsrc_die": (c_void_p, (c_void_p, c_uint64)),
    "dwarf_getsrcfiles": (c_int, (c_void_p, _POINTER, POINTER(_SIZE))),
    "dwarf_getsrclines": (c_int, (c_void_p, _POINTER, POINTER(_SIZE))),
    "dwarf_haspc": (c_int, (c_void_p, c_uint64)),
    "dwarf_lineaddr": (c_int, (c_void_p, _ADDRESS)),
    "dwarf_linecol": (c_int, (c_void_p, POINTER(c_int))),
    "dwarf_lineendsequence": (c_int, (c_void_p, POINTER(ctypes.c_bool))),
    "dwarf_lineno": (c_int, (c_void_p, POINTER(c_int))),
    "dwarf_linesrc": (c_char_p, (c_void_p, c_void_p, c_void_p)),
    "dwarf_onesrcline": (c_void_p, (c_void_p, _SIZE)),
    "dwarf_ranges": (_OFFSET, (c_void_p, _OFFSET, _ADDRESS, _ADDRESS, _ADDRESS)),
    "dwarf_siblingof": (c_int, (c_void_p, c_void_p)),
    "dwarf_tag": (c_int, (c_void_p,)),
    "dwfl_begin": (c_void_p, (POINTER(Callbacks),)),
    "dwfl_end": (None, (c_void_p,)),
    "dwfl_errmsg": (c_char_p, (c_int,)),
    "dwfl_module_addrname": (c_char_p, (c_void_p, c_uint64)),
    "dwfl_module_build_id": (c_int, (c_void_p, _POINTER, _ADDRESS)),
    "dwfl_module_getdwarf": (c_void_p, (c_void_p, _ADDRESS)),
    "dwfl_module_getelf": (c_void_p, (c_void_p, _ADDRESS)),
    "dwfl_module_nextcu": (c_void_p, (c_void_p, c_void_p, _ADDRESS)),
    "dwfl_report_end": (c_int, (c_void_p, c_void_p, c_void_p)),
    "dwfl_report_module": (c_void_p, (c_void_p, c_char_p, c_uint64, c_uint64)),
    "dwfl_report_offline": (c_void_p, (c_void_p, c_char_p, c_char_p, c_int)),
}


@functools.cache
def load() -> Any:
    """Return the library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"functions and lines of code need elfutils' {_LIBRARY}",
            evidence=str(error),
            hint="apt-get install libdw1",
        ) from error
    return library


def decoded(value: bytes | None) -> str:
    """Return a text of the library; "" for none."""
    return value.decode(errors="replace") if value else ""


def text(die: Any, name: int) -> str:
    """Return an attribute that is a text, also of the origin of a die; "" without it."""
    dw, attribute = load(), _Attribute()
    if not dw.dwarf_attr_integrate(die, name, byref(attribute)):
        return ""
    return decoded(dw.dwarf_formstring(byref(attribute)))


def number(die: Any, name: int) -> int:
    """Return an attribute that is a number; 0 without it."""
    dw, attribute, value = load(), _Attribute(), c_uint64()
    if not dw.dwarf_attr(die, name, byref(attribute)):
        return 0
    return value.value if dw.dwarf_formudata(byref(attribute), byref(value)) == 0 else 0


def directory(unit: Any) -> str:
    """Return the directory in which the compiler made a unit; "" if it does not say."""
    return text(unit, _AT_COMP_DIR)


def ranges(die: Any, damaged: Callable[[], Exception] | None = None) -> Iterator[tuple[int, int]]:
    """Yield the addresses of a die's code, start and end; raises what ``damaged`` returns."""
    dw = load()
    base, start, end = c_uint64(), c_uint64(), c_uint64()
    offset = 0
    while True:
        offset = dw.dwarf_ranges(die, offset, byref(base), byref(start), byref(end))
        if offset < 0 and damaged is not None:
            raise damaged()
        if offset <= 0:
            return
        if start.value < end.value:
            yield start.value, end.value


def children(die: Die) -> Iterator[Die]:
    """Yield the dies right below a die, each as an object of its own."""
    dw = load()
    child = Die()
    if dw.dwarf_child(byref(die), byref(child)):
        return
    while True:
        yield child
        before, child = child, Die()
        if dw.dwarf_siblingof(byref(before), byref(child)):
            return
