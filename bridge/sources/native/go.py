# SPDX-License-Identifier: Apache-2.0
"""Coverage of Go programs: counters that ``go build -cover`` puts into them, read in place.

The program is not changed and need not know of the bridge. Its file's symbols say where things
are: ``runtime.covctrs`` to ``runtime.ecovctrs`` are the counters, and
``internal/coverage/rtcov.Meta`` lists the packages that were initialised, each with its metadata.

**Counters** are words of 32 bits. Those of a function lie together behind a header: their number,
the number of the package, and the number of the function in it (``internal/coverage/defs.go`` of
Go). All is 0 until the function runs first; each run writes the header before it raises a counter.
So the bridge learns where a function's counters are when it has run. It keeps what it has read: a
counter that is another at the next look has run. Only with ``-covermode=set``, where a counter is a
flag, it writes to the program: it clears the counters, never a header.

**Metadata** of a package (``internal/coverage/encodemeta``) is a header, an offset for each
function, a table of texts, and for each function its name, its file and its blocks with lines and
columns. All of this is there from the start, so all blocks have PCs, whether they run or not.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge.errors import SourceError
from bridge.sources.native.modules import SourceBlock

__all__ = ["GoProgram", "find_go_program"]

_COUNTERS: Final = ("runtime.covctrs", "runtime.ecovctrs")
_PACKAGES: Final = "internal/coverage/rtcov.Meta"

_META: Final = struct.Struct("<IIII16s4xII")
"""``MetaSymbolHeader``: length, name, path, module, hash, files, functions."""
_BLOB: Final = struct.Struct("<QI16s4xQQqBB6x")
"""``rtcov.CovMetaBlob``: address, length, hash, path (address and length), number, mode,
granularity."""
_PER_BLOCK: Final = 1
_SET: Final = 1
"""``coverage.CtrModeSet``: a block sets its counter to 1."""
_HEADER_WORDS: Final = 3
_MOST_PACKAGES: Final = 1 << 14
_MOST_BYTES: Final = 64 << 20
_UNKNOWN: Final = -2
_NO_COUNTER: Final = -1


@dataclass(frozen=True)
class _Function:
    """A function: the number of its first block, and how many it has."""

    first: int
    blocks: int


class GoProgram:
    """The counters of a running Go program that was built with coverage.

    Attributes:
        key: what the PCs are derived from: a digest of all metadata.
        path: the program's file.
        blocks: all blocks, by package, in the order of its functions and their texts.
        address: of the counters.
        slots, flags: as for :meth:`bridge.sources.native.memory.NativeMemory.add_words`.

    Args:
        process: its number.
        memory: a descriptor of its ``/proc/PID/mem``.
        symbols: addresses in the running process.

    Raises:
        SourceError: its coverage makes no sense.
    """

    def __init__(self, process: int, path: str, memory: int, symbols: dict[str, int]) -> None:
        self.process = process
        self.path = path
        self.memory = memory
        self.address, end = (symbols[name] for name in _COUNTERS)
        words = (end - self.address) // 4
        if not 0 <= words <= _MOST_BYTES // 4:
            raise SourceError(f"{path} has counters from {self.address:#x} to {end:#x}")
        self.slots = array("i", [_UNKNOWN]) * words
        self.blocks: list[SourceBlock] = []
        self.flags = False
        self._functions: dict[tuple[int, int], _Function] = {}
        self.key = self._read_packages(symbols[_PACKAGES])

    @property
    def running(self) -> bool:
        """Whether the process has not ended, nor executed another program."""
        try:
            return bool(os.pread(self.memory, 1, self.address))
        except OSError:
            return False

    def close(self) -> None:
        """Close the descriptor. Safe to call twice."""
        memory, self.memory = self.memory, -1
        if memory >= 0:
            os.close(memory)

    def _read(self, address: int, size: int) -> bytes:
        if not 0 <= size <= _MOST_BYTES:
            raise SourceError(f"{self.path} has {size} bytes of coverage data in one piece")
        try:
            data = os.pread(self.memory, size, address)
        except (OSError, OverflowError) as error:
            raise SourceError(f"process {self.process} cannot be read: {error}") from error
        if len(data) != size:
            raise SourceError(f"process {self.process} has ended")
        return data

    def _read_packages(self, address: int) -> str:
        """Read the metadata of all packages; return the key."""
        at, count = struct.unpack("<QQ", self._read(address, 16))
        if count > _MOST_PACKAGES:
            raise SourceError(f"{self.path} has {count} packages with coverage")
        data = self._read(at, count * _BLOB.size)
        packages = []
        for slot, blob in enumerate(_BLOB.iter_unpack(data)):
            place, length, digest, path_at, path_length, hard_coded, mode, granularity = blob
            if granularity != _PER_BLOCK:
                raise SourceError(f"{self.path} has a counter for each function, not each block")
            self.flags = self.flags or mode == _SET
            path = self._read(path_at, path_length).decode(errors="replace")
            # A number of Go's own packages is in the program's code, others are given here.
            number = hard_coded if hard_coded != -1 else slot + 1
            packages.append((path, digest, number & 0xFFFFFFFF, place, length))
        key = hashlib.sha256()
        for path, digest, number, place, length in sorted(packages):
            key.update(path.encode() + b"\0" + digest)
            for index, blocks in enumerate(_functions(self._read(place, length))):
                self._functions[number, index] = _Function(len(self.blocks), len(blocks))
                self.blocks += blocks
        return "go-" + key.hexdigest()[:40]

    def learn(self) -> None:
        """Find the counters of functions that have run since the last call.

        Raises:
            SourceError: the process has ended.
        """
        # Read anew: the reader's copy may have a counter of a function, and no header yet.
        words = array("I", self._read(self.address, 4 * len(self.slots)))
        at = 0
        while at < len(words):
            if not words[at] or self.slots[at] != _UNKNOWN:
                at += 1
                continue
            function = None
            if at + _HEADER_WORDS <= len(words):
                function = self._functions.get((words[at + 1], words[at + 2]))
            if function is None or function.blocks != words[at]:
                # Half of a header, which is whole the next time.
                return
            for offset in range(_HEADER_WORDS):
                self.slots[at + offset] = _NO_COUNTER
            at += _HEADER_WORDS
            for index in range(min(function.blocks, len(words) - at)):
                self.slots[at + index] = function.first + index
            at += function.blocks


def find_go_program(process: int) -> GoProgram | None:
    """Return the counters of a running program; None if it is no Go program with coverage.

    Raises:
        SourceError: it is one, and cannot be read.
    """
    try:
        path = str(Path(f"/proc/{process}/exe").readlink())
        wanted = (*_COUNTERS, _PACKAGES)
        symbols = _symbols(Path(f"/proc/{process}/exe"), wanted)
        if symbols is None or not all(symbols.get(name) for name in wanted):
            return None
        moved = _base(process, path)
        memory = os.open(f"/proc/{process}/mem", os.O_RDWR | os.O_CLOEXEC)
    except (OSError, struct.error, ValueError) as error:
        raise SourceError(f"process {process} cannot be read: {error}") from error
    try:
        return GoProgram(process, path, memory, {name: at + moved for name, at in symbols.items()})
    except (struct.error, IndexError) as error:
        os.close(memory)
        raise SourceError(f"{path} has coverage of another form: {error}") from error
    except BaseException:
        os.close(memory)
        raise


def _functions(data: bytes) -> Iterator[list[SourceBlock]]:
    """Return the blocks of each function of a package's metadata."""
    length, _, path, _, _, _, functions = _META.unpack_from(data)
    offsets = struct.unpack_from(f"<{functions}I", data, _META.size)
    texts = _texts(data, _META.size + 4 * functions)
    package = texts[path]
    if length != len(data):
        raise SourceError("the metadata of a Go package has another length than it says")
    for offset in offsets:
        numbers = _Numbers(data, offset)
        units, name, file = (next(numbers) for _ in range(3))
        blocks = []
        for _ in range(units):
            line, column, end_line, end_column, _ = (next(numbers) for _ in range(5))
            blocks.append(
                SourceBlock(
                    f"{package}.{texts[name]}", texts[file], line, column, end_line, end_column
                )
            )
        yield blocks


def _texts(data: bytes, at: int) -> list[str]:
    """Return a table of texts: their number, then length and bytes of each."""
    numbers = _Numbers(data, at)
    texts = []
    for _ in range(next(numbers)):
        size = next(numbers)
        texts.append(data[numbers.at : numbers.at + size].decode(errors="replace"))
        numbers.at += size
    return texts


class _Numbers:
    """Reads ULEB128 numbers, one after the other; raises IndexError at the end of the data."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self.at = at

    def __iter__(self) -> _Numbers:
        return self

    def __next__(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7


def _symbols(path: Path, wanted: tuple[str, ...]) -> dict[str, int] | None:
    """Return the values of symbols of an ELF file; None if it has no table of them."""
    with path.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            return None
        (offset,) = struct.unpack_from("<Q", header, 40)
        size, count = struct.unpack_from("<HH", header, 58)
        sections = []
        for index in range(count):
            file.seek(offset + index * size)
            sections.append(struct.unpack("<IIQQQQIIQQ", file.read(64)))
        for _, kind, _, _, at, length, link, _, _, _ in sections:
            if kind != 2:  # SHT_SYMTAB
                continue
            file.seek(at)
            table = file.read(length)
            file.seek(sections[link][4])
            names = file.read(sections[link][5])
            found = {}
            for name in wanted:
                # Faster than a look at each of the symbols.
                place = names.find(b"\0" + name.encode() + b"\0") + 1
                entry = struct.pack("<I", place)
                row = table.find(entry) if place else -1
                while row >= 0 and row % 24:
                    row = table.find(entry, row + 1)
                if row >= 0:
                    found[name] = struct.unpack_from("<Q", table, row + 8)[0]
            return found
    return None


def _base(process: int, path: str) -> int:
    """Return what the loader has added to the addresses of a program's file."""
    with Path(f"/proc/{process}/exe").open("rb") as file:
        header = file.read(64)
        offset, size, count = (
            struct.unpack_from("<Q", header, 32)[0],
            *struct.unpack_from("<HH", header, 54),
        )
        lowest: tuple[int, int] | None = None
        for index in range(count):
            file.seek(offset + index * size)
            kind, _, at, address = struct.unpack("<IIQQ", file.read(24))
            if kind == 1 and (lowest is None or address < lowest[0]):
                lowest = address, at
    if lowest is None:
        raise ValueError("it has no segment to load")
    page = os.sysconf("SC_PAGESIZE")
    with Path(f"/proc/{process}/maps").open(encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            words = line.split(maxsplit=5)
            if len(words) == 6 and words[5].rstrip("\n").removesuffix(" (deleted)") == path:
                place, offset = lowest
                if int(words[2], 16) == offset // page * page:
                    return int(words[0].partition("-")[0], 16) - place // page * page
    raise ValueError("its file is not mapped")
