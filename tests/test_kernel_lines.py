# SPDX-License-Identifier: Apache-2.0
"""Lines from debug information, against a program that gcc has made."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bridge.errors import SourceError, UsageError
from bridge.sources.guest_kernel.lines import Lines, find_vmlinux
from bridge.sources.guest_kernel.symbols import KernelSymbols

MAIN = """\
#include "mill.h"
int turn(int n)
{
        if (n > 3)
                return grind(n);
        return n + 1;
}
"""
MILL_H = """\
int grain(int);
static inline __attribute__((always_inline)) int grind(int n)
{
        return grain(n) * 7;
}
"""
GRAIN = """\
__attribute__((section(".init.text"))) int early(int n)
{
        return n ^ 5;
}

int grain(int n)
{
        return n - 2;
}
"""

TEXT = 0xFFFF_FFFF_8100_0000


def link(directory: Path, *flags: str, sources: tuple[str, str] = ("init", "fs")) -> Path:
    """A program with two compile units, at the address of a kernel."""
    tree = directory / "tree"
    first, second = (tree / name for name in sources)
    for folder in (first, second, directory / "out"):
        folder.mkdir(parents=True, exist_ok=True)
    (first / "main.c").write_text(MAIN)
    (first / "mill.h").write_text(MILL_H)
    (second / "grain.c").write_text(GRAIN)
    out = directory / "out"
    for source in (first / "main.c", second / "grain.c"):
        command = ["gcc", "-g", "-O1", "-mcmodel=kernel", "-fno-pic", "-ffreestanding", *flags]
        command += ["-fcf-protection=none", "-c", str(source), "-o", f"{source.stem}.o"]
        subprocess.run(command, check=True, cwd=out)
    command = ["ld", "-static", f"-Ttext={TEXT:#x}", "-e", "turn", "-o", "vmlinux"]
    command += ["--section-start=.init.text=0xffffffff82000000", "main.o", "grain.o"]
    subprocess.run(command, check=True, cwd=out)
    return out / "vmlinux"


@pytest.fixture(scope="module", params=["-gdwarf-4", "-gdwarf-5"])
def vmlinux(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(tmp_path_factory.mktemp("linked"), request.param)


def addresses(vmlinux: Path) -> dict[str, int]:
    text = subprocess.run(["nm", str(vmlinux)], capture_output=True, text=True, check=True).stdout
    return {line.split()[2]: int(line.split()[0], 16) for line in text.splitlines()}


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
