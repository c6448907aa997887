# SPDX-License-Identifier: Apache-2.0
"""An ELF object for synthetic PCs, so that programs that read DWARF show the target's source.

Each block is a call of ``__sanitizer_cov_trace_pc`` that ends at the block's PC, as the compiler of
a kernel with kcov places them; all 16 addresses of the block's slot have its line. Each source file
is a compile unit with a line table of its own (the assembler's ``.loc`` makes one for the whole
object, which a reader would go through for each unit). A function of the source is a symbol for
each run of its blocks: where an inner function lies between, a second symbol has ``.2`` at its end.

All calls are in one section ``.text``, because syzkaller looks nowhere else. It spans the space of
synthetic PCs and is a hole of the file where no block is. Functions of the guest's kernel are
symbols of sections without content, at their canonical addresses.
"""

from __future__ import annotations

import ast
import logging
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

from bridge.errors import InfrastructureError, MissingDependencyError, SourceError, UsageError
from bridge.results.report.host import COVERAGE_FILE, find_paths, measured_files
from bridge.results.run_directory import load_blocks
from bridge.sources import PC
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.guest_kernel.symbols import KernelSymbols, Symbol
from bridge.sources.pcs import (
    PC_BASE,
    SLOT_BYTES,
    SYSCALL_FILE,
    SYSCALL_SLOTS,
    BlockTable,
    syscall_pc,
)
from bridge.sources.python.blocks import decode_source
from bridge.sources.symbolize import BLOCKS_FILE
from bridge.trace.names import system_calls
from bridge.util.files import atomic_output, cannot_write
from bridge.util.packages import apt_line

__all__ = [
    "CALLBACK",
    "CompileUnit",
    "KernelText",
    "Names",
    "PlacedBlock",
    "compile_units",
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

# DWARF 4. Compile units with and without DW_AT_comp_dir, and functions: tag, children, then pairs
# of attribute and form.
_ABBREVIATIONS: Final = """\
\t.section .debug_abbrev,"",@progbits
\t.uleb128 1,0x11,1, 0x13,0x05, 0x03,0x08, 0x1b,0x08, 0x11,0x01, 0x12,0x07, 0x10,0x17, 0,0
\t.uleb128 2,0x11,1, 0x13,0x05, 0x03,0x08, 0x11,0x01, 0x12,0x07, 0x10,0x17, 0,0
\t.uleb128 3,0x2e,0, 0x03,0x08, 0x11,0x01, 0x12,0x07, 0x3a,0x0f, 0x3b,0x0f, 0,0
\t.byte 0
"""
_LANGUAGE_PYTHON: Final = 0x14

_PIECE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block: its PC, line and column, and the function that it belongs to."""

    pc: PC
    line: int
    column: int
    function: str
    """Dotted, from the top-level package."""
    function_line: int


@dataclass(frozen=True, slots=True)
class CompileUnit:
    """A source file with its blocks, at consecutive slots."""

    name: str
    """The path below ``directory``."""
    directory: str
    """Absolute; empty if the file was not found."""
    blocks: tuple[PlacedBlock, ...]


@dataclass(frozen=True, slots=True)
class _Code:
    """A function or class of a source: its dotted name and the lines of its body."""

    name: str
    line: int
    first: int
    last: int


def compile_units(run: Path) -> tuple[list[CompileUnit], list[CompileUnit]]:
    """Return the source files of a run's target, and system calls, as compile units.

    A source that is missing has lines but no functions; a source that is newer than the run may
    have others. Both are said in a warning.

    Raises:
        UsageError: the run has no block table, or no block.
        SourceError: the table is damaged.
    """
    table = load_blocks(run)
    if not len(table):
        raise UsageError(
            f"{run / BLOCKS_FILE} has no block",
            hint="run with a target of Python; see docs/targets.md",
        )
    data = run / COVERAGE_FILE
    paths = find_paths(table.files, measured_files([data]) if data.is_file() else ())
    written = (run / BLOCKS_FILE).stat().st_mtime
    units, missing, newer = [], [], []
    for name in table.files:
        path = Path(paths[name])
        try:
            text = path.read_bytes()
            if path.stat().st_mtime > written:
                newer.append(name)
        except OSError:
            text = None
            missing.append(name)
        if unit := _unit(table, name, path, text):
            units.append(unit)
    for names, problem in (
        (missing, "were not found: they have no functions, and relative paths"),
        (newer, "were changed after the run: their functions may be others now"),
    ):
        if names:
            _log.warning("%d source files %s (%s ...)", len(names), problem, names[0])
    return units, _system_call_units()


def write_elf(run: Path, output: Path) -> None:
    """Write the object of a run's block table and kernel symbols, whole or not at all.

    Raises:
        UsageError: the run has no blocks of a target.
        SourceError: its files are damaged.
        MissingDependencyError: there is no assembler or linker.
        InfrastructureError: they fail, or the file cannot be written.
    """
    units, calls = compile_units(run)
    path = run / SYMBOLS_FILE
    kernel = KernelSymbols.load(path) if path.is_file() else None
    texts = kernel_texts(kernel)
    link(output, _assembly(calls + units, texts, kernel), _linker_script(calls + units, texts))
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


def _unit(table: BlockTable, name: str, path: Path, text: bytes | None) -> CompileUnit | None:
    """Return the unit of a file of the table; None if it has no block."""
    file = table.file(name)
    blocks = file.blocks() if file is not None else []
    if file is None or not blocks:
        return None
    module = name.rpartition(".")[0].replace("/", ".").removesuffix(".__init__")
    codes = _codes(text) if text is not None else []
    owners: list[_Code | None] = [None] * (blocks[-1].end_line + 1)
    # An inner function comes after the one that it lies in.
    for code in codes:
        for line in range(code.first, min(code.last + 1, len(owners))):
            owners[line] = code
    placed = []
    for index, block in enumerate(blocks):
        owner = owners[block.start_line]
        function = f"{module}.{owner.name if owner else '<module>'}"
        line = owner.line if owner else 1
        pc = file.pc(index)
        placed.append(PlacedBlock(pc, block.start_line, block.start_col, function, line))
    directory = str(path).removesuffix(f"/{name}") if text is not None else ""
    if directory == str(path):
        # Found elsewhere, or named by its absolute path.
        return CompileUnit(path.name, str(path.parent), tuple(placed))
    return CompileUnit(name, directory, tuple(placed))


def _codes(text: bytes) -> list[_Code]:
    """Return the functions and classes of a source, outer ones first; none if it is no Python."""
    try:
        tree = ast.parse(decode_source(text))
    except (SyntaxError, ValueError, RecursionError, SourceError):
        return []
    found = []
    todo: list[tuple[ast.AST, str]] = [(tree, "")]
    while todo:
        node, prefix = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # The header belongs to the code around it.
            first = min(
                each.lineno for each in (node.body[0], *getattr(node.body[0], "decorator_list", []))
            )
            found.append(
                _Code(f"{prefix}{node.name}", node.lineno, first, node.end_lineno or first)
            )
            prefix = f"{prefix}{node.name}."
        todo += ((child, prefix) for child in ast.iter_child_nodes(node))
    return sorted(found, key=lambda code: (code.first, -code.last))


def _system_call_units() -> list[CompileUnit]:
    """Return a unit for each run of numbers that Linux has, by number."""
    units = []
    known = sorted(system_calls().items())
    for _, group in groupby(enumerate(known), key=lambda each: each[1][0] - each[0]):
        blocks = []
        for _, (number, call) in group:
            if (pc := syscall_pc(number)) is not None:
                blocks.append(PlacedBlock(pc, number, 1, f"syscall.{call.name}", number))
        units.append(CompileUnit(SYSCALL_FILE, "", tuple(blocks)))
    return units


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
    yield f'\t.section .text.{number},"ax",@progbits\n.Lt{number}:\n'
    yield f"\t.rept {len(unit.blocks)}\n{_SLOT_CODE}\t.endr\n"
    functions = []
    for (name, line), group in groupby(
        unit.blocks, lambda each: (each.function, each.function_line)
    ):
        run = list(group)
        start, extent = run[0].pc - _HALF, len(run) * SLOT_BYTES
        label = names.quoted(name)
        yield f"\t.set {label},.Lt{number}+{start - first}\n"
        yield f"\t.type {label},@function\n\t.size {label},{extent}\n"
        functions.append((name, line, start, extent))
    yield unit_entry(number, unit.name, unit.directory, _LANGUAGE_PYTHON, first, size)
    for name, line, start, extent in functions:
        yield f"\t.uleb128 3\n{_string(name)}\t.8byte {start:#x},{extent}\n\t.uleb128 1,{line}\n"
    yield line_table(number, unit.name)
    yield f"\t.byte 0,9,2\n\t.8byte {first:#x}\n"
    line = 1
    for block in unit.blocks:
        # Set the column, advance the line, add a row, advance the address.
        yield f"\t.uleb128 5,{block.column}\n\t.sleb128 3,{block.line - line}\n"
        yield f"\t.byte 1,9,{SLOT_BYTES},0\n"
        line = block.line
    yield f"\t.byte 0,1,1\n.Lle{number}:\n"


def unit_entry(number: int, name: str, directory: str, language: int, first: PC, size: int) -> str:
    """Return the entry of a compile unit, to which its functions may be added."""
    text = f"\t.section .debug_info\n\t.4byte .Lie{number}-.Lib{number}\n.Lib{number}:\n"
    text += f"\t.2byte 4\n\t.4byte 0\n\t.byte 8\n\t.uleb128 {1 if directory else 2}\n"
    text += f"\t.2byte {language:#x}\n{_string(name)}{_string(directory) if directory else ''}"
    return text + f"\t.8byte {first:#x},{size}\n\t.4byte .Lls{number}\n"


def line_table(number: int, name: str) -> str:
    """Return the end of a compile unit, and the head of its line table.

    The table is of version 4: 13 opcodes, one file, in the unit's directory. What follows are its
    rows, and the label ``.Lle`` with the number.
    """
    text = f"\t.byte 0\n.Lie{number}:\n\t.section .debug_line\n.Lls{number}:\n"
    text += f"\t.4byte .Lle{number}-.Llb{number}\n.Llb{number}:\n\t.2byte 4\n"
    text += f"\t.4byte .Llp{number}-.Llh{number}\n.Llh{number}:\n"
    text += "\t.byte 1,1,1,-5,14,13, 0,1,1,1,1,0,0,0,1,0,0,1, 0\n"
    return text + f"{_string(name)}\t.byte 0,0,0, 0\n.Llp{number}:\n"


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
    return linker_script(parts, PC_BASE, texts)


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
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise InfrastructureError(
            f"{Path(command[0]).name} failed with status {done.returncode}",
            evidence=done.stderr[-2000:],
            hint="does the disk have room for 300 MiB, and is binutils up to date?",
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
