# SPDX-License-Identifier: Apache-2.0
"""The synthetic PC space, and the table from PCs to blocks.

**The space.** Consumers of kcov check ranges, so synthetic PCs lie where no code of a kernel is:
at the top of the x86-64 module area, which modules fill from the bottom. It is cut into slots of
16 bytes, one for each block; a block's PC is the middle of its slot, and every address of the slot
stands for the block, because consumers move PCs a little: syzkaller's filter drops the low 3 bits
and its report subtracts up to 5. The top 32 bits are the same for all, so that a PC is still unique
when a consumer keeps the low half only.

**Layout.** The first 4096 slots stand for system call numbers. Each source file has an
extent of whole chunks (16 slots) that begins at a hash of the file's name, which is relative to the
directory of the top-level package and the same on every machine; within it the blocks lie in the
order of the text. If two files would overlap, the later name moves up to the next free chunks. So
a PC depends on the file's name and text alone, except for these rare collisions, and the same set
of files always gets the same PCs.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from bridge.errors import SourceError
from bridge.sources import PC
from bridge.sources.python.blocks import Block, find_blocks

__all__ = [
    "PC_BASE",
    "PC_END",
    "SLOT_BYTES",
    "SYSCALL_FILE",
    "SYSCALL_SLOTS",
    "BlockTable",
    "FileBlocks",
    "Location",
    "syscall_pc",
]

PC_BASE: Final = 0xFFFF_FFFF_F000_0000
"""The first address of the synthetic space."""
PC_END: Final = 0xFFFF_FFFF_FF00_0000
"""The end of the synthetic space, exclusive: MODULES_END of x86-64 Linux."""
SLOT_BYTES: Final = 16
"""Bytes of address space for one block."""
SYSCALL_SLOTS: Final = 4096
"""Slots kept at the start of the space for system call numbers 0 to 4095."""
SYSCALL_FILE: Final = "syscall/x86_64"
"""The file name of system call numbers when they are symbolized; the number is the line."""

_PC_IN_SLOT: Final = 8
_CHUNK_SLOTS: Final = 16
_CHUNKS: Final = (PC_END - PC_BASE) // SLOT_BYTES // _CHUNK_SLOTS
_FIRST_CHUNK: Final = SYSCALL_SLOTS // _CHUNK_SLOTS

_MAGIC: Final = "kcov-bridge-blocks"
_VERSION: Final = 1


def syscall_pc(nr: int) -> PC | None:
    """Return the PC of system call number ``nr``; None outside 0 to 4095.

    It is symbolized as ``syscall/x86_64:NR.1,NR.1``.
    """
    if not 0 <= nr < SYSCALL_SLOTS:
        return None
    return PC_BASE + nr * SLOT_BYTES + _PC_IN_SLOT


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a source; prints as ``file:line.col,line.col``, as Go's coverage does."""

    file: str
    block: Block

    def __str__(self) -> str:
        return f"{self.file}:{self.block}"


class FileBlocks:
    """The blocks of one file and their PCs."""

    __slots__ = ("_coordinates", "_count", "_text", "first_pc", "name")

    def __init__(self, name: str, first_pc: PC, coordinates: array[int] | str) -> None:
        """Take four numbers for each block as ``coordinates``, or their text in a saved table."""
        self.name = name
        self.first_pc = first_pc
        self._coordinates: array[int] | None = None
        self._text = ""
        if isinstance(coordinates, str):
            # Parsed on first use, because a table of 10,000 files may be loaded for a few PCs.
            self._text = coordinates
            self._count = coordinates.count(" ") + 1 if coordinates else 0
        else:
            self._coordinates = coordinates
            self._count = len(coordinates) // 4

    def __len__(self) -> int:
        return self._count

    def pc(self, index: int) -> PC:
        """Return the PC of block number ``index``; raises IndexError."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self.first_pc + index * SLOT_BYTES

    def index_of(self, pc: PC) -> int:
        """Return the number of the block that an address of its slot stands for.

        The address is one of the file's; it is not checked.
        """
        return (pc - (self.first_pc - _PC_IN_SLOT)) // SLOT_BYTES

    def block(self, index: int) -> Block:
        """Return block number ``index`` of the file; raises IndexError."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        numbers = self._numbers()
        return Block(*numbers[4 * index : 4 * index + 4])

    def blocks(self) -> list[Block]:
        """All blocks, in the order of the text."""
        numbers = self._numbers()
        return [Block(*numbers[at : at + 4]) for at in range(0, len(numbers), 4)]

    def line_pc(self, line: int) -> PC | None:
        """Return the PC of the block that contains a line, or None.

        For many lines of a file use :meth:`line_pcs`.
        """
        numbers = self._numbers()
        index = bisect_right(range(self._count), line, key=lambda at: numbers[4 * at]) - 1
        if index < 0 or line > numbers[4 * index + 2]:
            return None
        return self.pc(index)

    def line_ranges(self) -> list[tuple[int, int]]:
        """Return the first and the last line of each block, in the order of the text."""
        numbers = self._numbers()
        return list(zip(numbers[::4], numbers[2::4], strict=True))

    def line_pcs(self) -> list[PC]:
        """Return the PC of each line, by line number; 0 for a line without a block."""
        numbers = self._numbers()
        pcs = [0] * (numbers[-2] + 1 if numbers else 1)
        for index in range(self._count):
            pc = self.first_pc + index * SLOT_BYTES
            start, end = numbers[4 * index], numbers[4 * index + 2]
            pcs[start : end + 1] = [pc] * (end + 1 - start)
        return pcs

    def coordinates_text(self) -> str:
        """Return the blocks in the saved form: ``line.col,line.col``, separated by blanks."""
        return self._text or " ".join(map(str, self.blocks()))

    def _numbers(self) -> array[int]:
        if self._coordinates is None:
            text = self._text.replace(",", ".").replace(" ", ".")
            try:
                self._coordinates = array("I", map(int, text.split("."))) if text else array("I")
            except (ValueError, OverflowError) as error:
                raise self._damaged(str(error)) from error
            if len(self._coordinates) != 4 * self._count:
                raise self._damaged("not four numbers for each block")
        return self._coordinates

    def _damaged(self, evidence: str) -> SourceError:
        return SourceError(f"the blocks of {self.name} are damaged", evidence=evidence)


class BlockTable:
    """All blocks of a set of source files: PC to block, block to PC, line to PC.

    It takes about 16 bytes a block and 300 a file. Adding a file is not safe while other threads
    read.
    """

    def __init__(self) -> None:
        self._files: dict[str, FileBlocks] = {}
        self._chunks: dict[int, FileBlocks] = {}
        self._blocks = 0

    @classmethod
    def from_sources(
        cls,
        sources: Mapping[str, str | bytes],
        *,
        on_error: Callable[[str, SourceError], None] | None = None,
    ) -> BlockTable:
        """Return the table of some files.

        Args:
            sources: source text by package-relative name (``pkg/mod.py``).
            on_error: called with name and error of each file that cannot be parsed, which is then
                left out; None to raise the error.

        Raises:
            SourceError: a file cannot be parsed.
        """
        table = cls()
        for name in sorted(sources):
            try:
                blocks = find_blocks(sources[name])
            except SourceError as error:
                if on_error is None:
                    raise
                on_error(name, error)
            else:
                table._place(name, blocks)
        return table

    def add(self, name: str, source: str | bytes) -> FileBlocks:
        """Add a file and assign PCs to its blocks.

        Raises:
            SourceError: the table has the name, the source cannot be parsed, or the space is full.
        """
        return self._place(name, find_blocks(source))

    def __len__(self) -> int:
        """Return the number of blocks, without system call numbers."""
        return self._blocks

    def __iter__(self) -> Iterator[tuple[PC, Location]]:
        """Iterate over all blocks with their PCs, by file name, then in the order of the text."""
        for name in sorted(self._files):
            file = self._files[name]
            for index, block in enumerate(file.blocks()):
                yield file.first_pc + index * SLOT_BYTES, Location(name, block)

    @property
    def files(self) -> list[str]:
        """The names of the files, sorted."""
        return sorted(self._files)

    def file(self, name: str) -> FileBlocks | None:
        """Return a file by its name, or None."""
        return self._files.get(name)

    def lookup(self, pc: PC) -> Location | None:
        """Return the location of a PC, or of any other address of its slot; None if unknown."""
        if not PC_BASE <= pc < PC_END:
            return None
        slot = (pc - PC_BASE) // SLOT_BYTES
        if slot < SYSCALL_SLOTS:
            return Location(SYSCALL_FILE, Block(slot, 1, slot, 1))
        file = self._chunks.get(slot // _CHUNK_SLOTS)
        if file is None:
            return None
        index = file.index_of(pc)
        return Location(file.name, file.block(index)) if index < len(file) else None

    def line_pc(self, name: str, line: int) -> PC | None:
        """Return the PC of the block that contains a line of a file, or None."""
        file = self._files.get(name)
        return file.line_pc(line) if file is not None else None

    def save(self, path: Path) -> None:
        """Write the table as UTF-8 text, one line a file, fields separated by a tab.

        The first line is ``kcov-bridge-blocks`` and the version of the format, 1. Each other line
        has a file's name (``%``, tab and line breaks as %-escapes), the PC of its first block in
        hex, and its blocks in the order of the text as ``line.col,line.col``, separated by a
        blank; block number i has the PC of the first one plus 16 i. Files are sorted by name.

        Raises:
            SourceError: the file cannot be written.
        """
        try:
            with path.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as out:
                out.write(f"{_MAGIC}\t{_VERSION}\n")
                for name in sorted(self._files):
                    file = self._files[name]
                    out.write(f"{_escape(name)}\t{file.first_pc:#x}\t{file.coordinates_text()}\n")
        except OSError as error:
            raise SourceError(f"cannot write the block table {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> BlockTable:
        """Read a table that :meth:`save` wrote.

        The numbers of a block are checked when it is first used.

        Raises:
            SourceError: the file is missing, damaged, or of another version.
        """
        try:
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise SourceError(f"cannot read the block table {path}: {error.strerror}") from error
        lines = text.split("\n")
        magic, _, version = lines[0].partition("\t")
        if magic != _MAGIC:
            raise SourceError(f"{path} is not a block table", evidence=lines[0][:80])
        if version != str(_VERSION):
            raise SourceError(
                f"{path} is a block table of version {version[:20]}, this is version {_VERSION}",
                hint="another version made the run: symbolize with that kcov-bridge",
            )
        if lines.pop() != "":
            raise SourceError(f"{path} is truncated", evidence=text[-80:])
        table = cls()
        for line in lines[1:]:
            try:
                name, first, coordinates = line.split("\t")
                file = FileBlocks(
                    unquote(name, errors="surrogateescape"), int(first, 16), coordinates
                )
                table._enter(file, table._chunk_of(file))
            except ValueError as error:
                raise SourceError(f"{path} is damaged", evidence=line[:80]) from error
        return table

    def _place(self, name: str, blocks: list[Block]) -> FileBlocks:
        if name in self._files:
            raise SourceError(f"{name} is already in the block table")
        coordinates = array(
            "I",
            (
                number
                for block in blocks
                for number in (block.start_line, block.start_col, block.end_line, block.end_col)
            ),
        )
        chunk = self._find_room(name, len(blocks)) if blocks else _FIRST_CHUNK
        file = FileBlocks(name, _chunk_pc(chunk), coordinates)
        self._enter(file, chunk)
        return file

    def _enter(self, file: FileBlocks, chunk: int) -> None:
        self._files[file.name] = file
        self._blocks += len(file)
        for taken in range(chunk, chunk + _chunks_for(len(file))):
            self._chunks[taken] = file

    def _chunk_of(self, file: FileBlocks) -> int:
        """Return the first chunk of a file of a saved table; raises ValueError if impossible."""
        chunk, rest = divmod(file.first_pc - _chunk_pc(0), _CHUNK_SLOTS * SLOT_BYTES)
        end = chunk + _chunks_for(len(file))
        if rest or chunk < _FIRST_CHUNK or end > _CHUNKS or file.name in self._files:
            raise ValueError(file.first_pc)
        if any(taken in self._chunks for taken in range(chunk, end)):
            raise ValueError(file.first_pc)
        return chunk

    def _find_room(self, name: str, blocks: int) -> int:
        """Return the first chunk for a file: at its hash, or the next free one above."""
        needed = _chunks_for(blocks)
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        home = _FIRST_CHUNK + int.from_bytes(digest[:8], "big") % (_CHUNKS - _FIRST_CHUNK)
        for start, end in ((home, _CHUNKS), (_FIRST_CHUNK, min(home + needed, _CHUNKS))):
            chunk = start
            while chunk + needed <= end:
                taken = next((c for c in range(chunk, chunk + needed) if c in self._chunks), None)
                if taken is None:
                    return chunk
                other = self._chunks[taken]
                chunk = self._chunk_index(other) + _chunks_for(len(other))
        raise SourceError(
            f"no room for the {blocks} blocks of {name} in the synthetic PC range",
            hint=f"{self._blocks} blocks exist already: cover fewer packages",
        )

    @staticmethod
    def _chunk_index(file: FileBlocks) -> int:
        return (file.first_pc - PC_BASE) // SLOT_BYTES // _CHUNK_SLOTS


def _chunk_pc(chunk: int) -> PC:
    """Return the PC of a chunk's first slot."""
    return PC_BASE + chunk * _CHUNK_SLOTS * SLOT_BYTES + _PC_IN_SLOT


def _chunks_for(blocks: int) -> int:
    return -(-blocks // _CHUNK_SLOTS)


def _escape(name: str) -> str:
    """Return a file name as a field of the saved table."""
    if not any(c in name for c in "%\t\n\r"):
        return name
    return "".join(quote(c) if c in "%\t\n\r" else c for c in name)
