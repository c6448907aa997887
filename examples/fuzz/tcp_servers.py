# SPDX-License-Identifier: Apache-2.0
"""Servers of TCP as targets: ``--target tcp_servers:Modbus``, ``Redis`` and ``Mqtt``."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bridge.targets import Endpoint


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class _Server:
    """The members of a target that needs nothing in the guest."""

    guest_modules: tuple[str, ...] = ()
    guest_setup = ""
    guest_teardown = ""

    def __init__(self, directory: Path | None = None) -> None:
        self.endpoints: tuple[Endpoint, ...] = ()


class _Loop:
    """A thread with an event loop."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self.thread.start()

    def run(self, call: Callable[[], Awaitable[Any]]) -> Any:
        async def running() -> Any:
            return await call()

        return asyncio.run_coroutine_threadsafe(running(), self.loop).result(20)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


class Modbus(_Server):
    """pymodbus: a device with a hundred of each kind of register, on TCP port 502."""

    name = "modbus"
    packages = ("pymodbus",)

    def start(self) -> None:
        from pymodbus.datastore import (
            ModbusDeviceContext,
            ModbusSequentialDataBlock,
            ModbusServerContext,
        )
        from pymodbus.pdu.device import ModbusDeviceIdentification
        from pymodbus.server import ModbusTcpServer

        def block() -> ModbusSequentialDataBlock:
            return ModbusSequentialDataBlock(1, [17] * 100)

        port = free_port()
        self.loop = _Loop("modbus")

        async def serve() -> ModbusTcpServer:
            device = ModbusDeviceContext(di=block(), co=block(), hr=block(), ir=block())
            identity = ModbusDeviceIdentification(
                info_name={"VendorName": "maker", "ProductCode": "p1"}
            )
            server = ModbusTcpServer(
                ModbusServerContext(device, single=True),
                identity=identity,
                address=("127.0.0.1", port),
            )
            await server.serve_forever(background=True)
            return server

        self.server = self.loop.run(serve)
        self.endpoints = (Endpoint("modbus", port, 502),)

    def stop(self) -> None:
        self.loop.run(self.server.shutdown)
        self.loop.stop()


class Redis(_Server):
    """fakeredis: an empty data base on TCP port 6379."""

    name = "redis"
    packages = ("fakeredis",)

    def start(self) -> None:
        from fakeredis import TcpFakeServer

        self.server = TcpFakeServer(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.endpoints = (Endpoint("redis", self.server.server_address[1], 6379),)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Mqtt(_Server):
    """amqtt: a broker for anonymous clients on TCP port 1883."""

    name = "mqtt"
    packages = ("amqtt",)

    def start(self) -> None:
        from amqtt.broker import Broker

        port = free_port()
        self.loop = _Loop("mqtt")
        anonymous = "amqtt.plugins.authentication.AnonymousAuthPlugin"

        async def serve() -> Broker:
            broker = Broker(
                {
                    "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
                    "plugins": {anonymous: {"allow_anonymous": True}},
                }
            )
            await broker.start()
            return broker

        self.broker = self.loop.run(serve)
        self.endpoints = (Endpoint("mqtt", port, 1883),)

    def stop(self) -> None:
        self.loop.run(self.broker.shutdown)
        self.loop.stop()
