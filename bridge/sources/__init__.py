# SPDX-License-Identifier: Apache-2.0
"""Coverage sources: their protocol here, the implementations in the modules below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["PC", "Consumed", "Source"]

PC = int
"""A program counter as the guest reads it: a 64-bit kernel address."""


class Consumed(Protocol):
    """What a ledger needs of a source."""

    def consume(self) -> Sequence[PC]:
        """Return the PCs of the blocks covered since the last call, each once, and forget them.

        Called on the doorbell's thread at each system call return that an owner reports, while the
        target's threads run. What is covered during the call is in this answer or the next one.
        What the target did before it sent something to the guest is in the first call that begins
        after that. The cost follows the number of blocks covered, not the size of the target.
        """


class Source(Consumed, Protocol):
    """A coverage source, with its life and its figures."""

    name: str

    def start(self) -> None:
        """Start to measure; code that runs afterwards, on any thread of the target, counts.

        Raises:
            SourceError: it cannot start.
        """

    def stop(self) -> None:
        """Stop the measurement. Safe to call twice, and on a source that never started."""

    @property
    def blocks_total(self) -> int:
        """Number of blocks that the source could cover."""

    @property
    def blocks_covered(self) -> int:
        """Number of different blocks covered since :meth:`start`."""
