# SPDX-License-Identifier: Apache-2.0
"""Targets that fail: in a request, at the start, for want of something in the guest."""

from __future__ import annotations

import socket
import socketserver
import tempfile
import threading
from pathlib import Path

from bridge.targets import (
    Device,
    GuestFile,
    SerialPort,
    UdpEndpoint,
    UnixEndpoint,
    VirtioPort,
)

LATE_SECONDS = 2.0


class FaultyTarget:
    """One service at a serial port, a virtio port, a Unix socket and by UDP; it does as it is told.

    A request and an answer are a line each.
    """

    name = "faulty"
    packages = ("tests.system.faulty_service",)
    guest_modules: tuple[str, ...] = ()
    guest_packages: tuple[str, ...] = ()
    guest_files = (GuestFile("/etc/target", b"the target's\n", 0o600),)
    guest_setup = "stty -F /dev/target/serial raw -echo\n"
    guest_teardown = ""
    devices: tuple[Device, ...] = ()
    endpoints: tuple[UnixEndpoint | UdpEndpoint, ...] = ()

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="kcov-bridge-")
        self.servers: list[socketserver.BaseServer] = []

    def start(self) -> None:
        from tests.system.faulty_service import Datagrams, Lines

        paths = {name: Path(self.directory.name, name) for name in ("serial", "virtio", "unix")}
        for path in paths.values():
            self.servers.append(socketserver.ThreadingUnixStreamServer(str(path), Lines))
        udp = socketserver.ThreadingUDPServer(("127.0.0.1", 0), Datagrams)
        self.servers.append(udp)
        for server in self.servers:
            # A thread that waits for its connection's end keeps nobody.
            server.daemon_threads = True  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever).start()
        self.devices = (
            SerialPort("serial", paths["serial"]),
            VirtioPort("virtio", paths["virtio"]),
        )
        self.endpoints = (
            UnixEndpoint("unix", paths["unix"], 70),
            UdpEndpoint("udp", udp.server_address[1], 70),
        )

    def stop(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.servers = []
        self.directory.cleanup()


class DeafTarget(FaultyTarget):
    """Its socket is there, and nobody listens."""

    def start(self) -> None:
        path = Path(self.directory.name, "deaf")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
        self.devices = (VirtioPort("deaf", path),)
        self.guest_setup = ""


class NoModule(FaultyTarget):
    """The image has no such kernel module."""

    guest_modules = ("floppy",)


class NoPackage(FaultyTarget):
    """The image has no such package, but the other one."""

    guest_packages = ("mount", "cifs-utils")


class NoMount(FaultyTarget):
    """The guest cannot mount what it is to mount."""

    guest_setup = "mkdir -p /mnt/target\nmount -t ext4 /dev/nosuchdisk /mnt/target\n"


class NeverReady(FaultyTarget):
    """A server's loop in start(), where it does not belong."""

    def start(self) -> None:
        super().start()
        self.servers[0].serve_forever()
