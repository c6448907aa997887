# SPDX-License-Identifier: Apache-2.0
"""Filters of the kernel's code, and what Linux' kcov leaves out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import UsageError
from bridge.sources.guest_kernel import filters
from bridge.sources.guest_kernel.filters import (
    KernelFilter,
    Ranges,
    intersection,
    not_instrumented,
    subtraction,
    union,
)
from bridge.sources.guest_kernel.make_not_instrumented import (
    excluded_files,
    functions_of_assembler,
    generated_functions,
)
from bridge.sources.guest_kernel.placement import MODULES_BASE
from bridge.sources.guest_kernel.symbols import KernelSymbols, ModuleText

BASE = 0xFFFF_FFFF_8100_0000
END = BASE + 0x10000

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def as_set(ranges: Iterable[tuple[int, int]]) -> set[int]:
    return {number for start, end in ranges for number in range(start, end)}


def is_normal(ranges: Ranges) -> bool:
    return all(a < b for a, b in ranges) and all(x[1] < y[0] for x, y in pairwise(ranges))


@given(RANGES, RANGES)
def test_ranges_are_sets_of_addresses(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    one, two = union(first), union(second)
    assert is_normal(one)
    assert as_set(one) == as_set(first)
    for found, expected in (
        (union([*one, *two]), as_set(first) | as_set(second)),
        (intersection(one, two), as_set(first) & as_set(second)),
        (subtraction(one, two), as_set(first) - as_set(second)),
    ):
        assert is_normal(found)
        assert as_set(found) == expected


def kernel(*names: str, start: int = BASE, step: int = 0x10) -> str:
    rows = [f"{start + i * step:x} t {name}\n" for i, name in enumerate(names)]
    return f"{BASE:x} T _stext\n{''.join(rows)}{END:x} T _etext\n"


def symbols(*names: str) -> KernelSymbols:
    text = kernel(*names) + (
        "ffffffffc0000000 t v9fs_open\t[9p]\nffffffffc0000100 t v9fs_close\t[9p]\n"
        "ffffffffc0002000 t p9_tag\t[9pnet]\n"
    )
    modules = {
        "9p": ModuleText(0xFFFFFFFFC0000000, MODULES_BASE, 0x200),
        "9pnet": ModuleText(0xFFFFFFFFC0002000, MODULES_BASE + 0x4000, 0x300),
    }
    return KernelSymbols.from_kallsyms(text, 0, modules)


NAMES = ("vfs_read", "vfs_write", "do_sys_open", "vfs_stat", "tail")
ALL_MODULES = [(MODULES_BASE, MODULES_BASE + 0x200), (MODULES_BASE + 0x4000, MODULES_BASE + 0x4300)]


def ranges(
    include: list[str], exclude: list[str] | None = None, rules: bool = False
) -> list[tuple[int, int]]:
    return KernelFilter(include, exclude or [], kcov_rules=rules).ranges(symbols(*NAMES))


def test_no_include_is_all_code_there_is() -> None:
    assert ranges([]) == [(BASE, END), *ALL_MODULES]


def test_functions_by_name() -> None:
    assert ranges(["vfs_*"]) == [(BASE, BASE + 0x20), (BASE + 0x30, BASE + 0x40)]
    assert ranges(["vfs_*"], ["vfs_w*"]) == [(BASE, BASE + 0x10), (BASE + 0x30, BASE + 0x40)]
    assert ranges(["v9fs_*"]) == [ALL_MODULES[0]]
    assert ranges(["[pv]*9*"], ["v9fs_close"]) == [
        (MODULES_BASE, MODULES_BASE + 0x100),
        ALL_MODULES[1],
    ]


def test_modules_by_name() -> None:
    assert ranges(["module:9p*"]) == ALL_MODULES
    assert ranges(["module:9p"]) == ALL_MODULES[:1]
    assert ranges(["module:vmlinux"]) == [(BASE, END)]
    assert ranges([], ["module:vmlinux", "module:9pnet"]) == ALL_MODULES[:1]


def test_addresses() -> None:
    assert ranges([f"addr:{BASE + 8:#x}-{BASE + 16:X}"]) == [(BASE + 8, BASE + 16)]
    # What lies beside the code is no code.
    assert ranges([f"addr:{END - 8:x}-{MODULES_BASE + 8:x}"]) == [
        (END - 8, END),
        (MODULES_BASE, MODULES_BASE + 8),
    ]


class Files:
    """Debug information with two files."""

    def __init__(self) -> None:
        self.ranges = {"fs/read_write.c": (BASE, BASE + 0x20), "fs/open.c": (BASE + 32, BASE + 48)}

    def file_ranges(self, pattern: str) -> Ranges:
        return union(r for name, r in self.ranges.items() if fnmatchcase(name, pattern))

    def files(self) -> Collection[str]:
        return self.ranges.keys()


def test_files() -> None:
    wanted = KernelFilter(["file:fs/o*"], kcov_rules=False)
    assert wanted.needs_lines
    assert wanted.ranges(symbols(*NAMES), Files()) == [(BASE + 32, BASE + 48)]
    with pytest.raises(UsageError, match="needs the kernel's debug information") as caught:
        wanted.ranges(symbols(*NAMES))
    assert "linux-image-…-dbg" in caught.value.hint
    with pytest.raises(UsageError, match="no source file matches") as caught:
        KernelFilter(["file:fs/opne.c"]).ranges(symbols(*NAMES), Files())
    assert "fs/open.c" in caught.value.hint
    assert not KernelFilter(["module:9p"]).needs_lines


@pytest.mark.parametrize(
    ("term", "message", "near"),
    [
        ("vfs_raed", "no function matches the kernel filter 'vfs_raed'", "vfs_read"),
        ("vsf_*", "no function", "vfs_"),
        ("module:9pent", "no loaded module", "9pnet"),
        ("module:vmlinx", "no loaded module", "vmlinux"),
        ("quite_something_else", "no function", ""),
        ("addr:1000-2000", "the kernel has no code at", "System.map"),
    ],
)
def test_a_term_that_matches_nothing(term: str, message: str, near: str) -> None:
    for include, exclude in (([term], []), ([], [term])):
        wanted = KernelFilter(include, exclude, kcov_rules=False)
        with pytest.raises(UsageError, match=message) as caught:
            wanted.ranges(symbols(*NAMES))
        assert near in caught.value.hint
        assert bool(caught.value.hint) == bool(near)
        # The module may be loaded later.
        assert wanted.ranges(symbols(*NAMES), strict=False) == (
            [] if include else [(BASE, END), *ALL_MODULES]
        )


@pytest.mark.parametrize(
    "term", ["modul:9p", "addr:1-", "addr:2-1", "addr:0x1", "addr:x-y", "module:", "", "file: "]
)
def test_a_term_that_cannot_be_read(term: str) -> None:
    with pytest.raises(UsageError, match="kernel filter"):
        KernelFilter([term])


def test_filters_that_leave_nothing() -> None:
    with pytest.raises(UsageError, match="leave nothing to record"):
        ranges(["vfs_*"], ["vfs_*"])
    wanted = KernelFilter(["schedule"])
    text = symbols("vfs_read", "__schedule", "schedule", "tail")
    with pytest.raises(UsageError, match="does not instrument") as caught:
        wanted.ranges(text)
    assert "--kernel-all" in caught.value.hint
    assert wanted.ranges(text, strict=False) == []
    assert KernelFilter(["schedule"], kcov_rules=False).ranges(text)


def left_out(*names: str, text: str = "") -> list[str]:
    """Those of the functions that the rules of kcov take out."""
    found = KernelSymbols.from_kallsyms(text or kernel(*names, "the_end"))
    out = not_instrumented(found)
    return [
        s.name
        for s in found
        if s.size and s.name != "_stext" and any(a <= s.start < b for a, b in out)
    ]


def test_sections_are_left_out() -> None:
    names = ["before", "one", "two", "after"]
    for section in ("entry", "noinstr", "static_call"):
        text = kernel(*names) + (
            f"{BASE + 0x10:x} T __{section}_text_start\n{BASE + 0x30:x} T __{section}_text_end\n"
        )
        assert [n for n in left_out(text=text) if n in names] == ["one", "two"]
    text = kernel(*names) + (
        f"{BASE + 0x10:x} T __cpuidle_text_start\n{BASE + 0x30:x} T __cpuidle_text_end\n"
    )
    assert left_out(text=text) == []


def test_files_that_are_not_instrumented_are_left_out() -> None:
    # kernel/sched/core.c, mm/slub.c, arch/x86/lib/memcpy_64.S, lib/string.c; compiler's parts too.
    names = ["vfs_read", "__schedule", "vfs_write", "kmem_cache_free", "v9fs_x", "memcpy_orig"]
    assert left_out(*names) == ["__schedule", "kmem_cache_free", "memcpy_orig"]
    assert left_out("vfs_read", "__schedule.cold", "schedule_tail.isra.0") == [
        *("__schedule.cold", "schedule_tail.isra.0"),
    ]
    assert left_out("vfs_read", "__SCT__cond_resched", "__x86_indirect_thunk_rax", "x") == [
        *("__SCT__cond_resched", "__x86_indirect_thunk_rax"),
    ]


def test_a_name_that_several_files_have_needs_a_neighbour_of_its_file() -> None:
    # arch/x86/kernel/apm_32.c has both names; other files have the first one, too.
    assert re.search(r"\s\?queue_empty\s", LISTS["6.1"])
    assert left_out("vfs_read", "queue_empty", "vfs_write") == []
    assert left_out("vfs_read", "queue_empty", "queue_event", "set_apm_ints", "vfs_write") == [
        *("queue_empty", "queue_event", "set_apm_ints"),
    ]
    assert left_out("vfs_read", "__schedule", "queue_empty", "vfs_write") == ["__schedule"]


def test_what_lies_between_two_functions_of_a_file_is_its_own() -> None:
    assert left_out("vfs_a", "__schedule", "unheard_of", "schedule_tail", "vfs_b") == [
        *("__schedule", "unheard_of", "schedule_tail"),
    ]
    many = [f"unheard_of_{i}" for i in range(17)]
    assert left_out("__schedule", *many, "schedule_tail") == ["__schedule", "schedule_tail"]


def test_one_module_is_no_neighbour_of_another() -> None:
    found = KernelSymbols.from_kallsyms(
        kernel("vfs_read", "__schedule") + "ffffffffc0000000 t unheard_of\t[a]\n"
        "ffffffffc0000010 t schedule_tail\t[a]\n",
        0,
        {"a": ModuleText(0xFFFFFFFFC0000000, MODULES_BASE, 0x20)},
    )
    out = not_instrumented(found)
    assert (MODULES_BASE + 0x10, MODULES_BASE + 0x20) in out


LISTS = {
    path.stem.removeprefix("not_instrumented_"): path.read_text()
    for path in Path(filters.__file__).parent.glob("not_instrumented_*.txt")
}


@pytest.mark.parametrize("version", ["6.1", "6.12"])
def test_a_list_says_how_it_was_made(version: str) -> None:
    head = [line for line in LISTS[version].splitlines() if line.startswith("#")]
    assert "make_not_instrumented.py" in "".join(head)
    assert f"Linux {version}." in "".join(head)
    for file in ("kernel/sched/core.c", "mm/slub.c", "lib/string.c", "arch/x86/entry/entry_64.S"):
        assert f"\n{file}:\n" in LISTS[version]


@pytest.mark.parametrize("version", ["6.1", "6.12"])
def test_not_instrumented_uses_the_list_of_the_kernels_version(version: str) -> None:
    """A kernel with the names that one list alone has, and a few that the other alone has."""

    def listed(text: str) -> set[str]:
        """The certain names of one directory, whose files all lists have."""
        found = set()
        for part in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
            if part.startswith("kernel/sched/"):
                found |= {word for word in part.split()[1:] if not word.startswith("?")}
        return found

    (other,) = LISTS.keys() - {version}
    own, foreign = listed(LISTS[version]), listed(LISTS[other])
    mine, others = sorted(own - foreign)[:1000], sorted(foreign - own)[:20]
    assert len(mine) > 20
    names = [name for pair in zip(others, ["vfs_read"] * 20, strict=True) for name in pair]
    out = left_out(*mine, "vfs_write", *names)
    assert set(mine) <= set(out)
    assert not set(others) & set(out)


def test_what_makefiles_take_out(tmp_path: Path) -> None:
    def write(name: str, text: str = "") -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("mm/Makefile", "obj-y := a.o b.o\nKCOV_INSTRUMENT_a.o\t:= n\nKCOV_INSTRUMENT_no.o := n\n")
    write("kernel/sched/Makefile", "  KCOV_INSTRUMENT := n\nKCOV_INSTRUMENT_d.o := y\n")
    write("arch/arm64/kernel/Makefile", "KCOV_INSTRUMENT := n\n")
    write("arch/x86/boot/Makefile", "KCOV_INSTRUMENT := n\n")
    write("fs/Makefile", "# KCOV_INSTRUMENT := n\n")
    for name in ("mm/a", "mm/b", "kernel/sched/c", "kernel/sched/d", "kernel/sched/sub/e"):
        write(f"{name}.c")
    for name in ("arch/arm64/kernel/f", "arch/x86/boot/g", "fs/h"):
        write(f"{name}.c")
    assert list(excluded_files(tmp_path)) == ["kernel/sched/c.c", "mm/a.c"]


def test_functions_that_macros_make(tmp_path: Path) -> None:
    header = tmp_path / "include/trace/events/mill.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        "TRACE_EVENT(wheel,\nDECLARE_EVENT_CLASS(stones,\nDEFINE_EVENT(stones, grind,\n"
    )
    text = (
        "SYSCALL_DEFINE2(nice, int, x)\nDEFINE_IDTENTRY(exc_x)\n"
        "#define CREATE_TRACE_POINTS\n#include <trace/events/mill.h>\n"
    )
    found = generated_functions(text, tmp_path)
    assert {"__x64_sys_nice", "__do_sys_nice", "exc_x", "__exc_x"} <= found
    assert {"__traceiter_wheel", "perf_trace_stones", "__traceiter_grind"} <= found
    assert "perf_trace_grind" not in found
    assert functions_of_assembler(
        "SYM_FUNC_START(memcpy)\n\tSYM_INNER_LABEL(inside, SYM_L_GLOBAL)\nSYM_FUNC_END(memcpy)\n"
        "SYM_FUNC_START(\\name)\n.macro SYM_X\nSYM_CODE_START_LOCAL(xen_error_entry)\n"
    ) == {"memcpy", "inside", "xen_error_entry"}
