# SPDX-License-Identifier: Apache-2.0
"""Executables and shared objects with their blocks, and the PCs of these.

Native blocks have synthetic PCs too, in a range of their own below those of Python: slots of 16
bytes, as in :mod:`bridge.sources.pcs`. The blocks of a module have consecutive slots in the
compiler's order, from a place on that is a hash of the module's build id. So a PC means the same on
each run of the same build, wherever the loader puts the module, and on every machine. If two
modules would overlap, the one that is loaded later moves up.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote, unquote

from bridge.errors import SourceError
from bridge.sources import PC
from bridge.sources.pcs import PC_BASE, SLOT_BYTES
from bridge.util.files import write_atomically

__all__ = [
    "NATIVE_BASE",
    "NATIVE_END",
    "ModuleIdentity",
    "ModuleTable",
    "NativeModule",
    "SourceBlock",
    "module_key",
]

ModuleIdentity: TypeAlias = tuple[str, PC, int]
"""A module's key, the PC of its first block, and the number of its blocks."""

NATIVE_BASE: Final = 0xFFFF_FFFF_E000_0000
"""The first address of native blocks: the end of those of kernel modules."""
NATIVE_END: Final = PC_BASE
"""The end of the addresses of native blocks, exclusive."""

_PC_IN_SLOT: Final = 8
_CHUNK: Final = 16
_CHUNKS: Final = (NATIVE_END - NATIVE_BASE) // SLOT_BYTES // _CHUNK
_MAGIC: Final = "kcov-bridge-native"
_VERSION: Final = 1


def module_key(build_id: bytes, path: str) -> str:
    """Return what a module's PCs are derived from.

    That is its build id; if it has none, a digest of its file, or its name if the file is gone.
    """
    if build_id:
        return build_id.hex()
    try:
        with Path(path).open("rb") as file:
            return "file-" + hashlib.file_digest(file, "sha256").hexdigest()[:40]
    except (OSError, ValueError):
        return "name-" + Path(path).name


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """A block whose place in the source is known without debug information: of a Go program."""

    function: str
    """With the path of its package."""
    file: str
    line: int
    column: int
    end_line: int
    end_column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}.{self.column},{self.end_line}.{self.end_column}"


@dataclass
class NativeModule:
    """A module with its blocks, in the order of their PCs."""

    key: str
    path: str
    first_pc: PC
    count: int
    after_call: bool = False
    """Whether places are those behind the call of a callback, not those where blocks begin."""
    places: array[int] = field(default_factory=lambda: array("I"))
    """Where each block lies in the module's file, as its addresses go; 0 where it is not known."""
    blocks: Sequence[SourceBlock] = ()
    """Where each block is in the source, for a Go program; it has no places."""
    covered: bytes = b""
    """A byte for each block: 1 if it was covered."""

    @property
    def name(self) -> str:
        """Its file's name, without the directory."""
        return Path(self.path).name or "?"

    @property
    def identity(self) -> ModuleIdentity:
        """Equal to that of a module of another run if it has the same blocks at the same PCs."""
        return self.key, self.first_pc, self.count

    def is_same(self, other: NativeModule) -> bool:
        """Return whether a module of another run has the same blocks at the same PCs."""
        return self.identity == other.identity

    def add(self, other: NativeModule) -> None:
        """Add what another run knows of the same module."""
        either = int.from_bytes(self.covered.ljust(self.count, b"\0"), "big")
        either |= int.from_bytes(other.covered.ljust(self.count, b"\0"), "big")
        self.covered = either.to_bytes(self.count, "big")
        if not all(self.places) and len(self.places) == len(other.places):
            pairs = zip(self.places, other.places, strict=True)
            self.places = array("I", (mine or theirs for mine, theirs in pairs))
        elif not self.places:
            self.places = other.places

    def pc(self, index: int) -> PC:
        """Return the PC of a block."""
        return self.first_pc + index * SLOT_BYTES

    def address(self, index: int) -> int:
        """Return an address inside a block, as in the module's file; 0 if it is not known."""
        place = self.places[index] if index < len(self.places) else 0
        return place - 1 if place and self.after_call else place


class ModuleTable:
    """All native modules of a run, by PC. Adding one is not safe while other threads read."""

    def __init__(self) -> None:
        self._modules: list[NativeModule] = []
        # Sorted by first PC.
        self._starts: list[PC] = []
        self._sorted: list[NativeModule] = []

    def __iter__(self) -> Iterator[NativeModule]:
        """Iterate over the modules in the order in which they were loaded."""
        return iter(self._modules)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return sum(module.count for module in self._modules)

    def add(self, key: str, path: str, count: int, *, after_call: bool = False) -> NativeModule:
        """Add a module and assign PCs to its blocks.

        Raises:
            SourceError: the space is full.
        """
        module = NativeModule(
            key, path, self._room(key, -(-count // _CHUNK)), count, after_call=after_call
        )
        self._enter(module)
        return module

    def merge(self, other: ModuleTable) -> list[NativeModule]:
        """Add what another guest covered: places that it knows, and blocks that ran.

        Returns:
            Modules of the other table that cannot be added: their PCs are taken. That is so only
            if several modules wanted one place, and were loaded in another order.
        """
        left = []
        for module in other:
            mine = next((each for each in self._modules if each.is_same(module)), None)
            if mine is not None:
                mine.add(module)
            elif self._is_free(module):
                self._enter(module)
            else:
                left.append(module)
        return left

    def _is_free(self, module: NativeModule) -> bool:
        return all(
            module.pc(module.count) <= each.first_pc or each.pc(each.count) <= module.first_pc
            for each in self._modules
        )

    def lookup(self, pc: PC) -> tuple[NativeModule, int] | None:
        """Return module and number of the block that an address of its slot stands for."""
        at = bisect_right(self._starts, pc + _PC_IN_SLOT) - 1
        if at < 0 or not NATIVE_BASE <= pc < NATIVE_END:
            return None
        module = self._sorted[at]
        index = (pc - (module.first_pc - _PC_IN_SLOT)) // SLOT_BYTES
        return (module, index) if 0 <= index < module.count else None

    def save(self, path: Path) -> None:
        """Write the table as text, one line a module, fields separated by a tab.

        The first line is ``kcov-bridge-native`` and the version of the format, 1. Each other line
        has the module's key and path, the PC of its first block in hex, the number of blocks,
        ``after`` if places lie behind calls and else ``at``, the place of each block in hex,
        separated by blanks, and a digit for each block: 1 if it was covered. For a Go program it
        is ``source``, and for each block function, file and ``line.column,line.column``, separated
        by ``:``; blanks and ``:`` are %-escapes.

        Raises:
            InfrastructureError: the file cannot be written.
        """
        lines = [f"{_MAGIC}\t{_VERSION}\n"]
        for module in self._modules:
            places = " ".join(f"{place:x}" for place in module.places)
            covered = module.covered.translate(_DIGITS).decode("ascii")
            after = "after" if module.after_call else "at"
            if module.blocks:
                after, places = "source", " ".join(map(_block_text, module.blocks))
            name = quote(module.path, safe="/ ", errors="surrogateescape")
            lines.append(
                f"{module.key}\t{name}\t{module.first_pc:#x}\t{module.count}\t{after}\t{places}"
                f"\t{covered}\n"
            )
        write_atomically(path, "".join(lines))

    @classmethod
    def load(cls, path: Path) -> ModuleTable:
        """Read a table that :meth:`save` wrote.

        Raises:
            SourceError: the file is missing, damaged, or of another version.
        """
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeError) as error:
            raise SourceError(f"cannot read {path}: {error}") from error
        if lines[0] != f"{_MAGIC}\t{_VERSION}" or lines.pop() != "":
            raise SourceError(
                f"{path} is damaged, or was written by another version", evidence=lines[0][:80]
            )
        table = cls()
        for line in lines[1:]:
            try:
                key, name, first, count, after, places, covered = line.split("\t")
                module = NativeModule(
                    key,
                    unquote(name, errors="surrogateescape"),
                    int(first, 16),
                    int(count),
                    after == "after",
                    array("I", (int(place, 16) for place in places.split() if after != "source")),
                    [_block(text) for text in places.split() if after == "source"],
                    bytes(digit == "1" for digit in covered),
                )
                if max(len(module.places), len(module.blocks), len(module.covered)) > module.count:
                    raise ValueError("more than its blocks")
            except (ValueError, OverflowError) as error:
                raise SourceError(f"{path} is damaged", evidence=line[:80]) from error
            table._enter(module)
        return table

    def _enter(self, module: NativeModule) -> None:
        at = bisect_right(self._starts, module.first_pc)
        self._starts.insert(at, module.first_pc)
        self._sorted.insert(at, module)
        self._modules.append(module)

    def _room(self, key: str, wanted: int) -> PC:
        """Return the first PC of free chunks, from the key's own place on, then from the start."""
        wanted = max(wanted, 1)
        taken = [
            (
                (module.first_pc - NATIVE_BASE) // SLOT_BYTES // _CHUNK,
                max(-(-module.count // _CHUNK), 1),
            )
            for module in self._sorted
        ]
        ideal = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % _CHUNKS
        for start in (ideal, 0):
            chunk = start
            for first, size in taken:
                if first + size <= chunk:
                    continue
                if first >= chunk + wanted:
                    break
                chunk = first + size
            if chunk + wanted <= _CHUNKS:
                return NATIVE_BASE + chunk * _CHUNK * SLOT_BYTES + _PC_IN_SLOT
        raise SourceError(f"no room for {wanted * _CHUNK} native blocks in the synthetic PC range")


def _block_text(block: SourceBlock) -> str:
    names = ":".join(quote(name, errors="surrogateescape") for name in (block.function, block.file))
    return f"{names}:{block.line}.{block.column},{block.end_line}.{block.end_column}"


def _block(text: str) -> SourceBlock:
    function, file, place = text.split(":")
    line, column, end_line, end_column = map(int, place.replace(",", ".").split("."))
    return SourceBlock(unquote(function), unquote(file), line, column, end_line, end_column)


_DIGITS: Final = bytes([ord("0")]) + bytes([ord("1")]) * 255
