# SPDX-License-Identifier: Apache-2.0
"""Servers of UDP, Unix sockets and a virtio port as targets, each of a package from PyPI."""

from __future__ import annotations

import socketserver
import tempfile
import threading
from pathlib import Path
from typing import Any

from bridge.targets import UdpEndpoint, UnixEndpoint, VirtioPort


class _NoGuestNeeds:
    """The members of a target that needs nothing in the guest."""

    guest_modules: tuple[str, ...] = ()
    guest_setup = ""
    guest_teardown = ""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="kcov-bridge-")


class DnsTarget(_NoGuestNeeds):
    """dnslib's server, which answers for one zone on UDP port 53."""

    name = "dns"
    packages = ("dnslib",)
    endpoints: tuple[UdpEndpoint, ...] = ()
    server: Any = None

    def start(self) -> None:
        from dnslib.server import DNSLogger, DNSServer
        from dnslib.zoneresolver import ZoneResolver

        resolver = ZoneResolver("meter.test. 60 IN A 192.0.2.7")
        logger = DNSLogger(log="-request,-reply,-truncated,-error")
        self.server = DNSServer(resolver, address="127.0.0.1", port=0, logger=logger)
        self.server.start_thread()
        self.endpoints = (UdpEndpoint("dns", self.server.server.server_address[1], 53),)

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server.thread.join()
            self.server.server.server_close()
            self.server = None


class SmtpTarget(_NoGuestNeeds):
    """aiosmtpd on a Unix socket, which the guest reaches at TCP port 25."""

    name = "smtp"
    packages = ("aiosmtpd",)
    endpoints: tuple[UnixEndpoint, ...] = ()
    controller: Any = None

    def start(self) -> None:
        from aiosmtpd.controller import UnixSocketController
        from aiosmtpd.handlers import Sink

        path = Path(self.directory.name, "smtp")
        self.controller = UnixSocketController(Sink(), unix_socket=str(path))
        self.controller.start()
        self.endpoints = (UnixEndpoint("smtp", path, 25),)

    def stop(self) -> None:
        if self.controller is not None:
            self.controller.stop()
            self.controller = None
        self.directory.cleanup()


class AgentTarget(_NoGuestNeeds):
    """A JSON-RPC agent on a virtio port: python-lsp-jsonrpc, with one method."""

    name = "agent"
    packages = ("pylsp_jsonrpc",)
    endpoints = ()
    devices: tuple[VirtioPort, ...] = ()
    server: Any = None

    def start(self) -> None:
        from pylsp_jsonrpc.dispatchers import MethodDispatcher
        from pylsp_jsonrpc.endpoint import Endpoint
        from pylsp_jsonrpc.streams import JsonRpcStreamReader, JsonRpcStreamWriter

        class Methods(MethodDispatcher):  # type: ignore[misc]
            def m_add(self, left: int, right: int) -> int:
                return left + right

        class Talk(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                endpoint = Endpoint(Methods(), JsonRpcStreamWriter(self.wfile).write)
                JsonRpcStreamReader(self.rfile).listen(endpoint.consume)
                endpoint.shutdown()

        path = Path(self.directory.name, "agent")
        self.server = socketserver.ThreadingUnixStreamServer(str(path), Talk)
        threading.Thread(target=self.server.serve_forever).start()
        self.devices = (VirtioPort("agent", path),)

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
        self.directory.cleanup()
