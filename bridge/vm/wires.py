# SPDX-License-Identifier: Apache-2.0
"""The process that carries the guest's wires: connections to the target through the region.

The guest's part is ``guest/module/wire.c``. One process (``wires.c``) serves all connections of a
guest; the doorbell's thread commands it when one begins or ends, and never sees what they carry.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bridge.device.abi import WIRE_RING_BYTES, WORD, HeaderWord, WireEnd, WireWord
from bridge.device.region import Region
from bridge.targets import AnyEndpoint, UdpEndpoint, UnixEndpoint
from bridge.util.compile import CProgram
from bridge.vm.network import EPOCH_HEADER
from bridge.vm.process import Process, spawn

__all__ = ["WIRES", "WireRelay"]

logger = logging.getLogger(__name__)

WIRES = CProgram(
    "the process for wires",
    Path(__file__).with_name("wires.c"),
    (
        *("-O2", "-Wall", "-Wextra", "-Werror"),
        f"-DRING_BYTES={WIRE_RING_BYTES}",
        *(f"-D{word.name}={word.value}" for word in WireWord),
        *(f"-DWIRE_{kind.name}={kind.value}" for kind in WireEnd),
    ),
    "relays",
    (EPOCH_HEADER,),
)
_ANSWER_SECONDS = 2.0


class WireRelay:
    """A running process; close it at the end.

    Args:
        bell: the eventfd that the guest rings.
        guest_bell: the eventfd that interrupts the guest.
        endpoints: what the guest can connect to.
        changes_epoch: whether it changes the coverage epoch, which every return is reported
            without.

    Raises:
        MissingDependencyError: there is no C compiler.
        InfrastructureError: it cannot be started.
    """

    def __init__(
        self,
        region: Region,
        bell: int,
        guest_bell: int,
        endpoints: Sequence[AnyEndpoint],
        *,
        changes_epoch: bool = True,
    ) -> None:
        self._closing = False
        self.set(endpoints)
        with ExitStack() as stack:
            self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(self._control.close)
            stack.callback(control.close)
            self._control.settimeout(_ANSWER_SECONDS)
            fds = (region.fd, bell, guest_bell, control.fileno())
            epoch = HeaderWord.COVERAGE_EPOCH * WORD if changes_epoch else 0
            words = (fds[0], region.size, epoch, *fds[1:])
            process = spawn(
                [WIRES.build(), *map(str, words)],
                name="process for wires",
                pass_fds=fds,
                on_end=self._ended,
            )
            stack.callback(process.kill)
            control.close()
            self._process = process
            self.pid = process.pid
            self._stack = stack.pop_all()

    def set(self, endpoints: Sequence[AnyEndpoint]) -> None:
        """Take the endpoints' addresses of now; connections that there are stay."""
        self._addresses = {
            each.guest_port: (
                os.fspath(each.host_path.absolute())
                if isinstance(each, UnixEndpoint)
                else str(each.host_port)
            )
            for each in endpoints
            if not isinstance(each, UdpEndpoint)
        }

    def open(self, port: int, offset: int) -> int:
        """Connect the rings at ``offset`` to the endpoint with this port; return an errno."""
        address = self._addresses.get(port)
        if address is None:
            return errno.ECONNREFUSED
        return self._command(f"open {offset} {address}")

    def end(self, offset: int) -> int:
        """End a connection; its memory may be freed if this returns 0."""
        return self._command(f"close {offset}")

    def reset(self) -> None:
        """Reset all connections."""
        self._command("reset")

    def close(self) -> None:
        """End the process, and with it all connections. Safe to call twice."""
        self._closing = True
        self._stack.close()

    def _command(self, text: str) -> int:
        if self._closing:
            return errno.EIO
        try:
            self._control.send(text.encode())
            answer = self._control.recv(1)
        except OSError as error:
            logger.error("the process for wires does not answer: %s", error)
            # It must not write later, where it was told, into memory that is something else then.
            self._process.send_signal(signal.SIGKILL)
            self._control.close()
            return errno.EIO
        return answer[0] if answer else errno.EIO

    def _ended(self, process: Process) -> None:
        if not self._closing:
            logger.error(
                "the process for wires %s; connections through the region have ended: %s",
                process.how_it_ended,
                process.stderr_text,
            )
