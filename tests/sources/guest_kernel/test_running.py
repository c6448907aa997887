# SPDX-License-Identifier: Apache-2.0
"""The code of a kernel that only the running guest knows."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from bridge.config import Settings
from bridge.errors import KernelUnknownError, UnwatchableError, UsageError
from bridge.guest.guest_image import CustomImage
from bridge.session.kernel_watch import GuestKernelWatch
from bridge.session.stats import Stats
from bridge.sources.guest_kernel.filters import KernelFilter
from bridge.sources.guest_kernel.placement import MODULES_BASE
from bridge.sources.guest_kernel.plan import PlanWord, Ram
from bridge.sources.guest_kernel.running import Shell, kernel_of, placement_of, read_kernel
from bridge.sources.guest_kernel.source import GuestKernel
from tests.support.kernel_payload import payload

LINKED = 0xFFFF_FFFF_8100_0000
KALLSYMS = """\
ffffffff81000000 T _text
ffffffff81000000 T _stext
ffffffff81000000 T first
ffffffff81002000 T __entry_text_start
ffffffff81002000 T entry_SYSCALL_64
ffffffff81003000 T __entry_text_end
ffffffff81003000 T vfs_open
ffffffff81008000 T __noinstr_text_start
ffffffff81009000 T __noinstr_text_end
ffffffff81009000 T last
ffffffff81010000 T _etext
"""
FILES = "8000 nbd.ko\n4096 9p.ko\n1000 snd-seq.ko.xz\n12 modules.dep\n7 a.ko\n6 a.ko\n"
ALL = KernelFilter()


def moved(by: int, text: str = KALLSYMS) -> str:
    """The text as a kernel shows it that has moved itself, or was linked elsewhere."""
    return re.sub("^[0-9a-f]{16}", lambda m: f"{int(m[0], 16) + by:016x}", text, flags=re.MULTILINE)


@pytest.mark.parametrize("offset", [0, 0x20_0000, 0x3E60_0000])
@pytest.mark.parametrize("said", [True, False])
def test_wherever_it_has_moved_to(offset: int, said: bool) -> None:
    text = f"KERNELOFFSET={offset:x}\n" if said else ""
    code = kernel_of(moved(offset), text, FILES, ALL, None)
    symbol = code.symbols.lookup(LINKED + 0x3004)
    assert symbol is not None
    assert symbol.name == "vfs_open"
    assert code.syscall_entry == LINKED + 0x2000


def test_a_kernel_that_was_linked_elsewhere() -> None:
    # CONFIG_PHYSICAL_START=0x4000000, moved by 16 MiB.
    text = moved(0x400_0000)
    code = kernel_of(text, "KERNELOFFSET=1000000\n", "", ALL, None)
    assert code.syscall_entry == LINKED + 0x2000 + 0x300_0000


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (0x1000, ""),  # not as such a kernel is aligned
        (-0x80_0000, ""),  # below where it was linked to
        (0x4000_0000, ""),  # beyond where any is
        (0, "KERNELOFFSET=1000\n"),
        (0, "KERNELOFFSET=40000000\n"),
        (0x20_0000, "KERNELOFFSET=2000000\n"),  # then it was linked below all kernels
        (0, "KERNELOFFSET=ffffffffffe00000\n"),
    ],
)
def test_an_offset_that_cannot_be(by: int, said: str) -> None:
    with pytest.raises(KernelUnknownError, match="the link address of") as caught:
        kernel_of(moved(by), said, "", ALL, None)
    assert "nokaslr" in caught.value.hint


def test_a_kernel_that_hides_its_symbols() -> None:
    hidden = re.sub("^[0-9a-f]+", "0" * 16, KALLSYMS, flags=re.MULTILINE)
    for text in (hidden, "", "nonsense\n"):
        with pytest.raises(KernelUnknownError, match="hides the addresses") as caught:
            kernel_of(text, "KERNELOFFSET=0\n", FILES, ALL, None)
        assert "kptr_restrict" in caught.value.hint


@pytest.mark.parametrize("name", ["entry_SYSCALL_64", "__noinstr_text_end"])
def test_a_kernel_that_lacks_what_is_needed(name: str) -> None:
    text = "".join(line for line in KALLSYMS.splitlines(True) if f" {name}\n" not in line)
    with pytest.raises(KernelUnknownError, match=f"lack {name}"):
        kernel_of(text, "", "", ALL, None)


def test_modules_have_the_room_of_their_files() -> None:
    placement = placement_of(FILES)
    assert placement.sizes == {"9p": 4096, "a": 4096, "nbd": 8192, "snd_seq": 4096}
    assert placement.place("9p", 4096) == MODULES_BASE
    assert placement.place("nbd", 100) == placement_of(FILES).place("nbd", 8000)
    assert placement_of("").sizes == {}


def test_more_files_than_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    placement = placement_of("".join(f"999999999 m{n}.ko\n" for n in range(3)))
    assert placement.sizes == {}
    assert "in the order in which they are loaded" in caplog.text


def shell_with(**output: str) -> Shell:
    """Gives these for the scripts in which the names occur."""

    def run(script: str, take: object) -> None:
        assert callable(take)
        for name, text in output.items():
            if name in script:
                for start in range(0, len(text), 1 << 20):
                    take(text[start : start + (1 << 20)].encode())

    return run


def test_asking_the_guest() -> None:
    shell = shell_with(kallsyms=moved(0x20_0000), kcore="KERNELOFFSET=200000\n", find=FILES)
    code = read_kernel(shell, ALL, None)
    assert code.syscall_entry == LINKED + 0x2000
    assert code.text_size("nbd") == 8192


def test_a_guest_that_does_not_stop_talking() -> None:
    with pytest.raises(KernelUnknownError, match="files have more than"):
        read_kernel(shell_with(kallsyms="x" * (65 << 20)), ALL, None)


def test_code_that_comes_later() -> None:
    kernel = GuestKernel(None, 64 << 20)
    try:
        assert not kernel.known
        assert kernel.describe(payload(0)) != 0
        with pytest.raises(KernelUnknownError, match="kernel is unknown"):
            _ = kernel.code
        kernel.set_code(kernel_of(KALLSYMS, "", FILES, ALL, None))
        assert kernel.known
        assert kernel.describe(payload(0x20_0000)) == 0
        assert kernel.offset == 0x20_0000
    finally:
        kernel.close()


def test_a_run_that_never_knew_leaves_no_symbols(tmp_path: Path) -> None:
    kernel = GuestKernel(None, 64 << 20)
    kernel.close()
    kernel.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Hiding:
    """A guest whose kernel hides its symbols."""

    def run(self, command: str, **_: object) -> None:
        assert "/proc/" in command or "find" in command


@pytest.mark.parametrize("source", ["auto", "kernel"])
def test_only_a_kernel_that_was_asked_for_must_be_known(
    source: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = CustomImage(Path(__file__), Path(__file__))  # one that does not know its kernel
    with monkeypatch.context() as patch:
        # Whether this machine's QEMU loads a plugin is of no account.
        patch.setattr("bridge.sources.guest_kernel.plugin.build_plugin", Path)
        patch.setattr("bridge.sources.guest_kernel.plugin.why_not_loaded", lambda *_: None)
        watch = GuestKernelWatch(Settings(source=source), image)
    guest: Any = Hiding()
    caplog.set_level(logging.WARNING)

    def never(function: object) -> None:
        raise AssertionError("there is nothing to tell the source")

    with contextlib.closing(watch):
        assert watch.kernel is not None
        if source == "kernel":
            with pytest.raises(KernelUnknownError, match="hides the addresses"):
                watch.read_kernel(guest, "6.1", never)
        else:
            watch.read_kernel(guest, "6.1", never)
            assert watch.kernel is None
            (record,) = caplog.records
            assert record.message.startswith("the guest's kernel is no source: the guest's kernel")


@pytest.mark.parametrize("source", ["auto", "kernel"])
def test_kernel_watch_without_the_guests_memory_says_so(
    source: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = CustomImage(Path(__file__), Path(__file__))
    with monkeypatch.context() as patch:
        patch.setattr("bridge.sources.guest_kernel.plugin.build_plugin", Path)
        patch.setattr("bridge.sources.guest_kernel.plugin.why_not_loaded", lambda *_: None)
        watch = GuestKernelWatch(Settings(source=source), image)
    stats = Stats()
    with contextlib.closing(watch):
        kernel = watch.kernel
        assert kernel is not None
        kernel.plan.words[PlanWord.RAM] = Ram.REFUSED  # as the plugin writes it
        kernel.tick()
        kernel.tick()
        assert [record.levelname for record in caplog.records] == ["ERROR"]
    watch.fill(stats)
    assert stats.sources == []
    assert stats.kernel_blocks_covered is None
    assert ("memory was not found" in stats.problem) == (source == "kernel")


def test_a_filter_for_files_needs_their_lines() -> None:
    with pytest.raises(UsageError, match="debug information"):
        kernel_of(KALLSYMS, "", "", KernelFilter(["file:fs/*"]), None)


def test_kernel_watch_of_more_vcpus_than_it_can_have_is_refused() -> None:
    image = CustomImage(Path(__file__), Path(__file__))
    for source, error in (
        ("kernel", UsageError),
        ("python,kernel", UsageError),
        ("auto", UnwatchableError),
    ):
        with pytest.raises(error, match="at most 64 vCPUs, not 65") as raised:
            GuestKernelWatch(Settings(source=source, cpus=65), image)
        assert "--cpus 64" in raised.value.hint
