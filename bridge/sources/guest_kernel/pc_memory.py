# SPDX-License-Identifier: Apache-2.0
"""Where a q35 machine has its memory: ``pc_q35_init`` in QEMU."""

from __future__ import annotations

__all__ = ["HIGH_MEMORY", "low_memory"]

HIGH_MEMORY = 1 << 32
"""Where the memory begins that has no room below."""


def low_memory(size: int) -> int:
    """Return how many of ``size`` bytes of memory begin at address 0."""
    return size if size < 0xB000_0000 else 0x8000_0000
