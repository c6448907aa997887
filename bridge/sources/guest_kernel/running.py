# SPDX-License-Identifier: Apache-2.0
"""The code of a kernel of which nothing is known before it runs: what the guest's own files say.

They are read as root, before the bridge's module is loaded, which then says where the code is now.
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
"""More than the text of any kernel's symbols."""
_PACKED: Final = 4
"""A module's text is at most so many times as large as its packed file."""

Shell = Callable[[str, Callable[[bytes], object]], None]
"""Runs a script in the guest as root, and gives its output away as it comes."""


def read_kernel(shell: Shell, wanted: KernelFilter, lines: Lines | None) -> KernelCode:
    """Ask a running guest; errors as of :func:`kernel_of`."""
    symbols, offset, modules = (_output(shell, script) for script in (_SYMBOLS, _OFFSET, _MODULES))
    return kernel_of(symbols, offset, modules, wanted, lines)


def kernel_of(
    kallsyms: str, offset: str, modules: str, wanted: KernelFilter, lines: Lines | None
) -> KernelCode:
    """From the text of ``/proc/kallsyms``, ``KERNELOFFSET=`` and hex digits if the kernel says
    that, and size and name of the files of its modules.

    Raises :class:`bridge.errors.KernelUnknownError` where the kernel hides its symbols or lacks
    some that are needed, and :class:`bridge.errors.UsageError` for a filter that makes no sense.
    """
    said = re.search(r"^KERNELOFFSET=([0-9a-f]{1,16})$", offset, re.MULTILINE)
    moved = kaslr_offset(kallsyms, int(said[1], 16) if said else None)
    logger.debug("the guest's kernel has moved itself by %#x", moved)
    return KernelCode(
        KernelSymbols.from_kallsyms(kallsyms, moved), placement_of(modules), wanted, lines
    )


def placement_of(files: str) -> ModulePlacement:
    """Where modules are placed, from lines with the size and the name of each module's file.

    A text is smaller than its file, so that is room enough, and it is the same on each run.
    """
    sizes: dict[str, int] = {}
    for size, name, packed in re.findall(r"^(\d{1,12}) (\S+)\.ko(\.\S+)?$", files, re.MULTILINE):
        sizes[name] = max(int(size) * (_PACKED if packed else 1), sizes.get(name, 0))
    try:
        return ModulePlacement(sizes)
    except SourceError as error:
        logger.warning("modules are placed in the order in which they come: %s", error.message)
        return ModulePlacement({})


def _output(shell: Shell, script: str) -> str:
    """What a script prints; empty where it fails."""
    found = bytearray()

    def take(data: bytes) -> None:
        found.extend(data)
        if len(found) > _MAX_BYTES:
            raise KernelUnknownError(f"the guest's kernel has more than {_MAX_BYTES} bytes to say")

    shell(script, take)
    return found.decode("ascii", "replace")
