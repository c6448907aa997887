# SPDX-License-Identifier: Apache-2.0
"""Names of Rust functions as their source has them.

rustc has two forms of symbol names: "v0" (``_R…``), whose grammar is in the chapter "Symbol
Mangling" of The rustc book, and the older one, which looks like that of C++ (``_ZN…17h…E``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

__all__ = ["demangle_legacy", "demangle_v0"]

_LONGEST: Final = 1 << 14
"""Characters of a name; back references can make it as long as they like."""
_DEEPEST: Final = 100
_BASIC: Final = dict(
    zip(
        "abcdefhijlmnopstuvxyz",
        (
            *("i8", "bool", "char", "f64", "str", "f32", "u8", "isize", "usize", "i32", "u32"),
            *("i128", "u128", "_", "i16", "u16", "()", "...", "i64", "u64", "!"),
        ),
        strict=True,
    )
)
_SIGNED: Final = frozenset("ailnsx")
_BASE62: Final = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_HASH: Final = re.compile("::h[0-9a-f]{16}$")
_ESCAPE: Final = re.compile(r"\$(LT|GT|RF|BP|LP|RP|SP|C|u[0-9a-f]{1,6})\$|\.\.|(?<![^:])_(?=\$)")
_ESCAPED: Final = dict(
    zip(("LT", "GT", "RF", "BP", "LP", "RP", "SP", "C"), "<>&*()@,", strict=True)
)


def demangle_legacy(name: str) -> str:
    """Return a name of the older form, demangled as C++, without its hash and escapes.

    A name that has no such hash is C++'s own, and comes back as it is.
    """
    without = _HASH.sub("", name)
    return name if without == name else _ESCAPE.sub(_plain, without)


def _plain(match: re.Match[str]) -> str:
    code = match[1]
    if code is None:
        return "::" if match[0] == ".." else ""
    try:
        return _ESCAPED[code] if code in _ESCAPED else chr(int(code[1:], 16))
    except (ValueError, OverflowError):
        return match[0]


def demangle_v0(name: str) -> str | None:
    """Return a name of the form v0 as its source has it; None if it is none.

    Generic arguments are shown, hashes of crates are not.
    """
    # What LLVM adds to clones of functions has no place in the grammar.
    text = name.partition(".")[0].partition("$")[0]
    if not text.startswith("_R") or not text.isascii():
        return None
    parser = _Parser(text[2:])
    try:
        parser.path(value=True)
        if parser.at < len(parser.text):
            # The crate that has this instance.
            parser.silently(lambda: parser.path(value=False))
        return "".join(parser.out) if parser.at == len(parser.text) else None
    except (ValueError, IndexError, KeyError, UnicodeError, OverflowError):
        return None


class _Parser:
    """Reads a symbol behind ``_R`` from left to right, and writes the name into ``out``.

    Raises ValueError, IndexError, KeyError, UnicodeError or OverflowError for what is no name.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.out: list[str] = []
        self._length = 0
        self._depth = 0
        self._silent = 0
        self._lifetimes = 0

    def silently(self, read: Callable[[], object]) -> None:
        """Read something that the name does not show."""
        self._silent += 1
        read()
        self._silent -= 1

    def path(self, *, value: bool) -> None:
        """Read a path; generic arguments are ``::<…>`` in that of a value."""
        self._enter()
        kind = self._next()
        if kind == "C":
            self._write(self._identifier()[0])
        elif kind in "MXY":
            if kind != "Y":
                # Where the impl is: not shown.
                self._disambiguator()
                self.silently(lambda: self.path(value=False))
            self._write("<")
            self.type()
            if kind != "M":
                self._write(" as ")
                self.path(value=False)
            self._write(">")
        elif kind == "N":
            self._nested(value=value)
        elif kind == "I":
            self.path(value=value)
            self._write("::<" if value else "<")
            self._listed(self._generic)
            self._write(">")
        elif kind == "B":
            self._again(lambda: self.path(value=value))
        else:
            raise ValueError(kind)
        self._depth -= 1

    def _nested(self, *, value: bool) -> None:
        space = self._next()
        if not space.isalpha():
            raise ValueError(space)
        self.path(value=value)
        name, number = self._identifier()
        if space.isupper():
            kind = {"C": "closure", "S": "shim"}.get(space, space)
            self._write(f"::{{{kind}{f':{name}' if name else ''}#{number}}}")
        elif name:
            self._write(f"::{name}")

    def type(self) -> None:
        """Read a type."""
        self._enter()
        kind = self._next()
        if kind in _BASIC:
            self._write(_BASIC[kind])
        elif kind in "RQ":
            self._write("&")
            if self._peek() == "L":
                self._next()
                if lifetime := self._number():
                    self._lifetime(lifetime)
                    self._write(" ")
            self._write("mut " if kind == "Q" else "")
            self.type()
        elif kind in "PO":
            self._write("*const " if kind == "P" else "*mut ")
            self.type()
        elif kind in "AS":
            self._write("[")
            self.type()
            if kind == "A":
                self._write("; ")
                self._constant()
            self._write("]")
        elif kind == "T":
            self._write("(")
            if self._listed(self.type) == 1:
                self._write(",")
            self._write(")")
        elif kind == "F":
            self._bound(self._function)
        elif kind == "D":
            self._write("dyn ")
            self._bound(lambda: self._listed(self._dyn_trait, " + "))
            if self._next() != "L":
                raise ValueError("dyn without a lifetime")
            if lifetime := self._number():
                self._write(" + ")
                self._lifetime(lifetime)
        elif kind == "B":
            self._again(self.type)
        else:
            self.at -= 1
            self.path(value=False)
        self._depth -= 1

    def _function(self) -> None:
        if self._peek() == "U":
            self._next()
            self._write("unsafe ")
        if self._peek() == "K":
            self._next()
            if self._peek() == "C":
                self._next()
                abi = "C"
            else:
                abi = self._name().replace("_", "-")
            self._write(f'extern "{abi}" ')
        self._write("fn(")
        self._listed(self.type)
        self._write(")")
        if self._peek() == "u":
            self._next()
        else:
            self._write(" -> ")
            self.type()

    def _dyn_trait(self) -> None:
        # Its bindings go into the brackets of its generic arguments.
        opened = self._trait()
        while self._peek() == "p":
            self._next()
            self._write(f"{', ' if opened else '<'}{self._name()} = ")
            opened = True
            self.type()
        if opened:
            self._write(">")

    def _trait(self) -> bool:
        """Read a path, and leave the bracket of its generic arguments open if it has some."""
        self._enter()
        opened = False

        def read() -> None:
            nonlocal opened
            opened = self._trait()

        if self._peek() == "B":
            self._next()
            self._again(read)
        elif self._peek() == "I":
            self._next()
            self.path(value=False)
            self._write("<")
            self._listed(self._generic)
            opened = True
        else:
            self.path(value=False)
        self._depth -= 1
        return opened

    def _generic(self) -> None:
        if self._peek() == "L":
            self._next()
            self._lifetime(self._number())
        elif self._peek() == "K":
            self._next()
            self._constant()
        else:
            self.type()

    def _constant(self) -> None:
        self._enter()
        kind = self._next()
        if kind == "p":
            self._write("_")
        elif kind == "B":
            self._again(self._constant)
        else:
            negative = kind in _SIGNED and self._peek() == "n"
            self.at += negative
            end = self.text.index("_", self.at)
            digits, self.at = self.text[self.at : end], end + 1
            number = int(digits or "0", 16)
            if kind == "b":
                self._write(("false", "true")[number])
            elif kind == "c":
                self._write(repr(chr(number)))
            elif kind in "ailnsxhjmoty":
                self._write(f"{'-' if negative else ''}{number}")
            else:
                # Others are not stable.
                raise ValueError(kind)
        self._depth -= 1

    def _bound(self, read: Callable[[], object]) -> None:
        """Read something that may have lifetimes of its own: ``for<'a, 'b> …``."""
        count = 0
        if self._peek() == "G":
            self._next()
            count = self._number() + 1
            if count > _DEEPEST:
                raise ValueError("too many lifetimes")
            self._write("for<")
            for number in range(count):
                self._lifetimes += 1
                self._write(", " if number else "")
                self._lifetime(1)
            self._write("> ")
        read()
        self._lifetimes -= count

    def _lifetime(self, index: int) -> None:
        """Write a lifetime: 0 is ``'_``, others count from the innermost."""
        if index > self._lifetimes:
            raise ValueError("an unknown lifetime")
        number = self._lifetimes - index
        name = chr(ord("a") + number) if number < 26 else f"_{number}"
        self._write(f"'{name}" if index else "'_")

    def _listed(self, read: Callable[[], object], between: str = ", ") -> int:
        """Read some things up to an ``E``; return how many."""
        count = 0
        while self._peek() != "E":
            self._write(between if count else "")
            read()
            count += 1
        self._next()
        return count

    def _again(self, read: Callable[[], object]) -> None:
        """Read what a back reference leads to: a place before itself."""
        begin = self.at - 1
        place = self._number()
        if place >= begin:
            raise ValueError("a reference that leads forward")
        if self._silent:
            return
        after, self.at = self.at, place
        read()
        self.at = after

    def _identifier(self) -> tuple[str, int]:
        """Read a name; return it with its number among those that are alike."""
        number = self._disambiguator()
        return self._name(), number

    def _disambiguator(self) -> int:
        if self._peek() != "s":
            return 0
        self._next()
        return self._number() + 1

    def _name(self) -> str:
        encoded = self._peek() == "u"
        self.at += encoded
        # No number begins with 0, so that another may follow it.
        digits = self._next()
        while digits != "0" and self._peek().isdigit():
            digits += self._next()
        length = int(digits)
        if self._peek() == "_":
            self.at += 1
        name = self.text[self.at : self.at + length]
        if len(name) != length:
            raise ValueError("a name that is cut off")
        self.at += length
        if not encoded:
            return name
        # Python's codec has a hyphen before the digits.
        plain, _, digits = name.rpartition("_")
        return f"{plain}{'-' if plain else ''}{digits}".encode().decode("punycode")

    def _number(self) -> int:
        end = self.text.index("_", self.at)
        digits, self.at = self.text[self.at : end], end + 1
        number = 0
        for digit in digits:
            number = number * 62 + _BASE62.index(digit)
        return number + 1 if digits else 0

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("too deep")

    def _peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def _next(self) -> str:
        char = self.text[self.at]
        self.at += 1
        return char

    def _write(self, text: str) -> None:
        if self._silent:
            return
        self.out.append(text)
        self._length += len(text)
        if self._length > _LONGEST:
            raise ValueError("too long")
