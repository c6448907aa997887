# SPDX-License-Identifier: Apache-2.0
"""The process that carries the guest's UDP datagrams to the targets, from its start to its end.

QEMU's part is a second network at the guest's hub, which sends each frame of the guest to a Unix
socket and takes frames from there; the process (:mod:`bridge.vm.datagrams`) answers for the
address of the targets. One process serves all endpoints of a guest.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bridge.errors import InfrastructureError
from bridge.targets import TARGET_ADDRESS, UdpEndpoint
from bridge.targets.scratch import ScratchDirectory
from bridge.vm.network import EpochWord
from bridge.vm.process import Process, spawn

__all__ = ["DatagramRelay"]

logger = logging.getLogger(__name__)

_SCRIPT = Path(__file__).with_name("datagrams.py")
_RESET_SECONDS = 10.0


class DatagramRelay:
    """A running relay; close it at the end.

    Args:
        endpoints: at least one.
        coverage_epoch: the word that it changes; None for none.

    Attributes:
        directory: of the two sockets: ``relay`` is the process's, ``qemu`` will be QEMU's.
        pid: of the process.
    """

    def __init__(
        self, endpoints: Sequence[UdpEndpoint], coverage_epoch: EpochWord | None = None
    ) -> None:
        with ExitStack() as stack:
            scratch = ScratchDirectory("udp")
            self.directory = scratch.make()
            stack.callback(scratch.remove)
            # Bound here, so that QEMU finds it.
            frames = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            frames.bind(str(self.directory / "relay"))
            self._control, control = socket.socketpair()
            stack.callback(self._control.close)
            stack.callback(control.close)
            self._control.settimeout(_RESET_SECONDS)
            command = [
                *(sys.executable, "-I", "-S", _SCRIPT, frames.fileno(), control.fileno()),
                *(TARGET_ADDRESS, self.directory / "qemu"),
            ]
            if coverage_epoch is not None:
                command += ["--epoch", coverage_epoch.file, coverage_epoch.offset]
            process = spawn(
                [str(word) for word in command],
                name="UDP relay",
                pass_fds=(frames.fileno(), control.fileno()),
                on_end=self._ended,
            )
            self._closing = False
            self.pid = process.pid
            stack.callback(process.kill)
            control.close()
            self.reset(endpoints)
            self._stack = stack.pop_all()

    def reset(self, endpoints: Sequence[UdpEndpoint] = ()) -> None:
        """Drop all datagrams on the way, and forget the guest's ports.

        Args:
            endpoints: where the services are from now on; empty for where they were.

        Raises:
            InfrastructureError: the process has died, or does not answer.
        """
        ports = (f"{each.guest_port}:{each.host_port}" for each in endpoints)
        try:
            self._control.send(f"{' '.join(ports)}\n".encode())
            answer = self._control.recv(1)
        except OSError as error:
            raise InfrastructureError(f"the UDP relay does not answer: {error}") from error
        if not answer:
            raise InfrastructureError("the UDP relay has ended")

    def close(self) -> None:
        """End the process and remove the sockets. Safe to call twice."""
        self._closing = True
        self._stack.close()

    def _ended(self, process: Process) -> None:
        if not self._closing:
            logger.error(
                "the UDP relay %s; the guest reaches no UDP endpoint any more: %s",
                process.how_it_ended,
                process.stderr_text,
            )
