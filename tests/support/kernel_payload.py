# SPDX-License-Identifier: Apache-2.0
"""What a guest's module says about a kernel that lies at KERNEL."""

from __future__ import annotations

from bridge.device import abi

KERNEL = 0xFFFF_FFFF_8100_0000
ENTRY = KERNEL + 0x2000


def payload(offset: int = 0x1400000, **cpus: int) -> list[int]:
    words = [0] * (abi.PAGE_SIZE // abi.WORD)
    words[abi.KernelWord.CPUS] = 1
    words[abi.KernelWord.SYSCALL_ENTRY] = ENTRY + offset
    words[abi.KernelWord.CPU] = cpus.get("current", 0x1000)
    words[abi.KernelWord.CPU + 1] = cpus.get("preempt", 0x1010)
    words[abi.KernelWord.VECTORS + 14] = KERNEL + 0x2200 + offset
    return words
