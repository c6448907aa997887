# SPDX-License-Identifier: Apache-2.0
"""A power meter on a serial line, as a target: ``--target modbus_target:MeterTarget``.

pymodbus serves the meter's registers with the RTU framing of serial lines. The guest's program
opens ``/dev/target/meter``, a real serial port, as it would open the adapter of a real meter.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from bridge.targets import SerialPort

REGISTERS = [2301, 523, 1203, 499]
"""Volts, amperes, watts and hertz, in tenths."""


class MeterTarget:
    """Unit 1 on the line has :data:`REGISTERS` as its holding registers, from address 0 on."""

    name = "meter"
    packages = ("pymodbus",)
    endpoints = ()
    # 8 data bits, no parity, 19200 bit/s, which are common for meters; no character means more
    # than itself, and read() returns what has come.
    guest_setup = "stty -F /dev/target/meter 19200 raw -echo\n"
    devices: tuple[SerialPort, ...] = ()

    def __init__(self, directory: Path | None) -> None:
        self._thread: threading.Thread | None = None
        self._stop: Callable[[], object] = lambda: None

    def start(self) -> None:
        port: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(port,))
        self._thread.start()
        # What pymodbus raises while it starts is raised here.
        self.devices = (SerialPort("meter", port.result(timeout=60)),)

    def _run(self, port: Future[int]) -> None:
        try:
            asyncio.run(self._serve(port))
        except BaseException as error:
            if port.done():
                raise
            port.set_exception(error)

    async def _serve(self, port: Future[int]) -> None:
        from pymodbus import FramerType
        from pymodbus.server import ModbusTcpServer
        from pymodbus.simulator import DataType, SimData, SimDevice

        meter = SimDevice(1, SimData(0, values=REGISTERS, datatype=DataType.REGISTERS))
        server: Any = ModbusTcpServer(meter, framer=FramerType.RTU, address=("127.0.0.1", 0))
        await server.serve_forever(background=True)
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        self._stop = lambda: loop.call_soon_threadsafe(stopping.set)
        port.set_result(server.transport.sockets[0].getsockname()[1])
        await stopping.wait()
        await server.shutdown()

    def stop(self) -> None:
        if self._thread is not None:
            self._stop()
            self._thread.join()
            self._thread = None
