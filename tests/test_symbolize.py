# SPDX-License-Identifier: Apache-2.0
"""``symbolize``: the format of ``runsc symbolize``, from a run directory alone."""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.errors import SourceError, UsageError
from bridge.sources.pcs import BlockTable, syscall_pc
from bridge.sources.symbolize import (
    Symbolizer,
    add_symbolize_arguments,
    load_blocks,
    symbolize_command,
)

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
    add_symbolize_arguments(parser)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return symbolize_command(parser.parse_args(["--run", str(run), *options]))


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
    assert messages[0] == "symbolize: 0xffffffff81000000 is no PC of this run's blocks"
    for message, text in zip(messages[1:], garbage[1:], strict=True):
        assert message == f"symbolize: {text!r} is no hexadecimal number"


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
    with pytest.raises(SourceError, match="no block table"):
        load_blocks(tmp_path)


def test_the_default_run_is_the_default_of_make_run() -> None:
    parser = argparse.ArgumentParser()
    add_symbolize_arguments(parser)
    assert parser.parse_args([]).run == Path("build/run")


COMMAND = (
    "import argparse, sys\n"
    "from bridge.sources.symbolize import *\n"
    "parser = argparse.ArgumentParser()\n"
    "add_symbolize_arguments(parser)\n"
    "sys.exit(symbolize_command(parser.parse_args()))\n"
)


def test_a_reader_that_closes_early_is_no_error(tmp_path: Path) -> None:
    BlockTable.from_sources({"pkg/a.py": "if a:\n    b\n" * 20_000}).save(tmp_path / "blocks.tsv")
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--all", "--run", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"0xffffffff")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_input_that_is_no_text(run: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", COMMAND, "--run", str(run)],
        input=b"\xff\xfe\n",
        capture_output=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert b"SourceError: stdin is no text" in answer.stderr
