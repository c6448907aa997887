# SPDX-License-Identifier: Apache-2.0
"""Where coverage comes from: the protocol of a source, and its implementations beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["PC", "Consumed", "Source"]

PC = int
"""A program counter as the guest reads it: a 64-bit kernel address."""


class Consumed(Protocol):
    """What a ledger needs of a source."""

    def consume(self) -> Sequence[PC]:
        """The PCs of the blocks covered since the last call, each once, and forget them.

        Called on the doorbell thread at each system call return of an owner that may have news,
        while the target goes on running on its own threads: what is covered during the call shows
        up in this answer or in the next one, never in none. What the target did before it sent
        something to the guest must show in the first call that begins after that. Its cost must
        follow the number of blocks covered, not the size of the target.
        """


class Source(Consumed, Protocol):
    """Something that covers code and can say which blocks were covered since it was last asked."""

    name: str

    def start(self) -> None:
        """Begin to measure. Code that runs afterwards, on any thread of the target, counts.

        Raises :class:`bridge.errors.SourceError`.
        """

    def stop(self) -> None:
        """End the measurement. Safe to call twice, and on a source that never started."""

    @property
    def blocks_total(self) -> int:
        """How many blocks the source could cover."""

    @property
    def blocks_covered(self) -> int:
        """How many different blocks have been covered since :meth:`start`."""
