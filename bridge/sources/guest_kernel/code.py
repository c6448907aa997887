# SPDX-License-Identifier: Apache-2.0
"""A kernel's code: its symbols, the placement of its modules, and what to record.

All addresses here are canonical: link-time addresses for the kernel itself, and those of
:mod:`bridge.sources.guest_kernel.placement` for modules.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bridge.errors import InfrastructureError, KernelUnknownError
from bridge.sources import PC
from bridge.sources.guest_kernel.filters import KernelFilter, Ranges, union
from bridge.sources.guest_kernel.lines import Lines
from bridge.sources.guest_kernel.placement import ModulePlacement, module_name
from bridge.sources.guest_kernel.plan import RangeFlag
from bridge.sources.guest_kernel.symbols import KernelSymbols, ModuleText
from bridge.util.cache import cache_directory, cache_folder
from bridge.util.files import write_atomically

__all__ = ["KernelCode", "Piece"]

Piece = tuple[PC, PC, RangeFlag]
"""A range of code and its properties; the end is exclusive."""

_OWN_MODULE = "kcov_bridge"

_INTERRUPT_COUNT = ("irq_enter", "irq_enter_rcu", "irq_exit", "irq_exit_rcu", "__irq_exit_rcu")
"""Functions that interrupt handlers call first and last (kernel/softirq.c in Linux)."""

_SWITCH_START = (
    "__perf_event_task_sched_out",
    "__kmap_local_sched_out",
    "enter_lazy_tlb",
    "switch_mm_irqs_off",
    "__switch_to_asm",
)
"""What ``context_switch()`` (kernel/sched/core.c in Linux) calls first after
``kcov_prepare_switch()``, which a kernel without kcov lacks."""

_EXIT_WORK = (
    "task_work_run",
    "blkcg_maybe_throttle_current",
    "mem_cgroup_handle_over_high",
    "__rseq_handle_notify_resume",
)
"""What ``resume_user_mode_work()`` (include/linux/resume_user_mode.h in Linux) calls."""

_EXIT_DONE = (
    "arch_do_signal_or_restart",
    "fire_user_return_notifiers",
    "native_tss_update_io_bitmap",
    "fpregs_assert_state_consistent",
    "switch_fpu_return",
)
"""What ``exit_to_user_mode_prepare()`` (kernel/entry/common.c in Linux) calls besides."""


class KernelCode:
    """The code of one kernel and of its modules, which come and go.

    ``lines`` is needed if the filter names files.

    Raises:
        UsageError: the filter is invalid.
        KernelUnknownError: symbols that are needed are missing.
    """

    def __init__(
        self,
        symbols: KernelSymbols,
        placement: ModulePlacement,
        wanted: KernelFilter,
        lines: Lines | None = None,
    ) -> None:
        self.symbols = symbols
        self._placement = placement
        self._wanted = wanted
        self._lines = lines
        self._modules: dict[str, ModuleText] = {}
        self._module_pieces: dict[str, list[Piece]] = {}
        # What was made of each module's symbols the last time: a reset of the guest names the
        # same ones again.
        self._named: dict[str, tuple[ModuleText, str, KernelSymbols, list[Piece]]] = {}
        if lines is not None:
            lines.belong_to(symbols)
        self.syscall_entry = self._needed("entry_SYSCALL_64")
        kernel = union((start, end) for start, end, module in symbols.texts() if not module)
        entry, noinstr = (
            (self._needed(f"__{name}_text_start"), self._needed(f"__{name}_text_end"))
            for name in ("entry", "noinstr")
        )
        # A filter may name code of a module that is loaded later.
        recorded = wanted.ranges(symbols, lines, strict=False)
        self.pieces: list[Piece] = cut(
            kernel,
            {
                RangeFlag.RECORD: recorded,
                RangeFlag.NOINSTR: union([entry, noinstr]),
                RangeFlag.SCHEDULE: self._functions("__schedule"),
                RangeFlag.SWITCH_START: union(
                    itertools.chain(*map(self._functions, _SWITCH_START))
                ),
                RangeFlag.SCHEDULE_END: self._functions("finish_task_switch*"),
                RangeFlag.INTERRUPT_COUNT: union(
                    itertools.chain(*map(self._functions, _INTERRUPT_COUNT))
                ),
                RangeFlag.EXIT_WORK: union(itertools.chain(*map(self._functions, _EXIT_WORK))),
                RangeFlag.EXIT_DONE: union(
                    itertools.chain([entry], *map(self._functions, _EXIT_DONE))
                ),
            },
        )

    @classmethod
    def from_system_map(
        cls,
        system_map: Path,
        modules: Path | None,
        wanted: KernelFilter,
        lines: Lines | None = None,
    ) -> KernelCode:
        """Return the code from a System.map, and the module list of the kernel's package if given.

        This takes seconds for a distribution's kernel, so the cache keeps it for the same files,
        filter and program.
        """
        if lines is None:
            kept = _kept(system_map, modules, wanted)
            # A damaged entry can raise anything; it is replaced.
            with contextlib.suppress(Exception):
                code = pickle.loads(kept.read_bytes())
                if isinstance(code, cls):
                    return code
        placement = ModulePlacement.load(modules) if modules is not None else ModulePlacement({})
        code = cls(KernelSymbols.from_system_map(system_map), placement, wanted, lines)
        if lines is None:
            with contextlib.suppress(InfrastructureError):
                cache_folder(kept.parent.name, private=True)
                write_atomically(kept, pickle.dumps(code, protocol=5))
        return code

    def _needed(self, name: str) -> PC:
        address = self.symbols.address(name)
        if address is None:
            raise KernelUnknownError(
                f"the guest kernel's symbols lack {name}: its code cannot be watched",
                hint="is the System.map that of this kernel? Or ask for --source python",
            )
        return address

    def _functions(self, pattern: str) -> Ranges:
        return union((symbol.start, symbol.end) for symbol in self.symbols.matching(pattern))

    @property
    def modules(self) -> Mapping[str, ModuleText]:
        """The modules that are loaded."""
        return self._modules

    def text_size(self, name: str) -> int:
        """Return an upper bound of a module's text in bytes; 0 if the kernel's package lacks it."""
        return self._placement.sizes.get(module_name(name), 0)

    def module_comes(self, name: str, base: int, size: int) -> None:
        """Note a module whose text is at ``base``; raises SourceError if no room is left."""
        name = module_name(name)
        place = ModuleText(base, self._placement.place(name, size), size)
        if self._modules.get(name) != place:
            self._modules[name] = place
            self.name_module(name, "")

    def module_goes(self, name: str) -> None:
        """Note that a module is gone; its symbols stay, for what was recorded."""
        name = module_name(name)
        self.symbols.remove_module(name)
        self._modules.pop(name, None)
        self._module_pieces.pop(name, None)

    def name_module(self, name: str, kallsyms: str) -> None:
        """Set a module's symbols from lines of ``/proc/kallsyms``."""
        name = module_name(name)
        place = self._modules[name]
        named = self._named.get(name)
        if named is None or named[:2] != (place, kallsyms):
            alone = KernelSymbols()
            alone.add_module(name, kallsyms, place)
            # Lines of files ask for the module there.
            self.symbols.take_module(name, alone)
            recorded: Ranges = []
            if name != _OWN_MODULE:
                recorded = self._wanted.ranges(alone, self._lines, strict=False)
            text = (place.canonical, place.canonical + place.size)
            named = place, kallsyms, alone, cut([text], {RangeFlag.RECORD: recorded})
            if kallsyms:
                self._named[name] = named
        self.symbols.take_module(name, named[2])
        self._module_pieces[name] = named[3]

    def running(self, offset: int) -> list[tuple[int, int, PC, RangeFlag]]:
        """Return all code at its addresses in the guest, for a kernel moved by ``offset``.

        Each range is (start, end, canonical start, flags); sorted and disjoint.
        """
        found = [(start + offset, end + offset, start, flags) for start, end, flags in self.pieces]
        for name, pieces in self._module_pieces.items():
            place = self._modules[name]
            moved = place.base - place.canonical
            found += [(start + moved, end + moved, start, flags) for start, end, flags in pieces]
        found.sort()
        disjoint: list[tuple[int, int, PC, RangeFlag]] = []
        for piece in found:
            # Overlaps can only come from a hostile guest.
            if not disjoint or piece[0] >= disjoint[-1][1]:
                disjoint.append(piece)
        return disjoint


def _kept(system_map: Path, modules: Path | None, wanted: KernelFilter) -> Path:
    """Return the path in the cache for these inputs."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (system_map, modules):
        if path is not None:
            status = path.stat() if path.is_file() else None
            found = (status.st_size, status.st_mtime_ns) if status is not None else ()
            digest.update(repr((str(path), found)).encode())
    digest.update(repr(wanted.terms).encode())
    for pattern in ("*.py", "*.txt"):
        for path in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(path.read_bytes())
    return cache_directory() / "kernels" / f"{digest.hexdigest()[:24]}.pickle"


def cut(
    whole: Sequence[tuple[PC, PC]], flagged: Mapping[RangeFlag, Sequence[tuple[PC, PC]]]
) -> list[Piece]:
    """Cut the ranges of ``whole`` where a flag begins or ends; all are sorted and disjoint."""
    pieces: list[Piece] = []
    at = dict.fromkeys(flagged, 0)
    for begin, finish in whole:
        edges = {begin, finish}
        for ranges in flagged.values():
            edges.update(edge for pair in ranges for edge in pair if begin < edge < finish)
        cuts = sorted(edges)
        for start, end in itertools.pairwise(cuts):
            flags = RangeFlag(0)
            for flag, ranges in flagged.items():
                while at[flag] < len(ranges) and ranges[at[flag]][1] <= start:
                    at[flag] += 1
                if at[flag] < len(ranges) and ranges[at[flag]][0] <= start:
                    flags |= flag
            pieces.append((start, end, flags))
    return pieces
