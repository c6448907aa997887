# SPDX-License-Identifier: Apache-2.0
"""Lines from debug information, against a program that gcc has made."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bridge.errors import MissingDependencyError, SourceError, UsageError
from bridge.sources import libdw
from bridge.sources.guest_kernel.code import KernelCode
from bridge.sources.guest_kernel.filters import KernelFilter
from bridge.sources.guest_kernel.lines import Lines, find_modules, find_vmlinux
from bridge.sources.guest_kernel.placement import MODULES_BASE, ModulePlacement, core_text_size
from bridge.sources.guest_kernel.plan import RangeFlag
from bridge.sources.guest_kernel.symbols import KernelSymbols
from tests.support.linked_kernel import (
    CANONICAL,
    LOADED,
    RELEASE,
    TEXT,
    addresses,
    link,
    link_module,
    loaded,
    sections,
)


@pytest.fixture(scope="module", params=["-gdwarf-4", "-gdwarf-5"])
def vmlinux(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = link(tmp_path_factory.mktemp("linked"), request.param)
    link_module(made, request.param)
    return made


@pytest.fixture
def module(vmlinux: Path) -> Path:
    return vmlinux.parent / "lib/modules" / RELEASE / "kernel/drivers/my-mill.ko"


def test_lines_of_functions(vmlinux: Path) -> None:
    lines, where = Lines(vmlinux), addresses(vmlinux)
    assert lines.function_line(where["turn"]) == ("init/main.c", 3)
    assert lines.function_line(where["grain"]) == ("fs/grain.c", 7)
    assert lines.function_line(where["early"]) == ("fs/grain.c", 2)
    assert lines.function_line(where["early"] + 1) == lines.lookup(where["early"] + 1)
    assert lines.function_line(0) is None
    # The first statement, as addr2line says it, too.
    assert lines.lookup(where["grain"]) == ("fs/grain.c", 8)
    for pc in (0, TEXT - 1, 0xFFFF_FFFF_8180_0000, where["early"] + 0x1000, 1 << 64):
        assert lines.lookup(pc) is None


def test_all_lines_are_those_of_addr2line(vmlinux: Path) -> None:
    lines, where = Lines(vmlinux), addresses(vmlinux)
    pcs = [pc for name in ("turn", "grain", "early") for pc in range(where[name], where[name] + 3)]
    pcs += range(TEXT, max(where["turn"], where["grain"]))
    told = subprocess.run(
        ["addr2line", "-e", str(vmlinux), *map(hex, pcs)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    seen = set()
    for pc, text in zip(pcs, told, strict=True):
        file, _, line = text.split(" (")[0].rpartition(":")
        found = lines.lookup(pc)
        if found is None:
            assert line in "?0", hex(pc)
        else:
            # addr2line leaves the path as the compiler has it.
            assert (Path(file).name, int(line)) == (Path(found[0]).name, found[1]), hex(pc)
            seen.add(found)
    assert {("init/main.c", 4), ("init/main.c", 6), ("init/mill.h", 4)} <= seen


def test_the_code_of_files(vmlinux: Path) -> None:
    lines, where = Lines(vmlinux), addresses(vmlinux)
    assert sorted(lines.files()) == ["fs/grain.c", "init/main.c"]
    ranges = lines.file_ranges("fs/*")
    assert len(ranges) == 2
    inside = {
        name for name in ("turn", "grain", "early") for a, b in ranges if a <= where[name] < b
    }
    assert inside == {"grain", "early"}
    assert lines.file_ranges("init/mill.h") == []
    assert len(lines.file_ranges("*")) == 2, "the two units touch"


def test_lines_of_units_and_of_blocks(vmlinux: Path) -> None:
    lines, where = Lines(vmlinux), addresses(vmlinux)
    unit = lines.unit_at(where["grain"])
    assert unit is not None
    assert unit == lines.unit_at(where["early"]) != lines.unit_at(where["turn"])
    assert lines.unit_lines(unit) == {("fs/grain.c", n) for n in (2, 3, 4, 7, 8, 9)}
    assert lines.lines_in(where["grain"], where["grain"] + 1) == {
        *(("fs/grain.c", 7), ("fs/grain.c", 8)),
    }
    assert lines.lines_in(0, 10) == set()


def test_without_aranges(vmlinux: Path, tmp_path: Path) -> None:
    copy = tmp_path / "vmlinux"
    subprocess.run(
        ["objcopy", "--remove-section=.debug_aranges", str(vmlinux), str(copy)], check=True
    )
    where, lines, other = addresses(vmlinux), Lines(copy), Lines(vmlinux)
    for name in ("turn", "grain", "early"):
        assert lines.lookup(where[name]) == other.lookup(where[name]) is not None
    assert lines.file_ranges("*") == other.file_ranges("*")


def test_compressed_debug_information(vmlinux: Path, tmp_path: Path) -> None:
    copy = tmp_path / "vmlinux"
    subprocess.run(
        ["objcopy", "--compress-debug-sections=zlib", str(vmlinux), str(copy)], check=True
    )
    assert Lines(copy).function_line(addresses(vmlinux)["turn"]) == ("init/main.c", 3)


def test_paths_of_a_program_that_is_no_kernel(tmp_path: Path) -> None:
    vmlinux = link(tmp_path, sources=("a", "b"))
    # It was compiled in out/, and its sources are beside that.
    found = Lines(vmlinux).lookup(addresses(vmlinux)["grain"])
    assert found == (f"{tmp_path}/tree/b/grain.c", 8)


def test_files_without_debug_information(vmlinux: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "vmlinux"
    subprocess.run(["strip", "-o", str(stripped), str(vmlinux)], check=True)
    with pytest.raises(UsageError, match="has no debug information") as caught:
        Lines(stripped)
    assert "CONFIG_DEBUG_INFO" in caught.value.hint
    with pytest.raises(SourceError, match="cannot read"):
        Lines(tmp_path / "none")
    (tmp_path / "text").write_text("no program\n")
    with pytest.raises(SourceError, match="can't be read"):
        Lines(tmp_path / "text")


def test_damaged_debug_information(vmlinux: Path, tmp_path: Path) -> None:
    bad = tmp_path / "vmlinux"
    for section in (".debug_abbrev", ".debug_info"):
        (tmp_path / "junk").write_bytes(b"\x01" * 10)
        subprocess.run(
            ["objcopy", f"--update-section={section}={tmp_path / 'junk'}", str(vmlinux), str(bad)],
            check=True,
        )
        with pytest.raises(SourceError, match="can't be read"):
            Lines(bad)


def test_all_lines_of_a_module_are_those_of_addr2line(vmlinux: Path, module: Path) -> None:
    lines = Lines(vmlinux, loaded(vmlinux, module), find_modules(RELEASE, vmlinux))
    seen = set()
    for section, at, size in sections(module):
        told = subprocess.run(
            ["addr2line", "-e", str(module), "-j", section, *map(hex, range(size))],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for offset, text in zip(range(size), told, strict=True):
            file, _, line = text.split(" (")[0].rpartition(":")
            found = lines.lookup(CANONICAL + at + offset)
            if found is None:
                assert line in "?0", f"{section}+{offset:#x}"
            else:
                assert (Path(file).name, int(line)) == (Path(found[0]).name, found[1]), section
                seen.add(found)
    assert {
        *(("drivers/one.c", 8), ("drivers/two.c", 4), ("drivers/two.c", 8), ("init/mill.h", 4)),
    } <= seen
    assert ("drivers/one.c", 4) not in seen, "the kernel throws .init.text away"
    assert lines.lookup(CANONICAL - 1) is None
    assert lines.lookup(CANONICAL + core_text_size(module)) is None


def test_functions_units_and_files_of_a_module(vmlinux: Path, module: Path) -> None:
    symbols = loaded(vmlinux, module)
    lines = Lines(vmlinux, symbols, find_modules(RELEASE, vmlinux))
    where = {symbol.name: symbol.start for symbol in symbols if symbol.module}
    assert lines.function_line(where["helper"]) == ("drivers/two.c", 11)
    assert lines.function_line(where["rare"]) == ("drivers/two.c", 7)
    assert lines.function_line(where["leave"]) == ("drivers/one.c", 7)
    one = lines.unit_at(where["leave"])
    assert one is not None
    assert lines.unit_lines(one) == {("drivers/one.c", line) for line in (7, 8, 9)}
    assert lines.unit_at(where["rare"]) is lines.unit_at(where["helper"]) is not one
    assert lines.files() == {"init/main.c", "fs/grain.c", "drivers/one.c", "drivers/two.c"}
    ranges = lines.file_ranges("drivers/two.c")
    inside = {name for name, pc in where.items() for a, b in ranges if a <= pc < b}
    assert inside == {"grain", "helper", "rare"}
    # Of a module that is gone PCs are still looked up, but there is nothing left to record.
    symbols.remove_module("my-mill")
    assert lines.lookup(where["rare"]) == ("drivers/two.c", 8)
    assert lines.file_ranges("drivers/two.c") == []


def test_a_filter_for_the_files_of_a_module(vmlinux: Path, module: Path) -> None:
    text = subprocess.run(["nm", str(vmlinux)], capture_output=True, text=True, check=True).stdout
    end = TEXT + 0x1000
    marks = [f"__{name}_text_{edge}" for name in ("entry", "noinstr") for edge in ("start", "end")]
    text += "".join(f"{end:x} T {name}\n" for name in ["entry_SYSCALL_64", *marks])
    there = loaded(vmlinux, module)
    symbols = KernelSymbols.from_kallsyms(text)
    wanted = KernelFilter(["file:fs/grain.c", "file:drivers/two.c"], kcov_rules=False)
    lines = Lines(vmlinux, modules=find_modules(RELEASE, vmlinux))
    code = KernelCode(symbols, ModulePlacement({}), wanted, lines)
    (start, stop, _) = next(row for row in there.texts() if row[2])
    code.module_comes("my_mill", LOADED, stop - start)
    recorded = [
        (canonical, canonical + end - start)
        for start, end, canonical, flags in code.running(0)
        if flags & RangeFlag.RECORD
    ]
    moved = MODULES_BASE - CANONICAL
    inside = {
        symbol.name
        for symbol in there
        for a, b in recorded
        if a <= symbol.start + (moved if symbol.module else 0) < b
    }
    assert inside == {"grain", "early", "helper", "rare"}


def test_modules_without_lines(
    vmlinux: Path, module: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    symbols = loaded(vmlinux, module)
    (tmp_path / "empty").mkdir()
    for directory in (None, tmp_path / "empty"):
        assert Lines(vmlinux, symbols, directory).lookup(CANONICAL) is None
    assert Lines(vmlinux).lookup(CANONICAL) is None
    assert caplog.text == "", "that is nothing special"
    copy = tmp_path / module.name
    subprocess.run(["strip", "-g", "-o", str(copy), str(module)], check=True)
    assert Lines(vmlinux, symbols, tmp_path).lookup(CANONICAL) is None
    assert "the lines of the module my_mill are unknown" in caplog.text
    copy.write_bytes(b"\x7fELF")
    assert Lines(vmlinux, symbols, tmp_path).lookup(CANONICAL) is None
    assert "my-mill.ko is not a kernel module" in caplog.text


def test_a_module_of_another_build(
    vmlinux: Path, module: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    symbols = loaded(vmlinux, module)
    source = tmp_path / "other.s"
    source.write_text(f'.text\n.skip 3\n.incbin "{vmlinux}", 0, 40\n')
    out = vmlinux.parent
    subprocess.run(["gcc", "-c", str(source), "-o", str(tmp_path / "o.o")], check=True)
    command = ["ld", "-r", "-o", str(tmp_path / module.name), str(tmp_path / "o.o")]
    subprocess.run([*command, "one.o", "two.o"], check=True, cwd=out)
    assert Lines(vmlinux, symbols, tmp_path).lookup(CANONICAL + 48) is None
    assert "the debug information of the module my_mill belongs to another build" in caplog.text


def test_a_kernel_of_another_build(vmlinux: Path, module: Path) -> None:
    text = f"{TEXT:x} T _stext\n{TEXT + 3:x} T a\n{TEXT + 0x800:x} T _etext\n"
    with pytest.raises(UsageError, match="belongs to another kernel than the guest's"):
        Lines(vmlinux, KernelSymbols.from_kallsyms(text))


def test_without_the_library(vmlinux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libdw, "_LIBRARY", "libnone.so.1")
    libdw.load.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"libnone\.so\.1") as caught:
        Lines(vmlinux)
    assert "libdw1" in caught.value.hint


def test_where_modules_are(tmp_path: Path) -> None:
    vmlinux = tmp_path / "boot/vmlinux-6.1.0-x"
    vmlinux.parent.mkdir()
    assert find_modules(RELEASE, vmlinux, root=tmp_path / "none") is None
    elsewhere = tmp_path / "root/usr/lib/modules" / RELEASE
    elsewhere.mkdir(parents=True)
    assert find_modules(RELEASE, vmlinux, root=tmp_path / "root") == elsewhere
    assert find_modules("", vmlinux, root=tmp_path / "root") is None
    beside = tmp_path / "lib/modules" / RELEASE
    beside.mkdir(parents=True)
    assert find_modules(RELEASE, vmlinux, root=tmp_path / "root") == beside
    (vmlinux.parent / "modules.order").touch()
    assert find_modules("", vmlinux) == vmlinux.parent, "a tree in which kernels are built"


def test_where_debian_puts_it(tmp_path: Path) -> None:
    assert find_vmlinux("6.1.0-x", root=tmp_path) is None
    places = [
        *("usr/lib/modules/6.1.0-x/vmlinux", "lib/modules/6.1.0-x/vmlinux"),
        *("vmlinux-6.1.0-x", "boot/vmlinux-6.1.0-x"),
    ]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
        assert find_vmlinux("6.1.0-x", root=tmp_path) == tmp_path / place
    assert find_vmlinux("6.1.0-y", root=tmp_path) is None
    assert find_vmlinux("", tmp_path / "vmlinux-6.1.0-x") == tmp_path / "vmlinux-6.1.0-x"
    with pytest.raises(UsageError, match="there is no file"):
        find_vmlinux("6.1.0-x", tmp_path / "none", root=tmp_path)


def test_a_kernels_symbols_and_lines_agree(vmlinux: Path) -> None:
    text = subprocess.run(["nm", str(vmlinux)], capture_output=True, text=True, check=True).stdout
    symbols, lines = KernelSymbols.from_kallsyms(text), Lines(vmlinux)
    for name, file in (("turn", "init/main.c"), ("grain", "fs/grain.c")):
        (symbol,) = symbols.matching(name)
        found = lines.lookup(symbol.start)
        assert found is not None
        assert found[0] == file
