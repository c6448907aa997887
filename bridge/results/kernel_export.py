# SPDX-License-Identifier: Apache-2.0
"""Coverage of the guest's kernel for other programs: what ``kcov-bridge export`` writes."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge.errors import BridgeError, SourceError, UsageError
from bridge.results import summary
from bridge.sources import PC
from bridge.sources.guest_kernel import BLOCKS_FILE, SYMBOLS_FILE
from bridge.sources.guest_kernel.filters import KERNEL
from bridge.sources.guest_kernel.lines import Lines, SourceUnit, find_modules, find_vmlinux
from bridge.sources.guest_kernel.placement import MODULES_END
from bridge.sources.guest_kernel.symbols import KernelSymbols

__all__ = [
    "FORMATS",
    "Block",
    "drcov",
    "is_kernel_pc",
    "lcov",
    "lines_of",
    "rawcover",
    "read_blocks",
]

_PCS_FILE: Final = "pcs.txt"
_KERNEL_BASE: Final = 0xFFFF_FFFF_8000_0000
_BLOCK_MAX: Final = 0xFFFF
"""drcov has 16 bits for the size of a block."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """A basic block of the kernel that was covered."""

    start: PC
    size: int


def is_kernel_pc(pc: PC) -> bool:
    """Whether a PC is one of the guest's kernel or its modules, not a synthetic one."""
    return _KERNEL_BASE <= pc < MODULES_END


def read_blocks(path: Path) -> list[Block]:
    """Read the blocks of a run, sorted, each once; with the largest of several sizes.

    Raises :class:`bridge.errors.UsageError` where there is no such file and
    :class:`bridge.errors.SourceError` where it is damaged.
    """
    sizes: dict[PC, int] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            start, size = line.split("\t")
            pc, length = int(start, 16), int(size)
            if not is_kernel_pc(pc) or length <= 0:
                raise ValueError("no block of a kernel")
        except ValueError as error:
            raise SourceError(f"{path} is damaged in line {number}", evidence=line[:80]) from error
        sizes[pc] = max(length, sizes.get(pc, 0))
    return [Block(pc, sizes[pc]) for pc in sorted(sizes)]


def rawcover(run: Path) -> bytes:
    """Render a run's kernel PCs, sorted, each once: ``0x…``, one a line, as syzkaller does."""
    path = run / _PCS_FILE
    pcs: set[PC] = set()
    others = 0
    for number, line in enumerate(_lines(path), 1):
        try:
            pc = int(line, 16)
        except ValueError as error:
            raise SourceError(f"{path} is damaged in line {number}", evidence=line[:80]) from error
        if is_kernel_pc(pc):
            pcs.add(pc)
        else:
            others += 1
    if not pcs:
        raise UsageError(
            f"{path} has no PC of the guest's kernel"
            + (f", only {others} of other sources" if others else ": it is empty"),
            hint=_HINT,
        )
    return "".join(f"{pc:#x}\n" for pc in sorted(pcs)).encode()


def drcov(symbols: KernelSymbols, blocks: list[Block]) -> bytes:
    """The blocks in DynamoRIO's drcov format, version 2; an entry for the kernel and one for each
    module that has blocks. Blocks of no known text are left out, with a warning."""
    extents: dict[str, tuple[PC, PC]] = {}
    for start, end, module in symbols.texts(all_modules=True):
        low, high = extents.get(module, (start, end))
        extents[module] = min(low, start), max(high, end)
    texts = sorted((low, high, module) for module, (low, high) in extents.items())
    table: list[str] = []
    body = bytearray()
    count = lost = index = 0
    last = ""
    for block in sorted(blocks):
        while index < len(texts) and texts[index][1] <= block.start:
            index += 1
        if index == len(texts) or block.start < texts[index][0]:
            lost += 1
            continue
        low, high, module = texts[index]
        name = f"{module}.ko" if module else KERNEL
        if not table or name != last:
            table.append(f"{len(table):3}, {low:#018x}, {high:#018x}, {0:#018x}, {name}\n")
            last = name
        offset, rest = block.start - low, min(block.size, high - block.start)
        while rest:
            size = min(rest, _BLOCK_MAX)
            body += struct.pack("<IHH", offset, size, len(table) - 1)
            offset, rest, count = offset + size, rest - size, count + 1
    if lost:
        _log.warning("%d blocks are of no known text and were left out", lost)
    if not count:
        raise UsageError("none of the run's blocks is of a known text", hint=_HINT)
    head = (
        "DRCOV VERSION: 2\nDRCOV FLAVOR: drcov\n"
        f"Module Table: version 2, count {len(table)}\n"
        "Columns: id, base, end, entry, path\n"
        f"{''.join(table)}BB Table: {count} bbs\n"
    )
    return head.encode() + bytes(body)


def lcov(symbols: KernelSymbols, blocks: list[Block], lines: Lines) -> bytes:
    """Render lines and functions in LCOV's format, for the compile units that were covered.

    Counts are 1 and 0: how often is not known. Blocks without lines are left out, with a warning.
    """
    hit: set[tuple[str, int]] = set()
    units: set[SourceUnit] = set()
    starts: set[PC] = set()
    lost = 0
    for block in blocks:
        unit = lines.unit_at(block.start)
        if unit is None:
            lost += 1
            continue
        units.add(unit)
        hit |= lines.lines_in(block.start, block.start + block.size)
        symbol = symbols.lookup(block.start)
        if symbol is not None:
            starts.add(symbol.start)
    if lost:
        _log.warning(
            "%d blocks have no lines (assembler, modules without debug information) and were left "
            "out",
            lost,
        )
    if not hit:
        raise UsageError(
            f"no block of the run has lines in {lines.path}",
            hint="the file must be of the very kernel that the guest has run",
        )
    known: dict[str, dict[int, bool]] = {}
    for unit in units:
        for file, line in lines.unit_lines(unit):
            known.setdefault(file, {})[line] = (file, line) in hit
    functions: dict[str, dict[str, tuple[int, bool]]] = {}
    seen = -1
    for symbol in symbols:
        # The first of the names of an address is the function's.
        if symbol.start == seen or not symbol.size:
            continue
        seen = symbol.start
        if lines.unit_at(symbol.start) in units and (place := lines.function_line(symbol.start)):
            covered = functions.setdefault(place[0], {})
            line, before = covered.get(symbol.name, (place[1], False))
            covered[symbol.name] = line, before or symbol.start in starts
    out = ["TN:kcov_bridge"]
    for file in sorted(known):
        found = sorted(functions.get(file, {}).items(), key=lambda item: (item[1][0], item[0]))
        out.append(f"SF:{file}")
        out += [f"FN:{line},{name}" for name, (line, _) in found]
        out += [f"FNDA:{int(covered)},{name}" for name, (_, covered) in found]
        out += [f"FNF:{len(found)}", f"FNH:{sum(covered for _, (_, covered) in found)}"]
        out += [f"DA:{line},{int(covered)}" for line, covered in sorted(known[file].items())]
        out += [f"LF:{len(known[file])}", f"LH:{sum(known[file].values())}", "end_of_record"]
    return "\n".join([*out, ""]).encode()


_HINT: Final = "run with the guest's kernel as a source; see docs/guest-kernel.md"


def _lines(path: Path) -> list[str]:
    """Return the non-blank lines of a file of a run."""
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no {path.name} in {path.parent}",
            hint=f"name the directory of a finished run with --run; {_HINT}",
        ) from error
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is damaged", evidence=str(error)) from error
    return [line for line in text.splitlines() if line.strip()]


def _blocks(run: Path) -> list[Block]:
    blocks = read_blocks(run / BLOCKS_FILE)
    if not blocks:
        raise UsageError(f"{run / BLOCKS_FILE} is empty: no block was covered", hint=_HINT)
    return blocks


def _symbols(run: Path) -> KernelSymbols:
    path = run / SYMBOLS_FILE
    if not path.is_file():
        raise UsageError(f"there is no {SYMBOLS_FILE} in {run}", hint=_HINT)
    symbols = KernelSymbols.load(path)
    if not symbols.texts(all_modules=True):
        raise UsageError(f"{path} is empty", hint=_HINT)
    return symbols


def _make_rawcover(run: Path, vmlinux: Path | None) -> bytes:
    return rawcover(run)


def _make_drcov(run: Path, vmlinux: Path | None) -> bytes:
    return drcov(_symbols(run), _blocks(run))


def _make_lcov(run: Path, vmlinux: Path | None) -> bytes:
    blocks, symbols = _blocks(run), _symbols(run)
    lines = lines_of(run, vmlinux, symbols)
    if lines is None:
        raise UsageError(
            f"there is no debug information of the kernel {_release(run) or '(unknown release)'}",
            hint="install the package linux-image-…-dbg of the guest's kernel, or name a vmlinux "
            "with --vmlinux",
        )
    return lcov(symbols, blocks, lines)


def lines_of(run: Path, vmlinux: Path | None, symbols: KernelSymbols) -> Lines | None:
    """The debug information of the kernel of a run, from a file that is named or from Debian's
    package; None where there is none, or none that can be used, which is then said.

    Raises as :func:`find_vmlinux` and :class:`Lines` do, for a file that is named.
    """
    release = _release(run)
    found = find_vmlinux(release, vmlinux) if vmlinux or release else None
    if found is None:
        return None
    try:
        return Lines(found, symbols, find_modules(release, found))
    except BridgeError as error:
        if vmlinux is not None:
            raise
        _log.warning("the kernel's lines are not known: %s", error.report())
        return None


def _release(run: Path) -> str:
    """Return the kernel release in a run's summary; "" if it has none."""
    try:
        return str(summary.read(run / "summary.json").get("kernel") or "")
    except BridgeError:
        return ""


FORMATS: Final[dict[str, Callable[[Path, Path | None], bytes]]] = {
    "rawcover": _make_rawcover,
    "drcov": _make_drcov,
    "lcov": _make_lcov,
}
"""What makes each format from a run directory and, where one is named, a ``vmlinux``."""
