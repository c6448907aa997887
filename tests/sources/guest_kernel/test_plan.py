# SPDX-License-Identifier: Apache-2.0
"""The plan between bridge and plugin: both sides lay it out alike; and what is told through it."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path

import pytest

from bridge.device import abi
from bridge.device.region import Area, Region
from bridge.errors import SourceError, UnwatchableError
from bridge.results.kernel_export import read_blocks
from bridge.sources.guest_kernel import plan as layout
from bridge.sources.guest_kernel import plugin
from bridge.sources.guest_kernel.code import KernelCode
from bridge.sources.guest_kernel.filters import KernelFilter
from bridge.sources.guest_kernel.placement import ModulePlacement
from bridge.sources.guest_kernel.plan import CpuWord, Plan, PlanWord, Ram, RangeFlag, SlotWord
from bridge.sources.guest_kernel.source import GuestKernel, ram_offset
from bridge.sources.guest_kernel.symbols import KernelSymbols
from tests.support.kernel_payload import ENTRY, KERNEL, payload

HEADER = Path(layout.__file__).with_name("tcg") / "plan.h"
MIB = 1 << 20

CONSTANTS = {
    "PLAN_MAGIC": layout.MAGIC,
    "PLAN_VERSION": layout.VERSION,
    "PLAN_CPUS": layout.CPUS,
    "PLAN_SLOTS": abi.SLOTS,
    "PLAN_VECTORS": layout.VECTORS,
    "PLAN_RANGES": layout.RANGES,
    "PLAN_BLOCKS": layout.BLOCKS,
    "PLAN_CPUS_OFFSET": layout.CPUS_OFFSET,
    "PLAN_SLOTS_OFFSET": layout.SLOTS_OFFSET,
    "PLAN_VECTORS_OFFSET": layout.VECTORS_OFFSET,
    "PLAN_RANGES_OFFSET": layout.RANGES_OFFSET,
    "PLAN_BLOCKS_OFFSET": layout.BLOCKS_OFFSET,
    "PLAN_BYTES": layout.BYTES,
    "PLAN_NOWHERE": layout.NOWHERE,
    "PLAN_MARKER_BYTES": layout.MARKER_BYTES,
    "PLAN_HIDDEN_NO": abi.Hidden.NO,
    "PLAN_HIDDEN_SEEN": abi.Hidden.SEEN,
    "PLAN_HIDDEN_EXIT": abi.Hidden.EXIT,
    "PLAN_HIDDEN_EXIT_LATER": abi.Hidden.EXIT_LATER,
    "PLAN_RAM_FOUND": Ram.FOUND,
    "PLAN_RAM_REFUSED": Ram.REFUSED,
    "sizeof(struct plan_cpu)": layout.CPU_WORDS * abi.WORD,
    "sizeof(struct plan_slot)": layout.PLAN_SLOT_WORDS * abi.WORD,
    "sizeof(struct plan_range)": layout.RANGE_WORDS * abi.WORD,
    "sizeof(struct plan_block)": layout.BLOCK_WORDS * abi.WORD,
    **{f"PLAN_{flag.name}": int(flag) for flag in RangeFlag},
}


def _expected() -> dict[str, int]:
    expected = dict(CONSTANTS)
    structs: dict[str, type[IntEnum]] = {
        "plan_header": PlanWord,
        "plan_cpu": CpuWord,
        "plan_slot": SlotWord,
    }
    for struct, words in structs.items():
        for word in words:
            expected[f"offsetof(struct {struct}, {word.name.lower()})"] = word * abi.WORD
    return expected


def test_the_plugin_has_the_same_layout(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler
    expected = _expected()
    prints = "\n".join(f'\tprintf("%llu\\n", (unsigned long long)({name}));' for name in expected)
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{HEADER}"\n\nint main(void)\n{{\n{prints}\n\treturn 0;\n}}\n'
    )
    subprocess.run(
        [compiler, "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "layout", source], check=True
    )
    output = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True)
    assert dict(zip(expected, map(int, output.stdout.split()), strict=True)) == expected


def test_the_plugin_compiles_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "plugin.so"
    plugin.PLUGIN.compile(path, "-Werror")
    with pytest.raises(OSError, match="qemu_plugin"):
        # Its functions are QEMU's: it can be loaded nowhere else.
        ctypes.CDLL(str(path), mode=2)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnwatchableError, match="C compiler") as caught:
        plugin.build_plugin("qemu-system-x86_64")
    assert "gcc and libc6-dev" in caught.value.hint


def test_a_compiler_that_compiles_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As one without the C library's headers."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'kcov_tcg.c:1: stdio.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(UnwatchableError, match="does not compile") as caught:
        plugin.build_plugin("qemu-system-x86_64")
    assert "stdio.h" in caught.value.evidence
    assert "gcc and libc6-dev" in caught.value.hint
    assert not list((tmp_path / "cache" / "plugins").iterdir())


@pytest.mark.parametrize(
    ("physical", "memory", "offset"),
    [
        (0, 256 * MIB, 0),
        (256 * MIB - 8, 256 * MIB, 256 * MIB - 8),
        (256 * MIB, 256 * MIB, None),
        (2048 * MIB, 2560 * MIB, 2048 * MIB),
        (2048 * MIB, 4096 * MIB, None),
        (4096 * MIB, 4096 * MIB, 2048 * MIB),
        (6144 * MIB - 8, 4096 * MIB, 4096 * MIB - 8),
        (6144 * MIB, 4096 * MIB, None),
        (2**64 - 8, 4096 * MIB, None),
    ],
)
def test_where_physical_memory_lies(physical: int, memory: int, offset: int | None) -> None:
    assert ram_offset(physical, memory) == offset


SYSTEM_MAP = """\
ffffffff81000000 T _stext
ffffffff81000000 T first
ffffffff81002000 T __entry_text_start
ffffffff81002000 T entry_SYSCALL_64
ffffffff81003000 T __entry_text_end
ffffffff81003000 T second
ffffffff81004000 t __schedule
ffffffff81004100 t finish_task_switch.isra.0
ffffffff81004200 T third
ffffffff81008000 T __noinstr_text_start
ffffffff81008000 T exc_page_fault
ffffffff81009000 T __noinstr_text_end
ffffffff81009000 T last
ffffffff81010000 T _etext
"""
R, N = RangeFlag.RECORD, RangeFlag.NOINSTR


def code(*include: str, exclude: Sequence[str] = (), kcov_rules: bool = False) -> KernelCode:
    return KernelCode(
        KernelSymbols.from_kallsyms(SYSTEM_MAP),
        ModulePlacement({"net_9p": 0x2000}),
        KernelFilter(include, exclude, kcov_rules=kcov_rules),
    )


@pytest.fixture
def kernel() -> Iterator[GuestKernel]:
    kernel = GuestKernel(code(), 64 * MIB)
    yield kernel
    kernel.close()


@pytest.fixture
def area() -> Iterator[Area]:
    """An area of 512 words."""
    region = Region(MIB)
    area = region.allocate(512)
    assert area is not None
    yield area
    region.close()


def ranges(plan: Plan) -> list[tuple[int, int, int, RangeFlag]]:
    at = layout.RANGES_OFFSET // abi.WORD
    words = plan.words[at : at + 4 * plan.words[PlanWord.RANGES]].tolist()
    return [
        (start, end, start + delta & 2**64 - 1, RangeFlag(flags))
        for start, end, delta, flags in zip(*(words[i::4] for i in range(4)), strict=True)
    ]


def cpu(plan: Plan, number: int) -> list[int]:
    at = layout.CPUS_OFFSET // abi.WORD + number * layout.CPU_WORDS
    found: list[int] = plan.words[at : at + 2].tolist()
    return found


def test_a_kernel_that_was_moved(kernel: GuestKernel) -> None:
    offset = 0x1400000
    assert kernel.describe(payload(offset)) == 0
    assert kernel.offset == offset
    assert cpu(kernel.plan, 0) == [0x1000, 0x1010]
    assert cpu(kernel.plan, 1) == [layout.NOWHERE, layout.NOWHERE]
    found = ranges(kernel.plan)
    assert [
        (start - offset - KERNEL, end - offset - KERNEL, flags) for start, end, _, flags in found
    ] == [
        (0, 0x2000, R),
        (0x2000, 0x3000, R | N | RangeFlag.EXIT_DONE),
        (0x3000, 0x4000, R),
        (0x4000, 0x4100, R | RangeFlag.SCHEDULE),
        (0x4100, 0x4200, R | RangeFlag.SCHEDULE_END),
        (0x4200, 0x8000, R),
        (0x8000, 0x9000, R | N),
        (0x9000, 0x10000, R),
    ]
    assert all(start - canonical == offset for start, _, canonical, _ in found)
    assert kernel.plan.words[PlanWord.SYSCALL_ENTRY] == ENTRY + offset
    assert kernel.plan.words[PlanWord.RANGES_EPOCH] % 2 == 0


@pytest.mark.parametrize("offset", [1, -4096, 1 << 30, 2**63])
def test_another_kernel(kernel: GuestKernel, offset: int) -> None:
    assert kernel.describe(payload(offset)) != 0
    assert kernel.offset is None
    assert ranges(kernel.plan) == []


def test_addresses_that_the_guest_made_up(kernel: GuestKernel) -> None:
    for current, preempt in [(2**64 - 1, 0x1010), (64 * MIB, 0x1010), (0x1001, 0x1012)]:
        assert kernel.describe(payload(current=current, preempt=preempt)) == 0
        assert layout.NOWHERE in cpu(kernel.plan, 0)


def test_modules_come_and_go(kernel: GuestKernel) -> None:
    kernel.describe(payload(0))
    before = ranges(kernel.plan)
    where = 0xFFFF_FFFF_C012_3000
    kernel.module("net_9p", True, where, 0x2000)
    kernel.module("kcov_bridge", True, where + 0x10000, 0x1000)
    placed = 0xFFFF_FFFF_A000_0000
    assert ranges(kernel.plan)[len(before) :] == [
        (where, where + 0x2000, placed, R),
        # After the known ones and a page between; our own is not recorded.
        (where + 0x10000, where + 0x11000, placed + 0x3000, RangeFlag(0)),
    ]
    kernel.module("net_9p", False, where, 0x2000)
    kernel.module("kcov_bridge", False, 0, 0)
    assert ranges(kernel.plan) == before
    # One that would lie in the kernel's own code, or nowhere.
    kernel.module("liar", True, KERNEL + 0x100, 0x2000)
    kernel.module("far", True, 2**64 - 4096, 2**63)
    assert ranges(kernel.plan) == before


def test_what_the_guest_says_itself(kernel: GuestKernel) -> None:
    kernel.describe(payload(0))
    modules = "net_9p 90112 1 9p, Live 0xffffffffc0100000\nodd 4096 0 - Live 0x0000000000000000\n"
    symbols = "ffffffffc0100010 t p9_read\t[net_9p]\nffffffffc0900010 t other\t[odd]\n"
    kernel.load_symbols(modules, symbols)
    assert not kernel.unnamed
    found = kernel.code.symbols.lookup(0xFFFF_FFFF_A000_0020)
    assert found is not None
    assert (found.name, found.module) == ("p9_read", "net_9p")
    assert kernel.code.modules["net_9p"].size == 0x2000
    assert "odd" not in kernel.code.modules
    kernel.module("late", True, 0xFFFF_FFFF_C020_0000, 0x1000)
    assert kernel.unnamed


def test_texts_end_where_something_else_begins(kernel: GuestKernel) -> None:
    kernel.describe(payload(0))
    at = 0xFFFF_FFFF_C010_0000
    modules = (
        f"one 20480 0 - Live {at:#x}\ntwo 8192 0 - Live {at + 0x8000:#x} (OE)\n"
        f"bare 4096 0 - Live {at + 0x10000:#x}\nthree 12288 1 one, Live {at + 0x20000:#x}\n"
        "nonsense\nhuge 99999999999999 0 - Live 0xffffffffc0f00000\n"
    )
    symbols = "".join(
        f"{at + offset:016x} {kind} name\t[{module}]\n"
        for module, kind, offset in [
            *(("one", "t", 0x10), ("one", "T", 0x1800), ("one", "r", 0x2040), ("one", "d", 0x3000)),
            # Its data lie elsewhere, and before it.
            *(("two", "t", 0x8000), ("two", "d", 0x5000)),
            *(("three", "t", 0x20000), ("three", "t", 0x90000000)),
        ]
    )
    kernel.load_symbols(modules, symbols)
    sizes = {name: place.size for name, place in kernel.code.modules.items()}
    assert sizes == {"one": 0x2040, "two": 8192, "bare": 4096, "three": 12288}


def test_a_guest_that_goes_on_as_it_was(kernel: GuestKernel) -> None:
    """Of what was there before the guest's module, nobody tells again."""
    kernel.describe(payload(0))
    modules = "net_9p 90112 1 9p, Live 0xffffffffc0100000\n"
    kernel.load_symbols(modules, "ffffffffc0100010 t p9_read\t[net_9p]\n")
    ready = ranges(kernel.plan)
    kernel.module("late", True, 0xFFFF_FFFF_C020_0000, 0x1000)
    assert ranges(kernel.plan) != ready
    assert kernel.describe(payload(0)) == 0
    assert kernel.unnamed
    kernel.restore_modules()
    assert not kernel.unnamed
    assert ranges(kernel.plan) == ready
    found = kernel.code.symbols.lookup(0xFFFF_FFFF_A000_0020)
    assert found is not None
    assert found.name == "p9_read"


def test_rewound_guest_has_its_modules_before_it_runs_and_its_code_stays_valid(
    kernel: GuestKernel, area: Area
) -> None:
    kernel.describe(payload(0))
    at = 0xFFFF_FFFF_C010_0000
    modules = f"net_9p 90112 1 9p, Live {at:#x}\n"
    kernel.load_symbols(modules, f"{at + 0x10:x} t p9_read\t[net_9p]\n")
    ready, words = ranges(kernel.plan), kernel.plan.words
    for _ in range(2):
        kernel.attach(3, area, 0x1000)
        kernel.module("net_9p", False, 0, 0)
        # In its place.
        kernel.module("late", True, at, 0x1000)
        # A module of which the guest did not tell in time; it is none of the ready state.
        kernel.load_symbols(f"{modules}lost 4096 0 - Live {at + 0x100000:#x}\n", "")
        kernel.detach(3)
        kernel.rewound()
        assert ranges(kernel.plan) == ready
        epoch = words[PlanWord.RANGES_EPOCH]
        assert kernel.describe(payload(0)) == 0
        assert (words[PlanWord.WANT], words[PlanWord.RANGES_EPOCH]) == (1, epoch)
        assert not kernel.unnamed
    # Only the first description after that is the one that was expected.
    kernel.attach(3, area, 0x1000)
    kernel.detach(3)
    assert kernel.describe(payload(0)) == 0
    assert words[PlanWord.WANT] == 0
    assert ranges(kernel.plan) != ready


@pytest.mark.parametrize("other", [{"offset": 0x1000}, {"current": 0x2000}])
def test_rewound_guest_that_describes_another_kernel_is_translated_again(
    kernel: GuestKernel, area: Area, other: dict[str, int]
) -> None:
    """As after a kexec, or if the guest had described what it likes."""
    kernel.describe(payload(**other))
    kernel.load_symbols("", "")
    kernel.attach(3, area, 0x1000)
    kernel.detach(3)
    kernel.rewound()
    assert kernel.describe(payload()) == 0
    assert kernel.plan.words[PlanWord.WANT] == 0
    assert kernel.offset == 0x1400000


def test_rewound_guest_whose_kernel_had_ended_is_translated_again(
    kernel: GuestKernel, area: Area
) -> None:
    kernel.describe(payload())
    kernel.load_symbols("", "")
    kernel.attach(3, area, 0x1000)
    gone = payload()
    gone[abi.KernelWord.CPUS] = 0
    kernel.describe(gone)
    kernel.plan.words[PlanWord.WANT] = 1
    kernel.rewound()
    assert kernel.describe(payload()) == 0
    assert kernel.plan.words[PlanWord.WANT] == 0


def test_a_module_before_the_kernel(kernel: GuestKernel) -> None:
    assert kernel.module("net_9p", True, KERNEL, 0x1000) == errno.EINVAL
    assert ranges(kernel.plan) == []


def test_a_kernels_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))
    system_map = tmp_path / "System.map"
    system_map.write_text(SYSTEM_MAP)
    everything, third = KernelFilter(kcov_rules=False), KernelFilter(["third"])

    def made(wanted: KernelFilter) -> list[tuple[int, int, RangeFlag]]:
        return KernelCode.from_system_map(system_map, None, wanted).pieces

    first = made(everything)
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    written = kept.stat().st_mtime_ns
    assert made(everything) == first
    assert kept.stat().st_mtime_ns == written
    assert made(third) != first
    kept.write_bytes(kept.read_bytes()[:100])
    assert made(everything) == first
    assert kept.stat().st_size > 100
    # Another kernel in the same place.
    system_map.write_text(SYSTEM_MAP.replace("ffffffff81004200", "ffffffff81004300"))
    assert made(everything) != first


def test_where_a_task_leaves_for_another(kernel: GuestKernel) -> None:
    text = SYSTEM_MAP.replace("T third", "T switch_mm_irqs_off")
    symbols = KernelSymbols.from_kallsyms(text)
    code = KernelCode(symbols, ModulePlacement({}), KernelFilter(kcov_rules=False))
    (leaving,) = [piece for piece in code.pieces if RangeFlag.SWITCH_START in piece[2]]
    assert leaving[0] == KERNEL + 0x4200
    assert RangeFlag.SCHEDULE_END not in leaving[2]


class TestWhatIsRecorded:
    def recorded(self, code: KernelCode) -> list[tuple[int, int]]:
        return [(a - KERNEL, b - KERNEL) for a, b, flags in code.pieces if R in flags]

    def test_by_name(self) -> None:
        assert self.recorded(code("third", "last")) == [(0x4200, 0x8000), (0x9000, 0x10000)]

    def test_as_kcov_does(self) -> None:
        left = self.recorded(code(kcov_rules=True))
        assert (0x2000, 0x3000) not in left
        assert (0x8000, 0x9000) not in left
        assert (0x4000, 0x4100) not in left, "the scheduler's files are not instrumented"
        assert (0x4200, 0x8000) in left

    def test_of_a_module_by_name(self) -> None:
        one = code("p9_*")
        assert self.recorded(one) == []
        base = 0xFFFF_FFFF_C000_0000
        one.module_comes("9pnet", base, 0x2000)
        assert not any(R in flags for *_, flags in one.running(0))
        lines = f"{base:x} t helper\t[9pnet]\n{base + 0x100:x} t p9_open\t[9pnet]\n"
        lines += f"{base + 0x180:x} t other\t[9pnet]\n"
        one.name_module("9pnet", lines)
        found = [(start, end) for start, end, _, flags in one.running(0) if R in flags]
        assert found == [(base + 0x100, base + 0x180)]

    def test_symbols_that_are_needed(self) -> None:
        symbols = KernelSymbols.from_kallsyms(SYSTEM_MAP.replace("entry_SYSCALL_64", "other"))
        with pytest.raises(SourceError, match="entry_SYSCALL_64"):
            KernelCode(symbols, ModulePlacement({}), KernelFilter())


def test_too_many_pieces(kernel: GuestKernel) -> None:
    pieces = [(n * 16, n * 16 + 8, n * 16, RangeFlag.RECORD) for n in range(layout.RANGES + 1)]
    with pytest.raises(SourceError, match="ranges, more than"):
        kernel.plan.set_code(pieces, [], 0)


def test_owners(kernel: GuestKernel, area: Area) -> None:
    words = kernel.plan.words
    at = layout.SLOTS_OFFSET // abi.WORD + 7 * layout.PLAN_SLOT_WORDS
    kernel.attach(7, area, 0xFFFF_8880_0000_1000)
    assert words[at + SlotWord.TASK] == 0, "nothing is known of the kernel yet"
    kernel.describe(payload())
    kernel.attach(7, area, 0xFFFF_8880_0000_1000)
    assert words[at : at + 4].tolist() == [0xFFFF_8880_0000_1000, area.offset, 512, 0]
    assert words[PlanWord.SLOTS] == 8
    assert words[PlanWord.WANT] == 1
    words[at + SlotWord.APPENDED], words[at + SlotWord.DROPPED] = 5, 3
    assert kernel.counts(7) == (5, 3)
    epoch, number = words[PlanWord.EPOCH], words[at + SlotWord.NUMBER]
    assert kernel.detach(7) == (5, 3)
    assert words[at + SlotWord.TASK] == 0
    assert words[PlanWord.EPOCH] != epoch
    assert kernel.detach(7) == (0, 0)
    # Another task at the same address.
    kernel.attach(7, area, 0xFFFF_8880_0000_1000)
    assert words[at + SlotWord.NUMBER] != number


def test_a_kernel_that_goes(kernel: GuestKernel, area: Area) -> None:
    """By a reboot or kexec: its tasks are nobody's, but what they were given counts."""
    words = kernel.plan.words
    at = layout.SLOTS_OFFSET // abi.WORD + 7 * layout.PLAN_SLOT_WORDS
    assert kernel.describe(payload()) == 0
    kernel.attach(7, area, 0xFFFF_8880_0000_1000)
    words[at + SlotWord.APPENDED], words[at + SlotWord.DROPPED] = 5, 3
    gone = payload()
    gone[abi.KernelWord.CPUS] = 0
    assert kernel.describe(gone) == 0
    assert kernel.offset is None
    assert words[at + SlotWord.TASK] == 0
    assert words[PlanWord.WANT] == 0
    assert cpu(kernel.plan, 0) == [layout.NOWHERE, layout.NOWHERE]
    assert kernel.counts(7) == (5, 3)
    kernel.attach(7, area, 0xFFFF_8880_0000_1000)
    assert words[at + SlotWord.TASK] == 0, "it has no owners"
    # The next one, before the host has learned that the old owners are no more.
    assert kernel.describe(payload(0x2400000)) == 0
    assert kernel.offset == 0x2400000
    assert words[at + SlotWord.TASK] == 0
    assert kernel.detach(7) == (5, 3)
    assert kernel.detach(7) == (0, 0)


def test_describe_again_while_traced_keeps_the_owner(kernel: GuestKernel, area: Area) -> None:
    words = kernel.plan.words
    at = layout.SLOTS_OFFSET // abi.WORD + 7 * layout.PLAN_SLOT_WORDS
    assert kernel.describe(payload()) == 0
    kernel.attach(7, area, 0xFFFF_8880_0000_1000)
    task, found = words[at + SlotWord.TASK], ranges(kernel.plan)
    assert task
    assert kernel.describe(payload()) == 0
    assert (words[at + SlotWord.TASK], words[PlanWord.WANT]) == (task, 1)
    assert ranges(kernel.plan) == found
    assert kernel.describe(payload(0x2400000)) == 0
    assert words[at + SlotWord.TASK] == 0, "another kernel"


def test_an_area_is_not_given_away_while_it_is_written_to(
    kernel: GuestKernel, area: Area, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_BUSY_SECONDS", 0.05)
    kernel.describe(payload())
    kernel.attach(3, area, 0x1000)
    busy = layout.CPUS_OFFSET // abi.WORD + 2 * layout.CPU_WORDS + CpuWord.BUSY
    kernel.plan.words[busy] = 4
    with pytest.raises(SourceError, match="QEMU hangs"):
        kernel.detach(3)


def test_the_kernel_is_left_alone_while_nobody_traces(
    kernel: GuestKernel, area: Area, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    kernel.describe(payload())
    want = PlanWord.WANT
    for _ in range(2):
        kernel.attach(3, area, 0x1000)
        kernel.tick()
        assert kernel.plan.words[want] == 1
        kernel.detach(3)
        kernel.tick()
        assert kernel.plan.words[want] == 1, "the next may come at once"
        now[0] += 3
        kernel.tick()
        assert kernel.plan.words[want] == 0
    kernel.load_symbols("", "")
    kernel.attach(3, area, 0x1000)
    kernel.detach(3)
    kernel.rewound()
    now[0] += 15
    kernel.tick()
    assert kernel.plan.words[want] == 1, "a reset takes its time on a busy machine"
    now[0] += 10
    kernel.tick()
    assert kernel.plan.words[want] == 0


def test_blocks_that_were_seen(kernel: GuestKernel, tmp_path: Path) -> None:
    words = kernel.plan.words
    at = layout.BLOCKS_OFFSET // abi.WORD
    for number in range(3):
        words[at + 2 * number], words[at + 2 * number + 1] = KERNEL + number * 16, 9
    words[PlanWord.BLOCKS] = 2
    assert kernel.plan.blocks() == [(KERNEL, 9), (KERNEL + 16, 9)]
    assert kernel.blocks_covered == 2
    kernel.save(tmp_path)
    assert [block.start for block in read_blocks(tmp_path / "kernel-blocks.tsv")] == [
        KERNEL,
        KERNEL + 16,
    ]
    symbol = KernelSymbols.load(tmp_path / "kernel-symbols.tsv").lookup(KERNEL + 16)
    assert symbol is not None
    assert symbol.name == "first"
