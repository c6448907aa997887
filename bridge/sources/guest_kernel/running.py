# SPDX-License-Identifier: Apache-2.0
"""The code of a kernel that is unknown until it runs, from the guest's own files.

The files are read as root before the bridge's module is loaded, which then reports the addresses.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Final

from bridge.errors import KernelUnknownError, SourceError
from bridge.sources.guest_kernel.code import KernelCode
from bridge.sources.guest_kernel.filters import KernelFilter
from bridge.sources.guest_kernel.lines import Lines
from bridge.sources.guest_kernel.placement import ModulePlacement
from bridge.sources.guest_kernel.symbols import KernelSymbols, kaslr_offset

__all__ = ["kernel_of", "placement_of", "read_kernel"]

logger = logging.getLogger(__name__)

_SYMBOLS: Final = "grep -v ']$' /proc/kallsyms"
# A note of /proc/kcore (VMCOREINFO) has it: arch_crash_save_vmcoreinfo() in arch/x86/kernel.
_OFFSET: Final = "head -c 65536 /proc/kcore | grep -a -o 'KERNELOFFSET=[0-9a-f]*'"
_MODULES: Final = "find /lib/modules/\"$(uname -r)\"/ -name '*.ko*' -type f -printf '%s %f\\n'"

_MAX_BYTES: Final = 64 << 20
"""Limit for the symbols' text; larger than any kernel's."""
_PACKED: Final = 4
"""Upper bound of a module's text size relative to its compressed file."""

Shell = Callable[[str, Callable[[bytes], object]], None]
"""Runs a script in the guest as root and passes its output on as it comes."""


def read_kernel(shell: Shell, wanted: KernelFilter, lines: Lines | None) -> KernelCode:
    """Return the kernel of a running guest; raises as :func:`kernel_of`."""
    symbols, offset, modules = (_output(shell, script) for script in (_SYMBOLS, _OFFSET, _MODULES))
    return kernel_of(symbols, offset, modules, wanted, lines)


def kernel_of(
    kallsyms: str, offset: str, modules: str, wanted: KernelFilter, lines: Lines | None
) -> KernelCode:
    """Return the kernel's code from the text of its files.

    Args:
        kallsyms: ``/proc/kallsyms``.
        offset: ``KERNELOFFSET=`` and hex digits; empty if the kernel does not report it.
        modules: size and name of each module's file, one a line.
        wanted: what to record.
        lines: source lines, if a filter names files.

    Raises:
        KernelUnknownError: the kernel hides its symbols, or lacks some that are needed.
        UsageError: a filter is invalid.
    """
    said = re.search(r"^KERNELOFFSET=([0-9a-f]{1,16})$", offset, re.MULTILINE)
    moved = kaslr_offset(kallsyms, int(said[1], 16) if said else None)
    logger.debug("KASLR offset of the guest's kernel: %#x", moved)
    return KernelCode(
        KernelSymbols.from_kallsyms(kallsyms, moved), placement_of(modules), wanted, lines
    )


def placement_of(files: str) -> ModulePlacement:
    """Return the placement of modules, from lines with size and name of each module's file.

    The bound is the same on each run, and no text is larger.
    """
    sizes: dict[str, int] = {}
    for size, name, packed in re.findall(r"^(\d{1,12}) (\S+)\.ko(\.\S+)?$", files, re.MULTILINE):
        sizes[name] = max(int(size) * (_PACKED if packed else 1), sizes.get(name, 0))
    try:
        return ModulePlacement(sizes)
    except SourceError as error:
        logger.warning(
            "modules are placed in the order in which they are loaded: %s", error.message
        )
        return ModulePlacement({})


def _output(shell: Shell, script: str) -> str:
    """Return what a script prints; empty if it fails."""
    found = bytearray()

    def take(data: bytes) -> None:
        found.extend(data)
        if len(found) > _MAX_BYTES:
            raise KernelUnknownError(f"the guest's kernel files have more than {_MAX_BYTES} bytes")

    shell(script, take)
    return found.decode("ascii", "replace")
