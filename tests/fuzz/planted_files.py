# SPDX-License-Identifier: Apache-2.0
"""A defect planted into a 9P server: it does not take long writes far behind the beginning."""

from __future__ import annotations

__all__ = ["check_message"]

TWRITE = 118
FAR = 60_000
LONG = 100


def check_message(message: bytes) -> None:
    """Look at a message before the server does."""
    if message[4] == TWRITE:
        check_write(
            int.from_bytes(message[11:19], "little"), int.from_bytes(message[19:23], "little")
        )


def check_write(offset: int, count: int) -> None:
    """Fail an assertion."""
    assert offset < FAR or count < LONG, (offset, count)
