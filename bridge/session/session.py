# SPDX-License-Identifier: Apache-2.0
"""A guest with a kcov device that the host fills: everything between "boot" and "gone".

    with Session(Settings()) as session:
        result = session.kcov(["cat", "/mnt/target/README"])

The parts are born in this order and die in the reverse one, whatever happens in between: region,
doorbell, coverage source and target (on a thread of their own), QEMU, SSH.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
import shlex
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from bridge.config import Settings
from bridge.device.abi import WORD, HeaderWord
from bridge.device.doorbell import Doorbell
from bridge.device.ivshmem import IvshmemServer
from bridge.device.kcov import Device, Personality
from bridge.device.region import Region
from bridge.errors import (
    BootTimeoutError,
    BridgeError,
    DoorbellError,
    GuestResetError,
    GuestSetupError,
    InfrastructureError,
    KernelUnknownError,
    MissingDependencyError,
    QemuError,
    TargetError,
    UnwatchableError,
    UsageError,
)
from bridge.guest.guest_image import GuestImage, find_guest_image, lines_for
from bridge.session.isolated import IsolatedTarget
from bridge.session.snapshots import ready_snapshot, remove_snapshot
from bridge.session.status import StatusServer
from bridge.sources import remote
from bridge.sources.comparisons import Comparison, ComparisonLedger
from bridge.sources.guest_kernel.source import GuestKernel
from bridge.sources.ledger import Cursor, Ledger
from bridge.sources.pcs import BlockTable, Location, syscall_pc
from bridge.sources.symbolize import BLOCKS_FILE, KernelPlaces, Symbolizer
from bridge.targets import TARGET_ADDRESS, Target
from bridge.targets.registry import create as create_target
from bridge.vm.accel import Accelerator, choose_accelerator
from bridge.vm.agent import Ready
from bridge.vm.config import MachineConfig, MemoryFds, WatchFds
from bridge.vm.machine import PLUGIN_REMEDY, Machine
from bridge.vm.network import EpochWord, RelayGate
from bridge.vm.snapshot import Snapshot, new_memory

if TYPE_CHECKING:
    # Imported where they are used, by runs that use them; what takes longest, SSH, while the guest
    # goes on.
    from bridge.guest.ssh import CommandResult, Guest, Output
    from bridge.sources.guest_kernel.filters import KernelFilter
    from bridge.sources.python.source import PythonSource

__all__ = ["KcovResult", "Session"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_GUEST_DIRECTORY = "/run/kcov-bridge"
_SET_UP_SECONDS = 60.0
_TEAR_DOWN_SECONDS = 10.0
_RESUME_SECONDS = 20.0
_HANG_UP_SECONDS = 5.0
_HANG_UP_POLL_SECONDS = 0.002
_EVIDENCE = 4096


@dataclass(frozen=True)
class KcovResult:
    """What a command did under kcov: its exit status, its PCs in order, its output."""

    exit_status: int
    pcs: list[int]
    stdout: bytes
    stderr: bytes


class Session:
    """A booted guest and all that stands behind it; a context manager, to be entered once.

    ``out`` is the directory for what the session leaves: ``console.log`` while it runs,
    ``.coverage`` and ``blocks.tsv`` at its end; None: nothing, and no file is made anywhere.
    Entering raises the :class:`bridge.errors.BridgeError` that says what failed, with nothing
    left running. Making one raises :class:`bridge.errors.UsageError` for settings that do not go
    together. ``partial_pcs`` is what stood in the areas when a command under kcov was cut
    off.
    """

    def __init__(self, settings: Settings, out: Path | None) -> None:
        if settings.comparisons and settings.isolate:
            raise UsageError(
                "what a target in a process of its own compares is not recorded",
                hint="leave --comparisons or --isolate away",
            )
        self.settings = settings
        self.partial_pcs: list[int] = []
        self.accelerator: Accelerator | None = None
        self.source: PythonSource | IsolatedTarget | None = None
        self.kernel: GuestKernel | None = None
        self.region: Region | None = None
        self.device: Device[Cursor] | None = None
        self.doorbell: Doorbell[Cursor] | None = None
        self.ready: Ready | None = None
        self.snapshot: Snapshot | None = None
        """What the guest was started from, if it was not booted."""
        self.resets = 0
        """How often the guest was taken back."""
        self.image: GuestImage
        self.target: Target
        self.machine: Machine
        self.guest: Guest
        self._out = out
        self._plugin: Path | None = None
        self._coverage_epoch: EpochWord | None = None
        self._gate: RelayGate
        self._ram = -1
        self._resetting = threading.Lock()  # held by reset()
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        accelerator = choose_accelerator(self.settings.accel)
        try:
            self._start(accelerator)
        except BootTimeoutError as error:
            if accelerator.name != "kvm" or self.settings.accel != "auto":
                raise
            # A KVM that opens and boots nothing; the processor's flags did not tell.
            accelerator = Accelerator("tcg", "nothing booted under KVM")
            logger.warning("%s; once more with %s", error.message, accelerator)
            self._start(accelerator)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # From nothing to a guest that is ready

    def _start(self, accelerator: Accelerator) -> None:
        """With the sources that the settings ask for; where that is left to us, those that work."""
        self.accelerator = accelerator
        logger.info("accelerator: %s", accelerator)
        sources = self.settings.sources(accelerator.name)
        try:
            self._start_with(sources)
        except UnwatchableError as error:
            if self.settings.source != "auto":
                raise
            logger.warning("the guest kernel is not recorded: %s (%s)", error.message, error.hint)
            self._start_with(sources - {"kernel"})

    def _start_with(self, sources: frozenset[str]) -> None:
        self.source = self.kernel = None
        with ExitStack() as stack:
            self._assemble(stack, sources)
            self._stack = stack.pop_all()

    def _assemble(self, stack: ExitStack, sources: frozenset[str]) -> None:
        settings = self.settings
        self.target = create_target(settings.target, settings.target_dir)
        self.image = find_guest_image(settings)
        out = self._output_directory()

        self.region = region = Region(settings.region << 20)
        stack.callback(region.close)
        server = IvshmemServer(region)
        stack.callback(server.close)
        self._gate = RelayGate()
        stack.callback(self._gate.close)
        if "kernel" in sources:
            from bridge.sources.guest_kernel.plugin import build_plugin

            self._plugin = build_plugin()
            self._probe(self._plugin)
            code = self.image.kernel_code(self._kernel_filter, settings.vmlinux)
            self.kernel = GuestKernel(code, settings.memory << 20)
            stack.callback(self.kernel.close)
        comparisons = None
        python = "python" in sources
        if python and settings.isolate:
            isolated = IsolatedTarget(settings.target, settings.target_dir, out, self._deliver)
            self.target = self.source = isolated
        elif python and self.target.packages:
            from bridge.sources.python.source import PythonSource

            data_file = out / ".coverage" if out is not None else None
            self.source = PythonSource(
                self.target.packages, data_file=data_file, comparisons=settings.comparisons
            )
            if settings.comparisons:
                comparisons = ComparisonLedger(self.source, self._source_failed)
        self.device = Device(
            region,
            Ledger([self.source] if self.source else [], self._source_failed),
            Personality(settings.personality),
            syscall_pc if settings.syscall_pcs else None,
            self.kernel,
            comparisons,
        )
        self.doorbell = Doorbell(
            region,
            self.device,
            server.bell,
            poll_seconds=settings.awake,
            kernel=self.kernel,
            silent=self.kernel is not None and self.source is None and not settings.syscall_pcs,
        )
        # Before the source starts: coverage.py measures the threads that start after it.
        self.doorbell.start()
        stack.callback(self.doorbell.stop)
        stack.enter_context(StatusServer(self.status))
        self._start_target(stack, out)
        # A target without endpoints has ways to the guest that nobody here knows of.
        relayed = self.source is None or bool(self.target.endpoints)
        if relayed and not settings.syscall_pcs:
            self.doorbell.rely_on_relays()
            self._coverage_epoch = EpochWord(region.path, HeaderWord.NEWS * WORD)

        self._boot(stack, server, out)
        if self.kernel is not None and out is not None:
            stack.callback(self._save_kernel, self.kernel, out)
        stack.push(self._power_down)
        self._set_up(stack)
        self._learn_modules()

    def _probe(self, plugin: Path) -> None:
        """Where the kernel can be left out: before the target starts, for it starts once."""
        qemu = self.settings.qemu
        if self.settings.source == "auto" and shutil.which(qemu) is not None:
            from bridge.sources.guest_kernel.plugin import why_not_loaded

            why = why_not_loaded(qemu, plugin)
            if why is not None:
                raise UnwatchableError(
                    f"this QEMU cannot load the plugin that watches the guest kernel: {why}",
                    hint=PLUGIN_REMEDY,
                )

    def _boot(self, stack: ExitStack, server: IvshmemServer, out: Path | None) -> None:
        """From the settings to a guest that takes commands."""
        assert self.accelerator is not None
        config = self.image.machine_config(self.settings, self.accelerator)
        config = dataclasses.replace(
            config,
            endpoints=self.target.endpoints,
            coverage_epoch=self._coverage_epoch,
            gate=self._gate.path,
            plugin=self._plugin if self.kernel is not None else None,
        )
        snapshot = self._find_snapshot(config)
        if snapshot is not None:
            try:
                self._start_machine(stack, server, out, config, snapshot)
                return
            except (MissingDependencyError, UnwatchableError, UsageError):
                raise
            except BridgeError as error:
                logger.warning("the guest does not start from its snapshot: %s", error.message)
                logger.debug("%s", error.report())
                remove_snapshot(snapshot)
            assert self.doorbell is not None
            self.doorbell.call(self.doorbell.reset)
        self._start_machine(stack, server, out, config, None)

    def _find_snapshot(self, config: MachineConfig) -> Snapshot | None:
        """The ready guest, saved, if it is to be had; without it the guest boots."""
        settings = self.settings
        if not settings.snapshot or not self.image.can_be_saved or settings.kernel is not None:
            return None
        try:
            modules = self.target.guest_modules
            return ready_snapshot(self.image, config, settings.region << 20, modules)
        except (BootTimeoutError, MissingDependencyError):
            # The guest would not boot either.
            raise
        except BridgeError as error:
            logger.warning("there is no snapshot of the guest: %s", error.report())
            return None

    def _start_machine(
        self,
        stack: ExitStack,
        server: IvshmemServer,
        out: Path | None,
        config: MachineConfig,
        snapshot: Snapshot | None,
    ) -> None:
        """Start QEMU, from a snapshot or by booting."""
        watch = None
        if self.kernel is not None and self.region is not None:
            watch = WatchFds(self.kernel.plan.fd, self.region.fd)
        logger.info("%s %s", "starting" if snapshot is not None else "booting", self.image.name)
        with ExitStack() as attempt:
            memory, loading = None, None
            if snapshot is not None:
                attempt.callback(snapshot.close)
                ram, states = self._memory(snapshot, config, attempt)
                loading = attempt.enter_context(snapshot.loading(ram))
                memory = MemoryFds(ram, states, loading.devices)
            doorbell = attempt.enter_context(server.connect())
            console = out / "console.log" if out is not None else None
            self.machine = Machine(
                config, doorbell=doorbell, console_path=console, watch=watch, memory=memory
            )
            attempt.callback(self.machine.close)
            try:
                self.machine.start()
            except QemuError:
                if loading is not None:
                    loading.check()
                raise
            doorbell.close()
            if loading is not None:
                loading.end()
                self.machine.resume()
                self.machine.dial()
                importlib.import_module("bridge.guest.ssh")
                self.machine.wait_ready(_RESUME_SECONDS)
            self.guest, self.ready = self.image.bring_up(self.machine, attempt, self._read_kernel)
            self.snapshot = snapshot
            stack.push(attempt.pop_all())
        logger.info(
            "guest ready after %.1f s%s: Linux %s",
            self.ready.boot_seconds,
            " (from a snapshot)" if snapshot is not None else "",
            self.ready.kernel,
        )

    @functools.cached_property
    def _kernel_filter(self) -> KernelFilter:
        from bridge.sources.guest_kernel.filters import KernelFilter

        settings = self.settings
        return KernelFilter(
            settings.kernel_include.split(),
            settings.kernel_exclude.split(),
            kcov_rules=not settings.kernel_all,
        )

    def _read_kernel(self, guest: Guest, release: str) -> None:
        """Before the guest's module is loaded: ask the kernel where its code is, if the image could
        not say that. Where it is not known and nobody asked for it by name, it is no source."""
        kernel, doorbell = self.kernel, self.doorbell
        if kernel is None or doorbell is None or kernel.known:
            return

        from bridge.sources.guest_kernel.running import read_kernel

        def shell(script: str, output: Output) -> None:
            guest.run(script, stdout=output, capture=_EVIDENCE)

        try:
            wanted = self._kernel_filter
            lines = lines_for(wanted, release, self.settings.vmlinux)
            code = read_kernel(shell, wanted, lines)
        except KernelUnknownError as error:
            if "auto" not in self.settings.source.split(","):
                raise
            logger.warning("the guest's kernel is no source: %s", error.message)
            self.kernel = None
            return
        doorbell.call(functools.partial(kernel.know, code))

    def _memory(
        self, snapshot: Snapshot, config: MachineConfig, stack: ExitStack
    ) -> tuple[int, int]:
        """The memory, to be filled, and the states of a machine that starts from the snapshot."""
        try:
            self._ram = new_memory(config.memory_mib << 20)
            stack.callback(os.close, self._ram)
            states = snapshot.states()
            stack.callback(os.close, states)
        except OSError as error:
            raise InfrastructureError(f"no memory for the guest: {error.strerror}") from error
        return self._ram, states

    # Back to the guest that is ready

    def reset(self) -> None:
        """Take the used guest back to its ready state, in the same QEMU.

        Its memory, and with it all files, processes and connections; its devices; all instances
        of the kcov device, and the region. Then the target is set up in it again. The target
        itself goes on as it is, and what the guest has covered stays counted.

        A command that runs meanwhile fails with :class:`bridge.errors.GuestResetError`. Raises
        :class:`bridge.errors.UsageError` for a guest that was booted, not started from a snapshot,
        and a :class:`bridge.errors.GuestLostError` for one that is lost.
        """
        if self.snapshot is None:
            raise UsageError(
                "the guest was booted, so there is nothing to take it back to",
                hint="a guest of one of the project's images is started from a snapshot, unless "
                "the setting snapshot forbids it or --kernel is given",
            )
        with self._resetting:
            self.machine.check()
            with self.guest.unreachable():
                self.ready = self.machine.rewind(self._go_back, _RESUME_SECONDS)
            if self.kernel is not None and self.doorbell is not None:
                self.doorbell.call(self.kernel.recall)
            self._prepare()

    def _go_back(self) -> None:
        """While the guest stands still: all that is not QEMU's own."""
        assert self.doorbell is not None
        assert self.snapshot is not None
        self.resets += 1
        self.guest.forget()
        self.doorbell.call(self.doorbell.reset)
        self._gate.reset_all()
        self.snapshot.restore(self._ram)
        # The guest will take the same ports again.
        deadline = time.monotonic() + _HANG_UP_SECONDS
        while any(TARGET_ADDRESS in line for line in self.machine.connections):
            if time.monotonic() > deadline:
                raise InfrastructureError("connections of the guest to its target do not end")
            time.sleep(_HANG_UP_POLL_SECONDS)

    @staticmethod
    def _save_kernel(kernel: GuestKernel, out: Path) -> None:
        try:
            kernel.save(out)
        except BridgeError as error:
            logger.error("the guest kernel's coverage was not saved: %s", error.report())

    def _learn_modules(self) -> None:
        """Ask the guest what modules it has, and for their symbols, if there are new ones."""
        kernel, doorbell = self.kernel, self.doorbell
        if kernel is None or doorbell is None or not kernel.unnamed:
            return
        modules = self.guest.run("cat /proc/modules", check=True).text
        symbols = bytearray()
        self.guest.run("grep -F '[' /proc/kallsyms", stdout=symbols.extend, capture=_EVIDENCE)
        doorbell.call(functools.partial(kernel.learn, modules, symbols.decode("ascii", "replace")))

    def _output_directory(self) -> Path | None:
        if self._out is None:
            return None
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InfrastructureError(
                f"the directory {self._out} cannot be made: {error.strerror}"
            ) from error
        return self._out

    def _start_target(self, stack: ExitStack, out: Path | None) -> None:
        """Source, then target, on one thread of their own: it is measured, and its heirs."""
        if isinstance(self.source, IsolatedTarget):
            self.source.start()
            stack.callback(self.source.stop)
            return
        executor = ThreadPoolExecutor(1, thread_name_prefix="target")
        stack.callback(executor.shutdown)

        def there(function: Callable[[], T]) -> T:
            return executor.submit(function).result()

        if self.source is not None:
            there(self.source.start)
            # Called in the reverse order: the source writes .coverage, then its table is whole.
            if out is not None:
                stack.callback(self.source.table.save, out / BLOCKS_FILE)
            stack.callback(there, self.source.stop)
            stack.enter_context(remote.serving(self.source, self._deliver))
        logger.debug("starting the target %s", self.target.name)
        stack.callback(there, self.target.stop)
        try:
            there(self.target.start)
        except BridgeError:
            raise
        except Exception as error:
            raise TargetError(
                f"the target {self.target.name} raised {type(error).__name__} on start: {error}",
                evidence="".join(traceback.format_exception(error)),
            ) from error

    def _deliver(self, handle: int, pcs: Sequence[int]) -> None:
        """Coverage on behalf of a handle, from the target's thread: into the area, then go on."""
        doorbell, device = self.doorbell, self.device
        assert doorbell is not None
        assert device is not None
        try:
            doorbell.call(functools.partial(device.remote_coverage, handle, pcs))
        except (DoorbellError, TimeoutError) as error:
            logger.warning("coverage for handle %#x is lost: %s", handle, error)

    def _source_failed(self, failure: Exception) -> None:
        """A device without coverage is still a device: the guest's calls must go on."""
        assert self.doorbell is not None
        self.doorbell.source_failed(failure)

    def _power_down(self, kind: type[BaseException] | None, *_: object) -> None:
        """Orderly after good work; in trouble the machine's close() is quick."""
        if kind is None:
            ending = self.machine.powerdown()
            logger.debug("the machine ended by %s", ending.value)

    def _set_up(self, stack: ExitStack) -> None:
        """Make the target usable in the guest; undone at the end, if the guest still is there."""
        if self.target.guest_teardown:
            stack.callback(self._tear_down)
        self._prepare()

    def _prepare(self) -> None:
        # A snapshot has the target's modules.
        for module in self.target.guest_modules if self.snapshot is None else ():
            self._set_up_step(f"load the module {module}", ["modprobe", module])
        if self.target.guest_setup:
            self._set_up_step(f"set up the target {self.target.name}", self.target.guest_setup)

    def _set_up_step(self, what: str, command: str | Sequence[str]) -> None:
        result = self.guest.run(command, timeout=_SET_UP_SECONDS)
        if result.exit_status:
            raise GuestSetupError(
                f"the guest could not {what} (exit status {result.exit_status})",
                evidence=(result.stdout + result.stderr).decode(errors="replace"),
            )

    def _tear_down(self) -> None:
        if self.machine.loss is None:
            try:
                self.guest.run(self.target.guest_teardown, timeout=_TEAR_DOWN_SECONDS)
            except BridgeError as error:
                logger.debug("the target was not taken down in the guest: %s", error)

    def status(self) -> dict[str, Any]:
        """What the device is doing now, for ``kcov-bridge status``; only while it runs.

        Raises :class:`bridge.errors.DoorbellError` and TimeoutError.
        """
        doorbell, device = self.doorbell, self.device
        assert doorbell is not None
        assert device is not None

        def look() -> dict[str, Any]:
            doorbell.look_at_guest()
            for _, kcov in doorbell.instances():
                device.count_watched(kcov)
            return {
                "returns": device.totals.returns,
                "pcs": device.totals.appended,
                "pcs_unique": len(device.unique),
                "lost_pcs": device.totals.dropped,
                "comparisons": device.totals.comparisons,
                "lost_comparisons": device.totals.comparisons_dropped,
                "guest_timeouts": doorbell.guest_timeouts,
                "guest_skipped": doorbell.guest_skipped,
                "source_failures": doorbell.counters.source_failures,
                "instances": [
                    {
                        "slot": slot,
                        "owner": None if kcov.owner is None else kcov.owner & 0xFFFFFFFF,
                        "mode": kcov.mode.value,
                        "words": kcov.size,
                        "appended": kcov.appended,
                        "dropped": kcov.dropped,
                    }
                    for slot, kcov in doorbell.instances()
                ],
            }

        return {
            "pid": os.getpid(),
            "target": self.target.name,
            "accel": self.accelerator.name if self.accelerator else None,
            "kernel": self.ready.kernel if self.ready else None,
            "personality": self.settings.personality,
            **doorbell.call(look),
        }

    # Work in the guest

    def kcov(
        self,
        command: Sequence[str],
        *,
        follow: bool = True,
        unique: bool | None = None,
        timeout: float | None = None,
        stdout: Output | None = None,
        stderr: Output | None = None,
    ) -> KcovResult:
        """Run ``command`` in the guest under ``kcov-exec`` and fetch its PCs.

        ``follow``: its children and threads too. ``unique``: each PC once a process, in the order
        in which they came first; None: where the guest kernel is a source, whose PCs else fill
        every area in a moment. ``timeout`` in seconds. ``stdout`` and ``stderr``
        are given the output as it comes. Raises :class:`bridge.errors.RunTimeoutError`, and a
        :class:`bridge.errors.GuestLostError` when the guest goes away.
        """
        resets = self.resets
        try:
            return self._kcov(command, follow, unique, timeout, stdout, stderr)
        except GuestResetError:
            raise
        except BridgeError as error:
            if self.resets == resets:
                raise
            raise GuestResetError(f"the guest was reset: {shlex.join(command)}") from error

    def _kcov(
        self,
        command: Sequence[str],
        follow: bool,
        unique: bool | None,
        timeout: float | None,
        stdout: Output | None,
        stderr: Output | None,
    ) -> KcovResult:
        resets = self.resets
        file = _guest_file("pcs")
        if unique is None:
            unique = self.kernel is not None and self.settings.personality == "linux"
        options = [*(["-f"] if follow else []), *(["-u"] if unique else [])]
        words = ["kcov-exec", *options, "-b", "-o", file, "--", *command]
        kept = False

        def keep() -> None:
            nonlocal kept
            if not kept:
                kept = True
                self._keep_areas()

        try:
            result = self.guest.run(
                words, timeout=timeout, stdout=stdout, stderr=stderr, before_kill=keep
            )
            pcs = self._fetch(file)
            self._learn_modules()
        except BaseException:
            if self.resets == resets:
                keep()
            raise
        return KcovResult(result.exit_status, pcs, result.stdout, result.stderr)

    def compare(
        self, command: Sequence[str], *, follow: bool = True, timeout: float | None = None
    ) -> list[Comparison]:
        """What the target compares while ``command`` runs in the guest: type, operands, PC.

        The command's exit status and its output are of no account. Raises what :meth:`kcov` does,
        and :class:`bridge.errors.UsageError` without the setting ``comparisons``.
        """
        if not self.settings.comparisons:
            raise UsageError("comparisons are not recorded", hint="set comparisons, --comparisons")
        file = _guest_file("cmp")
        options = ["-b", "-c", *(["-f"] if follow else [])]
        self.guest.run(["kcov-exec", *options, "-o", file, "--", *command], timeout=timeout)
        words = self._fetch(file)
        return list(zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True))

    def _keep_areas(self) -> None:
        """The guest can't say any more what it found: read it where the host wrote it."""
        if self.doorbell is not None and self.device is not None:
            with contextlib.suppress(BridgeError, TimeoutError):
                self.partial_pcs += self.doorbell.call(self.device.read_areas)

    def _fetch(self, file: str) -> list[int]:
        # In memory: a bridge that is killed leaves no file behind.
        received = bytearray()
        line = f"cat {file} && rm {file}"
        result = self.guest.run(line, stdout=received.extend, capture=_EVIDENCE)
        if result.exit_status:
            raise GuestSetupError(
                "the PCs of a command cannot be read in the guest",
                evidence=result.stderr.decode(errors="replace"),
            )
        return memoryview(received[: len(received) // WORD * WORD]).cast("Q").tolist()

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float | None = None,
        stdout: Output | None = None,
        stderr: Output | None = None,
    ) -> CommandResult:
        """Run ``command`` in the guest as it is, without kcov; raises what :meth:`kcov` does."""
        return self.guest.run(command, timeout=timeout, stdout=stdout, stderr=stderr)

    @functools.cached_property
    def _symbolizer(self) -> Symbolizer:
        return Symbolizer(
            self.source.table if self.source else BlockTable(),
            kernel=KernelPlaces(self.kernel.code.symbols) if self.kernel else None,
        )

    def symbolize(self, pc: int) -> Location | str | None:
        """What a PC stands for: a location in the target's code; None for one of no block.

        For a PC of the guest's kernel a text, ``function+0xoffset [module]``.
        """
        return self._symbolizer.lookup(pc) or self._symbolizer.text(pc)


def _guest_file(kind: str) -> str:
    """A name in the guest that is nobody's yet; to ask the guest for one would take a command."""
    return f"{_GUEST_DIRECTORY}/{kind}.{os.urandom(8).hex()}"
