# SPDX-License-Identifier: Apache-2.0
"""An ELF object for synthetic PCs, so that programs that read DWARF show the target's source.

Blocks of Python and of native programs (:mod:`bridge.results.compile_units`) are treated alike.
Each is a call of ``__sanitizer_cov_trace_pc`` that ends at the block's PC, as the compiler of a
kernel with kcov places them; all 16 addresses of the block's slot have its line. Each source file
is a compile unit with a line table of its own (the assembler's ``.loc`` makes one for the whole
object, which a reader would go through for each unit). A function of the source is a symbol for
each run of its blocks: where an inner function lies between, a second symbol has ``.2`` at its end.
A native function that is inlined is an entry of its own in the function around it.

All calls are in one section ``.text``, because syzkaller looks nowhere else. It spans the space of
synthetic PCs from the first block on, and is a hole of the file where no block is. Functions of the
guest's kernel are symbols of sections without content, at their canonical addresses.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

from bridge.errors import MissingDependencyError, UsageError
from bridge.results.compile_units import (
    CompileUnit,
    PlacedBlock,
    native_units,
    python_units,
    system_call_units,
)
from bridge.sources import PC
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.guest_kernel.symbols import KernelSymbols, Symbol
from bridge.sources.pcs import PC_BASE, SLOT_BYTES, SYSCALL_SLOTS
from bridge.util.compile import run_tool
from bridge.util.files import atomic_output, cannot_write
from bridge.util.packages import apt_line

__all__ = [
    "CALLBACK",
    "KernelText",
    "Names",
    "kernel_symbols",
    "kernel_texts",
    "line_table",
    "link",
    "linker_script",
    "preamble",
    "unit_entry",
    "write_elf",
]

_log = logging.getLogger(__name__)

CALLBACK: Final = "__sanitizer_cov_trace_pc"
"""What the call of each block calls."""

_HALF: Final = SLOT_BYTES // 2
_CALLBACK_PC: Final = PC_BASE + (SYSCALL_SLOTS - 1) * SLOT_BYTES
"""The slot of a number that no system call has."""

# Three bytes before the call, and eight after it: instructions without effect.
_SLOT_CODE: Final = f"""\
\t.byte 0x0f,0x1f,0x00
\tcall {CALLBACK}
\t.byte 0x0f,0x1f,0x84,0x00,0x00,0x00,0x00,0x00
"""

# syzkaller takes a program of gcc below 14 for one whose calls cannot all be found, and then takes
# PCs without a call: those of the guest's kernel. A text with "gcc" and no version counts as one.
_COMMENT: Final = "made by kcov-bridge, not by gcc: the kernel's functions have no calls of kcov"

# DWARF 4. Compile units with and without DW_AT_comp_dir, functions without and with others inlined
# into them, and inlined ones: tag, children, then pairs of attribute and form.
_ABBREVIATIONS: Final = """\
\t.section .debug_abbrev,"",@progbits
\t.uleb128 1,0x11,1, 0x13,0x05, 0x03,0x08, 0x1b,0x08, 0x11,0x01, 0x12,0x07, 0x10,0x17, 0,0
\t.uleb128 2,0x11,1, 0x13,0x05, 0x03,0x08, 0x11,0x01, 0x12,0x07, 0x10,0x17, 0,0
\t.uleb128 3,0x2e,0, 0x03,0x08, 0x11,0x01, 0x12,0x07, 0x3a,0x0f, 0x3b,0x0f, 0,0
\t.uleb128 4,0x2e,1, 0x03,0x08, 0x11,0x01, 0x12,0x07, 0x3a,0x0f, 0x3b,0x0f, 0,0
\t.uleb128 5,0x1d,1, 0x03,0x08, 0x11,0x01, 0x12,0x07, 0x58,0x0f, 0x59,0x0f, 0x57,0x0f, 0,0
\t.byte 0
"""
_LANGUAGE_PYTHON: Final = 0x14
_LANGUAGE_C: Final = 0x0C
"""DW_LANG_C99, for native code of all languages: names are as a reader is to show them."""

_PIECE: Final = 1 << 16


def write_elf(run: Path, output: Path) -> None:
    """Write the object of a run's blocks and kernel symbols, whole or not at all.

    Raises:
        UsageError: the run has no blocks of a target.
        SourceError: its files are damaged.
        MissingDependencyError: there is no assembler or linker.
        InfrastructureError: they fail, or the file cannot be written.
    """
    units = [*python_units(run), *native_units(run)]
    if not units:
        raise UsageError(
            f"{run} has no block of a target",
            hint="name the directory of a finished run with --run, of a target in Python or of "
            "native programs; see docs/targets.md",
        )
    every = [*system_call_units(), *units]
    path = run / SYMBOLS_FILE
    kernel = KernelSymbols.load(path) if path.is_file() else None
    texts = kernel_texts(kernel)
    link(output, _assembly(every, texts, kernel), _linker_script(every, texts))
    blocks, status = sum(len(unit.blocks) for unit in units), output.stat()
    _log.info(
        "%d blocks of %d source files in %s: %.1f MiB, %.1f MiB of them on the disk",
        *(blocks, len(units), output, status.st_size / 2**20, status.st_blocks * 512 / 2**20),
    )


def link(output: Path, assembly: Iterable[str], script: str) -> None:
    """Write the object of a text for the assembler and a linker script, whole or not at all.

    Raises:
        MissingDependencyError: there is no assembler or linker.
        InfrastructureError: they fail, or the file cannot be written.
    """
    assembler, linker = _tool("as"), _tool("ld")
    try:
        with atomic_output(output) as part:
            source, made, linked, parts = (
                part.with_suffix(suffix) for suffix in (".s", ".o", ".linked", ".ld")
            )
            with source.open("w", encoding="utf-8", newline="\n") as out:
                out.writelines(assembly)
            parts.write_text(script, encoding="ascii")
            _do([assembler, "--64", "-o", str(made), str(source)])
            _do([linker, "-m", "elf_x86_64", "-T", str(parts), "-o", str(linked), str(made)])
            _copy_with_holes(linked, part)
    except OSError as error:
        raise cannot_write(output, error) from error


@dataclass(frozen=True, slots=True)
class KernelText:
    """A text of the kernel or of a module, and the name of its section."""

    section: str
    start: PC
    end: PC


def kernel_texts(kernel: KernelSymbols | None) -> list[KernelText]:
    """Return the texts of the kernel and its modules, with the names of their sections."""
    if kernel is None:
        return []
    return [
        KernelText(f".kernel.{index}.{module or 'vmlinux'}", start, end)
        for index, (start, end, module) in enumerate(kernel.texts(all_modules=True))
    ]


class Names:
    """Makes names of symbols unique, as an assembler wants them."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def quoted(self, name: str) -> str:
        """Return a name for a label: printable, quoted, with a number if it was there before."""
        name = "".join(c if c.isprintable() and c not in '"\\' else "_" for c in name)
        candidate = name
        while candidate in self._times:
            self._times[name] += 1
            candidate = f"{name}.{self._times[name]}"
        self._times[candidate] = 1
        return f'"{candidate}"'


def _assembly(
    units: list[CompileUnit], texts: list[KernelText], kernel: KernelSymbols | None
) -> Iterator[str]:
    """Yield the text of the object for the assembler."""
    names = Names()
    stext = kernel.address("_stext") if kernel is not None else None
    yield from preamble(names, PC_BASE if stext is None else stext)
    for number, unit in enumerate(units):
        yield from _unit_assembly(number, unit, names)
    starts: dict[str, KernelText] = {}
    for index, text in enumerate(texts):
        yield f'\t.section "{text.section}","ax",@nobits\n.Lk{index}:\n'
        yield f"\t.skip {text.end - text.start:#x}\n"
        starts[f".Lk{index}"] = text
    yield from kernel_symbols(kernel or (), starts, names)


def preamble(names: Names, stext: PC) -> Iterator[str]:
    """Yield what comes first in each object: the callback, ``_stext``, and what has no address."""
    names.quoted(CALLBACK)
    names.quoted("_stext")
    # What readers print as the file of functions without lines.
    yield '\t.file "kernel"\n'
    yield f'\t.section .text.callback,"ax",@progbits\n\t.globl {CALLBACK}\n'
    yield f"\t.type {CALLBACK},@function\n{CALLBACK}:\n\tret\n\t.size {CALLBACK},.-{CALLBACK}\n"
    yield f'\t.section .comment,"MS",@progbits,1\n\t.string "{_COMMENT}"\n'
    yield '\t.section .note.GNU-stack,"",@progbits\n'
    yield _ABBREVIATIONS
    yield f"\t.globl _stext\n\t.set _stext,{stext:#x}\n"


def _unit_assembly(number: int, unit: CompileUnit, names: Names) -> Iterator[str]:
    """Yield code, symbols, debug information and line table of a source file."""
    first = unit.blocks[0].pc - _HALF
    size = len(unit.blocks) * SLOT_BYTES
    files = {"": 1, unit.name: 1}
    for block in unit.blocks:
        for file in (block.file, *(each.call_file for each in block.inlined)):
            files.setdefault(file, len(files))
    yield f'\t.section .text.{number},"ax",@progbits\n.Lt{number}:\n'
    yield f"\t.rept {len(unit.blocks)}\n{_SLOT_CODE}\t.endr\n"
    entries = []
    for (name, line), group in groupby(
        unit.blocks,
        lambda each: (each.function, each.function_line if unit.is_python else 0),
    ):
        run = list(group)
        start, extent = run[0].pc - _HALF, len(run) * SLOT_BYTES
        label = names.quoted(name)
        yield f"\t.set {label},.Lt{number}+{start - first}\n"
        yield f"\t.type {label},@function\n\t.size {label},{extent}\n"
        inlined = "".join(_inlined_entry(block, files) for block in run)
        # Where native functions begin is not known: their first block is nearest.
        at = line or min(block.function_line for block in run)
        entries.append(
            f"\t.uleb128 {4 if inlined else 3}\n{_string(name)}\t.8byte {start:#x},{extent}\n"
            f"\t.uleb128 1,{at}\n" + (f"{inlined}\t.byte 0\n" if inlined else "")
        )
    language = _LANGUAGE_PYTHON if unit.is_python else _LANGUAGE_C
    yield unit_entry(number, unit.name, unit.directory, language, first, size)
    yield from entries
    yield line_table(number, *list(files)[1:])
    yield f"\t.byte 0,9,2\n\t.8byte {first:#x}\n"
    line, at = 1, 1
    for block in unit.blocks:
        if files[block.file] != at:
            at = files[block.file]
            yield f"\t.uleb128 4,{at}\n"
        # Set the column, advance the line, add a row, advance the address.
        yield f"\t.uleb128 5,{block.column}\n\t.sleb128 3,{block.line - line}\n"
        yield f"\t.byte 1,9,{SLOT_BYTES},0\n"
        line = block.line
    yield f"\t.byte 0,1,1\n.Lle{number}:\n"


def _inlined_entry(block: PlacedBlock, files: Mapping[str, int]) -> str:
    """Return the entries of the functions that a block is inlined from, one in the other."""
    text = ""
    for each in block.inlined:
        text += f"\t.uleb128 5\n{_string(each.function)}"
        text += f"\t.8byte {block.pc - _HALF:#x},{SLOT_BYTES}\n"
        text += f"\t.uleb128 {files[each.call_file]},{each.call_line},{each.call_column}\n"
    return text + "\t.byte 0\n" * len(block.inlined)


def unit_entry(number: int, name: str, directory: str, language: int, first: PC, size: int) -> str:
    """Return the entry of a compile unit, to which its functions may be added."""
    text = f"\t.section .debug_info\n\t.4byte .Lie{number}-.Lib{number}\n.Lib{number}:\n"
    text += f"\t.2byte 4\n\t.4byte 0\n\t.byte 8\n\t.uleb128 {1 if directory else 2}\n"
    text += f"\t.2byte {language:#x}\n{_string(name)}{_string(directory) if directory else ''}"
    return text + f"\t.8byte {first:#x},{size}\n\t.4byte .Lls{number}\n"


def line_table(number: int, *files: str) -> str:
    """Return the end of a compile unit, and the head of its line table.

    The table is of version 4: 13 opcodes, and files in the unit's directory. What follows are its
    rows, and the label ``.Lle`` with the number.
    """
    text = f"\t.byte 0\n.Lie{number}:\n\t.section .debug_line\n.Lls{number}:\n"
    text += f"\t.4byte .Lle{number}-.Llb{number}\n.Llb{number}:\n\t.2byte 4\n"
    text += f"\t.4byte .Llp{number}-.Llh{number}\n.Llh{number}:\n"
    text += "\t.byte 1,1,1,-5,14,13, 0,1,1,1,1,0,0,0,1,0,0,1, 0\n"
    text += "".join(f"{_string(file)}\t.byte 0,0,0\n" for file in files)
    return text + f"\t.byte 0\n.Llp{number}:\n"


def kernel_symbols(
    kernel: Iterable[Symbol], starts: Mapping[str, KernelText], names: Names
) -> Iterator[str]:
    """Yield the functions of the guest's kernel, each in the section of its text."""
    places = sorted(((text.start, text.end, label) for label, text in starts.items()))
    at = 0
    for symbol in kernel:
        while at and (at == len(places) or symbol.start < places[at][0]):
            at -= 1
        while at < len(places) and symbol.start >= places[at][1]:
            at += 1
        if at == len(places) or symbol.start < places[at][0] or not symbol.size:
            continue
        if symbol.name in (CALLBACK, "_stext"):
            continue
        start, _, label = places[at]
        name = names.quoted(symbol.name)
        yield f"\t.set {name},{label}+{symbol.start - start:#x}\n"
        yield f"\t.type {name},@function\n\t.size {name},{symbol.size}\n"


def _string(text: str) -> str:
    """Return the directive for a string that ends in a zero byte."""
    data = text.encode("utf-8", "surrogateescape")
    return f"\t.byte {','.join(map(str, data + bytes(1)))}\n"


def _linker_script(units: list[CompileUnit], texts: list[KernelText]) -> str:
    parts = [(unit.blocks[0].pc - _HALF, f".text.{n}") for n, unit in enumerate(units)]
    parts.append((_CALLBACK_PC, ".text.callback"))
    # Native blocks lie below those of Python.
    base = min(PC_BASE, *(at for at, _ in parts)) & -SLOT_BYTES
    return linker_script(parts, base, texts)


def linker_script(
    parts: Iterable[tuple[PC, str]], base: PC, elsewhere: Iterable[KernelText] = ()
) -> str:
    """Return the script that gives each part of ``.text`` its address, and texts outside of it."""
    lines = ["PHDRS { text PT_LOAD FLAGS(5); }", f"ENTRY({CALLBACK})", "SECTIONS {"]
    lines += [
        f'"{text.section}" {text.start:#x} (NOLOAD) : {{ *("{text.section}") }} :NONE'
        for text in elsewhere
    ]
    lines.append(f".text {base:#x} : {{")
    lines += [f'. = {at - base:#x}; *("{name}")' for at, name in sorted(parts)]
    lines.append("} :text =0x00000000")
    lines += [
        f"{name} 0 : {{ *({name}) }} :NONE"
        for name in (".comment", ".debug_info", ".debug_abbrev", ".debug_line")
    ]
    return "\n".join([*lines, "/DISCARD/ : { *(*) }", "}", ""])


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise MissingDependencyError(
            f"this machine has no {name}, which makes ELF objects", hint=apt_line("binutils")
        )
    return found


def _do(command: list[str]) -> None:
    run_tool(
        command,
        f"{Path(command[0]).name} failed",
        "does the disk have room for 600 MiB, and is binutils up to date?",
    )


def _copy_with_holes(source: Path, destination: Path) -> None:
    """Copy a file; pieces of zeros become holes."""
    zeros = bytes(_PIECE)
    with source.open("rb", buffering=0) as read, destination.open("wb", buffering=0) as write:
        size = 0
        while piece := read.read(_PIECE):
            size += len(piece)
            if piece != zeros[: len(piece)]:
                write.seek(size - len(piece))
                view = memoryview(piece)
                while view:
                    view = view[write.write(view) :]
        write.truncate(size)
