# SPDX-License-Identifier: Apache-2.0
"""From PCs back to source: what ``kcov-bridge symbolize`` prints.

For synthetic PCs the output is that of gVisor's ``runsc symbolize``: for each PC a line with it in
hex and a line ``file:line.col,line.col``. For PCs of the guest's kernel the second line is
``function+0xoffset``, with `` [module]`` behind it for those of a module and ``file:line `` before
it where the kernel's debug information is there.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, TextIO

from bridge.sources import PC
from bridge.sources.pcs import BlockTable, Location

if TYPE_CHECKING:
    from bridge.sources.guest_kernel.lines import Lines
    from bridge.sources.guest_kernel.symbols import KernelSymbols

__all__ = [
    "BLOCKS_FILE",
    "KernelPlaces",
    "Symbolizer",
]

BLOCKS_FILE: Final = "blocks.tsv"
"""The name of the block table in a run directory."""

# Always hex, with or without 0x; no sign and no underscore, which int() would take.
_HEX: Final = re.compile(r"(?:0[xX])?[0-9a-fA-F]+")


_MOVED: Final = 5
"""syzkaller's report takes so much from a PC, to get from a return address to its call."""
_MASKED: Final = 7
"""syzkaller's filter drops these bits of a PC."""


class KernelPlaces:
    """Says what PCs of the guest's kernel are."""

    def __init__(
        self,
        symbols: KernelSymbols,
        blocks: Iterable[PC] = (),
        *,
        lines: Callable[[], Lines | None] = lambda: None,
    ) -> None:
        """``blocks`` are the starts of the blocks that the run has covered; ``lines`` gives the
        kernel's debug information and is called when it is first needed."""
        self._symbols = symbols
        self._blocks = array("Q", sorted(blocks))
        self._open_lines: Callable[[], Lines | None] | None = lines
        self._lines: Lines | None = None

    def block(self, pc: PC) -> PC:
        """The covered block that a PC stands for; it may have been moved by a consumer.

        One that begins at the PC, else one that begins 5 bytes on, else, where the low 3 bits
        are 0, the first within 8 bytes, else the first within 5; without any, the PC itself.
        """
        for candidate in (pc, pc + _MOVED):
            if self._next_block(candidate) == candidate:
                return candidate
        following = self._next_block(pc)
        room = _MASKED if pc & _MASKED == 0 else _MOVED
        return following if following is not None and following - pc <= room else pc

    def text(self, pc: PC, prefix: str = "") -> str | None:
        """``[file:line ]function+0xoffset[ [module]]``; None for an unknown PC."""
        block = self.block(pc)
        # A moved PC may lie in the padding before the function, which is no function's.
        for at in (block, pc + _MOVED, pc | _MASKED):
            symbol = self._symbols.lookup(at)
            if symbol is not None:
                break
        else:
            return None
        text = f"{symbol.name}+{at - symbol.start:#x}"
        if symbol.module:
            text = f"{text} [{symbol.module}]"
        if self._open_lines is not None:
            self._lines, self._open_lines = self._open_lines(), None
        place = self._lines.lookup(at) if self._lines is not None else None
        return f"{prefix}{place[0]}:{place[1]} {text}" if place is not None else text

    def _next_block(self, pc: PC) -> PC | None:
        index = bisect_left(self._blocks, pc)
        return self._blocks[index] if index < len(self._blocks) else None


class Symbolizer:
    """Looks up PCs in a block table and in the guest's kernel, and prints them."""

    def __init__(
        self, table: BlockTable, *, prefix: str = "", kernel: KernelPlaces | None = None
    ) -> None:
        """``prefix`` is put before each printed path as it is: give the slash with it."""
        self._table = table
        self._prefix = prefix
        self._kernel = kernel

    def lookup(self, pc: PC) -> Location | None:
        """What a PC, or any other address of its slot, stands for."""
        return self._table.lookup(pc)

    def text(self, pc: PC) -> str | None:
        """The place of a PC as it is printed; None for an unknown one."""
        location = self.lookup(pc)
        if location is not None:
            return f"{self._prefix}{location}"
        return self._kernel.text(pc, self._prefix) if self._kernel is not None else None

    def write(self, pc: PC, out: TextIO) -> bool:
        """Print one PC and its place; prints nothing and returns False for an unknown one."""
        text = self.text(pc)
        if text is None:
            return False
        out.write(f"{pc:#x}\n{text}\n")
        return True

    def write_all(self, out: TextIO) -> None:
        """Print all blocks of the table, by file name and then in the order of the text.

        The PCs of system call numbers are not among them: they are no blocks of any source.
        """
        for pc, location in self._table:
            self._write(pc, location, out)

    def symbolize(self, lines: Iterable[str], out: TextIO, err: TextIO) -> int:
        """Print the PCs that ``lines`` hold, one a line in hex; blank lines are passed over.

        A line that is no PC, or one of no block, is named on ``err``; the others are printed
        all the same. Returns the number of lines that were not printed.
        """
        failed = 0
        # A run of many processes repeats each PC hundreds of times.
        places: dict[PC, str | None] = {}
        for line in lines:
            text = line.strip()
            if not text:
                continue
            if not _HEX.fullmatch(text):
                print(f"symbolize: {text[:80]!r} is no hexadecimal number", file=err)
                failed += 1
                continue
            pc = int(text, 16)
            if pc not in places:
                places[pc] = self.text(pc)
            if (place := places[pc]) is not None:
                out.write(f"{pc:#x}\n{place}\n")
            else:
                print(f"symbolize: {pc:#x} is no PC of this run's blocks", file=err)
                failed += 1
        return failed

    def _write(self, pc: PC, location: Location, out: TextIO) -> None:
        out.write(f"{pc:#x}\n{self._prefix}{location}\n")
