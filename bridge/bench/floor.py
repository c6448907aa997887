# SPDX-License-Identifier: Apache-2.0
"""The floor: a C program that answers the guest in place of the doorbell, and does nothing else.

It is compiled for this machine on first use, with the layout of :mod:`bridge.device.abi`. It uses
the same region and the same bell, so the guest, its module and its program are the same.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from bridge.device import abi
from bridge.errors import InfrastructureError
from bridge.session.session import Session
from bridge.util.compile import CProgram
from bridge.vm.process import spawn

__all__ = ["FLOOR", "LAYOUT_FLAGS", "floor"]

_AREA_WORDS = 512 << 10
"""The size that kcov-bench requests."""
_HANDED_OVER_SECONDS = 600.0

_LAYOUT: dict[str, int] = {
    "SLOTS": abi.SLOTS,
    "SLOT_WORDS": abi.SLOT_WORDS,
    "REQUESTS": abi.REQUESTS_OFFSET // abi.WORD,
    "RESPONSES": abi.RESPONSES_OFFSET // abi.WORD,
    "KICK_SLOT_BITS": abi.KICK_SLOT_BITS,
    "KICK": abi.HeaderWord.KICK.value,
    "HOST_STATE": abi.HeaderWord.HOST_STATE.value,
    "HOST_ASLEEP": abi.HostState.ASLEEP.value,
    "HOST_AWAKE": abi.HostState.AWAKE.value,
    "OP_MAP": abi.Op.MAP.value,
    "REQUEST_SEQ": abi.RequestWord.SEQ.value,
    "REQUEST_OP": abi.RequestWord.OP.value,
    "RESPONSE_SEQ": abi.ResponseWord.SEQ.value,
    "RESPONSE_ERROR": abi.ResponseWord.ERROR.value,
    "RESPONSE_FLAGS": abi.ResponseWord.FLAGS.value,
    "RESPONSE_AREA_OFFSET": abi.ResponseWord.AREA_OFFSET.value,
}
LAYOUT_FLAGS = tuple(f"-D{name}={value}" for name, value in _LAYOUT.items())
"""The region's layout, for the compiler."""

FLOOR = CProgram(
    name="the floor of a signal",
    source=Path(__file__).with_name("floor.c"),
    flags=("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", *LAYOUT_FLAGS),
    folder="bench",
)
"""The compiled program: :meth:`bridge.util.compile.CProgram.build`."""


@contextlib.contextmanager
def floor(session: Session, *, asleep: bool = False, answer_ns: int = 0) -> Iterator[None]:
    """Have the floor answer the session's guest in place of its doorbell.

    Each answer takes ``answer_ns`` nanoseconds longer than it has to.

    The guest must have no kcov instance open when this begins and ends.
    """
    program = FLOOR.build()
    doorbell, region = session.doorbell, session.region
    aside, over = threading.Event(), threading.Event()

    def stand_aside() -> None:
        aside.set()
        over.wait(_HANDED_OVER_SECONDS)

    with contextlib.ExitStack() as stack:
        area = doorbell.call(lambda: region.allocate(_AREA_WORDS))
        if area is None:
            raise InfrastructureError("the region has no room for one more area")
        stack.callback(doorbell.call, lambda: region.free(area))
        caller = threading.Thread(
            target=doorbell.call,
            args=(stand_aside, _HANDED_OVER_SECONDS),
            name="floor",
            daemon=True,
        )
        caller.start()
        stack.callback(caller.join)
        stack.callback(over.set)
        aside.wait()
        bell = doorbell._bell
        way = "asleep" if asleep else "busy"
        arguments = [region.fd, region.size, bell, area.offset, way, answer_ns]
        process = spawn([program, *map(str, arguments)], name="floor", pass_fds=(region.fd, bell))
        stack.callback(process.kill)
        yield
        if not process.running:
            raise InfrastructureError(
                f"the floor {process.how_it_ended}", evidence=process.stderr_text
            )
