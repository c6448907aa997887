# SPDX-License-Identifier: Apache-2.0
"""Coverage of the unmodified guest kernel, watched by a plugin in QEMU; docs/guest-kernel.md."""

from __future__ import annotations

from typing import Final

__all__ = ["BLOCKS_FILE", "SYMBOLS_FILE"]

# Defined here, so that readers of a run need not import the source.
BLOCKS_FILE: Final = "kernel-blocks.tsv"
"""The list of the kernel's covered blocks in a run directory. Each line has a start in hex, a tab,
and a size in bytes."""

SYMBOLS_FILE: Final = "kernel-symbols.tsv"
"""The name of the saved symbols in a run directory."""
