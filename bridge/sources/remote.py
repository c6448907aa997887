# SPDX-License-Identifier: Apache-2.0
"""Coverage on behalf of a handle: the host's side of KCOV_REMOTE_ENABLE.

A program in the guest enables handles with KCOV_REMOTE_ENABLE. A target that knows on whose behalf
it works marks that work with the handle::

    from bridge.sources.remote import handle, usb_handle

    def transfer_done(self, bus, data):
        with handle(usb_handle(bus)):
            self.parse(data)

What this thread runs inside the block goes only to the instance that enabled the handle, and is in
its area when the block ends. If no instance enabled the handle, it goes to none (as
``kcov_remote_start`` in Linux); the coverage report has it in any case. The code must not leave the
block by ``await`` or by a switch to another greenlet.

A block does nothing on a thread that no session measures, in a process that the target forked, and
for a target without Python packages.

``bridge.sources.remote`` is the stable import path for targets.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.sources.python.source import PythonSource

__all__ = ["Deliver", "common_handle", "handle", "serving", "usb_handle"]

Deliver = Callable[[int, Sequence[int]], object]
"""Called with a handle and the PCs covered on its behalf; returns when they are in the area."""

_SUBSYSTEM_SHIFT = 56
_USB = 1
_INSTANCES = 1 << 32

_lock = threading.Lock()  # guards the writing of _servings
# Each session's source, and the receiver of its coverage. A block belongs to the sources that
# measure its thread. Replaced, never changed.
_servings: tuple[tuple[PythonSource, Deliver], ...] = ()


def common_handle(instance: int) -> int:
    """Return the handle of the common subsystem with this instance (1 to 2**32-1).

    ``KCOV_SUBSYSTEM_COMMON`` in ``include/uapi/linux/kcov.h``. Raises ValueError.
    """
    if not 1 <= instance < _INSTANCES:
        raise ValueError(f"an instance of the common subsystem is 1 to 2**32-1, not {instance}")
    return instance


def usb_handle(bus: int) -> int:
    """Return the handle of a USB bus (0 to 2**32-1), ``KCOV_SUBSYSTEM_USB``; raises ValueError."""
    if not 0 <= bus < _INSTANCES:
        raise ValueError(f"a USB bus is 0 to 2**32-1, not {bus}")
    return _USB << _SUBSYSTEM_SHIFT | bus


@contextlib.contextmanager
def handle(value: int) -> Iterator[None]:
    """Mark what this thread runs inside the block as work on behalf of the handle ``value``."""
    diverted: list[tuple[Deliver, Sequence[int]]] = []
    try:
        with ExitStack() as stack:
            for source, deliver in _servings:
                if source.measures_this_thread:
                    diverted.append((deliver, stack.enter_context(source.divert())))
            yield
    finally:
        # Also for a block that raises: its code ran until then.
        for deliver, pcs in diverted:
            if pcs:
                deliver(value, pcs)


@contextlib.contextmanager
def serving(source: PythonSource, deliver: Deliver) -> Iterator[None]:
    """While inside, deliver the PCs of :func:`handle` blocks on the source's threads."""
    global _servings
    entry = (source, deliver)
    with _lock:
        _servings = (*_servings, entry)
    try:
        yield
    finally:
        with _lock:
            _servings = tuple(each for each in _servings if each is not entry)
