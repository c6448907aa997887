# SPDX-License-Identifier: Apache-2.0
"""What a run directory holds for ``symbolize``: block table, kernel symbols, kernel blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bridge.errors import UsageError
from bridge.sources import PC
from bridge.sources.guest_kernel import BLOCKS_FILE as KERNEL_BLOCKS_FILE
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.pcs import BlockTable
from bridge.sources.symbolize import BLOCKS_FILE, NATIVE_FILE, KernelPlaces

if TYPE_CHECKING:
    from bridge.sources.native.places import NativePlaces

__all__ = ["load_blocks", "load_kernel", "load_native"]


def load_blocks(run: Path) -> BlockTable:
    """Read the block table of a run directory.

    Raises :class:`bridge.errors.UsageError` where there is none and
    :class:`bridge.errors.SourceError` where it is damaged.
    """
    path = run / BLOCKS_FILE
    if not path.is_file():
        raise UsageError(
            f"{run} holds no block table ({BLOCKS_FILE})",
            hint="name the directory of a finished run with --run",
        )
    return BlockTable.load(path)


def load_native(run: Path) -> NativePlaces | None:
    """Read the native modules of a run directory; None if it has none.

    Raises :class:`bridge.errors.SourceError` where the file is damaged.
    """
    path = run / NATIVE_FILE
    if not path.is_file():
        return None
    from bridge.sources.native.modules import ModuleTable
    from bridge.sources.native.places import NativePlaces

    return NativePlaces(ModuleTable.load(path))


def load_kernel(run: Path, vmlinux: Path | None = None) -> KernelPlaces | None:
    """Read the symbols of the guest's kernel in a run directory; None if it has none.

    ``vmlinux`` has the kernel's debug information; by default that of Debian's package is used
    where it is installed. Raises :class:`bridge.errors.UsageError` where it is not there and
    :class:`bridge.errors.SourceError` where the run's files are damaged.
    """
    if vmlinux is not None and not vmlinux.is_file():
        raise UsageError(f"there is no file {vmlinux}")
    if not (run / SYMBOLS_FILE).is_file():
        return None
    # Most runs have nothing of the kernel; the imports are not for them.
    from bridge.results.kernel_export import lines_of, read_blocks
    from bridge.sources.guest_kernel.symbols import KernelSymbols

    blocks: list[PC] = []
    if (run / KERNEL_BLOCKS_FILE).is_file():
        blocks = [block.start for block in read_blocks(run / KERNEL_BLOCKS_FILE)]
    symbols = KernelSymbols.load(run / SYMBOLS_FILE)
    return KernelPlaces(
        symbols,
        blocks,
        lines=lambda: lines_of(run, vmlinux, symbols),
    )
