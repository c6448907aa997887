# SPDX-License-Identifier: Apache-2.0
"""QEMU's own device models as a source: see "QEMU's own devices" in docs/native.md."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bridge.config import Settings
from bridge.errors import MissingDependencyError
from bridge.session.device_host import DeviceHost
from bridge.session.stats import Stats
from bridge.sources.native.memory import PATH_BYTES
from bridge.sources.native.source import NativeSource
from bridge.sources.remote import Deliver
from bridge.sources.symbolize import NATIVE_FILE
from bridge.vm.config import DEFAULT_QEMU
from bridge.vm.device_models import EXTRA_ARGS, QEMU, find_qemu
from bridge.vm.network import EpochWord

__all__ = ["DeviceModels", "with_covered_qemu"]


def with_covered_qemu(settings: Settings) -> Settings:
    """Return the settings with a QEMU whose device models are covered, if they ask for one.

    Raises :class:`bridge.errors.MissingDependencyError` if it is not built.
    """
    if settings.qemu_devices and settings.qemu == DEFAULT_QEMU:
        return settings.replace(qemu=str(find_qemu()))
    return settings


class DeviceModels:
    """QEMU's device models as a source; made first, then started once.

    Args:
        out: directory for the table of native modules; None for nowhere.

    Attributes:
        native: the source, which may cover the target's programs too.
    """

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self.native = NativeSource("qemu")
        self._device: DeviceHost | None = None

    def start(self, device: DeviceHost, deliver: Deliver, epoch: EpochWord | None) -> None:
        """Make the memory that QEMU and the bridge share; raises SourceError."""
        self._device = device
        self.native.start((epoch.file, epoch.offset) if epoch is not None else None, deliver)

    @property
    def environment(self) -> Mapping[str, str]:
        """What QEMU must have in its environment."""
        return {**self.native.environment, **QEMU.environment}

    @property
    def extra_args(self) -> Sequence[str]:
        """Further options of QEMU."""
        return EXTRA_ARGS

    def check(self, process: int, qemu: str) -> None:
        """Raise MissingDependencyError if QEMU, a running process, was not built with coverage."""
        program = os.fsencode(Path(f"/proc/{process}/exe").readlink())[:PATH_BYTES]
        if not any(os.fsencode(module.path) == program for module in self.native.table):
            raise MissingDependencyError(
                f"the device models of {qemu} are not covered: it was not built "
                "with coverage and linked with the run time",
                hint="leave out --qemu; `make qemu-devices` builds one",
            )

    def close(self) -> None:
        """Stop the source and write its modules. Safe to call twice."""
        self.native.stop()
        if self._out is not None and len(self.native.table):
            self.native.save(self._out / NATIVE_FILE)

    def fill(self, stats: Stats) -> None:
        """As :class:`bridge.session.stats.Measured`."""
        stats.sources = sorted({*stats.sources, self.native.name})
        stats.blocks_total += self.native.blocks_total
        stats.blocks_covered += self.native.blocks_covered
        if self._device is not None:
            stats.pcs_unique += len(self.native.taken - self._device.device.unique)
