# SPDX-License-Identifier: Apache-2.0
"""Coverage of the programs that a target starts, handed over as it happens."""

from __future__ import annotations

import errno
import functools
import logging
import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Final

from bridge.device.abi import Comparison
from bridge.device.calls import HostThread
from bridge.errors import SourceError
from bridge.sources import PC
from bridge.sources.by_thread import ThreadOfPc
from bridge.sources.native.go import GoProgram, find_go_program
from bridge.sources.native.handles import HandleServer
from bridge.sources.native.memory import VARIABLE, Kind, NativeMemory, Range, Said, find_calls
from bridge.sources.native.modules import ModuleTable, NativeModule, module_key
from bridge.sources.native.places import NativePlaces
from bridge.sources.native.processes import descendants, read_code, shares
from bridge.sources.pcs import SLOT_BYTES
from bridge.sources.remote import Deliver

__all__ = ["NativeSource"]

_log = logging.getLogger(__name__)


_TYPE_BITS: Final = 7
"""KCOV_CMP_CONST and KCOV_CMP_SIZE(): all that a program may set of a record's type."""


@dataclass(frozen=True)
class _Go:
    """A Go program that is covered, and the number of its first block in the memory."""

    module: NativeModule
    first: int


def _pcs_of(copies: Sequence[tuple[NativeModule, bytes]]) -> set[PC]:
    """Return the PCs of the blocks whose byte is not 0."""
    pcs: set[PC] = set()
    for module, said in copies:
        pcs.update(compress(range(module.first_pc, module.pc(len(said)), SLOT_BYTES), said))
    return pcs


class NativeSource:
    """Blocks of native programs that were built with coverage and linked with the run time.

    The source covers each program that is started with :attr:`environment`, the processes that it
    forks, and the programs that these execute with that environment.

    A source is started and stopped once. :meth:`consume` may be called on any thread.
    """

    def __init__(self, name: str = "native") -> None:
        self.name = name
        self.given = 0
        """Number of PCs that :meth:`consume` has returned."""
        self.table = ModuleTable()
        """The modules that programs have loaded so far."""
        # Guards all below: consume() and stop() may run on different threads.
        self._lock = threading.Lock()
        self._memory: NativeMemory | None = None
        self._running = False
        self._handles: HandleServer | None = None
        # What a program says of each module of the table, by its index in the memory.
        self._said: dict[int, tuple[NativeModule, Said, array[int] | None]] = {}
        self._index_of: dict[tuple[str, Kind], int] = {}
        self._indices = 0
        # By key; several processes may run the same program, at once or one after the other.
        self._go: dict[str, _Go] = {}
        self._go_processes: list[GoProgram] = []
        # Of modules whose blocks all have places: these, sorted, with the blocks' numbers.
        self._orders: dict[int, list[tuple[int, int]]] = {}
        # A look that met blocks of a module without PCs has cleared PENDING, and left them.
        self._placed_since = False
        self._nonsense = 0
        self._covered = 0  # at the end
        self._taken: set[PC] = set()
        self._threads = ThreadOfPc()
        self._by_thread = False

    def start(self, epoch: tuple[str, int] | None = None, deliver: Deliver | None = None) -> None:
        """Make the memory; programs that are started from now on are covered.

        Args:
            epoch: a file and the offset in it of the word that new coverage changes; see
                :mod:`bridge.device.coverage_epoch`.
            deliver: takes what runs on behalf of handles.

        Raises:
            SourceError: there is no memory, or the source was started before.
            BridgeError: the reader cannot be built.
        """
        if self._memory is not None:
            raise SourceError(f"the source {self.name} was already started", hint="make a new one")
        name = ""
        if deliver is not None:
            try:
                self._handles = HandleServer(functools.partial(self._give, deliver))
            except OSError as error:
                raise SourceError(f"no socket for handles: {error.strerror}") from error
            name = self._handles.name
        self._memory = NativeMemory(epoch, name)
        self._running = True

    def _give(self, deliver: Deliver, handle: int, blocks: array[int]) -> None:
        with self._lock:
            memory = self._memory
            if memory is None or not self._running:
                return
            self._place_new(memory)
            pcs = memory.apart(blocks)
            self.given += len(pcs)
        # Not under the lock, which the doorbell's thread needs to consume.
        deliver(handle, pcs)

    @property
    def environment(self) -> Mapping[str, str]:
        """What a program must have in its environment to be covered; empty when stopped."""
        memory = self._memory
        return {VARIABLE: memory.path} if memory is not None and self._running else {}

    @property
    def blocks_total(self) -> int:
        """Number of blocks of all modules that were loaded."""
        return len(self.table)

    @property
    def blocks_covered(self) -> int:
        """Number of different blocks that :meth:`consume` has returned."""
        memory = self._memory
        return memory.covered if memory is not None and self._running else self._covered

    @property
    def taken(self) -> set[PC]:
        """Blocks that a program recorded itself (``kcov_bridge_take_blocks`` in its header)."""
        with self._lock:
            if self._memory is None or not self._running:
                return self._taken
            copies = self._copy_taken(self._memory)
        # Not under the lock: a large program takes milliseconds, and consume() waits.
        return _pcs_of(copies)

    def _copy_taken(self, memory: NativeMemory) -> list[tuple[NativeModule, bytes]]:
        """Return a byte for each block that a program may have recorded itself."""
        return [
            (module, memory.taken(said.first, said.count))
            for module, said, slots in self._said.values()
            if slots is None
        ]

    def consume(self) -> list[PC]:
        """As :class:`bridge.sources.Consumed`; by module, and in the compiler's order."""
        with self._lock:
            return self._consume()

    def add_process(self, process: int) -> None:
        """Cover a running process that no run time tells of: a Go program, and its descendants.

        Programs without coverage of Go are left alone.
        """
        with self._lock:
            memory = self._memory
            if memory is None or not self._running:
                return
            for each in descendants(process):
                try:
                    program = find_go_program(each)
                    if program is not None:
                        self._add_go(memory, program)
                except SourceError as error:
                    _log.warning("process %d is not covered: %s", each, error.message)

    def _add_go(self, memory: NativeMemory, program: GoProgram) -> None:
        for ended in [each for each in self._go_processes if not each.running]:
            ended.close()
            self._go_processes.remove(ended)
        known = self._go.get(program.key)
        if known is not None:
            module = known.module
        else:
            module = self.table.add(program.key, program.path, len(program.blocks))
            module.blocks = program.blocks
        memory_of_process = os.dup(program.memory)
        first = memory.add_words(
            memory_of_process,
            program.process,
            program.address,
            program.slots,
            len(program.blocks),
            module.first_pc,
            flags=program.flags,
            first=known.first if known is not None else None,
        )
        if first is None:
            os.close(memory_of_process)
            program.close()
            _log.warning("%s is not covered: there is no room", program.path)
            return
        self._go[program.key] = _Go(module, first)
        self._go_processes.append(program)
        _log.debug("%s has %d blocks of Go", program.path, len(program.blocks))

    def _learn(self, memory: NativeMemory) -> list[PC]:
        """Look where functions of Go have their counters that have run now; return their PCs."""
        for each in self._go_processes:
            try:
                each.learn()
            except SourceError as error:
                _log.debug("%s", error.message)
        return memory.drain(force=True) or []

    def _consume(self) -> list[PC]:
        memory = self._memory
        if memory is None:
            return []
        pcs = memory.drain() if not self._placed_since else None
        if pcs is None:
            self._place_new(memory)
            self._placed_since = False
            pcs = memory.drain(force=True) or []
        if self._go and memory.found_unknown():
            pcs += self._learn(memory)
        if not pcs:
            return pcs
        self.given += len(pcs)
        return self._threads.unpack(memory.buffer, pcs) if self._by_thread else pcs

    def _place_new(self, memory: NativeMemory) -> None:
        """Give PCs to the blocks of modules that were loaded since the last call."""
        for said in memory.new_modules():
            index, self._indices = self._indices, self._indices + 1
            self._placed_since = True
            if said is None:
                self._nonsense += 1
                memory.place(None, 0)
                continue
            key = module_key(said.build_id, said.path)
            try:
                module, slots = self._new_module(said, key)
            except SourceError as error:
                _log.warning("%s is not covered: %s", said.path, error.message)
                memory.place(None, 0)
                continue
            memory.place(said, module.first_pc, slots)
            self._said[index] = module, said, slots
            self._index_of[key, said.kind] = index
            _log.debug("%s has %d blocks from %#x on", said.path, module.count, module.first_pc)
        while found := memory.new_ranges():
            for each in found:
                self._add_range(memory, each)

    def _new_module(self, said: Said, key: str) -> tuple[NativeModule, array[int] | None]:
        """Return a module that is new to the table, and its slots as for ``NativeMemory.place``."""
        if said.kind is not Kind.TEXT:
            return self.table.add(key, said.path, said.count), None
        if not said.call_bytes:
            raise SourceError("its calls of the coverage callback have an unknown form")
        code = read_code(Path(said.path), said.text_start)
        places, slots = find_calls(code, said.text_start, said.call_target, said.call_bytes)
        if len(slots) < said.count:
            slots.extend([-1] * (said.count - len(slots)))
        module = self.table.add(key, said.path, len(places), after_call=True)
        module.places = places
        return module, slots

    def _add_range(self, memory: NativeMemory, found: Range) -> None:
        """Read counters of a process from now on, if it is one that shares the memory."""
        known = self._said.get(found.module)
        if known is None or known[1].kind is not Kind.COUNTERS or known[1].count != found.count:
            self._nonsense += 1
            return
        try:
            descriptor = os.open(f"/proc/{found.process}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH):
                _log.warning(
                    "the counters of process %d cannot be read: %s", found.process, error.strerror
                )
            return
        # A process that is hostile may name any other, and the bridge may be allowed more than it.
        if not shares(found, memory.descriptor):
            self._nonsense += 1
        elif memory.add_range(descriptor, found, known[1].first):
            return
        os.close(descriptor)

    def record_threads(self, on: bool) -> None:
        """As :class:`bridge.sources.by_thread.ByThread`."""
        with self._lock:
            if self._memory is not None:
                self._by_thread = on
                self._threads.record(self._memory.buffer, on)

    @property
    def thread_of(self) -> Mapping[PC, HostThread]:
        """As :class:`bridge.sources.by_thread.ByThread`."""
        return self._threads.thread_of

    def record_comparisons(self, on: bool) -> None:
        """As :class:`bridge.sources.comparisons.Comparing`."""
        with self._lock:
            if self._memory is not None:
                self._memory.record_comparisons(on)

    def consume_comparisons(self) -> tuple[list[Comparison], int]:
        """As :class:`bridge.sources.comparisons.Comparing`.

        A comparison's PC is that of the last block of its module that begins before it, in the
        order of addresses; 0 if that is not known.
        """
        with self._lock:
            memory = self._memory
            if memory is None:
                return [], 0
            noted, lost = memory.take_comparisons()
            if noted:
                self._place_new(memory)
            return [
                (kind & _TYPE_BITS, left, right, self._pc_before(module, place))
                for kind, left, right, module, place in noted
            ], lost

    def _pc_before(self, index: int, place: int) -> PC:
        """Return the PC of the block in which a place of a module is, as far as that is known."""
        known = self._said.get(index)
        if known is None:
            return 0
        module = known[0]
        order = self._orders.get(index)
        if order is None:
            self._read_places()
            order = sorted((at, number) for number, at in enumerate(module.places) if at)
            if all(module.places):
                self._orders[index] = order
        at = bisect_right(order, (place, module.count)) - 1
        return module.pc(order[at][1]) if at >= 0 else 0

    def places(self) -> NativePlaces:
        """Return what the PCs stand for; for one thread."""
        self.refresh()
        return NativePlaces(self.table, self.refresh)

    def refresh(self) -> None:
        """Read where the blocks of the table lie, which programs add, and which were covered."""
        with self._lock:
            self._read_places()

    def _read_places(self) -> None:
        memory = self._memory
        if memory is None or memory.closed:
            return
        for module, said, slots in self._said.values():
            ever = memory.ever(said.first, said.count)
            if slots is None:
                module.places = memory.places(said.first, said.count)
                now = memory.said(self._index_of[module.key, said.kind])
                module.after_call = now is not None and not now.has_places
                module.covered = ever
            else:
                covered = bytearray(module.count)
                at = ever.find(1)
                while at >= 0:
                    covered[slots[at]] = 1
                    at = ever.find(1, at + 1)
                module.covered = bytes(covered)
        for go in self._go.values():
            go.module.covered = memory.ever(go.first, go.module.count)

    def stop(self) -> None:
        """Stop the measurement. Safe to call twice, and on a source that never started.

        Programs that still run count for nobody from then on.
        """
        if self._handles is not None:
            self._handles.close()
        with self._lock:
            memory = self._memory
            if memory is None or not self._running:
                return
            self._running = False
            # Also what a process that was killed had not announced.
            self._place_new(memory)
            self.given += len(memory.drain(everything=True) or [])
            if self._go and memory.found_unknown():
                self.given += len(self._learn(memory))
            self._taken = _pcs_of(self._copy_taken(memory))
            self._read_places()
            self._say_what_is_lost(memory)
            self._covered = memory.covered
            memory.close()
            for each in self._go_processes:
                each.close()

    def _say_what_is_lost(self, memory: NativeMemory) -> None:
        if memory.other_layout:
            _log.warning(
                "a program of the target is linked with the run time of another version, and was "
                "not covered: link it again, with the library that `kcov-bridge native` names"
            )
        elif not self._indices and not self._go:
            _log.warning(
                "no program of the target has told of its blocks: it was not built with coverage "
                "and linked with the run time (see docs/native.md), or lost its environment"
            )
        if memory.lost_blocks:
            _log.warning("%d native blocks found no room, and are not covered", memory.lost_blocks)
        if self._nonsense:
            _log.warning(
                "%d native modules make no sense and are not covered: a program has written over "
                "the memory of the coverage",
                self._nonsense,
            )
        for module, said, _ in self._said.values():
            if not said.build_id:
                _log.warning(
                    "%s has no build id: its PCs are those of this file's contents", module.path
                )

    def save(self, path: Path) -> None:
        """Write the modules, for ``symbolize`` and ``export``; raises InfrastructureError."""
        self.places().table.save(path)
