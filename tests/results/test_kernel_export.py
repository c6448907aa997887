# SPDX-License-Identifier: Apache-2.0
"""Coverage of the kernel for other programs, from a run directory."""

from __future__ import annotations

import functools
import json
import re
import struct
from pathlib import Path

import pytest

from bridge.cli.main import main
from bridge.errors import SourceError, UsageError
from bridge.results.kernel_export import Block, drcov, lcov, rawcover, read_blocks
from bridge.results.run_directory import load_kernel
from bridge.sources.guest_kernel.lines import Lines, find_modules, find_vmlinux
from bridge.sources.guest_kernel.placement import MODULES_BASE
from bridge.sources.guest_kernel.symbols import KernelSymbols, ModuleText
from tests.support.linked_kernel import RELEASE, addresses, link, link_module, loaded

TEXT = 0xFFFF_FFFF_8100_0000
KALLSYMS = f"""\
{TEXT:x} T _stext
{TEXT:x} T vfs_read
{TEXT + 0x100:x} T vfs_write
{TEXT + 0x20000:x} T _etext
ffffffffc0000000 t v9fs_open\t[9p]
ffffffffc0002000 t p9_tag\t[9pnet]
ffffffffc0008000 t unused\t[dummy]
"""
MODULES = {
    "9p": ModuleText(0xFFFFFFFFC0000000, MODULES_BASE + 0x8000, 0x1000),
    "9pnet": ModuleText(0xFFFFFFFFC0002000, MODULES_BASE, 0x2000),
    "dummy": ModuleText(0xFFFFFFFFC0008000, MODULES_BASE + 0x20000, 0x1000),
}
BLOCKS = [
    Block(TEXT + 0x10, 0x20),
    Block(TEXT + 0x100, 70_000),
    Block(MODULES_BASE + 0x10, 4),
    Block(MODULES_BASE + 0x8FF0, 0x20),
]


@pytest.fixture
def symbols() -> KernelSymbols:
    return KernelSymbols.from_kallsyms(KALLSYMS, 0, MODULES)


@pytest.fixture
def run(tmp_path: Path, symbols: KernelSymbols) -> Path:
    symbols.save(tmp_path / "kernel-symbols.tsv")
    lines = [f"{block.start:#x}\t{block.size}\n" for block in reversed(BLOCKS)]
    (tmp_path / "kernel-blocks.tsv").write_text("".join(lines))
    pcs = [TEXT + 0x100, 0xFFFF_FFFF_F001_0008, TEXT + 0x10, MODULES_BASE + 0x10, TEXT + 0x10]
    (tmp_path / "pcs.txt").write_text("".join(f"{pc:#x}\n" for pc in pcs))
    return tmp_path


def parse_drcov(data: bytes) -> tuple[dict[int, tuple[int, int, str]], list[tuple[int, int, int]]]:
    """As a reader of the format takes it apart: modules by id, and blocks."""
    head, _, rest = data.partition(b"BB Table: ")
    lines = head.decode().splitlines()
    assert lines[:2] == ["DRCOV VERSION: 2", "DRCOV FLAVOR: drcov"]
    count = re.fullmatch(r"Module Table: version 2, count (\d+)", lines[2])
    assert count is not None
    assert lines[3] == "Columns: id, base, end, entry, path"
    modules = {}
    for line in lines[4:]:
        number, base, end, _, path = line.split(", ")
        modules[int(number)] = int(base, 16), int(end, 16), path
    assert len(modules) == int(count[1])
    number_of, _, body = rest.partition(b" bbs\n")
    assert len(body) == 8 * int(number_of)
    return modules, list(struct.iter_unpack("<IHH", body))


def test_drcov_has_an_entry_for_each_module_with_blocks(symbols: KernelSymbols) -> None:
    modules, blocks = parse_drcov(drcov(symbols, BLOCKS))
    assert modules == {
        0: (TEXT, TEXT + 0x20000, "vmlinux"),
        1: (MODULES_BASE, MODULES_BASE + 0x2000, "9pnet.ko"),
        2: (MODULES_BASE + 0x8000, MODULES_BASE + 0x9000, "9p.ko"),
    }
    assert blocks == [
        (0x10, 0x20, 0),
        # A block's size has 16 bits.
        (0x100, 0xFFFF, 0),
        (0x100 + 0xFFFF, 70_000 - 0xFFFF, 0),
        (0x10, 4, 1),
        # None runs past the end of its module.
        (0xFF0, 0x10, 2),
    ]


def test_drcov_of_modules_that_are_gone(symbols: KernelSymbols) -> None:
    symbols.remove_module("9pnet")
    modules, _ = parse_drcov(drcov(symbols, BLOCKS))
    assert modules[1][2] == "9pnet.ko"


def test_blocks_of_no_text_are_left_out(
    symbols: KernelSymbols, caplog: pytest.LogCaptureFixture
) -> None:
    stray = [Block(TEXT - 0x10, 4), Block(MODULES_BASE + 0x5000, 4), Block(0xFFFFFFFFE0000000, 4)]
    assert parse_drcov(drcov(symbols, [*BLOCKS, *stray])) == parse_drcov(drcov(symbols, BLOCKS))
    assert "3 blocks are of no known text" in caplog.text
    with pytest.raises(UsageError, match="none of the run's blocks"):
        drcov(symbols, stray)


def test_rawcover_has_the_kernels_pcs(run: Path) -> None:
    assert rawcover(run).decode().splitlines() == [
        *(f"{pc:#x}" for pc in (TEXT + 0x10, TEXT + 0x100, MODULES_BASE + 0x10)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "it is empty"), ("0xfffffffff0010008\n", "only 1 of other sources")],
)
def test_rawcover_of_nothing(run: Path, text: str, message: str) -> None:
    (run / "pcs.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        rawcover(run)


def test_blocks_are_read(run: Path) -> None:
    assert read_blocks(run / "kernel-blocks.tsv") == sorted(BLOCKS)
    (run / "kernel-blocks.tsv").write_text(f"{TEXT:x}\t4\n\n{TEXT:#x}\t9\n{TEXT:x}\t2\n")
    assert read_blocks(run / "kernel-blocks.tsv") == [Block(TEXT, 9)]


@pytest.mark.parametrize("line", ["x\t1", f"{TEXT:x}", f"{TEXT:x}\t0", "1000\t4", f"{TEXT:x}\t-1"])
def test_damaged_blocks(run: Path, line: str) -> None:
    (run / "kernel-blocks.tsv").write_text(f"{TEXT:x}\t1\n{line}\n")
    with pytest.raises(SourceError, match="damaged in line 2"):
        read_blocks(run / "kernel-blocks.tsv")


@pytest.fixture(scope="module")
def vmlinux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(tmp_path_factory.mktemp("linked"))


def symbols_of(vmlinux: Path) -> KernelSymbols:
    where = addresses(vmlinux)
    return KernelSymbols.from_kallsyms("".join(f"{a:x} T {n}\n" for n, a in where.items()))


def records(data: bytes) -> dict[str, list[str]]:
    """The lines of each file of an LCOV file."""
    found = {}
    for record in data.decode().split("end_of_record\n")[:-1]:
        name, *rest = record.removeprefix("TN:kcov_bridge\n").splitlines()
        found[name] = rest
    return found


def test_lcov_has_lines_and_functions_of_units_that_were_covered(
    vmlinux: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = addresses(vmlinux)
    stray = Block(MODULES_BASE, 4)
    data = lcov(symbols_of(vmlinux), [Block(where["grain"], 1), stray], Lines(vmlinux))
    assert records(data) == {
        "SF:fs/grain.c": [
            *("FN:2,early", "FN:7,grain", "FNDA:0,early", "FNDA:1,grain", "FNF:2", "FNH:1"),
            *("DA:2,0", "DA:3,0", "DA:4,0", "DA:7,1", "DA:8,1", "DA:9,0", "LF:6", "LH:2"),
        ]
    }
    assert "1 blocks have no lines" in caplog.text
    data = lcov(symbols_of(vmlinux), [Block(where["turn"], 0x100)], Lines(vmlinux))
    assert set(records(data)) == {"SF:init/main.c", "SF:init/mill.h"}
    with pytest.raises(UsageError, match="no block of the run has lines"):
        lcov(symbols_of(vmlinux), [stray], Lines(vmlinux))


def test_lcov_has_modules_with_debug_information(tmp_path: Path) -> None:
    vmlinux = link(tmp_path)
    symbols = loaded(vmlinux, link_module(vmlinux))
    lines = Lines(vmlinux, symbols, find_modules(RELEASE, vmlinux))
    where = {symbol.name: symbol.start for symbol in symbols if symbol.module}
    data = lcov(symbols, [Block(where["leave"], 1)], lines)
    assert records(data) == {
        "SF:drivers/one.c": [
            *("FN:7,leave", "FNDA:1,leave", "FNF:1", "FNH:1"),
            *("DA:7,1", "DA:8,0", "DA:9,0", "LF:3", "LH:1"),
        ]
    }


def test_export_writes_each_format(run: Path, vmlinux: Path) -> None:
    out = run / "out"
    for kind in ("rawcover", "drcov"):
        assert main(["export", "--run", str(run), "--format", kind, "-o", str(out)]) == 0
        assert out.read_bytes()
    # Blocks of the linked program, with its symbols.
    symbols_of(vmlinux).save(run / "kernel-symbols.tsv")
    (run / "kernel-blocks.tsv").write_text(f"{addresses(vmlinux)['grain']:x}\t4\n")
    arguments = ["export", "--run", str(run), "--format", "lcov"]
    assert main([*arguments, "--vmlinux", str(vmlinux), "-o", str(out)]) == 0
    assert out.read_text().startswith("TN:kcov_bridge\nSF:fs/grain.c\n")
    assert not list(run.glob(".*")), "a temporary file is left"


def test_export_writes_to_stdout(run: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["export", "--run", str(run), "--format", "drcov"]) == 0
    assert len(parse_drcov(capfdbinary.readouterr().out)[1]) == 5


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("rawcover", "pcs.txt"), ("drcov", "kernel-blocks.tsv")),
        *(("drcov", "kernel-symbols.tsv"), ("lcov", "kernel-blocks.tsv")),
    ],
)
def test_export_run_without_kernel_files_fails(
    run: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / "out"
    arguments = ["export", "--run", str(run), "--format", kind, "-o", str(out)]
    (run / name).write_text("")
    assert main(arguments) != 0
    assert name in capsys.readouterr().err
    (run / name).unlink()
    assert main(arguments) == 2
    assert f"there is no {name} in" in capsys.readouterr().err
    assert not out.exists()


def test_lcov_without_debug_information(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"format": "kcov-bridge-summary", "version": 2, "kernel": "6.1.0-none"}
    (run / "summary.json").write_text(json.dumps(summary))
    arguments = ["export", "--run", str(run), "--format", "lcov"]
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert "no debug information of the kernel 6.1.0-none" in text
    assert "--vmlinux" in text
    assert main([*arguments, "--vmlinux", str(run / "none")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_debug_information_that_was_not_asked_for_may_be_useless(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    summary = {"format": "kcov-bridge-summary", "version": 2, "kernel": "6.1.0-x"}
    (run / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "vmlinux-6.1.0-x").write_bytes(b"")
    find = functools.partial(find_vmlinux, root=tmp_path)
    monkeypatch.setattr("bridge.results.kernel_export.find_vmlinux", find)
    places = load_kernel(run)
    assert places is not None
    assert places.text(TEXT) == "vfs_read+0x0"
    assert "the kernel's lines are not known" in caplog.text
    places = load_kernel(run, tmp_path / "vmlinux-6.1.0-x")
    assert places is not None
    with pytest.raises(SourceError, match="can't be read"):
        places.text(TEXT)


def test_export_unwritable_output_leaves_nothing(run: Path) -> None:
    out = run / "none" / "out"
    arguments = ["export", "--run", str(run), "--format", "drcov", "-o", str(out)]
    assert main(arguments) == SourceError.exit_status
    assert not out.parent.exists()
