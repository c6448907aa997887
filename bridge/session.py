# SPDX-License-Identifier: Apache-2.0
"""A guest with a kcov device that the host fills: everything between "boot" and "gone".

    with Session(Settings()) as session:
        result = session.kcov(["cat", "/mnt/target/README"])

The parts are born in this order and die in the reverse one, whatever happens in between: region,
doorbell, coverage source and target (on a thread of their own), QEMU, SSH.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from bridge.config import Settings
from bridge.doorbell import Doorbell, IvshmemServer
from bridge.errors import BridgeError, GuestSetupError, TargetError
from bridge.guest_image import GuestImage, find_guest_image
from bridge.kcov import Device, Personality
from bridge.region import Region
from bridge.sources.ledger import Cursor, Ledger
from bridge.sources.pcs import BlockTable, syscall_pc
from bridge.sources.python import PythonSource
from bridge.sources.symbolize import Location, Symbolizer
from bridge.targets import Target
from bridge.targets.registry import create as create_target
from bridge.vm.accel import Accelerator, choose_accelerator
from bridge.vm.config import MachineConfig
from bridge.vm.machine import Machine
from bridge.vm.report import Ready
from bridge.vm.ssh import CommandResult, Guest

__all__ = ["KcovResult", "Session"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_BUSY_SECONDS = 200e-6
"""How long the host stays awake after a signal; tests/bench/bench_signal.py shows what it wins."""

_GUEST_DIRECTORY = "/run/kcov-bridge"
_PROGRESS_SECONDS = 2.0
Output = Callable[[bytes], None]


@dataclass(frozen=True)
class KcovResult:
    """What a command did under kcov: its exit status, its PCs in order, its output."""

    exit_status: int
    pcs: list[int]
    stdout: bytes
    stderr: bytes


class Session:
    """A booted guest and all that stands behind it; a context manager, to be entered once.

    ``out`` is the directory for what the run leaves: ``console.log`` while it runs, ``.coverage``
    and ``blocks.json`` at the end. Entering raises the :class:`bridge.errors.BridgeError` that
    says what failed, with nothing left running.
    """

    def __init__(self, settings: Settings, out: Path | None = None) -> None:
        self.settings = settings
        self.out = settings.out if out is None else out
        self.accelerator: Accelerator
        self.image: GuestImage
        self.target: Target
        self.device: Device[Cursor]
        self.doorbell: Doorbell[Cursor]
        self.source: PythonSource | None = None
        self.machine: Machine
        self.guest: Guest
        self.ready: Ready | None = None
        self._stack = contextlib.ExitStack()
        self._results = 0

    def __enter__(self) -> Session:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # From nothing to a guest that is ready

    def _start(self, stack: contextlib.ExitStack) -> None:
        settings = self.settings
        self.out.mkdir(parents=True, exist_ok=True)
        self.accelerator = choose_accelerator(settings.accel)
        logger.info("accelerator: %s (%s)", self.accelerator.name, self.accelerator.reason)
        self.target = create_target(settings.target, settings.target_dir)
        self.image = find_guest_image(settings)

        region = Region(settings.region << 20)
        stack.callback(region.close)
        server = IvshmemServer(region)
        stack.callback(server.close)
        if self.target.packages:
            self.source = PythonSource(self.target.packages, data_file=self.out / ".coverage")
        self.device = Device(
            region,
            Ledger([self.source] if self.source else []),
            Personality(settings.personality),
            syscall_pc if settings.syscall_pcs else None,
        )
        self.doorbell = Doorbell(region, self.device, server.bell, busy_seconds=_BUSY_SECONDS)
        # Before the source starts: coverage.py measures the threads that start after it.
        self.doorbell.start()
        stack.callback(self.doorbell.stop)
        self._start_target(stack)

        self.machine = Machine(
            self._machine_config(),
            doorbell=server.qemu_socket,
            console_path=self.out / "console.log",
        )
        stack.callback(self.machine.close)
        server.handshake()
        with _progress("booting"):
            self.machine.start()
            server.qemu_socket.close()
            self.guest = self.image.connect(self.machine, stack)
            self.ready = self.image.ready(self.machine, self.guest)
        self._set_up(stack)

    def _start_target(self, stack: contextlib.ExitStack) -> None:
        """Source, then target, on one thread of their own: it alone is measured, with its heirs."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="target")
        stack.callback(executor.shutdown)

        def there(function: Callable[[], T]) -> T:
            return executor.submit(function).result()

        if self.source is not None:
            there(self.source.start)
            stack.callback(self._save_blocks, self.source.table)
            stack.callback(there, self.source.stop)
        try:
            there(self.target.start)
        except BridgeError:
            raise
        except Exception as error:
            raise TargetError(
                f"the target {self.target.name} raised {type(error).__name__} when started: {error}"
            ) from error
        stack.callback(there, self.target.stop)

    def _save_blocks(self, table: BlockTable) -> None:
        table.save(self.out / "blocks.json")

    def _machine_config(self) -> MachineConfig:
        settings = self.settings
        return self.image.machine_config(
            accelerator=self.accelerator,
            memory_mib=settings.memory,
            cpus=settings.cpus,
            endpoints=self.target.endpoints,
            boot_timeout=settings.boot_timeout,
            qemu=settings.qemu,
        )

    def _set_up(self, stack: contextlib.ExitStack) -> None:
        """Make the target usable in the guest; undone, as far as the guest is there, at the end."""
        stack.callback(self.machine.powerdown)
        self.guest.run(["mkdir", "-p", _GUEST_DIRECTORY], check=True)
        for module in self.target.guest_modules:
            self._set_up_step(f"load the module {module}", ["modprobe", module])
        if self.target.guest_setup:
            self._set_up_step("set the target up", ["sh", "-c", self.target.guest_setup])
        if self.target.guest_teardown:
            stack.callback(self._tear_down)

    def _set_up_step(self, what: str, command: Sequence[str]) -> None:
        with _progress(what):
            result = self.guest.run(command, timeout=60)
        if result.exit_status:
            raise GuestSetupError(
                f"the guest could not {what} (exit status {result.exit_status})",
                evidence=(result.stdout + result.stderr).decode(errors="replace"),
            )

    def _tear_down(self) -> None:
        if self.machine.loss is None:
            with contextlib.suppress(BridgeError):
                self.guest.run(["sh", "-c", self.target.guest_teardown], timeout=10)

    # Work in the guest

    def kcov(
        self,
        command: Sequence[str],
        *,
        follow: bool = True,
        timeout: float | None = None,
        stdout: Output | None = None,
        stderr: Output | None = None,
    ) -> KcovResult:
        """Run ``command`` in the guest under ``kcov-exec`` and fetch its PCs.

        ``follow``: its children and threads too. ``timeout`` in seconds. ``stdout`` and ``stderr``
        are given the output as it comes. Raises :class:`bridge.errors.RunTimeoutError` and
        :class:`bridge.errors.GuestLostError`.
        """
        self._results += 1
        file = f"{_GUEST_DIRECTORY}/pcs.{self._results}"
        words = ["kcov-exec", *(["-f"] if follow else []), "-o", file, "--", *command]
        result = self.guest.run(words, timeout=timeout, stdout=stdout, stderr=stderr)
        pcs = self.guest.run(["sh", "-c", f"cat {file} && rm {file}"], capture=None)
        return KcovResult(result.exit_status, parse_pcs(pcs), result.stdout, result.stderr)

    def run(
        self,
        command: Sequence[str] | str,
        *,
        timeout: float | None = None,
        stdout: Output | None = None,
        stderr: Output | None = None,
    ) -> CommandResult:
        """Run ``command`` in the guest as it is, without kcov."""
        return self.guest.run(command, timeout=timeout, stdout=stdout, stderr=stderr)

    @functools.cached_property
    def _symbolizer(self) -> Symbolizer:
        return Symbolizer(self.source.table if self.source else BlockTable())

    def symbolize(self, pc: int) -> Location | None:
        """What a PC stands for, or None for an address that is no block's."""
        return self._symbolizer.lookup(pc)
