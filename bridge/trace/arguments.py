# SPDX-License-Identifier: Apache-2.0
"""The arguments of a system call as text, as strace prints them, where that is cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from bridge.trace.names import flag_values, system_calls

__all__ = ["arguments_text", "quoted"]

_AT_FDCWD: Final = -100
_UNSIGNED: Final = frozenset(
    {"unsigned int", "unsigned", "u32", "uint32_t", "uid_t", "gid_t", "qid_t", "old_uid_t"}
)
_SIGNED: Final = frozenset(
    {"int", "pid_t", "clockid_t", "const clockid_t", "key_t", "mqd_t", "timer_t", "__s32"}
)
_LONG: Final = frozenset({"long", "loff_t", "off_t", "ssize_t", "aio_context_t"})
_ADDRESSES: Final = frozenset({"addr", "start", "brk", "newsp", "tls", "new_addr", "child_stack"})
_CREATING: Final = 0o100 | 0o20000000
"""O_CREAT and the bit of O_TMPFILE: with these, open has a mode."""
_ESCAPES: Final = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r"}


def quoted(text: bytes, cut: bool = False) -> str:
    """Return bytes as a C string in quotes; ``...`` follows if it was cut."""
    parts = []
    for byte in text:
        if byte in (0x22, 0x5C):
            parts.append("\\" + chr(byte))
        elif 0x20 <= byte < 0x7F:
            parts.append(chr(byte))
        else:
            parts.append(_ESCAPES.get(byte) or f"\\{byte:03o}")
    return '"' + "".join(parts) + '"' + ("..." if cut else "")


def arguments_text(
    number: int, arguments: Sequence[int], strings: Mapping[int, tuple[bytes, bool]]
) -> tuple[str, ...] | None:
    """Return the arguments of a call of x86-64; None if its parameters are not known.

    Args:
        arguments: six numbers, unsigned.
        strings: the strings to which arguments point, and whether each was cut.
    """
    call = system_calls().get(number)
    if call is None:
        return None
    parameters: Sequence[tuple[str, str]] = call.parameters
    if call.name in ("open", "openat") and not arguments[len(parameters) - 2] & _CREATING:
        parameters = parameters[:-1]
    texts = []
    for index, (kind, name) in enumerate(parameters[: len(arguments)]):
        value = arguments[index]
        special = _SPECIAL.get((call.name, index))
        if index in strings:
            texts.append(quoted(*strings[index]))
        elif special is not None:
            texts.append(special(value))
        else:
            texts.append(_plain(kind, name, value))
    return tuple(texts)


def _plain(kind: str, name: str, value: int) -> str:
    if kind.endswith("*"):
        return f"{value:#x}" if value else "NULL"
    if "dfd" in name or name == "mountdirfd":
        signed = _signed(value, 32)
        return "AT_FDCWD" if signed == _AT_FDCWD else str(signed)
    if kind == "umode_t" or name == "mode":
        return f"{value & 0xFFFF:#05o}".replace("0o", "0")
    if kind in _SIGNED or "fd" in name:
        return str(_signed(value, 32))
    if kind in _UNSIGNED:
        return _number(value & 0xFFFFFFFF, name)
    if kind in _LONG:
        return str(_signed(value, 64))
    return _number(value, name)


def _number(value: int, name: str) -> str:
    if name in _ADDRESSES:
        return f"{value:#x}" if value else "NULL"
    return f"{value:#x}" if value and ("flags" in name or "mask" in name) else str(value)


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _flags(group: str, bits: int = 32) -> Callable[[int], str]:
    """Return a function that names flags; what has no name follows in hex."""

    def text(value: int) -> str:
        rest = value & ((1 << bits) - 1)
        names = []
        # The largest first, because O_SYNC has the bit of O_DSYNC.
        for name, flag in sorted(flag_values(group).items(), key=lambda each: -each[1]):
            if flag and rest & flag == flag:
                names.append(name)
                rest &= ~flag
        names.reverse()
        if rest or not names:
            names.append(f"{rest:#x}" if rest else "0")
        return "|".join(names)

    return text


def _one_of(group: str) -> Callable[[int], str]:
    """Return a function that names one value."""

    def text(value: int) -> str:
        number = _signed(value, 32)
        for name, each in flag_values(group).items():
            if each == number:
                return name
        return str(number)

    return text


def _open_flags(value: int) -> str:
    access = ("O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE")[value & 3]
    rest = _flags("open")(value & ~3)
    return access if rest == "0" else f"{access}|{rest}"


def _protection(value: int) -> str:
    return _flags("prot")(value) if value else "PROT_NONE"


def _clone_flags(value: int) -> str:
    flags, signal = _flags("clone", 64)(value & ~0xFF), value & 0xFF
    parts = [flags] if flags != "0" else []
    parts += [_one_of("signal")(signal)] if signal else []
    return "|".join(parts) or "0"


_ACCESS: Final = {0: "F_OK", 1: "X_OK", 2: "W_OK", 3: "W_OK|X_OK", 4: "R_OK", 5: "R_OK|X_OK"} | {
    6: "R_OK|W_OK",
    7: "R_OK|W_OK|X_OK",
}


def _access(value: int) -> str:
    return _ACCESS.get(value, f"{value:#x}")


_at: Final = _flags("at")


def _without(group: Callable[[int], str], name: str, other: str) -> Callable[[int], str]:
    """Return ``group`` with another of two names that have the same value."""
    return lambda value: group(value).replace(name, other)


_unlink: Final = _without(_at, "AT_EACCESS", "AT_REMOVEDIR")
_access_flags: Final = _without(_at, "AT_REMOVEDIR", "AT_EACCESS")

_SPECIAL: Final[Mapping[tuple[str, int], Callable[[int], str]]] = {
    ("open", 1): _open_flags,
    ("openat", 2): _open_flags,
    ("pipe2", 1): _flags("open"),
    ("dup3", 2): _flags("open"),
    ("newfstatat", 3): _at,
    ("statx", 2): _at,
    ("linkat", 4): _at,
    ("fchownat", 4): _at,
    ("fchmodat2", 3): _at,
    ("utimensat", 3): _at,
    ("execveat", 4): _at,
    ("unlinkat", 2): _unlink,
    ("faccessat2", 3): _access_flags,
    ("access", 1): _access,
    ("faccessat", 2): _access,
    ("faccessat2", 2): _access,
    ("mmap", 2): _protection,
    ("mmap", 3): _flags("map"),
    ("mprotect", 2): _protection,
    ("clone", 0): _clone_flags,
    ("mount", 3): _flags("mount"),
    ("kill", 1): _one_of("signal"),
    ("tkill", 1): _one_of("signal"),
    ("tgkill", 2): _one_of("signal"),
    ("rt_sigaction", 0): _one_of("signal"),
    ("lseek", 2): _one_of("seek"),
    ("fcntl", 1): _one_of("fcntl"),
}
