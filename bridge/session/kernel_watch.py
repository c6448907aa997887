# SPDX-License-Identifier: Apache-2.0
"""The guest kernel as a source, from the plugin in QEMU to the file of its symbols.

A session always has a kernel watch; where the kernel is no source it is a :class:`NoKernelWatch`,
which does nothing.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bridge.config import Settings
from bridge.device.abi import KERNEL_CPUS
from bridge.device.region import Region
from bridge.errors import BridgeError, KernelUnknownError, UnwatchableError, UsageError
from bridge.guest.guest_image import GuestImage, lines_for
from bridge.session.stats import Stats
from bridge.sources.guest_kernel.source import GuestKernel
from bridge.sources.symbolize import KernelPlaces
from bridge.vm.config import WatchFds
from bridge.vm.machine import PLUGIN_REMEDY

if TYPE_CHECKING:
    # Imported where they are used, by runs that use them.
    from bridge.guest.guest import Guest, Output
    from bridge.sources.guest_kernel.filters import KernelFilter

__all__ = ["GuestKernelWatch", "KernelWatch", "NoKernelWatch", "OnDoorbell", "watch_kernel"]

logger = logging.getLogger(__name__)

_EVIDENCE = 4096
_READ_SECONDS = 120.0
"""How long a guest may take to print its kernel's symbols."""
_SYMBOL_SECONDS = 30.0
"""The same for those of its modules."""
_SYMBOL_BYTES = 16 << 20
"""Several times more than all modules of a distribution's kernel that one machine loads."""

OnDoorbell = Callable[[Callable[[], None]], None]
"""Runs a function on the doorbell's thread."""


class KernelWatch(Protocol):
    """What a session does for the guest kernel as a source."""

    @property
    def kernel(self) -> GuestKernel | None:
        """The source; None where the kernel is none."""

    @property
    def plugin(self) -> Path | None:
        """What QEMU loads to watch the kernel."""

    def fds(self, region: Region) -> WatchFds | None:
        """Return the memory that the plugin shares with the bridge."""

    def read_kernel(self, guest: Guest, release: str, on_doorbell: OnDoorbell) -> None:
        """Ask a running kernel for its symbols, if they are not known yet.

        To be called before the guest's module is loaded. A kernel that does not say is no source
        any more.

        Raises:
            KernelUnknownError: it does not say, and was asked for by name.
        """

    def load_symbols(self, guest: Guest, on_doorbell: OnDoorbell) -> None:
        """Ask the guest for the symbols of its modules, if there are new ones.

        Raises:
            KernelUnknownError: it prints more than it can have.
            BridgeError: it does not say, or not in time.
        """

    def restore_modules(self, on_doorbell: OnDoorbell) -> None:
        """Take the modules for loaded that were loaded when the guest was ready: it was reset."""

    def places(self) -> KernelPlaces | None:
        """Return what the kernel's PCs stand for."""

    def save(self, out: Path) -> None:
        """Write what ``symbolize`` and ``export`` need; a failure is logged."""

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""

    def fill(self, stats: Stats) -> None:
        """As :class:`bridge.session.stats.Measured`."""


class NoKernelWatch:
    """The guest kernel is no source."""

    kernel: GuestKernel | None = None
    plugin: Path | None = None

    def fds(self, region: Region) -> WatchFds | None:
        """None."""
        return None

    def read_kernel(self, guest: Guest, release: str, on_doorbell: OnDoorbell) -> None:
        """Do nothing."""

    def load_symbols(self, guest: Guest, on_doorbell: OnDoorbell) -> None:
        """Do nothing."""

    def restore_modules(self, on_doorbell: OnDoorbell) -> None:
        """Do nothing."""

    def places(self) -> KernelPlaces | None:
        """None."""
        return None

    def save(self, out: Path) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Do nothing."""

    def fill(self, stats: Stats) -> None:
        """Add nothing."""


class GuestKernelWatch:
    """The guest kernel is a source.

    Args:
        settings: what to record of it.
        image: what the guest boots from, which may know the kernel's symbols.

    Raises:
        UnwatchableError: QEMU cannot load the plugin, and the kernel was not asked for by name.
        MissingDependencyError: the plugin cannot be compiled.
        UsageError: a filter makes no sense, or there are too many vCPUs.
        SourceError: there is no memory.
    """

    def __init__(self, settings: Settings, image: GuestImage) -> None:
        from bridge.sources.guest_kernel.plugin import build_plugin

        self._settings = settings
        self._by_name = settings.source != "auto"
        if settings.cpus > KERNEL_CPUS:
            refusal = UsageError if self._by_name else UnwatchableError
            raise refusal(
                f"the guest kernel is recorded on at most {KERNEL_CPUS} vCPUs, not {settings.cpus}",
                hint=f"--cpus {KERNEL_CPUS}, or --source python",
            )
        plugin = build_plugin(settings.qemu)
        self.plugin: Path | None = plugin
        if not self._by_name:
            _probe(settings.qemu, plugin)
        code = image.kernel_code(self._filter, settings.vmlinux)
        self._source = GuestKernel(code, settings.memory << 20)
        self.kernel: GuestKernel | None = self._source

    @functools.cached_property
    def _filter(self) -> KernelFilter:
        from bridge.sources.guest_kernel.filters import KernelFilter

        settings = self._settings
        return KernelFilter(
            settings.kernel_include.split(),
            settings.kernel_exclude.split(),
            kcov_rules=not settings.kernel_all,
        )

    def fds(self, region: Region) -> WatchFds | None:
        """As :class:`KernelWatch`."""
        return WatchFds(self._source.plan.fd, region.fd)

    def read_kernel(self, guest: Guest, release: str, on_doorbell: OnDoorbell) -> None:
        """As :class:`KernelWatch`."""
        if self._source.known:
            return

        from bridge.sources.guest_kernel.running import read_kernel

        def shell(script: str, output: Output) -> None:
            guest.run(script, stdout=output, capture=_EVIDENCE, timeout=_READ_SECONDS)

        try:
            lines = lines_for(self._filter, release, self._settings.vmlinux)
            code = read_kernel(shell, self._filter, lines)
        except KernelUnknownError as error:
            if self._by_name:
                raise
            logger.warning("the guest's kernel is no source: %s", error.message)
            self.kernel = None
            return
        on_doorbell(functools.partial(self._source.set_code, code))

    def load_symbols(self, guest: Guest, on_doorbell: OnDoorbell) -> None:
        """As :class:`KernelWatch`."""
        if self.kernel is None or not self._source.unnamed:
            return
        modules = guest.run("cat /proc/modules", check=True, timeout=_SYMBOL_SECONDS).text
        symbols = bytearray()

        def take(data: bytes) -> None:
            symbols.extend(data)
            if len(symbols) > _SYMBOL_BYTES:
                raise KernelUnknownError(
                    f"the symbols of the guest's modules have more than {_SYMBOL_BYTES} bytes"
                )

        guest.run(
            "grep -F '[' /proc/kallsyms",
            stdout=take,
            capture=_EVIDENCE,
            timeout=_SYMBOL_SECONDS,
        )
        text = symbols.decode("ascii", "replace")
        on_doorbell(functools.partial(self._source.load_symbols, modules, text))

    def restore_modules(self, on_doorbell: OnDoorbell) -> None:
        """As :class:`KernelWatch`."""
        on_doorbell(self._source.restore_modules)

    def places(self) -> KernelPlaces | None:
        """As :class:`KernelWatch`."""
        return KernelPlaces(self._source.code.symbols) if self.kernel is not None else None

    def save(self, out: Path) -> None:
        """As :class:`KernelWatch`."""
        try:
            self._source.save(out)
        except BridgeError as error:
            logger.error("the guest kernel's coverage was not saved: %s", error.report())

    def close(self) -> None:
        """As :class:`KernelWatch`."""
        self._source.close()

    def fill(self, stats: Stats) -> None:
        """As :class:`bridge.session.stats.Measured`."""
        if self._source.blind:
            # Logged where nobody asked for the kernel.
            if self._by_name:
                stats.problem = "the guest's memory was not found in QEMU: its kernel has no PCs"
        elif self._source.mismatched and self._by_name:
            stats.problem = "the guest kernel does not match its symbols: it has no PCs"
        elif self.kernel is not None:
            blocks = self._source.blocks_covered
            stats.kernel_blocks_covered = blocks
            if lost := self._source.blocks_lost:
                stats.problem = f"{lost:,} blocks of the guest kernel had no room: they have no PCs"
            stats.pcs_unique += blocks
            stats.sources = sorted({*stats.sources, "kernel"})


def watch_kernel(settings: Settings, image: GuestImage, wanted: bool) -> KernelWatch:
    """Return the kernel watch of a session; raises what :class:`GuestKernelWatch` raises."""
    return GuestKernelWatch(settings, image) if wanted else NoKernelWatch()


def _probe(qemu: str, plugin: Path) -> None:
    """Find out whether this QEMU loads the plugin, before a target is started for nothing."""
    if shutil.which(qemu) is None:
        return
    from bridge.sources.guest_kernel.plugin import why_not_loaded

    why = why_not_loaded(qemu, plugin)
    if why is not None:
        raise UnwatchableError(
            f"this QEMU cannot load the plugin that watches the guest kernel: {why}",
            hint=PLUGIN_REMEDY,
        )
