# SPDX-License-Identifier: Apache-2.0
"""``kernel_obj`` of syzkaller's manager: ``vmlinux`` for its pages ``/cover``, ``/funccover``, ….

The manager shows a PC as a line of a source, by a call of ``__sanitizer_cov_trace_pc`` that ends
there. Two objects are made here, because it reads all of ``.text`` into its memory, and the texts
of the kernel and the synthetic PCs are two gigabytes apart:

* with blocks of a target, the object of :mod:`bridge.results.elf_export`: lines of the target, and
  names of the kernel's functions for reports of crashes;
* else the functions of the kernel and its modules. A stock kernel has no sources at hand, so each
  text has a listing, a file with a line for each function. A function's first block stands for the
  function. The call is to end at its entry, so it lies in the five bytes before, and so do the
  symbol and its line. A line has no address inside of the function: reports of crashes stay as
  they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bridge.results.compile_units import has_blocks
from bridge.results.elf_export import (
    CALLBACK,
    KernelText,
    Names,
    kernel_symbols,
    kernel_texts,
    line_table,
    link,
    linker_script,
    preamble,
    unit_entry,
    write_elf,
)
from bridge.sources import PC
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.guest_kernel.filters import KERNEL
from bridge.sources.guest_kernel.symbols import KernelSymbols, Symbol
from bridge.sources.pcs import SYSCALL_FILE
from bridge.trace.names import system_calls
from bridge.util.files import remove, write_atomically

__all__ = ["LISTINGS", "OBJECT", "write_kernel_object"]

OBJECT: Final = "vmlinux"
"""The name that the manager looks for in ``kernel_obj``."""
LISTINGS: Final = "functions"
"""Directory of the listings, in ``kernel_obj``."""

_CALL_BYTES: Final = 5
_LANGUAGE_ASSEMBLER: Final = 0x8001
"""DW_LANG_Mips_Assembler, which stands for no language."""
_HEAD: Final = """\
# Functions of {module}, by address. A line is covered if its function was entered.
# Which lines of the source ran is not known: {module} comes without debug information.
#
# address           bytes  name
"""


@dataclass(frozen=True, slots=True)
class _Listing:
    """A text, and the functions in it that have a line each."""

    text: KernelText
    """Moved down by the length of a call."""
    module: str
    rows: tuple[tuple[PC, int], ...]
    """Where the call of a function begins, and the function's line."""


def write_kernel_object(run: Path, directory: Path) -> str:
    """Make what the manager takes as ``kernel_obj`` from what one guest has left in ``run``.

    Returns:
        What it shows, for people; "" if there is nothing, and no object then.

    Raises:
        SourceError: files of the run are damaged.
        MissingDependencyError: there is no assembler or linker.
        InfrastructureError: they fail, or a file cannot be written.
    """
    directory.mkdir(exist_ok=True)
    remove(directory / LISTINGS)
    output = directory / OBJECT
    if has_blocks(run):
        write_elf(run, output)
        _write_system_calls(directory)
        return "lines of the target"
    if not (run / SYMBOLS_FILE).is_file():
        remove(output)
        return ""
    symbols = KernelSymbols.load(run / SYMBOLS_FILE)
    # The kernel has freed the code of its start when a guest is ready.
    boot = symbols.text_at(symbols.address("_sinittext") or 0)
    functions = [
        symbol
        for symbol in symbols
        if symbol.size and not (boot and boot[0] <= symbol.start < boot[1])
    ]
    listings = _write_listings(symbols, functions, directory / LISTINGS)
    if not listings:
        remove(output)
        return ""
    stext = symbols.address("_stext") or listings[0].text.start + _CALL_BYTES
    names = directory / LISTINGS
    parts = [(listing.text.start, listing.text.section) for listing in listings]
    # Below the first call, which begins below the text.
    base = (listings[0].text.start & -16) - 16
    parts.append((base, ".text.callback"))
    link(output, _assembly(listings, functions, stext, names), linker_script(parts, base))
    return f"{sum(len(each.rows) for each in listings):,} functions of the kernel"


def _write_system_calls(directory: Path) -> None:
    """Write the source of system calls, which the manager looks for here: its lines are numbers."""
    lines: list[str] = []
    for number, call in sorted(system_calls().items()):
        lines += [""] * (number - 1 - len(lines))
        if number:
            lines.append(call.name)
    path = directory / SYSCALL_FILE
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "\n".join([*lines, ""]))


def _write_listings(
    symbols: KernelSymbols, functions: Iterable[Symbol], directory: Path
) -> list[_Listing]:
    """Write a file for the kernel and for each module; return the texts with functions."""
    directory.mkdir()
    by_module: dict[str, list[Symbol]] = {}
    for symbol in functions:
        by_module.setdefault(symbol.module, []).append(symbol)
    lines = {module: _HEAD.format(module=_file(module)).splitlines() for module in by_module}
    listings = []
    for text, (_, _, module) in zip(
        kernel_texts(symbols), symbols.texts(all_modules=True), strict=True
    ):
        rows = []
        free = text.start - _CALL_BYTES
        for symbol in by_module.get(module, ()):
            call = symbol.start - _CALL_BYTES
            # An alias of the one before, or a function of less than five bytes.
            if call < free or not text.start <= symbol.start < text.end:
                continue
            lines[module].append(f"{symbol.start:#x} {symbol.size:6}  {symbol.name}")
            rows.append((call, len(lines[module])))
            free = symbol.start
        if rows:
            moved = replace(text, start=text.start - _CALL_BYTES, end=text.end - _CALL_BYTES)
            listings.append(_Listing(moved, module, tuple(rows)))
    for module, text_of in lines.items():
        write_atomically(directory / _file(module), "\n".join([*text_of, ""]))
    return sorted(listings, key=lambda listing: listing.text.start)


def _file(module: str) -> str:
    # Without .ko at its end, by which the manager would find an object of a module.
    return module or KERNEL


def _assembly(
    listings: list[_Listing], functions: Iterable[Symbol], stext: PC, directory: Path
) -> Iterator[str]:
    names = Names()
    yield from preamble(names, stext)
    starts: dict[str, KernelText] = {}
    for number, listing in enumerate(listings):
        text = listing.text
        at = text.start
        yield f'\t.section "{text.section}","ax",@progbits\n.Lk{number}:\n'
        for call, _ in listing.rows:
            yield f"\t.skip {call - at}\n\tcall {CALLBACK}\n"
            at = call + _CALL_BYTES
        yield f"\t.skip {text.end - at}\n"
        # The symbols are to begin where the calls do.
        starts[f".Lk{number}"] = replace(
            text, start=text.start + _CALL_BYTES, end=text.end + _CALL_BYTES
        )
        size = text.end - text.start
        name = _file(listing.module)
        yield unit_entry(number, name, str(directory), _LANGUAGE_ASSEMBLER, text.start, size)
        yield line_table(number, name)
        yield f"\t.byte 0,9,2\n\t.8byte {text.start:#x}\n"
        at, last = text.start, 1
        for call, line in listing.rows:
            # Then line 0, which stands for no source, up to the next call.
            yield f"\t.byte 2\n\t.uleb128 {call - at}\n\t.byte 3\n\t.sleb128 {line - last}\n"
            yield f"\t.byte 1, 2,{_CALL_BYTES}, 3\n\t.sleb128 {-line}\n\t.byte 1\n"
            at, last = call + _CALL_BYTES, 0
        yield f"\t.byte 2\n\t.uleb128 {text.end - at}\n\t.byte 0,1,1\n"
        yield f".Lle{number}:\n"
    yield from kernel_symbols(functions, starts, names)
