# SPDX-License-Identifier: Apache-2.0
"""Coverage on behalf of somebody: what KCOV_REMOTE_ENABLE is on the host's side.

A program in the guest enables handles with KCOV_REMOTE_ENABLE. A target that knows on whose behalf
it works marks that work with the handle::

    from bridge.sources.remote import handle, usb_handle

    def transfer_done(self, bus, data):
        with handle(usb_handle(bus)):
            self.parse(data)

What the functions called inside the block cover, on this thread, goes to the instance that enabled
the handle and to no other: it is in its area when the block ends. Where nobody enabled it, it goes
to nobody (as in Linux, ``kcov_remote_start``), but to the coverage report all the same. The
block's own function is not kept apart, and the block must not be left by ``await``.

Outside a session, and in one whose target has no Python to cover, a block does nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.sources.python.source import PythonSource

__all__ = ["Deliver", "common_handle", "handle", "serving", "usb_handle"]

Deliver = Callable[[int, Sequence[int]], object]
"""Called with a handle and the PCs covered on its behalf; returns when they are in the area."""

_SUBSYSTEM_SHIFT = 56
_USB = 1
_INSTANCES = 1 << 32

_lock = threading.Lock()  # guards the writing of _serving
_serving: tuple[PythonSource, Deliver] | None = None


def common_handle(instance: int) -> int:
    """The handle of the common subsystem with this instance (1 to 2**32-1).

    ``KCOV_SUBSYSTEM_COMMON`` in ``include/uapi/linux/kcov.h``. Raises ValueError.
    """
    if not 1 <= instance < _INSTANCES:
        raise ValueError(f"an instance of the common subsystem is 1 to 2**32-1, not {instance}")
    return instance


def usb_handle(bus: int) -> int:
    """The handle of a USB bus (0 to 2**32-1): ``KCOV_SUBSYSTEM_USB``. Raises ValueError."""
    if not 0 <= bus < _INSTANCES:
        raise ValueError(f"a USB bus is 0 to 2**32-1, not {bus}")
    return _USB << _SUBSYSTEM_SHIFT | bus


@contextlib.contextmanager
def handle(value: int) -> Iterator[None]:
    """What is called inside the block belongs to the handle ``value``."""
    serving = _serving
    if serving is None:
        yield
        return
    source, deliver = serving
    pcs: Sequence[int] = ()
    try:
        with source.divert() as pcs:
            yield
    finally:
        # Also of a block that raises: what ran until then did run.
        if pcs:
            deliver(value, pcs)


@contextlib.contextmanager
def serving(source: PythonSource, deliver: Deliver) -> Iterator[None]:
    """While inside, blocks of :func:`handle` in this process have their coverage delivered."""
    global _serving
    with _lock:
        before, _serving = _serving, (source, deliver)
    try:
        yield
    finally:
        with _lock:
            _serving = before
