# SPDX-License-Identifier: Apache-2.0
"""Coverage of the unmodified guest kernel, watched by a plugin in QEMU; docs/guest-kernel.md."""

from __future__ import annotations

from typing import Final

__all__ = ["BLOCKS_FILE", "SYMBOLS_FILE"]

# Here, so that they are known without an import of what writes and reads them.
BLOCKS_FILE: Final = "kernel-blocks.tsv"
"""The name, in a run directory, of the list of the kernel's blocks that were covered: start in hex
and size in bytes, a tab between."""

SYMBOLS_FILE: Final = "kernel-symbols.tsv"
"""The name of the saved symbols in a run directory."""
