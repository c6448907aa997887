# SPDX-License-Identifier: Apache-2.0
"""The functions of the guest's kernel and of its modules, at canonical addresses.

**Canonical addresses.** For the kernel itself these are the link-time addresses: the addresses in
the guest without its KASLR offset. For a module they start at a base that is the same on every run,
see :mod:`bridge.sources.guest_kernel.placement`.

A kernel has about 100,000 functions. They are stored in arrays and one long string, and become
objects when they are looked up.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from itertools import pairwise
from pathlib import Path
from typing import Final

from bridge.errors import KernelUnknownError, SourceError
from bridge.sources import PC
from bridge.sources.guest_kernel.placement import MODULES_BASE, module_name
from bridge.util.files import write_atomically

__all__ = [
    "KernelSymbols",
    "ModuleText",
    "Symbol",
    "kaslr_offset",
]

_IMAGE_BASE: Final = 0xFFFF_FFFF_8000_0000
"""__START_KERNEL_map of x86-64: the lowest address of kernel text."""
_LINKED_TEXT: Final = 0xFFFF_FFFF_8100_0000
"""Default link address of x86-64 kernels; see kaslr_offset()."""
_IMAGE_SIZE: Final = 1 << 30
"""KERNEL_IMAGE_SIZE of x86-64 with CONFIG_RANDOMIZE_BASE: the limit of the offset."""
_ALIGNMENT: Final = 1 << 21
"""MIN_KERNEL_ALIGN of x86-64: the offset is a multiple of it."""

_MAGIC: Final = "kcov-bridge-kernel-symbols"
_VERSION: Final = 1

_LINE: Final = re.compile(r"^([0-9a-fA-F]+) ([A-Za-z?]) (\S+)(?:[ \t]+\[(\S+)\])?$", re.MULTILINE)
_TEXT_TYPES: Final = frozenset("tTwW")

# Names that mark a place. A function's name always takes precedence.
_MARKER: Final = re.compile(
    r"_[se]?(?:init)?text|_end|__\w*text_(?:start|end)|__indirect_thunk_(?:start|end)"
    r"|__(?:init|exit)_(?:begin|end)"
)
# Padding before a function has its own name if calls are checked or patched.
_PADDING: Final = ("__pfx_", "__cfi_")


@dataclass(frozen=True, slots=True)
class Symbol:
    """A function, or a part that the compiler split off (``NAME.cold``)."""

    name: str
    start: PC
    size: int
    """Bytes up to the next symbol, including the padding after the function."""
    module: str = ""
    """The module's name; empty for the kernel itself."""

    @property
    def end(self) -> PC:
        """The end address, exclusive."""
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class ModuleText:
    """Location of a loaded module's core text."""

    base: int
    """Its address in the guest."""
    canonical: PC
    """Its canonical address."""
    size: int
    """Its bytes."""


class _Table:
    """The functions of one text, sorted by address; the best name of an address comes first."""

    __slots__ = ("_names", "_offsets", "sizes", "starts", "texts")

    def __init__(self, rows: Iterable[tuple[PC, int, str]], texts: Iterable[tuple[PC, PC]]) -> None:
        """Take ``rows`` of start, size and name."""
        self.texts = list(texts)
        self.starts = array("Q")
        self.sizes = array("I")
        self._offsets = array("I", [0])
        names = []
        offset = 0
        for start, size, name in rows:
            self.starts.append(start)
            self.sizes.append(size)
            names.append(name)
            offset += len(name)
            self._offsets.append(offset)
        self._names = "".join(names)

    def __len__(self) -> int:
        return len(self.starts)

    def name(self, index: int) -> str:
        return self._names[self._offsets[index] : self._offsets[index + 1]]

    def names(self) -> Iterator[str]:
        text, begin = self._names, 0
        offsets = iter(self._offsets)
        next(offsets)
        for end in offsets:
            yield text[begin:end]
            begin = end

    def find(self, pc: PC) -> int:
        """Return the index of the function that contains an address; -1 if there is none."""
        index = bisect_right(self.starts, pc) - 1
        if index < 0:
            return -1
        start = self.starts[index]
        index = bisect_left(self.starts, start, 0, index + 1)
        return index if pc < start + self.sizes[index] else -1


class KernelSymbols:
    """Functions by address and by name. Not safe to change while another thread reads."""

    def __init__(self) -> None:
        self._kernel = _Table((), ())
        self._modules: dict[str, _Table] = {}
        self._gone: set[str] = set()
        self._bases: list[tuple[PC, str]] = []

    @classmethod
    def from_kallsyms(
        cls, text: str, offset: int = 0, modules: Mapping[str, ModuleText] | None = None
    ) -> KernelSymbols:
        """Return the symbols in the text of ``/proc/kallsyms``, as root reads it.

        Args:
            text: what the file contains.
            offset: the kernel's KASLR offset, see :func:`kaslr_offset`.
            modules: the loaded modules; symbols of others are left out.

        Raises:
            KernelUnknownError: the text has no addresses.
        """
        symbols = cls()
        found: list[tuple[int, str, str]] = []
        places = {module_name(name): place for name, place in (modules or {}).items()}
        by_module: dict[str, list[tuple[int, str, str]]] = {name: [] for name in places}
        for address, kind, name, module in _LINE.findall(text):
            if not module:
                found.append((int(address, 16), kind, name))
            elif module in by_module:
                by_module[module].append((int(address, 16), kind, name))
        symbols._kernel = _kernel_table(found, offset)
        for module, place in places.items():
            symbols._enter(module, _module_table(by_module[module], place))
        return symbols

    @classmethod
    def from_system_map(cls, path: Path) -> KernelSymbols:
        """Return the symbols of a ``System.map``, which has no modules.

        Raises:
            SourceError: the file cannot be read.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"cannot read {path}: {error}") from error
        return cls.from_kallsyms(text)

    def add_module(self, name: str, kallsyms_text: str, place: ModuleText) -> None:
        """Add a loaded module with its lines of ``/proc/kallsyms``; other lines are ignored.

        It replaces a module of the same name.
        """
        name = module_name(name)
        found = [
            (int(address, 16), kind, symbol)
            for address, kind, symbol, module in _LINE.findall(kallsyms_text)
            if module == name
        ]
        self._enter(name, _module_table(found, place))

    def take_module(self, name: str, others: KernelSymbols) -> None:
        """Add a module as ``others`` has it; it replaces a module of the same name."""
        self._enter(name, others._modules[module_name(name)])

    def remove_module(self, name: str) -> None:
        """Note that a module was unloaded.

        :meth:`texts` no longer has its text. Its symbols stay, because recorded PCs still have to
        be looked up, and its canonical addresses are never reused.
        """
        name = module_name(name)
        if name in self._modules:
            self._gone.add(name)

    @property
    def modules(self) -> list[str]:
        """Names of the loaded modules, sorted."""
        return sorted(set(self._modules) - self._gone)

    def __len__(self) -> int:
        return len(self._kernel) + sum(map(len, self._modules.values()))

    def __iter__(self) -> Iterator[Symbol]:
        """Iterate over all symbols by address, also of unloaded modules."""
        for module, table in self._tables():
            for index, name in enumerate(table.names()):
                yield Symbol(name, table.starts[index], table.sizes[index], module)

    def lookup(self, pc: PC) -> Symbol | None:
        """Return the function that contains a canonical address."""
        module = self._module_at(pc)
        table = self._modules[module] if module else self._kernel
        index = table.find(pc)
        if index < 0:
            return None
        return Symbol(table.name(index), table.starts[index], table.sizes[index], module)

    def matching(self, pattern: str) -> Iterator[Symbol]:
        """Return the symbols whose names match a case-sensitive pattern of :mod:`fnmatch`.

        All names of an address count, also those that :meth:`lookup` does not return.
        """
        match = re.compile(translate(pattern)).match
        for module, table in self._tables():
            if module in self._gone:
                continue
            for index, name in enumerate(table.names()):
                if match(name):
                    yield Symbol(name, table.starts[index], table.sizes[index], module)

    def address(self, name: str) -> PC | None:
        """Return the address of a symbol of the kernel itself; the first one of several."""
        for index, found in enumerate(self._kernel.names()):
            if found == name:
                return self._kernel.starts[index]
        return None

    def texts(self, *, all_modules: bool = False) -> list[tuple[PC, PC, str]]:
        """Return the texts by address: start, end and module (empty for the kernel).

        ``all_modules`` includes unloaded modules.
        """
        return [
            (start, end, module)
            for module, table in self._tables()
            for start, end in table.texts
            if all_modules or module not in self._gone
        ]

    def has_functions(self, module: str) -> bool:
        """Return whether a module, which may be unloaded, has symbols."""
        return module in self._modules and len(self._modules[module]) > 0

    def text_at(self, pc: PC) -> tuple[PC, PC, str] | None:
        """Return the text with an address, as in :meth:`texts`, also of an unloaded module."""
        module = self._module_at(pc)
        texts = (self._modules[module] if module else self._kernel).texts
        return next(((start, end, module) for start, end in texts if start <= pc < end), None)

    def save(self, path: Path) -> None:
        """Write the symbols as UTF-8 text, whole or not at all.

        The first line is ``kcov-bridge-kernel-symbols`` and the version of the format, 1. Each
        other line has four fields, tabs between: start in hex, size in bytes, module (empty for
        the kernel itself), name. Lines without a name locate the texts.

        Raises:
            InfrastructureError: the file cannot be written.
        """
        lines = [f"{_MAGIC}\t{_VERSION}"]
        for module, table in self._tables():
            lines += [f"{start:x}\t{end - start}\t{module}\t" for start, end in table.texts]
            lines += [
                f"{start:x}\t{size}\t{module}\t{name}"
                for start, size, name in zip(table.starts, table.sizes, table.names(), strict=True)
            ]
        write_atomically(path, "\n".join([*lines, ""]))

    @classmethod
    def load(cls, path: Path) -> KernelSymbols:
        """Read what :meth:`save` wrote; raises SourceError."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} holds no kernel symbols", evidence=str(error)) from error
        lines = text.split("\n")
        if lines[0] != f"{_MAGIC}\t{_VERSION}":
            raise SourceError(
                f"{path} holds no kernel symbols of version {_VERSION}", evidence=lines[0][:80]
            )
        if lines.pop() != "":
            raise SourceError(f"{path} is truncated", evidence=text[-80:])
        rows: dict[str, list[tuple[int, int, str]]] = {"": []}
        texts: dict[str, list[tuple[int, int]]] = {"": []}
        for line in lines[1:]:
            try:
                start, size, module, name = line.split("\t")
                row = (int(start, 16), int(size), name)
                if name:
                    rows[module].append(row)
                else:
                    rows.setdefault(module, [])
                    texts.setdefault(module, []).append((row[0], row[0] + row[1]))
            except (ValueError, KeyError) as error:
                raise SourceError(f"{path} is damaged", evidence=line[:80]) from error
        symbols = cls()
        try:
            for module, found in rows.items():
                table = _Table(found, texts[module])
                if any(a > b for a, b in zip(table.starts, table.starts[1:], strict=False)):
                    raise ValueError("not sorted")
                if module:
                    symbols._enter(module, table)
                else:
                    symbols._kernel = table
        except (ValueError, OverflowError) as error:
            raise SourceError(f"{path} is damaged", evidence=str(error)) from error
        return symbols

    def _tables(self) -> Iterator[tuple[str, _Table]]:
        yield "", self._kernel
        for _, module in self._bases:
            yield module, self._modules[module]

    def _module_at(self, pc: PC) -> str:
        """Return the module whose text may contain an address; empty for the kernel."""
        index = bisect_right(self._bases, pc, key=lambda pair: pair[0]) - 1
        return self._bases[index][1] if index >= 0 else ""

    def _enter(self, name: str, table: _Table) -> None:
        self._modules[name] = table
        self._gone.discard(name)
        self._bases = sorted((t.texts[0][0], n) for n, t in self._modules.items() if t.texts)


def kaslr_offset(text: str, said: int | None = None) -> int:
    """Return a kernel's KASLR offset: ``_text`` in ``/proc/kallsyms`` minus its link address.

    Args:
        text: of ``/proc/kallsyms``.
        said: KERNELOFFSET in the kernel's VMCOREINFO note. Without it the link address is assumed
            to be the default, __START_KERNEL: __START_KERNEL_map plus CONFIG_PHYSICAL_START
            (``arch/x86/include/asm/page_types.h``), which is 16 MiB unless it was changed.

    Raises:
        KernelUnknownError: the text has no ``_text``, or an impossible one.
    """
    match = re.search(r"^([0-9a-fA-F]+) [tT] _text$", text, re.MULTILINE)
    address = int(match[1], 16) if match else 0
    if address == 0:
        raise _hidden()
    offset = address - _LINKED_TEXT if said is None else said
    if offset % _ALIGNMENT or not 0 <= offset < _IMAGE_SIZE or address - offset < _IMAGE_BASE:
        raise KernelUnknownError(
            f"the link address of the guest's kernel is unknown: its _text is at {address:#x}, "
            f"moved by {offset:#x}",
            hint="boot it with nokaslr, or ask for --source python",
        )
    return offset


def _hidden() -> KernelUnknownError:
    return KernelUnknownError(
        "the guest's kernel hides the addresses of its symbols",
        hint="/proc/kallsyms (CONFIG_KALLSYMS) has to be read as root, with kernel.kptr_restrict "
        "0 or 1; or ask for --source python",
    )


def _kernel_table(found: list[tuple[int, str, str]], offset: int) -> _Table:
    moved = [
        (address - offset, kind, name)
        for address, kind, name in found
        if _IMAGE_BASE <= address - offset < MODULES_BASE
    ]
    rows = _rows(moved, MODULES_BASE)
    if not rows:
        raise _hidden()
    marks = {name: start for start, _, name in rows if _MARKER.fullmatch(name)}
    texts = [
        (marks[begin], marks[end])
        for begin, end in (("_stext", "_etext"), ("_sinittext", "_einittext"))
        if marks.get(begin, 0) < marks.get(end, 0) and begin in marks
    ]
    return _Table(rows, texts or [(rows[0][0], rows[-1][0] + rows[-1][1])])


def _module_table(found: list[tuple[int, str, str]], place: ModuleText) -> _Table:
    delta = place.canonical - place.base
    end = place.canonical + place.size
    moved = [
        (address + delta, kind, name)
        for address, kind, name in found
        if place.canonical <= address + delta < end
    ]
    return _Table(_rows(moved, end), [(place.canonical, end)])


def _rows(found: list[tuple[int, str, str]], end: PC) -> list[tuple[PC, int, str]]:
    """Return start, size and name of the functions among these symbols, sorted.

    Each symbol ends the one before it, also data and padding.
    """
    edges = sorted({address for address, _, _ in found})
    sizes = {a: b - a for a, b in pairwise([*edges, end])}
    text = sorted(
        (address, _rank(kind, name), position, name)
        for position, (address, kind, name) in enumerate(found)
        if kind in _TEXT_TYPES and not name.startswith(_PADDING)
    )
    rows = []
    for address, rank, _, name in text:
        # A marker alone ends something, or begins padding.
        if rank < _MARKER_RANK:
            rows.append((address, sizes[address], name))
        else:
            last = rows[-1] if rows else None
            rows.append((address, last[1] if last and last[0] == address else 0, name))
    return rows


_MARKER_RANK: Final = 4


def _rank(kind: str, name: str) -> int:
    """Return the sort key of a name; the lowest is the best name of an address."""
    if _MARKER.fullmatch(name):
        return _MARKER_RANK
    return "TWwt".index(kind)
