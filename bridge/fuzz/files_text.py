# SPDX-License-Identifier: Apache-2.0
"""Cases of the harness ``files`` as text, and back.

A line of text is a call of the case::

    open f0 a rw|creat 0644
    parallel
    0: write f0 100 7
    1: truncate a 5
    join
    close f0                # a comment

``guest/agent/files-calls.h`` defines the encoding. This module reads that file, so the two agree;
``tests/fuzz/test_files_text.py`` compares this decoder with the guest's.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bridge.errors import InfrastructureError, UsageError
from bridge.util.resources import guest_directory

__all__ = ["Call", "Encoding", "load_encoding", "to_bytes", "to_text"]

_PARALLEL = "parallel"
_JOIN = "join"
_ACCESS = ("r", "w", "rw")
"""Of ``open``: bits 0-1; 3 is rw as well."""


class _WrongArgumentError(Exception):
    """What is wrong with an argument of a line."""


@dataclass(frozen=True)
class Call:
    """A call of a case.

    Attributes:
        name: its name.
        arguments: their encoded bytes without what does not matter, in order.
        thread: who makes it; None outside of parallel sections.
    """

    name: str
    arguments: tuple[bytes, ...]
    thread: int | None = None


@dataclass(frozen=True)
class _Kind:
    """A kind of argument: how many bytes it takes, and both directions.

    Attributes:
        size: its bytes; None for all that are left.
        show: canonical bytes from any, and their text.
        parse: the bytes of a text; raises _WrongArgumentError.
    """

    size: int | None
    show: Callable[[bytes], tuple[bytes, str]]
    parse: Callable[[str], bytes]


@dataclass(frozen=True)
class Encoding:
    """The lists of ``guest/agent/files-calls.h``.

    Attributes:
        numbers: the constants.
        calls: the kinds of each call's arguments.
        names: how the names are written.
        specials: the numbers from ``FILES_SPECIAL`` on.
        open_flags: how the flags of ``open`` are written.
        entries: by list, how its entries are written.
    """

    numbers: Mapping[str, int]
    calls: Mapping[str, tuple[str, ...]]
    names: tuple[str, ...]
    specials: tuple[int, ...]
    open_flags: tuple[str, ...]
    entries: Mapping[str, tuple[str, ...]]

    @classmethod
    def parse(cls, text: str) -> Encoding:
        """Read the header.

        Raises:
            InfrastructureError: it is not what it should be.
        """
        numbers = {
            name: int(value, 0)
            for name, value in re.findall(r"^#define FILES_(\w+) (0x\w+|\d+)\b", text, re.MULTILINE)
        }
        calls = {
            name: tuple(kinds.split())
            for name, kinds in re.findall(r"^\tCALL\((\w+), \"([\w ]*)\"\)", text, re.MULTILINE)
        }
        entries: dict[str, list[str]] = {}
        for name, entry in re.findall(r"^\tENTRY\((\w+), \"([^\"]+)\", ", text, re.MULTILINE):
            entries.setdefault(name, []).append(entry)
        found = cls(
            numbers,
            calls,
            tuple(re.findall(r"^\tNAME\(\"([^\"]+)\", ", text, re.MULTILINE)),
            tuple(int(x) for x in re.findall(r"^\tSPECIAL\((-?\d+)\)", text, re.MULTILINE)),
            tuple(re.findall(r"^\tOPEN_FLAG\(\"(\w+)\", ", text, re.MULTILINE)),
            {name: tuple(texts) for name, texts in entries.items()},
        )
        try:
            for kind in itertools.chain.from_iterable(calls.values()):
                found._kind(kind)
            found._number("SEPARATOR")
        except KeyError as error:
            raise InfrastructureError(
                f"the table of the calls of the harness files has no {error.args[0]}",
                hint="install the package again: pip install --force-reinstall kcov-bridge",
            ) from error
        return found

    def _number(self, name: str) -> int:
        return self.numbers[name]

    # Bytes to calls

    def decode(self, case: bytes) -> tuple[list[Call], int]:
        """Take a case apart.

        Returns:
            Its calls, and how many records are beyond the most calls of a case.
        """
        calls: list[Call] = []
        left_out = 0
        parallel = False
        for raw in case.split(bytes([self._number("SEPARATOR")])):
            record = self._unescape(raw)
            if not record:
                continue
            name = self._call_names[(record[0] & 63) % len(self.calls)]
            if (name == _PARALLEL and parallel) or (name == _JOIN and not parallel):
                continue
            if len(calls) == self._number("MOST_CALLS"):
                left_out += 1
                continue
            thread = None
            if name in (_PARALLEL, _JOIN):
                parallel = name == _PARALLEL
            elif parallel:
                thread = record[0] >> 6
            calls.append(Call(name, tuple(self._arguments(name, record[1:])), thread))
        return calls, left_out

    @functools.cached_property
    def _call_names(self) -> tuple[str, ...]:
        return tuple(self.calls)

    def _arguments(self, name: str, data: bytes) -> Iterator[bytes]:
        for argument in self.calls[name]:
            kind = self._kind(argument)
            size = len(data) if kind.size is None else kind.size
            yield kind.show(data[:size].ljust(size, b"\0"))[0]
            data = data[size:]

    def _unescape(self, record: bytes) -> bytes:
        escape, other = self._number("ESCAPE"), self._number("ESCAPE_XOR")
        if escape not in record:
            return record
        plain = bytearray()
        rest = iter(record)
        for value in rest:
            if value != escape:
                plain.append(value)
            elif (escaped := next(rest, None)) is not None:
                plain.append(escaped ^ other)
        return bytes(plain)

    # Calls to bytes

    def encode(self, calls: Sequence[Call]) -> bytes:
        """Return the case of these calls."""
        separator = self._number("SEPARATOR")
        escape, other = self._number("ESCAPE"), self._number("ESCAPE_XOR")
        case = bytearray()
        for call in calls:
            if case:
                case.append(separator)
            first = self._call_names.index(call.name) | (call.thread or 0) << 6
            for value in bytes([first]) + b"".join(call.arguments):
                if value in (separator, escape):
                    case += bytes([escape, value ^ other])
                else:
                    case.append(value)
        return bytes(case)

    # Calls and lines

    def show(self, call: Call) -> str:
        """Return a call as a line of text, without its thread."""
        kinds = self.calls[call.name]
        texts = (
            self._kind(kind).show(value)[1]
            for kind, value in zip(kinds, call.arguments, strict=True)
        )
        return " ".join((call.name, *texts))

    def parse_line(self, line: str, *, parallel: bool) -> Call | None:
        """Return the call of a line; None for one without.

        Args:
            parallel: whether it is in a parallel section.

        Raises:
            UsageError: the line is wrong.
        """
        words = _words(line)
        if not words:
            return None
        thread = None
        if (match := re.fullmatch(r"(\d+):", words[0])) is not None:
            thread = int(match.group(1))
            words = words[1:]
        name = words[0] if words else ""
        if name not in self.calls:
            raise UsageError(
                f"there is no call {name!r}" if name else "there is no call after the thread",
                hint="the calls are " + " ".join(self.calls),
            )
        marker = name in (_PARALLEL, _JOIN)
        if thread is not None and (marker or not parallel):
            raise UsageError(f"{name} has a thread", hint="only calls after 'parallel' have one")
        if parallel and not marker:
            if thread is None:
                raise UsageError(
                    f"{name} has no thread", hint=f"write '0: {name} ...', or 'join' before it"
                )
            if thread >= self._number("THREADS"):
                raise UsageError(
                    f"there is no thread {thread}",
                    hint=f"threads are 0 to {self._number('THREADS') - 1}",
                )
        if (name == _PARALLEL and parallel) or (name == _JOIN and not parallel):
            raise UsageError(
                f"{name} is not possible here", hint="sections are 'parallel', calls, 'join'"
            )
        kinds = self.calls[name]
        if len(words) - 1 != len(kinds):
            raise UsageError(
                f"{name} has {len(kinds)} arguments, not {len(words) - 1}",
                hint=f"write: {' '.join((name, *kinds))}",
            )
        arguments = []
        for kind, word in zip(kinds, words[1:], strict=True):
            try:
                arguments.append(self._kind(kind).parse(word))
            except _WrongArgumentError as error:
                raise UsageError(f"{word} is no {kind} of {name}", hint=str(error)) from error
        return Call(name, tuple(arguments), thread)

    # Kinds of arguments

    def _kind(self, name: str) -> _Kind:
        kind = self._kinds.get(name)
        if kind is not None:
            return kind
        texts = self.entries[name]
        return self._kinds.setdefault(name, _listed(texts))

    @functools.cached_property
    def _kinds(self) -> dict[str, _Kind]:
        slots = tuple(f"f{number}" for number in range(self._number("SLOTS")))
        most = self._number("MOST_DATA")
        return {
            "slot": _listed(slots),
            "name": _listed(self.names),
            "number": _Kind(2, self._show_number, self._parse_number),
            "length": _plain(2),
            "fill": _plain(1),
            "open": _Kind(2, self._show_open, self._parse_open),
            "data": _Kind(None, lambda data: (data[:most], _quote(data[:most])), self._parse_data),
        }

    def _show_number(self, data: bytes) -> tuple[bytes, str]:
        value = int.from_bytes(data, "little")
        first = self._number("SPECIAL")
        if value < first:
            return data, str(value)
        index = (value - first) % len(self.specials)
        return (first + index).to_bytes(2, "little"), str(self.specials[index])

    def _parse_number(self, text: str) -> bytes:
        first = self._number("SPECIAL")
        value = _integer(text)
        if value is not None and 0 <= value < first:
            return value.to_bytes(2, "little")
        if value is None or value not in self.specials:
            raise _WrongArgumentError(
                f"it is 0 to {first - 1}, or {', '.join(map(str, self.specials))}"
            )
        return (first + self.specials.index(value)).to_bytes(2, "little")

    def _show_open(self, data: bytes) -> tuple[bytes, str]:
        value = int.from_bytes(data, "little")
        access = min(value & 3, len(_ACCESS) - 1)
        flags = (value >> 2) & ((1 << len(self.open_flags)) - 1)
        words = [flag for bit, flag in enumerate(self.open_flags) if flags >> bit & 1]
        return (flags << 2 | access).to_bytes(2, "little"), "|".join((_ACCESS[access], *words))

    def _parse_open(self, text: str) -> bytes:
        access, *words = text.split("|")
        if access not in _ACCESS or any(word not in self.open_flags for word in words):
            raise _WrongArgumentError(f"it is r, w or rw, then |FLAG: {' '.join(self.open_flags)}")
        value = _ACCESS.index(access)
        for word in words:
            value |= 4 << self.open_flags.index(word)
        return value.to_bytes(2, "little")

    def _parse_data(self, text: str) -> bytes:
        data = _unquote(text)
        if len(data) > self._number("MOST_DATA"):
            raise _WrongArgumentError(f"it has at most {self._number('MOST_DATA')} bytes")
        return data


def _listed(texts: Sequence[str]) -> _Kind:
    def show(data: bytes) -> tuple[bytes, str]:
        index = data[0] % len(texts)
        return bytes([index]), texts[index]

    def parse(text: str) -> bytes:
        if text not in texts:
            raise _WrongArgumentError(f"it is one of {' '.join(texts)}")
        return bytes([texts.index(text)])

    return _Kind(1, show, parse)


def _plain(size: int) -> _Kind:
    most = (1 << 8 * size) - 1

    def parse(text: str) -> bytes:
        value = _integer(text)
        if value is None or not 0 <= value <= most:
            raise _WrongArgumentError(f"it is 0 to {most}")
        return value.to_bytes(size, "little")

    return _Kind(size, lambda data: (data, str(int.from_bytes(data, "little"))), parse)


def _integer(text: str) -> int | None:
    # int() itself also takes blanks, underscores and the digits of other scripts.
    return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else None


def _quote(data: bytes) -> str:
    texts = (
        f"\\{chr(value)}"
        if value in b'"\\'
        else chr(value)
        if 0x20 <= value < 0x7F
        else f"\\x{value:02x}"
        for value in data
    )
    return f'"{"".join(texts)}"'


_QUOTED = re.compile(r'"(?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\]|\\x[0-9a-fA-F]{2})*"')
_IN_QUOTES = re.compile(r"\\x(..)|\\?(.)")


def _unquote(text: str) -> bytes:
    if _QUOTED.fullmatch(text) is None:
        raise _WrongArgumentError(r'it is text in quotes: "printable ASCII, \", \\, \xNN"')
    return bytes(
        int(match.group(1), 16) if match.group(1) else ord(match.group(2))
        for match in _IN_QUOTES.finditer(text[1:-1])
    )


_WORD = re.compile(r'"(?:\\.|[^"\\])*"|".*|#.*|[^\s"#]\S*')


def _words(line: str) -> list[str]:
    return [word for word in _WORD.findall(line) if not word.startswith("#")]


@functools.cache
def load_encoding() -> Encoding:
    """Return the encoding that this installation's guest agent has.

    Raises:
        InfrastructureError: the agent's sources are missing or damaged.
    """
    path = guest_directory() / "agent" / "files-calls.h"
    try:
        return Encoding.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InfrastructureError(f"{path} cannot be read: {error.strerror}") from error


def to_text(case: bytes) -> str:
    """Return a case as text: a line for each call that the harness makes.

    Each byte string is a case. ``to_bytes(to_text(case))`` makes the same calls.
    """
    encoding = load_encoding()
    calls, left_out = encoding.decode(case)
    lines = [
        encoding.show(call) if call.thread is None else f"{call.thread}: {encoding.show(call)}"
        for call in calls
    ]
    if left_out:
        lines.append(f"# {left_out} more, which are not made")
    return "".join(f"{line}\n" for line in lines)


def to_bytes(text: str) -> bytes:
    """Return the case of a text as :func:`to_text` writes it.

    Raises:
        UsageError: a line is wrong; the message has its number.
    """
    encoding = load_encoding()
    calls: list[Call] = []
    parallel = False
    most = encoding.numbers["MOST_CALLS"]
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            call = encoding.parse_line(line, parallel=parallel)
            if call is not None and len(calls) == most:
                raise UsageError(
                    f"a case has at most {most} calls", hint="split it into several cases"
                )
        except UsageError as error:
            raise UsageError(f"line {number}: {error.message}", hint=error.hint) from error
        if call is None:
            continue
        if call.name in (_PARALLEL, _JOIN):
            parallel = call.name == _PARALLEL
        calls.append(call)
    return encoding.encode(calls)
