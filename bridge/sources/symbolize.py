# SPDX-License-Identifier: Apache-2.0
"""From PCs back to source: what ``kcov-bridge symbolize`` prints.

For synthetic PCs the output is that of gVisor's ``runsc symbolize``: for each PC a line with it in
hex and a line ``file:line.col,line.col``. For PCs of the guest's kernel the second line is
``function+0xoffset``. `` [module]`` follows for code of a module; ``file:line `` precedes it if the
kernel's debug information is installed. For PCs of native code it is ``file:line.col,line.col
function``: see :mod:`bridge.sources.native.places`.
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
    from bridge.sources.native.debug import Frame
    from bridge.sources.native.places import NativePlaces

__all__ = [
    "BLOCKS_FILE",
    "NATIVE_FILE",
    "KernelPlaces",
    "Symbolizer",
]

BLOCKS_FILE: Final = "blocks.tsv"
"""The name of the block table in a run directory."""
NATIVE_FILE: Final = "native.tsv"
"""The name of the table of native modules in a run directory."""

# Always hex, with or without 0x. int() would also accept a sign and underscores.
_HEX: Final = re.compile(r"(?:0[xX])?[0-9a-fA-F]+")


_MOVED: Final = 5
"""syzkaller's report subtracts this from a PC, to get from a return address to its call."""
_MASKED: Final = 7
"""Bits of a PC that syzkaller's filter clears."""


class KernelPlaces:
    """Symbolizes PCs of the guest's kernel."""

    def __init__(
        self,
        symbols: KernelSymbols,
        blocks: Iterable[PC] = (),
        *,
        lines: Callable[[], Lines | None] = lambda: None,
    ) -> None:
        """Symbolize with a kernel's symbols.

        Args:
            symbols: of the kernel and its modules.
            blocks: starts of the blocks that the run covered.
            lines: returns the kernel's debug information; called when it is first needed.
        """
        self._symbols = symbols
        self._blocks = array("Q", sorted(blocks))
        self._open_lines: Callable[[], Lines | None] | None = lines
        self._lines: Lines | None = None

    def block(self, pc: PC) -> PC:
        """Return the start of the covered block that a PC stands for.

        A consumer may have moved the PC. In this order: a block that starts at the PC, one that
        starts 5 bytes above, the first within 8 bytes if the low 3 bits are 0, the first within 5;
        without any, the PC itself.
        """
        for candidate in (pc, pc + _MOVED):
            if self._next_block(candidate) == candidate:
                return candidate
        following = self._next_block(pc)
        room = _MASKED if pc & _MASKED == 0 else _MOVED
        return following if following is not None and following - pc <= room else pc

    def text(self, pc: PC, prefix: str = "") -> str | None:
        """Return ``[file:line ]function+0xoffset[ [module]]``; None for an unknown PC."""
        block = self.block(pc)
        # A moved PC may lie in the padding before the function.
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
    """Looks up PCs in a block table, in native modules and in the guest's kernel; prints them."""

    def __init__(
        self,
        table: BlockTable,
        *,
        prefix: str = "",
        kernel: KernelPlaces | None = None,
        native: NativePlaces | None = None,
    ) -> None:
        """Look up in these tables; ``prefix`` precedes each printed path and includes its slash."""
        self._table = table
        self._prefix = prefix
        self._kernel = kernel
        self._native = native

    def lookup(self, pc: PC) -> Location | None:
        """Return the location of a PC, or of any other address of its slot; None if unknown."""
        return self._table.lookup(pc)

    def native_function(self, pc: PC) -> Frame | None:
        """Return the innermost function of a native program that a PC belongs to, or None."""
        return self._native.innermost(pc) if self._native is not None else None

    def text(self, pc: PC) -> str | None:
        """Return the printed location of a PC; None for an unknown one."""
        location = self.lookup(pc)
        if location is not None:
            return f"{self._prefix}{location}"
        if self._native is not None and (text := self._native.text(pc, self._prefix)):
            return text
        return self._kernel.text(pc, self._prefix) if self._kernel is not None else None

    def write(self, pc: PC, out: TextIO) -> bool:
        """Print one PC and its location; return False, without output, for an unknown one."""
        text = self.text(pc)
        if text is None:
            return False
        out.write(f"{pc:#x}\n{text}\n")
        return True

    def write_all(self, out: TextIO) -> None:
        """Print all blocks of the table, by file name, then in the order of the text.

        The PCs of system call numbers are not blocks and are left out.
        """
        for pc, location in self._table:
            self._write(pc, location, out)
        for module in self._native.table if self._native is not None else ():
            for index in range(module.count):
                self.write(module.pc(index), out)

    def symbolize(self, lines: Iterable[str], out: TextIO, err: TextIO) -> int:
        """Print the PCs in ``lines``, one a line in hex; ignore blank lines.

        A line without a known PC is reported on ``err``.

        Returns:
            The number of lines that were not printed.
        """
        failed = 0
        # Runs with many processes repeat each PC hundreds of times.
        places: dict[PC, str | None] = {}
        for line in lines:
            text = line.strip()
            if not text:
                continue
            if not _HEX.fullmatch(text):
                print(f"symbolize: {text[:80]!r} is not a hexadecimal number", file=err)
                failed += 1
                continue
            pc = int(text, 16)
            if pc not in places:
                places[pc] = self.text(pc)
            if (place := places[pc]) is not None:
                out.write(f"{pc:#x}\n{place}\n")
            else:
                print(f"symbolize: {pc:#x} is not a PC of this run", file=err)
                failed += 1
        return failed

    def _write(self, pc: PC, location: Location, out: TextIO) -> None:
        out.write(f"{pc:#x}\n{self._prefix}{location}\n")
