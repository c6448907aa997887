# SPDX-License-Identifier: Apache-2.0
"""The frontier of a campaign: covered blocks beside blocks that were never reached.

For Python targets the edges are those of the bytecode of each function, from line to line and so
from block to block: branches, loops, the way into ``except`` and ``finally``. A function that was
defined and never called is one too. For the guest's kernel they are the direct jumps and calls at
the end of covered blocks, decoded from the kernel's image; what goes through a pointer is not
known, and code that the kernel patches while it runs (static keys, alternatives) may differ.
"""

from __future__ import annotations

import dis
import enum
import io
import lzma
import struct
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Final

from bridge.errors import MissingDependencyError, SourceError
from bridge.results.kernel_export import Block as KernelBlock
from bridge.sources import PC
from bridge.sources.guest_kernel.placement import core_text_sections
from bridge.sources.guest_kernel.symbols import KernelSymbols
from bridge.sources.pcs import BlockTable, FileBlocks
from bridge.sources.python.blocks import decode_source, find_blocks

__all__ = ["Edge", "EdgeKind", "KernelText", "kernel_frontier", "python_frontier"]


class EdgeKind(enum.StrEnum):
    """How one goes from a block to its neighbour."""

    BRANCH = "branch"
    EXCEPTION = "exception"
    CALL = "call"


@dataclass(frozen=True, slots=True)
class Edge:
    """A covered block with a neighbour that was not reached.

    Attributes:
        at: the covered block.
        to: the neighbour.
        symbol: function of the covered block.
        to_symbol: function of the neighbour.
        behind: blocks that were not reached and follow from there without a covered block between,
            the neighbour included; 0 if that is not known.
        others: further covered blocks with the same neighbour.
    """

    at: PC
    to: PC
    kind: EdgeKind
    symbol: str
    to_symbol: str
    behind: int = 0
    others: int = 0


# -- Python


_JUMPS: Final = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)
_NO_NEXT: Final = frozenset(
    {
        "JUMP_FORWARD",
        "JUMP_BACKWARD",
        "JUMP_BACKWARD_NO_INTERRUPT",
        "JUMP_ABSOLUTE",
        "RETURN_VALUE",
        "RETURN_CONST",
        "RAISE_VARARGS",
        "RERAISE",
        "INTERPRETER_EXIT",
    }
)
"""Instructions of all supported Pythons after which the next one does not follow."""

_TEdges = dict[tuple[int, int], EdgeKind]
"""Edges between blocks, by their numbers in the file."""


def python_frontier(
    table: BlockTable,
    covered: Collection[PC],
    sources: Mapping[str, Path],
    problems: list[str],
) -> list[Edge]:
    """Return the frontier in the files of a block table of which something was covered.

    Args:
        table: of the campaign.
        covered: PCs that were reached.
        sources: path of each file that is there, by its name in the table.
        problems: gets what could not be looked at, and why.
    """
    found: list[Edge] = []
    reached: dict[str, set[int]] = {}
    for pc in covered:
        location = table.lookup(pc)
        file = table.file(location.file) if location is not None else None
        if file is not None:
            reached.setdefault(file.name, set()).add(file.index_of(pc))
    for name, numbers in sorted(reached.items()):
        file = table.file(name)
        if file is None or name not in sources:
            problems.append(f"the source of {name} is not here: its frontier is not known")
            continue
        try:
            found += _file_frontier(file, numbers, sources[name])
        except (OSError, SyntaxError, ValueError, RecursionError, SourceError) as error:
            problems.append(f"the frontier of {name} is not known: {error}")
    return found


def _file_frontier(file: FileBlocks, reached: set[int], path: Path) -> Iterator[Edge]:
    text = decode_source(path.read_bytes())
    if find_blocks(text) != file.blocks():
        raise ValueError("the file was changed after the campaign began")
    number_of: list[int] = []
    for number, (first, last) in enumerate(file.line_ranges()):
        number_of += [-1] * (last + 1 - len(number_of))
        number_of[first : last + 1] = [number] * (last + 1 - first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = compile(text, str(path), "exec", dont_inherit=True)
    edges: _TEdges = {}
    symbols: dict[int, str] = {}
    for code in _codes(module):
        _add_edges(code, number_of, edges, symbols)
    following: dict[int, list[int]] = {}
    for at, to in edges:
        following.setdefault(at, []).append(to)
    ways: dict[int, list[tuple[int, EdgeKind]]] = {}
    for (at, to), kind in sorted(edges.items()):
        if at in reached and to not in reached:
            ways.setdefault(to, []).append((at, kind))
    for to, sides in sorted(ways.items()):
        # A branch says more than one of many blocks that may raise.
        at, kind = max(sides, key=lambda side: (side[1] is EdgeKind.BRANCH, side[0]))
        yield Edge(
            file.pc(at),
            file.pc(to),
            kind,
            symbols.get(at, ""),
            symbols.get(to, ""),
            _behind(to, following, reached),
            len(sides) - 1,
        )


def _behind(start: int, following: Mapping[int, list[int]], reached: set[int]) -> int:
    seen = {start}
    todo = [start]
    while todo:
        for each in following.get(todo.pop(), ()):
            if each not in seen and each not in reached:
                seen.add(each)
                todo.append(each)
    return len(seen)


def _codes(code: CodeType) -> Iterator[CodeType]:
    todo = [code]
    while todo:
        yield (code := todo.pop())
        todo += [each for each in code.co_consts if isinstance(each, CodeType)]


def _add_edges(
    code: CodeType, number_of: list[int], edges: _TEdges, symbols: dict[int, str]
) -> None:
    """Add the edges between blocks of a function, and the function of each block."""

    def block(line: int | None) -> int:
        return number_of[line] if line is not None and 0 < line < len(number_of) else -1

    bytecode = dis.Bytecode(code)
    instructions = list(bytecode)
    index_of = {each.offset: index for index, each in enumerate(instructions)}
    lines = [each.positions.lineno if each.positions else None for each in instructions]
    blocks = [block(line) for line in lines]
    module = code.co_name == "<module>"
    # The first instructions are of the line of the ``def``, which the module ran.
    entry = 0
    while not module and entry < len(lines) and lines[entry] in (None, code.co_firstlineno):
        entry += 1
    if module or not code.co_name.startswith("<"):
        # Functions come after those around them; lambdas and the like belong to their statement.
        symbols.update(
            (number, code.co_qualname.replace(".<locals>", ""))
            for number in blocks[entry:]
            if number >= 0
        )
    after: list[list[tuple[int, EdgeKind]]] = []
    for index, each in enumerate(instructions):
        to: list[tuple[int, EdgeKind]] = []
        if each.opname not in _NO_NEXT and index + 1 < len(instructions):
            to.append((index + 1, EdgeKind.BRANCH))
        if each.opcode in _JUMPS and each.argval in index_of:
            to.append((index_of[each.argval], EdgeKind.BRANCH))
        after.append(to)
    # The way into a handler; dis has had this list since 3.11, without a word in its documentation.
    for guarded in getattr(bytecode, "exception_entries", ()):
        target = index_of.get(guarded.target)
        if target is not None:
            for index, each in enumerate(instructions):
                if guarded.start <= each.offset < guarded.end:
                    after[index].append((target, EdgeKind.EXCEPTION))
    for index, number in enumerate(blocks):
        if number < 0:
            continue
        # Instructions without a line belong to no block: the way goes through them.
        todo = list(after[index])
        seen = {place for place, _ in todo}
        while todo:
            place, kind = todo.pop()
            if index < entry <= place:
                kind = EdgeKind.CALL
            if blocks[place] < 0:
                more = [
                    (further, EdgeKind.EXCEPTION if kind is EdgeKind.EXCEPTION else how)
                    for further, how in after[place]
                    if further not in seen
                ]
                seen.update(further for further, _ in more)
                todo += more
            elif blocks[place] != number:
                pair = number, blocks[place]
                if edges.get(pair) is not EdgeKind.BRANCH:
                    edges[pair] = kind


# -- The guest's kernel


class KernelText:
    """The code of a kernel, from its image, an ELF file that need not have symbols; and of modules.

    Raises:
        MissingDependencyError: pyelftools is not installed.
        SourceError: the file cannot be read, or is no such image.
    """

    def __init__(self, vmlinux: Path) -> None:
        try:
            from elftools.common.exceptions import ELFError
            from elftools.elf.elffile import ELFFile
        except ImportError as error:
            raise _missing("pyelftools") from error
        self._elf_error: type[Exception] = ELFError
        self._texts: list[tuple[PC, bytes]] = []
        self._addresses: dict[str, PC] = {}
        try:
            with vmlinux.open("rb") as file:
                for section in ELFFile(file).iter_sections():
                    if section["sh_flags"] & 4 and section["sh_type"] == "SHT_PROGBITS":
                        self._texts.append((section["sh_addr"], section.data()))
        except OSError as error:
            raise SourceError(f"cannot read {vmlinux}: {error.strerror}") from error
        except (ELFError, ValueError) as error:
            raise SourceError(f"{vmlinux} is no image of a kernel", evidence=str(error)) from error

    def add_module(self, path: Path, base: PC, symbols: KernelSymbols) -> None:
        """Add a module's code as the kernel links it: at ``base``, with the targets of its calls.

        Args:
            path: the module's file, ``.ko`` or ``.ko.xz``.
            symbols: of the kernel, for calls out of the module.

        Raises:
            SourceError: the file cannot be read, or is not a module.
        """
        offsets = core_text_sections(path)
        try:
            data = path.read_bytes()
            if path.suffix == ".xz":
                data = lzma.decompress(data)
            self._texts += _linked(io.BytesIO(data), base, offsets, self._address_of(symbols))
        except (OSError, lzma.LZMAError, self._elf_error, ValueError, struct.error) as error:
            raise SourceError(f"cannot read the module {path.name}", evidence=str(error)) from error

    def _address_of(self, symbols: KernelSymbols) -> Mapping[str, PC]:
        if not self._addresses:
            for symbol in symbols:
                self._addresses.setdefault(symbol.name, symbol.start)
        return self._addresses

    def read(self, start: PC, size: int) -> bytes:
        """Return the code at an address; b"" if it is not here."""
        for address, data in self._texts:
            if address <= start and start + size <= address + len(data):
                return data[start - address : start - address + size]
        return b""


_PC_RELATIVE: Final = (2, 4)
"""R_X86_64_PC32 and R_X86_64_PLT32."""
_NOWHERE: Final = 0xFFFF_FFFF_8000_0000
"""Where a call goes whose target is not known: no function is there."""


def _linked(
    file: io.BytesIO, base: PC, offsets: Mapping[str, int], addresses: Mapping[str, PC]
) -> list[tuple[PC, bytes]]:
    """Return address and code of each section of a module's core text."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.relocation import RelocationSection

    elf = ELFFile(file)
    sections = list(elf.iter_sections())
    code = {
        number: bytearray(section.data())
        for number, section in enumerate(sections)
        if section.name in offsets
    }
    places = {number: base + offsets[sections[number].name] for number in code}
    for section in sections:
        if not isinstance(section, RelocationSection) or section["sh_info"] not in code:
            continue
        target = section["sh_info"]
        names: Any = elf.get_section(section["sh_link"])
        for each in section.iter_relocations():
            if each["r_info_type"] not in _PC_RELATIVE:
                continue
            symbol = names.get_symbol(each["r_info_sym"])
            index = symbol["st_shndx"]
            if index in places:
                to = places[index] + symbol["st_value"]
            elif index == "SHN_UNDEF":
                to = addresses.get(symbol.name, _NOWHERE)
            else:
                # Data, which no call goes to.
                continue
            at = each["r_offset"]
            distance = to + each["r_addend"] - (places[target] + at)
            if -(1 << 31) <= distance < 1 << 31:
                struct.pack_into("<i", code[target], at, distance)
    return [(places[number], bytes(data)) for number, data in code.items()]


def kernel_frontier(
    blocks: Iterable[KernelBlock],
    text: KernelText,
    symbols: KernelSymbols,
    recorded: Callable[[PC], bool] = lambda pc: True,
) -> list[Edge]:
    """Return the frontier of the guest's kernel.

    Args:
        blocks: those that were covered; they may overlap.
        text: the kernel's code.
        symbols: of the kernel.
        recorded: whether code at an address is recorded at all.

    Raises:
        MissingDependencyError: capstone is not installed.
    """
    try:
        import capstone
        from capstone import x86
    except ImportError as error:
        raise _missing("capstone") from error
    covered = _Intervals(blocks)
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    calls, jumps = x86.X86_GRP_CALL, x86.X86_GRP_JUMP
    ways: dict[PC, list[tuple[PC, EdgeKind]]] = {}
    for start, size in covered.blocks:
        for instruction in decoder.disasm(text.read(start, size), start):
            groups = set(instruction.groups)
            if not groups & {calls, jumps}:
                continue
            operand = instruction.operands[0] if instruction.operands else None
            end = instruction.address + instruction.size
            sides: list[tuple[PC, bool]] = []
            if operand is not None and operand.type == x86.X86_OP_IMM:
                sides.append((operand.imm & (1 << 64) - 1, calls in groups))
            if jumps in groups and instruction.id != x86.X86_INS_JMP:
                sides.append((end, False))
            for to, call in sides:
                if not covered.has(to) and recorded(to):
                    kind = EdgeKind.CALL if call else EdgeKind.BRANCH
                    ways.setdefault(to, []).append((start, kind))
    found = []
    for to, sides_to in sorted(ways.items()):
        symbol = symbols.lookup(to)
        if symbol is None:
            continue
        at, kind = sides_to[0]
        own = symbols.lookup(at)
        name = own.name if own is not None else ""
        others = len({each for each, _ in sides_to}) - 1
        found.append(Edge(at, to, kind, name, symbol.name, 0, others))
    return found


class _Intervals:
    """The code of blocks."""

    def __init__(self, blocks: Iterable[KernelBlock]) -> None:
        self.blocks = sorted({(block.start, block.size) for block in blocks})
        self._starts = array("Q")
        self._ends = array("Q")
        for start, size in self.blocks:
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], start + size)
            else:
                self._starts.append(start)
                self._ends.append(start + size)

    def has(self, pc: PC) -> bool:
        index = bisect_right(self._starts, pc) - 1
        return index >= 0 and pc < self._ends[index]


def _missing(name: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"the frontier of the guest's kernel needs {name}, which is not installed",
        hint="pip install 'kcov-bridge[fuzz]'",
    )
