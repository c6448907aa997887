# SPDX-License-Identifier: Apache-2.0
"""``symbolize``: the format of ``runsc symbolize``, from a run directory alone."""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.cli import symbolize as command
from bridge.errors import SourceError, UsageError
from bridge.results.run_directory import load_blocks, load_kernel
from bridge.sources.guest_kernel.symbols import KernelSymbols, ModuleText
from bridge.sources.pcs import BlockTable, syscall_pc
from bridge.sources.symbolize import (
    KernelPlaces,
    Symbolizer,
)
from tests.support.linked_kernel import addresses, link

SOURCES = {
    "pkg/a.py": "a = 1\nif a:\n    b = 2\n",
    "pkg/sub/b.py": "def f():\n    return 1\n",
}
# As syzkaller reads it (pkg/cover/backend/gvisor.go), but for the directory it expects.
LINE = re.compile(r"^([^:]+):([0-9]+)\.([0-9]+),([0-9]+)\.([0-9]+)$")


@pytest.fixture
def table() -> BlockTable:
    return BlockTable.from_sources(SOURCES)


@pytest.fixture
def run(tmp_path: Path, table: BlockTable) -> Path:
    table.save(tmp_path / "blocks.tsv")
    return tmp_path


def symbolize(monkeypatch: pytest.MonkeyPatch, run: Path, text: str, *options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return command.run(parser.parse_args(["--run", str(run), *options]))


def test_a_pc_and_its_place(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Path,
    table: BlockTable,
) -> None:
    pcs = [pc for pc, _ in table]
    text = f"{pcs[1]:#x}\n\n  {pcs[3]:x}  \r\n{pcs[0]:#X}\n{pcs[0]:#x}\n"
    assert symbolize(monkeypatch, run, text) == 0
    assert capsys.readouterr() == (
        f"{pcs[1]:#x}\npkg/a.py:3.5,3.10\n"
        f"{pcs[3]:#x}\npkg/sub/b.py:2.5,2.13\n"
        f"{pcs[0]:#x}\npkg/a.py:1.1,2.6\n"
        f"{pcs[0]:#x}\npkg/a.py:1.1,2.6\n",
        "",
    )


def test_the_printed_pc_is_the_one_that_was_given(table: BlockTable) -> None:
    """A consumer that has moved a PC must find its own number again."""
    pc = next(iter(table))[0]
    out = io.StringIO()
    assert Symbolizer(table).write(pc - 5, out)
    assert out.getvalue() == f"{pc - 5:#x}\npkg/a.py:1.1,2.6\n"


def test_all_prints_every_block_in_pairs_of_lines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Path,
    table: BlockTable,
) -> None:
    assert symbolize(monkeypatch, run, "not read", "--all", "--prefix", "x/gvisor/pkg/") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [part for pc, where in table for part in (f"{pc:#x}", f"x/gvisor/pkg/{where}")]
    assert len(lines) == 8
    for line in lines[1::2]:
        match = LINE.match(line)
        assert match is not None
        assert match[1].removeprefix("x/gvisor/pkg/") in SOURCES


def test_system_calls_symbolise(table: BlockTable) -> None:
    pc = syscall_pc(257)
    assert pc is not None
    out = io.StringIO()
    assert Symbolizer(table, prefix="pkg/").write(pc, out)
    assert out.getvalue() == f"{pc:#x}\npkg/syscall/x86_64:257.1,257.1\n"
    assert str(Symbolizer(table).lookup(pc)) == "syscall/x86_64:257.1,257.1"
    assert LINE.match("syscall/x86_64:257.1,257.1")


def test_unknown_pcs_and_garbage_are_named_and_the_others_printed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Path,
    table: BlockTable,
) -> None:
    pc = next(iter(table))[0]
    garbage = ["0xffffffff81000000", "-1", "+1", "1_0", "0x", "0x0x1", "xyz", "1 2"]
    text = "\n".join([*garbage[:4], f"{pc:#x}", *garbage[4:], f"{pc:#x}"])
    assert symbolize(monkeypatch, run, text) == 1
    out, err = capsys.readouterr()
    assert out == f"{pc:#x}\npkg/a.py:1.1,2.6\n" * 2
    messages = err.splitlines()
    assert len(messages) == len(garbage)
    assert messages[0] == "symbolize: 0xffffffff81000000 is not a PC of this run"
    for message, text in zip(messages[1:], garbage[1:], strict=True):
        assert message == f"symbolize: {text!r} is not a hexadecimal number"


def test_no_input_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    assert symbolize(monkeypatch, run, "\n \n") == 0
    assert capsys.readouterr() == ("", "")


def test_a_directory_that_is_no_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no block table") as caught:
        load_blocks(tmp_path / "none")
    assert "--run" in caught.value.hint
    (tmp_path / "blocks.tsv").write_text("nonsense\n")
    with pytest.raises(SourceError, match="not a block table"):
        load_blocks(tmp_path)


TEXT = 0xFFFF_FFFF_8100_0000
MODULE = 0xFFFF_FFFF_A000_0000
KERNEL = f"""\
{TEXT:x} T _stext
{TEXT:x} T vfs_read
{TEXT + 0x40:x} t __pfx_vfs_write
{TEXT + 0x50:x} T vfs_write
{TEXT + 0x93:x} T vfs_stat
{TEXT + 0x100:x} T _etext
ffffffffc0000000 t v9fs_open\t[9p]
"""
KERNEL_BLOCKS = [
    *(TEXT, TEXT + 0x22, TEXT + 0x27, TEXT + 0x50, TEXT + 0x8E, TEXT + 0x93, TEXT + 0xA6),
    *(MODULE, MODULE + 0x33),
]


@pytest.fixture
def kernel() -> KernelSymbols:
    place = ModuleText(0xFFFFFFFFC0000000, MODULE, 0x1000)
    return KernelSymbols.from_kallsyms(KERNEL, 0, {"9p": place})


@pytest.fixture
def kernel_run(tmp_path: Path, kernel: KernelSymbols) -> Path:
    kernel.save(tmp_path / "kernel-symbols.tsv")
    blocks = "".join(f"{pc:x}\t4\n" for pc in KERNEL_BLOCKS)
    (tmp_path / "kernel-blocks.tsv").write_text(blocks)
    return tmp_path


def test_pcs_of_the_kernel_beside_others(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel_run: Path,
    table: BlockTable,
) -> None:
    table.save(kernel_run / "blocks.tsv")
    pc = next(iter(table))[0]
    text = f"{TEXT + 0x22:x}\n{pc:x}\n{MODULE + 0x33:x}\n{MODULE + 0x2000:x}\n"
    assert symbolize(monkeypatch, kernel_run, text) == 1
    assert capsys.readouterr() == (
        f"{TEXT + 0x22:#x}\nvfs_read+0x22\n"
        f"{pc:#x}\npkg/a.py:1.1,2.6\n"
        f"{MODULE + 0x33:#x}\nv9fs_open+0x33 [9p]\n",
        f"symbolize: {MODULE + 0x2000:#x} is not a PC of this run\n",
    )
    assert symbolize(monkeypatch, kernel_run, "", "--all") == 0
    assert len(capsys.readouterr().out.splitlines()) == 8, "--all has the blocks of files"


def test_a_run_of_the_kernel_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kernel_run: Path
) -> None:
    assert symbolize(monkeypatch, kernel_run, f"{TEXT:x}\n") == 0
    assert capsys.readouterr().out == f"{TEXT:#x}\nvfs_read+0x0\n"
    with pytest.raises(UsageError, match="no block table"):
        symbolize(monkeypatch, kernel_run, "", "--all")


def test_pcs_of_the_kernel_that_were_moved(kernel: KernelSymbols) -> None:
    places = KernelPlaces(kernel, KERNEL_BLOCKS)
    for block in KERNEL_BLOCKS:
        assert places.block(block) == block
        for back in range(6):
            whole, moved = (KernelPlaces(kernel, b).text(p) for b, p in moves(block, back))
            assert moved == whole is not None
    # Each of them beside the others: the function is right, wherever no other block begins.
    for block in (TEXT, TEXT + 0x50, MODULE):
        expected = places.text(block)
        for at in (block - 5, block & ~7):
            assert places.text(at) == expected
    # 5 bytes back from vfs_stat another block begins: exact PCs come first.
    assert places.text(TEXT + 0x93 - 5) == "vfs_write+0x3e"
    assert places.text((TEXT + 0x93) & ~7) == "vfs_stat+0x0"
    assert places.text(TEXT + 0x22) == "vfs_read+0x22"
    assert places.text(TEXT + 0xA6 & ~7) == "vfs_stat+0x13"


def moves(block: int, back: int) -> list[tuple[list[int], int]]:
    """A block alone, by its own PC and by one that lies before it."""
    return [([block], block), ([block], block - back)]


def test_moved_pcs_where_no_blocks_are_known(kernel: KernelSymbols) -> None:
    places = KernelPlaces(kernel)
    # The padding before a function is its own; the code before it is not.
    assert places.text(TEXT + 0x50 - 5) == "vfs_write+0x0"
    assert places.text(TEXT + 0x48) is None
    assert places.text(TEXT + 0x93 - 5) == "vfs_write+0x3e"
    assert places.text(TEXT + 0xA6 - 5) == "vfs_stat+0xe"
    assert places.text(TEXT - 0x10) is None
    assert places.text(MODULE + 0x1000) is None


def test_lines_of_the_kernel(kernel_run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    vmlinux = link(tmp_path_factory.mktemp("linked"))
    where = addresses(vmlinux)
    text = "".join(f"{pc:x} T {name}\n" for name, pc in where.items())
    KernelSymbols.from_kallsyms(text).save(kernel_run / "kernel-symbols.tsv")
    places = load_kernel(kernel_run, vmlinux)
    assert places is not None
    assert places.text(where["grain"], "x/") == "x/fs/grain.c:8 grain+0x0"
    with pytest.raises(UsageError, match="there is no file"):
        load_kernel(kernel_run, tmp_path_factory.mktemp("none") / "vmlinux")


def test_a_run_without_the_kernel(run: Path) -> None:
    assert load_kernel(run) is None


def test_lines_are_opened_when_they_are_needed(kernel: KernelSymbols) -> None:
    opened = []
    places = KernelPlaces(kernel, KERNEL_BLOCKS, lines=lambda: opened.append(1))
    assert places.text(1) is None
    assert opened == []
    for _ in range(2):
        assert places.text(MODULE) == "v9fs_open+0x0 [9p]"
        assert places.text(TEXT) == "vfs_read+0x0"
    assert opened == [1]


COMMAND = [sys.executable, "-m", "bridge", "symbolize"]


def test_a_reader_that_closes_early_is_no_error(tmp_path: Path) -> None:
    BlockTable.from_sources({"pkg/a.py": "if a:\n    b\n" * 20_000}).save(tmp_path / "blocks.tsv")
    with subprocess.Popen(
        [*COMMAND, "--all", "--run", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"0xffffffff")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_input_that_is_no_text(run: Path) -> None:
    answer = subprocess.run(
        [*COMMAND, "--run", str(run)],
        input=b"\xff\xfe\n",
        capture_output=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert b"error: stdin is no text" in answer.stderr
    assert answer.returncode == 125
