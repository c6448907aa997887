# SPDX-License-Identifier: Apache-2.0
"""A guest with a kcov device that the host fills: everything between "boot" and "gone".

    with Session(Settings()) as session:
        result = session.kcov(["cat", "/mnt/target/README"])

Components start in this order and stop in reverse: target host, kernel watch, device host, target
and source, guest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bridge.config import Settings
from bridge.device.abi import Comparison
from bridge.device.calls import LoggedCalls
from bridge.device.doorbell import Doorbell
from bridge.device.kcov import Device, Personality
from bridge.device.lanes import LaneAreas
from bridge.device.region import Region
from bridge.errors import (
    BridgeError,
    GuestLostError,
    GuestResetError,
    InfrastructureError,
    MissingDependencyError,
    TargetError,
    UsageError,
)
from bridge.guest.guest_image import GuestImage, find_guest_image
from bridge.session.device_host import DeviceHost
from bridge.session.events import Booted, Events, GuestLost, Reset, TraceBegan, TraceEnded
from bridge.session.executor import Executor, GuestExecutor, KcovResult
from bridge.session.guest_setup import set_up, tear_down
from bridge.session.isolated import IsolatedTarget, RemoteTarget
from bridge.session.kernel_watch import KernelWatch, watch_kernel
from bridge.session.launcher import Attempt, Launcher, RunningGuest, first_attempt, next_attempt
from bridge.session.stats import Measured, Stats
from bridge.session.status import StatusServer
from bridge.session.target_host import InProcessTarget, TargetHost, TargetState, stop_target
from bridge.sources.comparisons import Comparing
from bridge.sources.guest_kernel.source import GuestKernel
from bridge.sources.ledger import Cursor
from bridge.sources.pcs import BlockTable, Location
from bridge.sources.python.functions import FunctionIndex
from bridge.sources.symbolize import Symbolizer
from bridge.targets import Endpoint
from bridge.targets.description import Description
from bridge.targets.registry import TargetMaker
from bridge.targets.services import CompositeTarget, Services
from bridge.trace.call import Call
from bridge.trace.explained import CodeFinder, ExplainedCalls
from bridge.vm.accel import Accelerator
from bridge.vm.agent import Ready
from bridge.vm.machine import Machine, require_qemu
from bridge.vm.network import served_devices, silent_endpoints
from bridge.vm.restorer import Restored
from bridge.vm.snapshot import Snapshot

if TYPE_CHECKING:
    # Imported while the guest goes on: it takes longest.
    from bridge.guest.guest import CommandResult, Guest, Input, Output, Word
    from bridge.session.device_models import DeviceModels
    from bridge.sources.native.source import NativeSource
    from bridge.sources.python.source import PythonSource

__all__ = ["KcovResult", "Session"]

logger = logging.getLogger(__name__)

_SOONEST_NS = {"kvm": 10_000, "tcg": 50_000}
"""The shortest time in which a target can answer a call of the guest, by accelerator. The fastest
way, through the region, takes several times as long; see docs/performance.md."""
_END_SECONDS = 1.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class _Parts:
    """The components of a session whose guest is ready."""

    accelerator: Accelerator
    image: GuestImage
    target: Description
    by_region: bool
    host: TargetHost
    native: NativeSource | None
    watch: KernelWatch
    device: DeviceHost
    running: RunningGuest
    executor: Executor
    served: frozenset[str]
    """Devices whose back end is a process that ends with the machine."""


class Session:
    """A guest, its target and its kcov device; a context manager, to be entered once.

    Entering starts all components, or none: on an error nothing is left running.

    Args:
        settings: what to start.
        out: directory for what the session leaves: ``console.log`` while it runs, ``.coverage``
            and ``blocks.tsv`` at its end; None for nowhere.
        target: what makes the target, in place of the setting ``target``.
        target_state: what a reset does to the target.
        ssh_port: the port of 127.0.0.1 for SSH; 0 for a free one.

    Raises:
        UsageError: settings that do not go together.
        BridgeError: on entering, what failed.

    Attributes:
        events: what happens, for those who subscribe.
        partial_pcs: the PCs of the last command under kcov that was cut off.
        partial_calls: its calls, if they were traced.
    """

    def __init__(
        self,
        settings: Settings,
        out: str | os.PathLike[str] | None = None,
        *,
        target: TargetMaker | None = None,
        target_state: TargetState = TargetState.KEEP,
        ssh_port: int = 0,
    ) -> None:
        apart = settings.isolate or target_state is TargetState.FORK
        if settings.comparisons and apart:
            raise UsageError(
                "--comparisons cannot be combined with --isolate",
                hint="leave out --comparisons, or --isolate",
            )
        self.settings = settings
        self._target: str | TargetMaker = target if target is not None else settings.target
        self._target_state = target_state
        self._ssh_port = ssh_port
        self.events = Events()
        self.partial_pcs: Sequence[int] = ()
        self.partial_calls: Sequence[Call] = ()
        self._out = Path(out).absolute() if out is not None else None
        self._entered = False
        self._basic = Stats(target=str(self._target), personality=settings.personality)
        self._measured: list[Measured] = []
        self._parts: _Parts | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        if self._entered:
            raise UsageError("a session is entered once", hint="make a new one")
        self._entered = True
        if self.settings.qemu_devices:
            from bridge.session.device_models import with_covered_qemu

            self.settings = with_covered_qemu(self.settings)
        attempt: Attempt | None = first_attempt(self.settings)
        while attempt is not None:
            logger.info("accelerator: %s", attempt.accelerator)
            try:
                self._start(attempt)
                break
            except BridgeError as error:
                attempt = next_attempt(self.settings, attempt, error)
                if attempt is None:
                    raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # From nothing to a guest that is ready

    def _start(self, attempt: Attempt) -> None:
        self._measured = []
        self._basic.accel = attempt.accelerator.name
        self._basic.accel_reason = attempt.accelerator.reason
        with ExitStack() as stack:
            self._parts = self._assemble(stack, attempt)
            self._stack = stack.pop_all()

    def _assemble(self, stack: ExitStack, attempt: Attempt) -> _Parts:
        settings = self.settings
        out = self._output_directory()
        models: DeviceModels | None = None
        if settings.qemu_devices:
            from bridge.session.device_models import DeviceModels

            models = DeviceModels(out)
        host = self._target_host(out, models, measured="python" in attempt.sources)
        # For a start that goes no further; see below.
        stack.push(functools.partial(stop_target, host))
        self._measured.append(host)
        if models is not None:
            self._measured.append(models)
        # Before an image is built for it, which takes minutes.
        require_qemu(settings.qemu)
        host.build_programs()
        if settings.vmlinux is not None:
            from bridge.sources.guest_kernel.lines import find_vmlinux

            find_vmlinux("", settings.vmlinux)
        image = find_guest_image(settings)
        watch = watch_kernel(settings, image, wanted="kernel" in attempt.sources)
        stack.callback(watch.close)
        self._measured.append(watch)
        source, native = host.source, models.native if models is not None else host.native
        comparing: Comparing | None = None if isinstance(source, IsolatedTarget) else source
        if comparing is None:
            comparing = host.native
        device = DeviceHost(
            settings.region << 20,
            source=source,
            native=native,
            comparing=comparing if settings.comparisons else None,
            threads=source if source is not None else native,
            kernel=watch.kernel,
            personality=Personality(settings.personality),
            syscall_pcs=settings.syscall_pcs,
            syscall_comparisons=settings.syscall_comparisons,
            poll_seconds=settings.awake,
            soonest_ns=(
                _SOONEST_NS[attempt.accelerator.name] if settings.attribution == "call" else 0
            ),
        )
        stack.callback(device.close)
        self._measured.append(device)
        if models is not None:
            stack.callback(models.close)
        stack.enter_context(StatusServer(self.status))
        # After the doorbell, whose thread must not be measured.
        stack.push(functools.partial(stop_target, host))
        # With a PC for each return the guest is to report every return.
        coverage_epoch = device.coverage_epoch if not settings.syscall_pcs else None
        if models is not None:
            models.start(device, device.deliver, coverage_epoch)
        target = self._reached(host.start(device.deliver, coverage_epoch), device)
        if coverage_epoch is not None:
            device.rely_on_epoch()
        if source is not None or native is not None:
            # What the target covers of itself when it starts is nobody's yet.
            device.consume()
        if source is not None:
            stack.callback(_warn_of_silence, device, source, source.given)
        launcher = Launcher(
            settings,
            image,
            attempt.accelerator,
            device,
            watch,
            target,
            coverage_epoch=coverage_epoch,
            models=models,
            out=out,
            ssh_port=self._ssh_port,
        )
        stack.enter_context(launcher)
        if out is not None:
            stack.callback(watch.save, out)
        running = launcher.launch()
        stack.push(lambda kind, *_: running.close(orderly=kind is None))
        self._measured.append(running)
        if target.guest_teardown:
            stack.callback(_tear_down, running, target)
        _set_up(running, target)
        watch.load_symbols(running.guest, device.call)
        stack.callback(running.machine.add_loss_listener(self._guest_lost))
        ready, from_snapshot = running.ready, running.snapshot is not None
        self.events.publish(Booted(ready.kernel, ready.boot_seconds, from_snapshot))
        executor = GuestExecutor(
            running.guest,
            device,
            watched=watch.kernel is not None,
            directory=out,
            can_be_unique=settings.personality == "linux",
            explain=self._explain,
            cut_off=self._keep_partial,
        )
        return _Parts(
            attempt.accelerator,
            image,
            target,
            device.serves_wires,
            host,
            native,
            watch,
            device,
            running,
            executor,
            served_devices(target.devices),
        )

    def _target_host(
        self, out: Path | None, models: DeviceModels | None, *, measured: bool
    ) -> TargetHost:
        settings = self.settings
        if self._target_state is TargetState.FORK and not measured:
            raise UsageError(
                "a target that is forked for each reset must be measured",
                hint="have the setting source include python",
            )
        if measured and (settings.isolate or self._target_state is TargetState.FORK):
            return IsolatedTarget(
                self._target,
                settings.target_dir,
                out,
                start_seconds=settings.target_timeout,
                state=self._target_state,
            )
        return InProcessTarget(
            self._target,
            settings.target_dir,
            measured=measured,
            comparisons=settings.comparisons,
            shared=models.native if models is not None else None,
            out=out,
            start_seconds=settings.target_timeout,
        )

    def _reached(self, target: Description, device: DeviceHost) -> Description:
        """Return the target with the set-up for the way on which the guest connects to it."""
        wanted = self.settings.transport
        if wanted == "network" or not target.endpoints:
            return target
        if not target.guest_setup_by_region:
            if wanted == "region":
                raise UsageError(
                    f"the guest cannot connect to the target {target.name} by the region",
                    hint="leave out --transport region; docs/targets.md says what a target needs "
                    "for it",
                )
            return target
        try:
            device.serve_wires(target.endpoints, changes_epoch=not self.settings.syscall_pcs)
        except MissingDependencyError as error:
            if wanted == "region":
                raise
            logger.info("the guest connects to its target by its network: %s", error.message)
            return target
        return target.by_region()

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

    def _keep_partial(self, pcs: Sequence[int], calls: Sequence[Call]) -> None:
        self.partial_pcs = pcs
        self.partial_calls = calls

    def _explain(self, logged: LoggedCalls, pcs: Sequence[int]) -> Sequence[Call]:
        native = self._symbolizer.native_function
        code = CodeFinder(self.symbolize, self.functions.at, native)
        return ExplainedCalls(logged, pcs, code)

    @functools.cached_property
    def functions(self) -> FunctionIndex:
        """The functions of the target's packages."""
        source = self._running.host.source
        return FunctionIndex(source.packages if source is not None else ())

    def _guest_lost(self, error: BridgeError) -> None:
        self.events.publish(GuestLost(error))

    # What it consists of

    @property
    def _running(self) -> _Parts:
        if self._parts is None:
            raise UsageError(
                "the session has no guest: it was not entered, or did not start",
                hint="use it in a with statement",
            )
        return self._parts

    @property
    def accelerator(self) -> Accelerator:
        """What runs the guest, and why."""
        return self._running.accelerator

    @property
    def image(self) -> GuestImage:
        """What the guest was started from."""
        return self._running.image

    @property
    def target(self) -> Description:
        """The target, as it described itself when it served."""
        return self._running.target

    @property
    def target_objects(self) -> tuple[Any, ...]:
        """The target itself, or those of a composite one, in order.

        Where it runs in a process of its own, what stands for it:
        :class:`bridge.session.isolated.RemoteTarget`.
        """
        host = self._running.host
        count = len(self._target) if isinstance(self._target, Services) else 1
        if isinstance(host, IsolatedTarget):
            prefixes = [f"targets.{number}." for number in range(count)] if count > 1 else [""]
            return tuple(RemoteTarget(host, prefix) for prefix in prefixes)
        target = host.target if isinstance(host, InProcessTarget) else None
        return target.targets if isinstance(target, CompositeTarget) else (target,)

    @property
    def source(self) -> PythonSource | IsolatedTarget | None:
        """What covers the target; None where nothing does."""
        return self._running.host.source

    @property
    def native(self) -> NativeSource | None:
        """What covers the target's native programs and QEMU's devices; None where nothing does."""
        return self._running.native

    @property
    def kernel(self) -> GuestKernel | None:
        """The guest kernel as a source; None where it is none."""
        return self._running.watch.kernel

    @property
    def region(self) -> Region:
        """The memory shared with the guest."""
        return self._running.device.region

    @property
    def device(self) -> Device[Cursor]:
        """The kcov device; to be touched on the doorbell's thread alone."""
        return self._running.device.device

    @property
    def doorbell(self) -> Doorbell[Cursor]:
        """What answers the guest."""
        return self._running.device.doorbell

    @property
    def machine(self) -> Machine:
        """QEMU."""
        return self._running.running.machine

    @property
    def guest(self) -> Guest:
        """The guest as a place to run commands."""
        return self._running.running.guest

    @property
    def ready(self) -> Ready:
        """What the guest's agent reported when it was ready the last time."""
        return self._running.running.ready

    @property
    def snapshot(self) -> Snapshot | None:
        """What the guest was started from; None for one that was booted."""
        return self._running.running.snapshot

    @property
    def memory_fd(self) -> int:
        """The guest's memory; raises UsageError for a guest that was booted."""
        return self._running.running.memory_fd

    @property
    def restored(self) -> Restored | None:
        """What QEMU restored of the memory at the last reset; None if that was not QEMU's work."""
        return self._running.running.restored

    @property
    def reset_seconds(self) -> dict[str, float]:
        """What the parts of the last reset took: see "Reset" in docs/performance.md."""
        return dict(self._running.running.reset_seconds)

    @property
    def resets(self) -> int:
        """How often the guest was reset."""
        return self._running.running.resets

    def target_problems(self) -> list[str]:
        """Return what has gone wrong in the target since the last call and raised nothing here.

        See :meth:`bridge.session.target_host.TargetHost.problems`.
        """
        parts = self._running
        return [
            *parts.host.problems(),
            *(
                f"the target no longer listens on its endpoint {name}"
                for name in silent_endpoints(parts.running.endpoints)
            ),
            *(
                f"the target no longer serves its device {name}: the program has ended, and the "
                "guest has not"
                for name in self._unserved_devices()
            ),
        ]

    def _unserved_devices(self) -> list[str]:
        """Return the devices whose back end has ended before the guest."""
        parts = self._running
        names = parts.served - served_devices(parts.target.devices)
        # It also ends when QEMU does, which is perhaps not known yet.
        deadline = time.monotonic() + _END_SECONDS
        while names and self.machine.loss is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return sorted(names) if self.machine.loss is None else []

    @property
    def target_in_guest(self) -> bool:
        """Whether the guest keeps something of the target: what was set up there, or a device."""
        target = self._running.target
        return bool(target.guest_setup or target.devices)

    @property
    def target_pid(self) -> int | None:
        """The process that serves the guest; None where it is this one, or does not run."""
        return self._running.host.serving_pid

    @property
    def target_fault_count(self) -> int:
        """How many exceptions were noted in the target's own process; a look at memory."""
        return self._running.host.fault_count

    @property
    def target_fault_memory(self) -> int | None:
        """A descriptor of the memory whose first word is that number, if there is one."""
        return self._running.host.fault_memory

    def target_stacks(self) -> str:
        """Return where the threads of the target are now; empty if that cannot be had."""
        return self._running.host.stacks()

    # What it says of itself

    def stats(self) -> Stats:
        """Return the figures up to now; at any time, also after the end.

        Where a component cannot tell, its figures are old or missing, and ``problem`` says why.
        """
        stats = dataclasses.replace(self._basic, sources=[], instances=[])
        for component in tuple(self._measured):
            try:
                component.fill(stats)
            except Exception as error:
                stats.problem = str(error) or type(error).__name__
        return stats

    def status(self) -> dict[str, Any]:
        """Return what ``kcov-bridge status`` shows."""
        return {"pid": os.getpid(), **self.stats().as_dict()}

    # Work in the guest

    def run(
        self,
        command: Word | Sequence[Word],
        *,
        timeout: float | None = None,
        stdout: Output | None = None,
        stderr: Output | None = None,
    ) -> CommandResult:
        """Run ``command`` in the guest as it is, without kcov.

        Args:
            command: a line for the guest's ``sh``, or words that no shell changes.
            timeout: seconds.
            stdout, stderr: are given the output as it comes.

        Raises:
            RunTimeoutError: it did not end in time.
            GuestLostError: the guest went away.
        """
        return self.guest.run(command, timeout=timeout, stdout=stdout, stderr=stderr)

    def kcov(
        self,
        command: Word | Sequence[Word],
        *,
        follow: bool = True,
        unique: bool | None = None,
        trace: bool = False,
        timeout: float | None = None,
        stdout: Output | None = None,
        stderr: Output | None = None,
        stdin: Input | bytes = b"",
    ) -> KcovResult:
        """Run ``command`` in the guest under kcov and return its PCs.

        Args:
            command: as for :meth:`run`.
            follow: trace its children and threads too.
            unique: record each PC once a process, in the order in which they came first; None:
                where the guest kernel is a source, whose PCs else are too many, and with ``trace``
                once a call then.
            trace: record its system calls too: ``calls`` of the result.
            timeout: seconds.
            stdout, stderr: are given the output as it comes.
            stdin: its input: bytes, or a binary file.

        Raises:
            RunTimeoutError: it did not end in time.
            GuestLostError: the guest went away.
            IncompleteError: the PCs could not all be kept.
        """
        parts = self._running
        words = _words(command)
        with self._tracing(words) as ended:
            result = parts.executor.kcov(
                words,
                follow=follow,
                unique=unique,
                trace=trace,
                timeout=timeout,
                stdout=stdout,
                stderr=stderr,
                stdin=stdin,
            )
            ended(result.exit_status, len(result.pcs))
            self._load_symbols(parts, result)
        return result

    def load_symbols(self) -> None:
        """Ask the guest for the functions of kernel modules that were loaded meanwhile.

        :meth:`kcov` does so by itself, for modules that its command loaded.

        Raises:
            GuestLostError: the guest went away.
            BridgeError: it could not tell.
        """
        parts = self._running
        parts.watch.load_symbols(parts.running.guest, parts.device.call)

    def _load_symbols(self, parts: _Parts, result: KcovResult) -> None:
        """Ask for the names of modules that a command loaded; it keeps its PCs without them."""
        try:
            self.load_symbols()
        except BaseException as error:
            if isinstance(error, GuestLostError) or not isinstance(error, BridgeError):
                self._keep_partial(result.pcs, result.calls)
                raise
            logger.warning(
                "PCs in modules that were loaded meanwhile have no names: %s", error.message
            )

    def compare(
        self,
        command: Word | Sequence[Word],
        *,
        follow: bool = True,
        timeout: float | None = None,
    ) -> Sequence[Comparison]:
        """Run ``command`` and return what the target compares meanwhile: type, operands, PC.

        The command's exit status and its output are of no account.

        Raises:
            UsageError: the setting ``comparisons`` is off.
            BridgeError: as :meth:`kcov`.
        """
        if not self.settings.comparisons:
            raise UsageError("comparisons are not recorded", hint="set comparisons, --comparisons")
        words = _words(command)
        with self._tracing(words):
            return self._running.executor.compare(words, follow=follow, timeout=timeout)

    @contextlib.contextmanager
    def _tracing(self, words: tuple[str, ...]) -> Iterator[Callable[[int, int], None]]:
        """Publish that a trace begins and ends; a reset in between is the reason of a failure."""
        resets = self.resets
        outcome: tuple[int | None, int] = (None, 0)

        def ended(exit_status: int, pcs: int) -> None:
            nonlocal outcome
            outcome = exit_status, pcs

        self.events.publish(TraceBegan(words))
        try:
            yield ended
        except GuestResetError:
            raise
        except BridgeError as error:
            if self.resets == resets:
                raise
            raise GuestResetError(f"the guest was reset: {shlex.join(words)}") from error
        finally:
            self.events.publish(TraceEnded(words, *outcome))

    def put(
        self,
        local: str | os.PathLike[str] | bytes,
        remote: str | os.PathLike[str],
        mode: int = 0o644,
    ) -> None:
        """Write a file in the guest; see :meth:`bridge.guest.guest.Guest.put`."""
        self.guest.put(local, remote, mode)

    def get(self, remote: str | os.PathLike[str], local: str | os.PathLike[str]) -> None:
        """Copy a file of the guest; see :meth:`bridge.guest.guest.Guest.get`."""
        self.guest.get(remote, local)

    def reset(self) -> None:
        """Reset the used guest to its ready state, in the same QEMU.

        Its memory, and with it all files, processes and connections; its devices; all instances
        of the kcov device, and the region. The target goes on as it is, unless ``target_state``
        says otherwise. Then it is set up in the guest again. What the guest has covered stays
        counted.

        A command that runs meanwhile fails with :class:`bridge.errors.GuestResetError`. A guest
        that is lost because it stopped running (GuestStoppedError) runs again.

        Raises:
            UsageError: the guest was booted, not started from a snapshot.
            GuestLostError: the guest is lost for good.
            TargetError: the target raised something.
        """
        parts = self._running
        renew = functools.partial(_renew, parts)
        keep = self._target_state is TargetState.KEEP
        with parts.running.resetting(parts.device, None if keep else renew):
            parts.watch.restore_modules(parts.device.call)
            if parts.native is not None:
                # What QEMU's devices covered when they were reset is nobody's.
                parts.device.consume()
            _set_up(parts.running, parts.target)
        self.events.publish(Reset(parts.running.resets))

    def open_lane(self, sizes: Sequence[int]) -> LaneAreas:
        """Make a lane with areas of these sizes in words; see :mod:`bridge.device.lanes`.

        Raises:
            RegionError: the region has no room.
            DoorbellError: the device does not answer.
        """
        return self._running.device.open_lane(sizes)

    def close_lane(self, lane: LaneAreas) -> None:
        """End a lane. Safe to call twice."""
        self._running.device.close_lane(lane)

    def take_lines(self) -> dict[str, set[int]]:
        """Return the lines of the target's packages that ran since the last call, by file.

        Unlike PCs these are exact, and belong to no instance. After the end of the session the
        first call returns those of the target's own end.
        """
        source = self._running.host.source
        return source.take_lines() if source is not None else {}

    def symbolize(self, pc: int) -> Location | str | None:
        """Return the location of a PC in the target's code; None if it belongs to no block.

        For a PC of the guest's kernel a text, ``function+0xoffset [module]``.
        """
        return self._symbolizer.lookup(pc) or self._symbolizer.text(pc)

    @functools.cached_property
    def _symbolizer(self) -> Symbolizer:
        parts = self._running
        source, native = parts.host.source, parts.native
        return Symbolizer(
            source.table if source is not None else BlockTable(),
            kernel=parts.watch.places(),
            native=native.places() if native is not None else None,
        )


def _words(command: Word | Sequence[Word]) -> tuple[str, ...]:
    """Return the words of a command; a single line is given to the guest's shell."""
    if isinstance(command, str | bytes | os.PathLike):
        return "sh", "-c", os.fsdecode(command)
    return tuple(os.fsdecode(word) for word in command)


# ---- the target in the guest


def _renew(parts: _Parts) -> Description:
    """Give the target its first state again; its next connections and devices reach it."""
    now = parts.host.renew()
    if parts.by_region:
        now = now.by_region()
    if _on_guest_side(now) != _on_guest_side(parts.target):
        raise TargetError(
            f"the target {now.name} describes itself in another way, now that it was started again",
            evidence=f"before: {parts.target}\nnow:    {now}",
            hint="the guest and its devices stay, so only addresses on the host may differ",
        )
    if parts.host.source is not None or parts.host.native is not None:
        # What it covers of itself when it starts is nobody's.
        parts.device.consume()
    return now


def _on_guest_side(target: Description) -> Description:
    """Return a description without the addresses on the host."""
    return dataclasses.replace(
        target,
        endpoints=tuple(
            Endpoint(f"{type(each).__name__} {each.name}", 0, each.guest_port)
            for each in target.endpoints
        ),
        devices=tuple(
            dataclasses.replace(
                each,
                # QEMU was started with these, unless commands take their place.
                arguments=() if each.on_start else each.arguments,
                on_start=(),
                on_reset=(),
            )
            for each in target.devices
        ),
    )


def _set_up(running: RunningGuest, target: Description) -> None:
    set_up(running.guest, target, modules_loaded=running.snapshot is not None)


def _tear_down(running: RunningGuest, target: Description) -> None:
    if running.machine.loss is None:
        tear_down(running.guest, target)


def _warn_of_silence(
    device: DeviceHost,
    source: PythonSource | IsolatedTarget,
    before: int,
) -> None:
    """Say so where the target answered the guest and no line of its packages ran for it."""
    with contextlib.suppress(BridgeError):
        device.call(device.doorbell.look_at_guest)
        if not device.doorbell.target_answered:
            return
        if isinstance(source, IsolatedTarget):
            source.settle()
        device.consume()
        if source.given > before:
            return
        logger.warning(
            "the target answered the guest, but no line of its packages ran where the source "
            "measures: "
            'see "What is measured" in docs/targets.md',
        )
