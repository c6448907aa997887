# SPDX-License-Identifier: Apache-2.0
"""Which of the kernel's code is recorded: what the user asks for, and what Linux' kcov leaves out.

A term of a filter is one of

* ``PATTERN``: functions by name, as in ``v9fs_*``,
* ``module:PATTERN``: all code of modules, as in ``module:9p*``; ``module:vmlinux`` is the kernel,
* ``file:PATTERN``: the code of source files by their path in the kernel's tree, as in
  ``file:fs/9p/*``, for which debug information has to be there,
* ``addr:START-END``: canonical addresses, the end excluded.

Patterns are those of :mod:`fnmatch`; case counts, and ``*`` matches slashes, too.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from bridge.errors import SourceError, UsageError
from bridge.sources import PC
from bridge.sources.guest_kernel.placement import module_name
from bridge.sources.guest_kernel.symbols import KernelSymbols, Symbol

__all__ = [
    "KERNEL",
    "FileRanges",
    "KernelFilter",
    "Ranges",
    "intersection",
    "not_instrumented",
    "subtraction",
    "union",
]

Ranges = list[tuple[PC, PC]]
"""Addresses from start up to end; where a function returns them: sorted, disjoint, none empty, and
no two that touch."""

KERNEL: Final = "vmlinux"
"""What the kernel itself is called where modules are named."""

_LISTS: Final = "not_instrumented_*.txt"
"""What kernels of several versions do not instrument, beside this file."""

# Sections without instrumented code. Not among them: .cpuidle.text and .softirqentry.text, whose
# functions are instrumented unless their file is not.
_SECTIONS: Final = ("entry", "noinstr", "static_call")

# Made by macros and by the linker, in assembler; no source file has these names.
_THUNKS: Final = re.compile(
    r"__SC[TK]__|__x86_(?:indirect|return)_|__raw_callee_save_|(?:srso|retbleed|its|clear_bhb)_"
    r"|xen_hypercall_|arch_rethook_trampoline$|hv_hypercall_pg$|__(?:get|put)_user_(?:nocheck_)?\d|(?:irq|spurious)_entries"
)
# What the compiler makes of a function has its name and more.
_DERIVED: Final = re.compile(r"\.(?:cold|isra|constprop|part|llvm|localalias)\b.*")

_GAP: Final = 16
"""How many functions of unknown file may lie between two of one file to be held for its own. The
code of a file lies together, but a file's cold parts may lie near the next one's code."""

_NEAR: Final = 3


class FileRanges(Protocol):
    """Knows where the code of source files is: :class:`bridge.sources.guest_kernel.lines.Lines`."""

    def file_ranges(self, pattern: str) -> Ranges:
        """The code of the files that match."""

    def files(self) -> Collection[str]:
        """All files, by their path in the kernel's tree."""


def union(ranges: Iterable[tuple[PC, PC]]) -> Ranges:
    """All addresses that any of the ranges has; these may overlap, in any order."""
    merged: Ranges = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def intersection(first: Ranges, second: Ranges) -> Ranges:
    """The addresses that both have; each must be as :func:`union` returns it."""
    found: Ranges = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            found.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def subtraction(first: Ranges, second: Ranges) -> Ranges:
    """The addresses of the first that the second lacks; each as :func:`union` returns it."""
    left: Ranges = []
    j = 0
    for start, end in first:
        while j < len(second) and second[j][1] <= start:
            j += 1
        k = j
        while k < len(second) and second[k][0] < end:
            if start < second[k][0]:
                left.append((start, second[k][0]))
            start = second[k][1]
            k += 1
        if start < end:
            left.append((start, end))
    return left


@dataclass(frozen=True)
class _Term:
    """One term of a filter, taken apart."""

    text: str
    kind: str
    pattern: str
    addresses: tuple[PC, PC] = (0, 0)

    @classmethod
    def parse(cls, text: str) -> _Term:
        kind, colon, pattern = text.partition(":")
        if not colon:
            kind, pattern = "symbol", text
        if kind not in ("symbol", "module", "file", "addr"):
            raise UsageError(
                f"the kernel filter {text!r} is of no known kind",
                hint="it is FUNCTION, module:NAME, file:PATH or addr:START-END, where the first "
                "three may have wildcards",
            )
        if not pattern.strip():
            raise UsageError(f"the kernel filter {text!r} says nothing")
        if kind != "addr":
            return cls(text, kind, pattern)
        match = re.fullmatch(r"(?:0[xX])?([0-9a-fA-F]+)-(?:0[xX])?([0-9a-fA-F]+)", pattern)
        start, end = (int(match[1], 16), int(match[2], 16)) if match else (0, 0)
        if start >= end:
            raise UsageError(
                f"the kernel filter {text!r} has no range of addresses",
                hint="it is like addr:0xffffffff81000000-0xffffffff82000000, the end excluded",
            )
        return cls(text, kind, pattern, (start, end))


class KernelFilter:
    """What of the kernel is recorded."""

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        kcov_rules: bool = True,
    ) -> None:
        """No ``include`` is everything; ``exclude`` wins; ``kcov_rules`` also leaves out what
        Linux' kcov does not instrument, see :func:`not_instrumented`.

        Raises :class:`bridge.errors.UsageError` for a term that can't be read.
        """
        self._include = [_Term.parse(text) for text in include]
        self._exclude = [_Term.parse(text) for text in exclude]
        self._kcov_rules = kcov_rules
        self.terms = (tuple(include), tuple(exclude), kcov_rules)
        """What it was made of."""

    @property
    def needs_lines(self) -> bool:
        """Whether a term asks for debug information."""
        return any(term.kind == "file" for term in (*self._include, *self._exclude))

    def ranges(
        self, symbols: KernelSymbols, lines: FileRanges | None = None, *, strict: bool = True
    ) -> Ranges:
        """The canonical addresses that may be recorded, of the code that is there now.

        Raises :class:`bridge.errors.UsageError` for a term that needs ``lines`` where there are
        none, and, if ``strict``, for one that matches nothing or where nothing at all is left.
        Modules may come later: then ask again, not strictly.
        """
        texts = union((start, end) for start, end, _ in symbols.texts())
        wanted = texts
        if self._include:
            found = [r for term in self._include for r in _ranges(term, symbols, lines, strict)]
            wanted = intersection(union(found), texts)
        unwanted = [r for term in self._exclude for r in _ranges(term, symbols, lines, strict)]
        left = subtraction(wanted, union(unwanted))
        if strict and not left:
            raise UsageError("the kernel filters leave nothing to record")
        if self._kcov_rules:
            instrumented = subtraction(left, not_instrumented(symbols))
            if strict and not instrumented:
                raise UsageError(
                    "the kernel filters leave nothing but what Linux' kcov does not instrument",
                    hint="--kernel-all records it all the same",
                )
            left = instrumented
        return left


def _ranges(term: _Term, symbols: KernelSymbols, lines: FileRanges | None, strict: bool) -> Ranges:
    """What a term matches, in any order."""
    names: Collection[str]
    if term.kind == "addr":
        found = intersection([term.addresses], union((a, b) for a, b, _ in symbols.texts()))
        if strict and not found:
            raise UsageError(
                f"there is no code of the kernel at {term.pattern}",
                hint="canonical addresses are those of System.map",
            )
        return found
    if term.kind == "symbol":
        found = [(symbol.start, symbol.end) for symbol in symbols.matching(term.pattern)]
        # Marks have a name, but no size.
        found = [(start, end) for start, end in found if start < end]
        names = {symbol.name for symbol in symbols} if strict and not found else ()
        what = "function"
    elif term.kind == "module":
        pattern = module_name(term.pattern)
        texts = [(start, end, module or KERNEL) for start, end, module in symbols.texts()]
        found = [(a, b) for a, b, module in texts if fnmatch.fnmatchcase(module, pattern)]
        names = {module for _, _, module in texts}
        what = "loaded module"
    else:
        if lines is None:
            raise UsageError(
                f"the kernel filter {term.text!r} needs the kernel's debug information",
                hint="install the package linux-image-…-dbg of the guest's kernel or name a "
                "file with it: --vmlinux FILE; or name functions or a module instead",
            )
        found = lines.file_ranges(term.pattern)
        names = lines.files() if strict and not found else ()
        what = "source file"
    if strict and not found:
        raise _nothing(term, what, names)
    return found


def _nothing(term: _Term, what: str, names: Collection[str]) -> UsageError:
    """What is said of a pattern that nothing matches: the names that are near it."""
    plain = re.sub(r"[*?\[\]]", "", term.pattern)
    near = difflib.get_close_matches(plain, names, n=_NEAR, cutoff=0.6)
    # A beginning with a wildcard behind is near to all that begins almost so.
    if not near and plain:
        shorter = {name[: len(plain)]: name for name in sorted(names, reverse=True)}
        heads = difflib.get_close_matches(plain, shorter, n=_NEAR, cutoff=0.6)
        near = [shorter[head] for head in heads]
    return UsageError(
        f"no {what} matches the kernel filter {term.text!r}",
        hint=f"near it are: {', '.join(near)}" if near else "",
    )


def not_instrumented(symbols: KernelSymbols) -> Ranges:
    """What a kernel with CONFIG_KCOV does not instrument, so that its kcov never shows it.

    That is the sections ``.entry.text``, ``.noinstr.text`` and ``.static_call.text``, all that is
    written in assembler, and the files that the kernel's Makefiles take out. The last two are known
    by name, from lists that were made from the sources of several kernels. The list that fits best
    is used; on a kernel of another version it is near the truth.
    """
    found = []
    for section in _SECTIONS:
        start = symbols.address(f"__{section}_text_start")
        end = symbols.address(f"__{section}_text_end")
        if start is not None and end is not None:
            found.append((start, end))
    files = _list_for({symbol.name for symbol in symbols if not symbol.module})
    run: list[Symbol] = []
    for symbol in symbols:
        # Of the names of one address, the first is the function's.
        if run and symbol.module != run[-1].module:
            found += _by_file(run, files)
            run = []
        run.append(symbol)
    found += _by_file(run, files)
    return union(found)


def _by_file(symbols: Sequence[Symbol], files: dict[str, tuple[bool, frozenset[str]]]) -> Ranges:
    """The functions of one text, sorted by address, that the list has.

    A name that other files have, too, counts where a neighbour is of a listed file that has it;
    what lies between two functions of one file is that file's, whatever its name.
    """
    rows = _by_address(symbols)
    count = len(rows)
    owner: list[str | None] = [None] * count
    maybe: list[frozenset[str]] = [frozenset()] * count
    sure = [False] * count
    for index, (_, _, names) in enumerate(rows):
        for name in names:
            certain, candidates = files.get(_DERIVED.sub("", name), (False, frozenset()))
            sure[index] |= certain
            if certain and len(candidates) == 1:
                (owner[index],) = candidates
                break
            maybe[index] |= candidates
    for order in (range(1, count), range(count - 2, -1, -1)):
        step = order.step
        for index in order:
            neighbour = owner[index - step]
            if owner[index] is None and neighbour is not None and neighbour in maybe[index]:
                owner[index] = neighbour
    last: dict[str, int] = {}
    for index in range(count):
        file = owner[index]
        if file is None:
            continue
        before = last.get(file, index)
        between = owner[before + 1 : index]
        if len(between) <= _GAP and all(o is None for o in between):
            owner[before + 1 : index] = [file] * len(between)
        last[file] = index
    return [
        (start, end)
        for (start, end, names), file, listed in zip(rows, owner, sure, strict=True)
        if listed or file is not None or any(_THUNKS.match(name) for name in names)
    ]


def _by_address(symbols: Sequence[Symbol]) -> list[tuple[PC, PC, list[str]]]:
    """Start, end and all names of each address; marks alone are left out."""
    rows: list[tuple[PC, PC, list[str]]] = []
    for symbol in symbols:
        if rows and rows[-1][0] == symbol.start:
            rows[-1][2].append(symbol.name)
        elif symbol.size:
            rows.append((symbol.start, symbol.end, [symbol.name]))
    return rows


_List = dict[str, tuple[bool, frozenset[str]]]
"""By name: whether only listed files have the name, and which do."""


def _list_for(names: Collection[str]) -> _List:
    """The list that fits a kernel with functions of these names.

    It is the one of whose own names, which another list lacks, the kernel has the largest part.
    Only files that are in all lists count: a file that one lacks may have become instrumented.
    """
    lists = _lists()
    everywhere = frozenset.intersection(
        *(frozenset().union(*(files for _, files in listed.values())) for listed in lists)
    )
    shared = set.intersection(*(set(listed) for listed in lists))

    def fit(listed: _List) -> float:
        own = [name for name, (_, files) in listed.items() if files & everywhere]
        own = [name for name in own if name not in shared]
        return sum(name in names for name in own) / max(len(own), 1)

    return max(lists, key=fit)


@functools.cache
def _lists() -> list[_List]:
    return [_listed(path) for path in sorted(Path(__file__).parent.glob(_LISTS))]


def _listed(path: Path) -> _List:
    text = path.read_text(encoding="utf-8")
    found: _List = {}
    file = ""
    for line in text.splitlines():
        if line.startswith(" ") and file:
            for word in line.split():
                name = word.removeprefix("?")
                _, files = found.get(name, (True, frozenset()))
                files |= {file}
                found[name] = (not word.startswith("?"), files)
        elif line.endswith(":"):
            file = line.removesuffix(":")
        elif not line.startswith("#"):
            raise SourceError(f"{path} is damaged", evidence=line[:80])
    return found
