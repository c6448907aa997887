# SPDX-License-Identifier: Apache-2.0
"""Restores a guest's memory inside QEMU, which keeps what QEMU has translated of the guest's code.

After ``loadvm`` QEMU translates all code again, because the memory may have changed behind its
back. That takes several times as long as the rest of a reset. The plugin ``tcg/restorer.c`` changes
the memory as a device would, so QEMU itself forgets what it translated of the pages that change,
and nothing else. Then ``loadvm`` takes a state without the part that has QEMU forget everything
(:func:`bridge.vm.vmstate.keeping_code`).
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from dataclasses import dataclass, fields
from pathlib import Path

from bridge.errors import BridgeError, QemuError
from bridge.sources.guest_kernel.pc_memory import low_memory
from bridge.sources.guest_kernel.plugin import PLUGIN, build_plugin, why_not_loaded
from bridge.util.compile import CProgram

__all__ = ["RESTORER", "Restored", "Restorer", "compiled_restorer", "restorer_arguments"]

logger = logging.getLogger(__name__)

RESTORER = CProgram(
    name="the plugin that restores a guest's memory",
    source=Path(__file__).parent / "tcg" / "restorer.c",
    includes=tuple(each for each in PLUGIN.includes if each.name.startswith("qemu_")),
    flags=PLUGIN.flags,
    folder=PLUGIN.folder,
    suffix=PLUGIN.suffix,
)
GREETING = "restorer: ram=FD,saved=FD,control=FD is missing"
"""The plugin's error without arguments; it shows that QEMU loads it and has what it needs."""

_RESTORE, _TRACK = b"R", b"T"
_SECONDS = 30.0


@dataclass(frozen=True)
class Restored:
    """What the plugin did: ``struct answer`` in ``restorer.c``.

    Attributes:
        error: an errno if the memory is not restored.
        hidden: pages that were restored, but of which QEMU could not be told.
        tracked: 1 if Linux told which pages were written; otherwise all were compared.
        candidates: pages that were compared.
        restored: pages that differed.
        freed: bytes that were given back to the host.
        find_ns: nanoseconds to find the candidates.
        copy_ns: nanoseconds to compare and restore them.
        rest_ns: nanoseconds to give memory back and to take note of what is written from then on.
    """

    error: int
    hidden: int
    tracked: int
    candidates: int
    restored: int
    freed: int
    find_ns: int
    copy_ns: int
    rest_ns: int


_ANSWER = struct.Struct(f"={len(fields(Restored))}Q")


def compiled_restorer(qemu: str) -> Path | None:
    """Return the plugin, compiled on first use; None if this machine or QEMU cannot use it."""
    if os.environ.get("KCOV_BRIDGE_PLAIN", "0") not in ("", "0"):
        return None
    try:
        plugin = build_plugin(qemu, program=RESTORER, greeting=GREETING)
        why = why_not_loaded(qemu, plugin, GREETING)
    except BridgeError as error:
        why = error.report()
    if why is not None:
        logger.debug("the guest's memory is restored from outside of QEMU: %s", why)
        return None
    return plugin


def restorer_arguments(ram: int, saved: int, control: int, memory_mib: int) -> str:
    """Return the plugin's arguments, for QEMU's ``-plugin``."""
    low = low_memory(memory_mib << 20)
    return f"ram={ram},saved={saved},control={control},low={low}"


class Restorer:
    """The bridge's end. One thread at a time; the caller closes the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(_SECONDS)

    def track(self) -> Restored:
        """Take note of what is written from now on, of a guest that is paused and as it was saved.

        Raises: as :meth:`restore`.
        """
        return self._ask(_TRACK)

    def restore(self) -> Restored:
        """Restore the memory of a guest that is paused.

        Raises:
            QemuError: QEMU has ended, or does not answer.
        """
        return self._ask(_RESTORE)

    def _ask(self, request: bytes) -> Restored:
        try:
            self._sock.sendall(request)
            answer = self._sock.recv(_ANSWER.size)
        except OSError as error:
            raise QemuError(f"QEMU does not restore the guest's memory: {error}") from error
        if len(answer) != _ANSWER.size:
            raise QemuError("QEMU ended while it restored the guest's memory")
        return Restored(*_ANSWER.unpack(answer))
