# SPDX-License-Identifier: Apache-2.0
"""Host-side services under test: what a target is, and the ones that come with the bridge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bridge.targets.devices import (
    DEVICE_DIRECTORY,
    BlockDevice,
    Device,
    QemuDevice,
    SerialPort,
    Tpm,
    VhostUserFs,
    VirtioPort,
)

__all__ = [
    "DEFAULT_TARGET",
    "DEVICE_DIRECTORY",
    "MOUNT_POINT",
    "TARGET_ADDRESS",
    "AnyEndpoint",
    "BlockDevice",
    "Device",
    "DeviceTarget",
    "Endpoint",
    "GuestFile",
    "NativeTarget",
    "QemuDevice",
    "SerialPort",
    "Target",
    "Tpm",
    "UdpEndpoint",
    "UnixEndpoint",
    "VhostUserFs",
    "VirtioPort",
]

DEFAULT_TARGET = "plan9"
"""The target that has a default workload."""

MOUNT_POINT = "/mnt/target"
"""Where the guest mounts a tree of files."""

TARGET_ADDRESS = "10.0.2.100"
"""Where the guest finds the targets: an address of QEMU's user network that is nothing else there
(.2 is the host, .3 the name server, .4 the file server, .15 and up the guests)."""


@dataclass(frozen=True)
class Endpoint:
    """A TCP service of a target, as the guest is to reach it.

    The guest connects to :data:`TARGET_ADDRESS`, ``guest_port``, and reaches
    127.0.0.1:``host_port``; it reaches nothing else on the host.
    """

    name: str
    host_port: int
    guest_port: int


@dataclass(frozen=True)
class UnixEndpoint:
    """A service of a target that listens on a Unix socket (a stream) instead of a port.

    The guest connects with TCP to :data:`TARGET_ADDRESS`, ``guest_port``.
    """

    name: str
    host_path: Path
    guest_port: int


@dataclass(frozen=True)
class UdpEndpoint:
    """A UDP service of a target, as the guest is to reach it.

    What the guest sends to :data:`TARGET_ADDRESS`, ``guest_port``, arrives at
    127.0.0.1:``host_port``, from a port of its own for each port of the guest.
    """

    name: str
    host_port: int
    guest_port: int


AnyEndpoint = Endpoint | UdpEndpoint | UnixEndpoint
"""What a target may name as an endpoint."""


@dataclass(frozen=True)
class GuestFile:
    """A file that a target needs in the guest, written before ``guest_setup`` runs.

    Its directory must exist.
    """

    path: str
    content: bytes
    mode: int = 0o644


class Target(Protocol):
    """A service on the host whose Python code is to be covered.

    The bridge starts the coverage source first and calls :meth:`start` then, on a thread of its
    own that is measured, so that even the import of ``packages`` counts: a target module must not
    import the code under test at its top level.

    Of the members only ``name``, ``packages``, :meth:`start` and :meth:`stop` must be there; the
    others count as empty where they are missing, as do those of :class:`DeviceTarget`.
    """

    name: str
    packages: tuple[str, ...]

    def start(self) -> None:
        """Serve. Returns when requests are answered. Raises whatever the service raises."""

    @property
    def endpoints(self) -> Sequence[AnyEndpoint]:
        """What the guest must be able to reach; valid after :meth:`start`."""

    @property
    def guest_modules(self) -> tuple[str, ...]:
        """Kernel modules to load in the guest with modprobe before :attr:`guest_setup`."""

    @property
    def guest_setup(self) -> str:
        """A shell script, run by root in the guest after boot: mounts, devices."""

    @property
    def guest_teardown(self) -> str:
        """A shell script, run by root in the guest after the workload; may fail."""

    def stop(self) -> None:
        """End the service and join its threads. Safe to call twice."""


class DeviceTarget(Target, Protocol):
    """A target with the members that are optional; each counts as empty where it is missing.

    They are read once, when :meth:`start` has returned, as the others are.
    """

    @property
    def devices(self) -> Sequence[Device]:
        """Devices that QEMU gives the guest; valid after :meth:`start`."""

    @property
    def guest_files(self) -> Sequence[GuestFile]:
        """Files to write in the guest before :attr:`guest_setup`."""

    @property
    def guest_setup_by_region(self) -> str:
        """What takes the place of :attr:`guest_setup` where the guest connects by the region.

        ``kcov-wire PORT COMMAND`` runs a command whose descriptor 3 is a connection to the
        endpoint with this port. Empty for a target that only the network leads to.
        """

    @property
    def guest_packages(self) -> Sequence[str]:
        """Debian packages that the guest's image must have."""


class NativeTarget(Target, Protocol):
    """A target that starts native programs which were built with coverage: see docs/native.md.

    The members are optional, as those of :class:`DeviceTarget` are.
    """

    @property
    def native(self) -> bool:
        """Whether it does; read before :meth:`start`."""

    def build_programs(self) -> None:
        """Build programs that are missing, with progress on stderr; called before :meth:`start`.

        It may take minutes, and runs on the thread of who starts the session.
        """

    @property
    def processes(self) -> Sequence[int]:
        """The processes of its Go programs, which no run time announces; valid after start."""

    def cover_programs(self, environment: Mapping[str, str]) -> None:
        """Take the variables that a program must have to be covered; called before each start."""
