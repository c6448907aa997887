# SPDX-License-Identifier: Apache-2.0
"""What syzkaller's manager takes as kernel_obj, read as the manager reads it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bridge.results.kernel_object import LISTINGS, OBJECT, write_kernel_object
from bridge.sources.guest_kernel.symbols import KernelSymbols, ModuleText
from bridge.sources.pcs import BlockTable
from tests.results.test_elf_export import calls_at_any_byte, places, read

KERNEL = 0xFFFF_FFFF_8100_0000
MODULE = KERNEL + 0x20_0000
BOOT = KERNEL + 0x10_0000
CALL = 5
KALLSYMS = f"""\
{KERNEL:x} T _stext
{KERNEL:x} T first
{KERNEL + 0x40:x} T vfs_read
{KERNEL + 0x40:x} T alias_of_vfs_read
{KERNEL + 0x100:x} t helper
{KERNEL + 0x102:x} t tiny
{KERNEL + 0x1000:x} T _etext
{BOOT:x} T _sinittext
{BOOT:x} t init_only
{BOOT + 0x100:x} T _einittext
"""
FUNCTIONS = {"first": KERNEL, "vfs_read": KERNEL + 0x40, "helper": KERNEL + 0x100}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    symbols = KernelSymbols.from_kallsyms(
        KALLSYMS + f"{0x5000:x} t module_open\t[sample]\n{0x5010:x} t module_close\t[sample]\n",
        modules={"sample": ModuleText(0x5000, MODULE, 0x20)},
    )
    run = tmp_path / "run"
    run.mkdir()
    symbols.save(run / "kernel-symbols.tsv")
    return run


def test_functions_have_a_call_before_their_entry_and_a_line(run: Path, tmp_path: Path) -> None:
    directory = tmp_path / "obj"
    assert write_kernel_object(run, directory) == "5 functions of the kernel"
    vmlinux = directory / OBJECT
    wanted = {**FUNCTIONS, "module_open": MODULE, "module_close": MODULE + 0x10}
    assert calls_at_any_byte(vmlinux) == sorted(wanted.values())
    # The manager asks for the address before the one that it was given, by the length of a call.
    for (name, pc), (function, place) in zip(
        wanted.items(), places(vmlinux, *(pc - CALL for pc in wanted.values())), strict=True
    ):
        assert function == name
        listing, _, line = place.rpartition(":")
        assert Path(listing).name == ("sample" if pc >= MODULE else "vmlinux")
        text = Path(listing).read_text().splitlines()[int(line) - 1]
        assert text.split()[0] == hex(pc)
        assert text.split()[2] == name
    # Elsewhere in a function, where a report of a crash may be, there is a name and no line.
    ((name, place),) = places(vmlinux, KERNEL + 0x48)
    assert (name, place.rpartition(":")[2]) == ("vfs_read", "?")


def test_functions_of_the_start_and_aliases_are_not_listed(run: Path, tmp_path: Path) -> None:
    write_kernel_object(run, tmp_path)
    listing = (tmp_path / LISTINGS / "vmlinux").read_text()
    names = [line.split()[2] for line in listing.splitlines() if line.startswith("0x")]
    assert names == list(FUNCTIONS)
    # The manager takes each file *.ko for a module's object.
    assert sorted(each.name for each in (tmp_path / LISTINGS).iterdir()) == ["sample", "vmlinux"]


def test_symbols_have_the_size_that_the_kernel_prints(run: Path, tmp_path: Path) -> None:
    write_kernel_object(run, tmp_path)
    symbols = read("readelf", "-sW", str(tmp_path / OBJECT))
    match = re.search(r"(\w{16}) +(\d+) FUNC .* vfs_read$", symbols, re.M)
    assert match is not None
    assert (int(match[1], 16), int(match[2])) == (KERNEL + 0x40 - CALL, 0xC0)
    assert re.search(rf"{KERNEL:x} A _stext$", read("nm", str(tmp_path / OBJECT)), re.M)


def test_target_has_lines_and_replaces_the_listings(run: Path, tmp_path: Path) -> None:
    directory = tmp_path / "obj"
    write_kernel_object(run, directory)
    BlockTable.from_sources({"gone/it.py": "a = 1\nif a:\n    b = 2\n"}).save(run / "blocks.tsv")
    assert write_kernel_object(run, directory) == "lines of the target"
    assert not (directory / LISTINGS).exists()
    pcs = [pc for pc, _ in BlockTable.load(run / "blocks.tsv")]
    assert [place for _, place in places(directory / OBJECT, *pcs)] == [
        "gone/it.py:1",
        "gone/it.py:3",
    ]
    # System calls are lines of a file that the manager finds below kernel_obj.
    ((name, place),) = places(directory / OBJECT, 0xFFFF_FFFF_F000_0018)
    path, _, line = place.rpartition(":")
    assert name == "syscall.write"
    assert (directory / path).read_text().splitlines()[int(line) - 1] == "write"


def test_nothing_to_show_leaves_no_object(run: Path, tmp_path: Path) -> None:
    write_kernel_object(run, tmp_path)
    (run / "kernel-symbols.tsv").unlink()
    BlockTable().save(run / "blocks.tsv")
    assert write_kernel_object(run, tmp_path) == ""
    assert not (tmp_path / OBJECT).exists()
    assert not (tmp_path / LISTINGS).exists()
