# SPDX-License-Identifier: Apache-2.0
"""The guest kernel as a source that was asked for: what it has not recorded is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from bridge.config import Settings
from bridge.guest.guest_image import GuestImage
from bridge.session.kernel_watch import GuestKernelWatch
from bridge.session.stats import Stats
from bridge.sources.guest_kernel.code import KernelCode
from bridge.sources.guest_kernel.filters import KernelFilter
from bridge.sources.guest_kernel.placement import ModulePlacement
from bridge.sources.guest_kernel.plan import PlanWord
from bridge.sources.guest_kernel.symbols import KernelSymbols
from tests.support.kernel_payload import payload

SYSTEM_MAP = """\
ffffffff81000000 T _stext
ffffffff81002000 T __entry_text_start
ffffffff81002000 T entry_SYSCALL_64
ffffffff81003000 T __entry_text_end
ffffffff81008000 T __noinstr_text_start
ffffffff81008000 T exc_page_fault
ffffffff81009000 T __noinstr_text_end
ffffffff81010000 T _etext
"""


class Image:
    """An image whose kernel's symbols are known."""

    def kernel_code(self, wanted: KernelFilter, vmlinux: object) -> KernelCode:
        return KernelCode(KernelSymbols.from_kallsyms(SYSTEM_MAP), ModulePlacement({}), wanted)


@pytest.fixture
def watch() -> Iterator[GuestKernelWatch]:
    watch = GuestKernelWatch(Settings(source="kernel"), cast(GuestImage, Image()))
    yield watch
    watch.close()


def problem(watch: GuestKernelWatch) -> str:
    stats = Stats()
    watch.fill(stats)
    return stats.problem


def test_fill_of_another_kernel_than_the_symbols_is_a_problem(watch: GuestKernelWatch) -> None:
    kernel = watch.kernel
    assert kernel is not None
    assert kernel.describe(payload(0x1400000)) == 0
    assert problem(watch) == ""
    assert kernel.describe(payload(1)) != 0
    for _ in range(2):
        assert problem(watch) == "the guest kernel does not match its symbols: it has no PCs"
        watch.close()


def test_fill_with_blocks_that_had_no_room_is_a_problem(watch: GuestKernelWatch) -> None:
    kernel = watch.kernel
    assert kernel is not None
    assert kernel.describe(payload(0x1400000)) == 0
    kernel.plan.words[PlanWord.BLOCKS_LOST] = 3
    for _ in range(2):
        assert problem(watch) == "3 blocks of the guest kernel had no room: they have no PCs"
        watch.close()
