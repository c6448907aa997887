# SPDX-License-Identifier: Apache-2.0
"""Writing to file descriptors that other processes may share."""

from __future__ import annotations

import os
import select

__all__ = ["write_all"]


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of the bytes.

    Raises:
        OSError: they cannot be written.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            # Another process that shares the terminal or pipe has made it non-blocking.
            select.select([], [descriptor], [])
