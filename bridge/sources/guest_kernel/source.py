# SPDX-License-Identifier: Apache-2.0
"""The guest kernel as a source: which task is traced into which area, and what code there is.

This source is not consumed. The plugin in QEMU writes PCs into areas while the system call runs, as
the code of a kernel built with CONFIG_KCOV does. The plan tells the plugin which task owns which
instance.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.device.abi import KERNEL_CPUS, KernelWord
from bridge.device.region import Area
from bridge.errors import KernelUnknownError
from bridge.sources.guest_kernel import BLOCKS_FILE, SYMBOLS_FILE
from bridge.sources.guest_kernel.pc_memory import HIGH_MEMORY, low_memory
from bridge.sources.guest_kernel.plan import NOWHERE, VECTORS, Plan, PlanWord, Ram
from bridge.util.files import write_atomically

if TYPE_CHECKING:
    from bridge.sources.guest_kernel.code import KernelCode

__all__ = ["GuestKernel", "ram_offset"]

logger = logging.getLogger(__name__)

_PAGE = 4096
# Bounded, because the guest may be hostile: no more digits than an address has.
_MODULE = re.compile(r"^(\S+) (\d{1,9}) .* 0x([0-9a-f]{1,16})(?: \(\w+\))?$", re.MULTILINE)
_SYMBOL = re.compile(r"^([0-9a-f]{1,16}) ([A-Za-z]) \S+\t\[(\S+)\]$", re.MULTILINE)
_QUIET_SECONDS = 2.0
"""How long the code stays watched after the last owner has gone, because another may follow."""
_QUIET_AFTER_RESET_SECONDS = 20.0
"""The same in a guest that was reset, until its next owner: on a busy machine it takes so long to
start the same program again, and to translate all code twice takes longer."""


def ram_offset(physical: int, memory: int) -> int | None:
    """Return the offset of a guest-physical address in the memory of a q35 machine, or None.

    ``memory`` is the machine's memory in bytes.
    """
    below = low_memory(memory)
    if 0 <= physical < below:
        return physical
    if HIGH_MEMORY <= physical < HIGH_MEMORY + memory - below:
        return physical - HIGH_MEMORY + below
    return None


class _TextBounds:
    """How long the texts of modules are at most, from ``/proc/modules``, where sizes have the data
    in them, and the symbols of modules."""

    def __init__(self, proc_modules: str, kallsyms: str) -> None:
        self.modules = {
            name: (int(base, 16), int(size)) for name, size, base in _MODULE.findall(proc_modules)
        }
        self._last: dict[str, int] = {}
        others = {base for base, _ in self.modules.values()}
        for address, kind, name in _SYMBOL.findall(kallsyms):
            base, size = self.modules.get(name, (0, 0))
            if kind not in "tTwW":
                others.add(int(address, 16))
            elif base <= int(address, 16) < base + size:
                self._last[name] = max(self._last.get(name, 0), int(address, 16))
        self._others = sorted(others)

    def text_size(self, name: str) -> int:
        """Return the bytes from its start to the end of its last function; all of its bytes if it
        has no functions."""
        base, size = self.modules[name]
        after = bisect_right(self._others, self._last.get(name, base + size))
        if after < len(self._others):
            size = min(size, self._others[after] - base)
        return size


@dataclass(frozen=True, slots=True)
class _Described:
    """What the guest's module says of its kernel; offsets in the guest's memory, or NOWHERE."""

    entry: int
    marker: int
    marker_offset: int
    cpus: tuple[tuple[int, int], ...]
    vectors: tuple[int, ...]


class GuestKernel:
    """Writes the plan, on the doorbell's thread. Created before QEMU, which inherits the plan.

    Args:
        code: the kernel's code; None if :meth:`set_code` sets it later.
        memory: size of the guest's memory, in bytes.

    Raises:
        SourceError: there is no memory.
    """

    def __init__(self, code: KernelCode | None, memory: int) -> None:
        self.plan = Plan(memory)
        self.offset: int | None = None
        """KASLR offset of the kernel in bytes; None until the guest's module has reported it."""
        self._code = code
        self.unnamed = True
        """Whether some loaded modules lack symbols; see :meth:`load_symbols`."""
        self._memory = memory
        # Modules loaded before ours: base, bytes, lines of kallsyms; None until they are known.
        self._early: dict[str, tuple[int, int, str]] | None = None
        # The description in effect, and the one that a guest that was rewound gives again.
        self._described: _Described | None = None
        self._expected: _Described | None = None
        self._attached: set[int] = set()
        # Slots that were attached when their kernel ended: they get no more PCs, but still count.
        self._cut_off: set[int] = set()
        self._blocks_covered = 0
        self._blocks_lost = 0
        self.mismatched = False
        """Whether a kernel was reported that the symbols do not belong to; it is not watched."""
        # When the code is no longer watched, as nobody traces; None while somebody does.
        self._quiet_at: float | None = None
        self._blind = False

    @property
    def blind(self) -> bool:
        """Whether the guest's memory was not found in QEMU, so that nothing is recorded."""
        if self.plan.fd >= 0:
            self._blind = self.plan.words[PlanWord.RAM] == Ram.REFUSED
        return self._blind

    def close(self) -> None:
        """Release the memory. Safe to call twice."""
        self._blocks_covered, self._blind = self.blocks_covered, self.blind
        self._blocks_lost = self.blocks_lost
        self.plan.close()

    @property
    def known(self) -> bool:
        """Whether the kernel's code is known."""
        return self._code is not None

    def set_code(self, code: KernelCode) -> None:
        """Set the kernel's code, before the guest's module reports where it is."""
        self._code = code

    @property
    def code(self) -> KernelCode:
        """The kernel's code. Raises KernelUnknownError while it is unknown."""
        if self._code is None:
            raise KernelUnknownError("the guest's kernel is unknown")
        return self._code

    # Reports of the guest's module. They are not trusted: each address is bounded.

    def describe(self, payload: Sequence[int]) -> int:
        """Handle KERNEL; return an errno. A kernel that is unexpected or ends is not watched.

        Of a guest that was rewound, everything is known if it describes itself as before: see
        :meth:`rewound`.
        """
        expected, self._expected = self._expected, None
        described = self._read(payload)
        if described is not None and described == expected:
            return 0
        if self._attached and described is not None and described == self._described:
            # Root in the guest can have the module describe it again: traces go on.
            return 0
        self._forget()
        if described is None:
            return 0
        if self._code is None:
            return errno.ENOEXEC
        offset = described.entry - self.code.syscall_entry
        if offset % _PAGE or not 0 <= offset < 1 << 30:
            self.mismatched = True
            logger.warning(
                "the guest kernel does not match its symbols "
                "(entry_SYSCALL_64 at %#x): its code is not watched",
                described.entry,
            )
            return errno.ENOEXEC
        self.plan.set_marker(described.marker, described.marker_offset)
        for cpu, (current, preempt) in enumerate(described.cpus):
            self.plan.set_cpu(cpu, current, preempt)
        self.offset = offset
        self._described = described
        for name in tuple(self.code.modules):
            self.code.module_goes(name)
        self.unnamed = True
        self.publish()
        return 0

    def _read(self, payload: Sequence[int]) -> _Described | None:
        """Read a description; None for that of a kernel that ends."""
        if not payload[KernelWord.CPUS]:
            return None
        words = payload[KernelWord.CPU : KernelWord.CPU + 2 * KERNEL_CPUS]
        pairs = zip(words[::2], words[1::2], strict=True)
        return _Described(
            entry=payload[KernelWord.SYSCALL_ENTRY],
            marker=payload[KernelWord.MARKER],
            marker_offset=self._where(payload[KernelWord.MARKER_PHYSICAL], 64),
            cpus=tuple(
                (self._where(current, 8), self._where(preempt, 4)) for current, preempt in pairs
            ),
            vectors=tuple(payload[KernelWord.VECTORS : KernelWord.VECTORS + VECTORS]),
        )

    def rewound(self) -> None:
        """Note that the guest, which is paused and has no owners, was brought back to its ready
        state.

        Restore the modules of that state. So the plan is right for all code that runs from now on,
        even before the guest's module describes its kernel, and what QEMU translated stays valid:
        a page whose content the reset changed is translated again, and the other code has the same
        addresses. When the module then describes the kernel as before, nothing is left to do.
        """
        self._expected = None
        if self.offset is None or self._early is None:
            return
        self.restore_modules()
        self._expected = self._described
        if self._quiet_at is not None:
            self._quiet_at = time.monotonic() + _QUIET_AFTER_RESET_SECONDS

    def _forget(self) -> None:
        """Forget the previous kernel and its addresses.

        Set WANT to 0, so QEMU discards all translated code at the next halt of a vCPU, which the
        module executes. That code has the other kernel's addresses.
        """
        self.offset = None
        self._described = None
        for cpu in range(KERNEL_CPUS):
            self.plan.set_cpu(cpu, NOWHERE, NOWHERE)
        while self._attached:
            slot = self._attached.pop()
            self._cut_off.add(slot)
            self.plan.detach(slot)
        self._quiet_at = None
        self.plan.words[PlanWord.WANT] = 0

    def _where(self, physical: int, alignment: int) -> int:
        where = ram_offset(physical, self._memory) if physical else None
        return NOWHERE if where is None or where % alignment else where

    def module(self, name: str, comes: bool, start: int, size: int) -> int:
        """Handle MODULE and return an errno: code that has not run yet, or will not run again."""
        if self.offset is None:
            return errno.EINVAL
        if comes and size and start + size < 1 << 64:
            self.code.module_comes(name, start, size)
            self.unnamed = True
        else:
            self.code.module_goes(name)
        self.publish()
        return 0

    def load_symbols(self, proc_modules: str, kallsyms: str) -> None:
        """Read the guest's own files: modules loaded before ours, and symbols.

        Args:
            proc_modules: ``/proc/modules`` as root reads it.
            kallsyms: the lines of ``/proc/kallsyms`` that name a module.
        """
        if self.offset is None:
            return
        self.unnamed = False
        early: dict[str, tuple[int, int, str]] = {}
        code = self.code
        by_module: dict[str, list[str]] = {}
        for line in kallsyms.splitlines():
            by_module.setdefault(line.rpartition("[")[2].rstrip("]"), []).append(line)
        bounds = _TextBounds(proc_modules, kallsyms)
        for name, (base, size) in bounds.modules.items():
            if base and name not in code.modules:
                size = min(bounds.text_size(name), code.text_size(name) or size)
                if size:
                    code.module_comes(name, base, size)
                    symbols = "\n".join(by_module.get(name, ()))
                    early[name] = base, size, symbols
        for name, lines in by_module.items():
            if name in code.modules:
                code.name_module(name, "\n".join(lines))
        if self._early is None:
            # Our module tells of all that come later.
            self._early = early
        self.publish()

    def restore_modules(self) -> None:
        """Restore the modules loaded before ours, in a guest that was reset.

        For one that did not describe its kernel as before, to be called after :meth:`describe`. Our
        module reports all others.
        """
        if self.offset is None or self._early is None:
            return
        for name in [each for each in self.code.modules if each not in self._early]:
            self.code.module_goes(name)
        for name, (base, size, symbols) in self._early.items():
            self.code.module_comes(name, base, size)
            self.code.name_module(name, symbols)
        self.unnamed = False
        self.publish()

    def publish(self) -> None:
        """Publish the changed code in the plan."""
        if self.offset is not None and self._described is not None:
            self.plan.set_code(
                self.code.running(self.offset), self._described.vectors, self._described.entry
            )

    # Owners

    def attach(self, slot: int, area: Area, task: int) -> None:
        """Make the task at this guest address the owner of the instance in this slot."""
        if self.offset is None or not task:
            return
        self._attached.add(slot)
        self._cut_off.discard(slot)
        self._quiet_at = None
        self.plan.words[PlanWord.WANT] = 1
        self.plan.attach(slot, task, area.offset, area.size, area.bitmap_words)

    def counts(self, slot: int) -> tuple[int, int]:
        """Return the PCs appended and dropped for the slot's owner since it was attached."""
        known = slot in self._attached or slot in self._cut_off
        return self.plan.counts(slot) if known else (0, 0)

    def detach(self, slot: int) -> tuple[int, int]:
        """End the slot's ownership; return as :meth:`counts`. Its area is no longer written to."""
        if slot in self._cut_off:
            self._cut_off.discard(slot)
            return self.plan.counts(slot)
        if slot not in self._attached:
            return 0, 0
        self._attached.discard(slot)
        if not self._attached:
            self._quiet_at = time.monotonic() + _QUIET_SECONDS
        return self.plan.detach(slot)

    def tick(self) -> None:
        """Stop watching when nobody traces, so that the kernel runs at full speed.

        Called a few times a second.
        """
        if not self._blind and self.blind:
            logger.error("the guest's memory was not found in QEMU, so its kernel is not watched")
        if self._quiet_at is not None and time.monotonic() > self._quiet_at:
            self._quiet_at = None
            self.plan.words[PlanWord.WANT] = 0

    @property
    def blocks_covered(self) -> int:
        """Number of different blocks recorded; also after :meth:`close`."""
        if self.plan.fd >= 0:
            self._blocks_covered = self.plan.words[PlanWord.BLOCKS]
        return self._blocks_covered

    @property
    def blocks_lost(self) -> int:
        """How often a block had no room in the plan and is not recorded; also after close()."""
        if self.plan.fd >= 0:
            self._blocks_lost = self.plan.words[PlanWord.BLOCKS_LOST]
        return self._blocks_lost

    def save(self, directory: Path) -> None:
        """Write what exports and ``symbolize`` need into a run directory.

        Raises :class:`bridge.errors.InfrastructureError`.
        """
        if self._code is None:
            return
        self._code.symbols.save(directory / SYMBOLS_FILE)
        rows = [f"{start:#x}\t{size}\n" for start, size in self.plan.blocks()]
        write_atomically(directory / BLOCKS_FILE, "".join(rows))

    @property
    def api(self) -> int:
        """The version of QEMU's plugin API, 0 before QEMU has started."""
        return self.plan.words[PlanWord.API]
