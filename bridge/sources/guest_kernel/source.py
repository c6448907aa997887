# SPDX-License-Identifier: Apache-2.0
"""The guest kernel as a source: which task is traced into which area, and what code there is.

Unlike other sources this one is not consumed. The plugin in QEMU writes PCs into areas by itself,
while the system call runs, as the code of a kernel built with CONFIG_KCOV does; the bridge tells
it through the plan who owns what.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.abi import KERNEL_CPUS, KernelWord
from bridge.errors import SourceError
from bridge.region import Area
from bridge.sources import PC
from bridge.sources.guest_kernel.plan import NOWHERE, VECTORS, Plan, PlanWord, RangeFlag

__all__ = ["CodeMap", "GuestKernel", "ram_offset"]

logger = logging.getLogger(__name__)

_PAGE = 4096
_FOUR_GIB = 1 << 32
_QUIET_SECONDS = 2.0
"""How long the code stays watched after the last owner is gone: the next may come at once."""

Range = tuple[int, int, int, RangeFlag]


def ram_offset(physical: int, memory: int) -> int | None:
    """Where a guest-physical address lies in the memory of a q35 machine of ``memory`` bytes.

    None where there is no memory. ``pc_q35_init`` in QEMU says how much lies below 4 GiB.
    """
    below = memory if memory < 0xB000_0000 else 0x8000_0000
    if 0 <= physical < below:
        return physical
    if _FOUR_GIB <= physical < _FOUR_GIB + memory - below:
        return physical - _FOUR_GIB + below
    return None


@dataclass(frozen=True)
class CodeMap:
    """What is known of a kernel's code before it runs, in link-time addresses.

    ``syscall_entry`` is ``entry_SYSCALL_64``; ``record`` are the ranges to be recorded and
    ``noinstr`` those that an interrupt passes before and after its handler, both sorted.
    ``module`` gives the canonical address of a module, by name and bytes of text, and the pieces
    of it to be recorded, as offsets.
    """

    syscall_entry: int
    start: int
    end: int
    record: Sequence[tuple[int, int]]
    noinstr: Sequence[tuple[int, int]]
    switches: Sequence[tuple[int, int]]
    switched: Sequence[tuple[int, int]]
    module: Callable[[str, int], tuple[int, Sequence[tuple[int, int]]]]


class GuestKernel:
    """The plan's writer, on the doorbell's thread. Made before QEMU starts, which inherits ``fds``.

    ``memory`` in bytes. Raises :class:`bridge.errors.SourceError` where there is no memory.
    """

    def __init__(self, code: CodeMap, memory: int) -> None:
        self.plan = Plan()
        self.offset: int | None = None
        """By how much the kernel was moved (KASLR), bytes; None until it has said so."""
        self.modules: dict[str, tuple[int, int, int]] = {}
        """Text of the modules that are there: address, canonical address, bytes."""
        self._code = code
        self._memory = memory
        self._vectors: list[int] = []
        self._entry = 0
        self._attached: set[int] = set()
        self._quiet_since: float | None = None
        self._given = 0
        try:
            self.ram_fd = os.memfd_create("kcov-bridge-ram", os.MFD_CLOEXEC)
            os.ftruncate(self.ram_fd, memory)
        except OSError as error:
            self.plan.close()
            raise SourceError(f"no memory for the guest: {error.strerror}") from error

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        self.plan.close()
        if self.ram_fd >= 0:
            os.close(self.ram_fd)
            self.ram_fd = -1

    # What the guest's module says; none of it is trusted further than an address is bounded

    def describe(self, payload: Sequence[int]) -> int:
        """KERNEL: errno. A kernel that is not the expected one is not watched."""
        entry = payload[KernelWord.SYSCALL_ENTRY]
        offset = entry - self._code.syscall_entry
        if offset % _PAGE or not 0 <= offset < 1 << 30:
            logger.warning(
                "the guest kernel is another than the image's System.map is for "
                "(entry_SYSCALL_64 at %#x): its code is not watched",
                entry,
            )
            return errno.ENOEXEC
        cpus = []
        for cpu in range(KERNEL_CPUS):
            at = KernelWord.CPU + 2 * cpu
            current, preempt = payload[at : at + 2]
            cpus.append((self._where(current, 8), self._where(preempt, 4)))
        for slot in tuple(self._attached):
            self.detach(slot)
        for cpu, (current, preempt) in enumerate(cpus):
            self.plan.set_cpu(cpu, current, preempt)
        self.offset = offset
        self._entry = entry
        self._vectors = list(payload[KernelWord.VECTORS : KernelWord.VECTORS + VECTORS])
        self.modules.clear()
        self._tell_code()
        return 0

    def _where(self, physical: int, alignment: int) -> int:
        where = ram_offset(physical, self._memory) if physical else None
        return NOWHERE if where is None or where % alignment else where

    def module(self, name: str, comes: bool, start: int, size: int) -> int:
        """MODULE: errno. Its code has not run yet, or will not run any more."""
        self.modules.pop(name, None)
        if comes and size and start + size < 1 << 64:
            canonical, _ = self._code.module(name, size)
            self.modules[name] = (start, canonical, size)
        self._tell_code()
        return 0

    def _tell_code(self) -> None:
        assert self.offset is not None
        offset, code = self.offset, self._code
        pieces: list[Range] = []
        flagged = {
            RangeFlag.RECORD: code.record,
            RangeFlag.NOINSTR: code.noinstr,
            RangeFlag.SWITCHES: code.switches,
            RangeFlag.SWITCHED: code.switched,
        }
        for start, end, flags in _cut(code.start, code.end, flagged):
            pieces.append((start + offset, end + offset, start, flags))
        for name, (start, canonical, size) in self.modules.items():
            _, record = code.module(name, size)
            for first, last, flags in _cut(0, size, {RangeFlag.RECORD: record}):
                pieces.append((start + first, start + last, canonical + first, flags))
        pieces.sort()
        whole: list[Range] = []
        for piece in pieces:
            # What overlaps was made up by the guest.
            if not whole or piece[0] >= whole[-1][1]:
                whole.append(piece)
        self.plan.set_code(whole, self._vectors, self._entry)

    # Owners

    def attach(self, slot: int, area: Area, task: int) -> None:
        """The task at this guest address owns the instance in this slot from now on."""
        if self.offset is None or not task:
            return
        self._attached.add(slot)
        self._quiet_since = None
        self.plan.words[PlanWord.WANT] = 1
        self.plan.attach(slot, task, area.offset, area.size, area.bitmap_words)

    def counts(self, slot: int) -> tuple[int, int]:
        """PCs appended and dropped for the slot's owner since it was attached."""
        return self.plan.counts(slot) if slot in self._attached else (0, 0)

    def detach(self, slot: int) -> tuple[int, int]:
        """The slot has no owner any more; as :meth:`counts`. Nobody writes to its area then."""
        if slot not in self._attached:
            return 0, 0
        self._attached.discard(slot)
        if not self._attached:
            self._quiet_since = time.monotonic()
        return self.plan.detach(slot)

    def tick(self) -> None:
        """Called a few times a second: the kernel runs at full speed while nobody traces."""
        if self._quiet_since is not None and time.monotonic() - self._quiet_since > _QUIET_SECONDS:
            self._quiet_since = None
            self.plan.words[PlanWord.WANT] = 0

    def new_pcs(self) -> list[PC]:
        """PCs that were recorded for the first time since the last call."""
        new = self.plan.blocks(self._given)
        self._given += len(new)
        return [start for start, _ in new]

    @property
    def api(self) -> int:
        """The version of QEMU's plugin API, 0 before QEMU has started."""
        return self.plan.words[PlanWord.API]


def _cut(
    start: int, end: int, flagged: Mapping[RangeFlag, Sequence[tuple[int, int]]]
) -> list[tuple[int, int, RangeFlag]]:
    """[start, end) cut where flags change, without holes."""
    edges = {start, end}
    for first, last in itertools.chain.from_iterable(flagged.values()):
        edges.update(edge for edge in (first, last) if start < edge < end)
    cuts = sorted(edges)
    pieces: list[tuple[int, int, RangeFlag]] = []
    at = dict.fromkeys(flagged, 0)
    for first, last in zip(cuts, cuts[1:], strict=False):
        flags = RangeFlag(0)
        for flag, ranges in flagged.items():
            while at[flag] < len(ranges) and ranges[at[flag]][1] <= first:
                at[flag] += 1
            if at[flag] < len(ranges) and ranges[at[flag]][0] <= first:
                flags |= flag
        if pieces and pieces[-1][2] == flags:
            pieces[-1] = (pieces[-1][0], last, flags)
        else:
            pieces.append((first, last, flags))
    return pieces


def read_system_map(path: Path) -> dict[str, int]:
    """Symbols of a System.map: the last address of each name."""
    symbols = {}
    for line in path.read_text(encoding="ascii").splitlines():
        address, _, name = line.split(" ", 2)
        symbols[name] = int(address, 16)
    return symbols


def code_map(system_map: Path) -> CodeMap:
    """Everything in the kernel's text but what kcov never instruments."""
    symbols = read_system_map(system_map)
    noinstr = sorted(
        (symbols[f"__{name}_text_start"], symbols[f"__{name}_text_end"])
        for name in ("entry", "noinstr")
    )
    start, end = symbols["_stext"], symbols["_etext"]
    edges = [start, *(edge for pair in noinstr for edge in pair), end]
    record = list(zip(edges[::2], edges[1::2], strict=True))
    bases: dict[str, int] = {}

    def module(name: str, size: int) -> tuple[int, Sequence[tuple[int, int]]]:
        base = bases.setdefault(name, 0xFFFF_FFFF_A000_0000 + len(bases) * 0x100000)
        return base, [] if name == "kcov_bridge" else [(0, size)]

    ends = dict(zip(sorted(symbols.values()), sorted(symbols.values())[1:], strict=False))

    def functions(*names: str) -> list[tuple[int, int]]:
        found = [
            address
            for name, address in symbols.items()
            if name.partition(".")[0] in names and start <= address < end
        ]
        return sorted((address, ends.get(address, end)) for address in found)

    return CodeMap(
        symbols["entry_SYSCALL_64"],
        start,
        end,
        record,
        noinstr,
        functions("__schedule"),
        functions("finish_task_switch"),
        module,
    )
