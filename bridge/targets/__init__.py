# SPDX-License-Identifier: Apache-2.0
"""Host-side services under test: what a target is, and the ones that come with the bridge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["DEFAULT_TARGET", "MOUNT_POINT", "TARGET_ADDRESS", "Endpoint", "Target"]

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


class Target(Protocol):
    """A service on the host whose Python code is to be covered.

    The bridge starts the coverage source first and calls :meth:`start` then, on a thread of its
    own that is measured, so that even the import of ``packages`` counts: a target module must not
    import the code under test at its top level.
    """

    name: str
    packages: tuple[str, ...]

    def start(self) -> None:
        """Serve. Returns when requests are answered. Raises whatever the service raises."""

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
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
