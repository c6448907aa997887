# SPDX-License-Identifier: Apache-2.0
"""The frontier: of Python by what its own code does, of a kernel by an image made here."""

from __future__ import annotations

import subprocess
import trace
from collections.abc import Sequence
from pathlib import Path

import pytest

from bridge.errors import SourceError
from bridge.fuzz.frontier import Edge, EdgeKind, KernelText, kernel_frontier, python_frontier
from bridge.results.kernel_export import Block
from bridge.sources.guest_kernel.symbols import KernelSymbols
from bridge.sources.pcs import BlockTable

PYTHON = """\
import os

def never(a):
    return a

def f(x):
    y = [z for z in x if z]
    try:
        if y:
            for i in y:
                if i > 3:
                    print("above")
                    while i:
                        i -= 1
                    print("end")
        else:
            print("no")
    except ValueError:
        print("value")
    finally:
        os.getpid()
    with open(os.devnull) as file:
        file.read()
    return 1

class C:
    def method(self):
        return (lambda: 1)()
"""


def frontier(
    tmp_path: Path, text: str, lines: Sequence[int], problems: list[str] | None = None
) -> list[tuple[int, int, str, str, str, int, int]]:
    """Edges as lines, kind, functions, blocks behind, other sides, if these lines were reached."""
    path = tmp_path / "target.py"
    path.write_text(text)
    table = BlockTable()
    table.add("target.py", text)
    pcs = {table.line_pc("target.py", line) for line in lines}
    found = python_frontier(
        table,
        {pc for pc in pcs if pc is not None},
        {"target.py": path},
        [] if problems is None else problems,
    )

    def line(pc: int) -> int:
        location = table.lookup(pc)
        assert location is not None
        return location.block.start_line

    return [
        (line(e.at), line(e.to), e.kind.value, e.symbol, e.to_symbol, e.behind, e.others)
        for e in found
    ]


def test_python_frontier_has_branches_exceptions_and_functions_never_called(
    tmp_path: Path,
) -> None:
    reached = [1, 3, 6, 7, 9, 10, 11, 21, 22, 23, 24, 26, 27]
    assert frontier(tmp_path, PYTHON, reached) == [
        (1, 4, "call", "<module>", "never", 1, 0),
        (11, 12, "branch", "f", "f", 6, 0),
        (9, 16, "branch", "f", "f", 3, 0),
        (11, 18, "exception", "f", "f", 2, 2),
        (27, 28, "call", "C", "C.method", 1, 0),
    ]


RAISES = ("class Odd:", "    def __gt__(self, other): raise ValueError", "f([Odd()])")


def reached_by(tmp_path: Path, text: str, *calls: str) -> list[int]:
    """The lines of a module that these calls run, counted by Python's own module trace."""
    path = tmp_path / "traced.py"
    path.write_text(text)
    tracer = trace.Trace(count=True, trace=False)
    names = {"__file__": str(path)}
    tracer.runctx(compile("\n".join([text, *calls]), str(path), "exec"), names, names)
    lines = len(text.splitlines())
    return sorted(n for (file, n) in tracer.results().counts if file == str(path) and n <= lines)


def test_python_frontier_shrinks_as_a_real_run_reaches_more(tmp_path: Path) -> None:
    def neighbours(*calls: str) -> list[int]:
        return [
            to for _, to, *_ in frontier(tmp_path, PYTHON, reached_by(tmp_path, PYTHON, *calls))
        ]

    assert neighbours() == [4, 7, 28]
    assert neighbours("f([1])") == [4, 12, 16, 18, 28]
    assert neighbours("f([1])", "f([])") == [4, 12, 18, 28]
    assert neighbours("f([1])", "f([9])", "f([])", "never(1)") == [18, 28]
    assert neighbours("f([9])", "f([])", "never(1)", "C().method()", *RAISES) == []


def test_python_frontier_nothing_reached_has_no_edge(tmp_path: Path) -> None:
    assert frontier(tmp_path, PYTHON, []) == []


def test_python_frontier_all_reached_has_no_edge(tmp_path: Path) -> None:
    assert frontier(tmp_path, PYTHON, range(1, 40)) == []


def test_python_frontier_source_that_changed_is_left_out_and_said(tmp_path: Path) -> None:
    table = BlockTable()
    file = table.add("target.py", PYTHON)
    path = tmp_path / "target.py"
    path.write_text("x = 1\n\n\n\n")
    problems: list[str] = []
    covered = {file.pc(0)}
    assert python_frontier(table, covered, {"target.py": path}, problems) == []
    assert python_frontier(table, covered, {}, problems) == []
    path.write_text("x = (\n")
    assert python_frontier(table, covered, {"target.py": path}, problems) == []
    assert "changed after the campaign began" in problems[0]
    assert "is not here" in problems[1]
    assert len(problems) == 3


KERNEL = """\
        .text
        .globl first, second, third, fourth
first:                  # block 1: a jump that may be taken, or not
        test %rdi, %rdi
        jz 1f
        call second     # block 2: a call
        ret             # block 3
1:      jmp third       # block 4
second: ret
third:  call *%rax      # a call through a pointer has no edge
fourth: call first
        ret
"""


@pytest.fixture(scope="module")
def kernel(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[KernelText, KernelSymbols, dict[str, int]]:
    """An image of four functions at a kernel's address, with its symbols and their addresses."""
    directory = tmp_path_factory.mktemp("kernel")
    (directory / "code.S").write_text(KERNEL)
    image = directory / "vmlinux"
    subprocess.run(
        [
            *("gcc", "-nostdlib", "-static", "-o", image, directory / "code.S"),
            "-Wl,-Ttext=0xffffffff81000000,-e,first,--build-id=none",
        ],
        check=True,
    )
    names = subprocess.run(["nm", image], check=True, capture_output=True, text=True).stdout
    at = {line.split()[2]: int(line.split()[0], 16) for line in names.splitlines()}
    kallsyms = "".join(
        f"{at[name]:x} T {name}\n" for name in ("first", "second", "third", "fourth")
    )
    text = f"{at['first']:x} T _text\n{kallsyms}"
    subprocess.run(["strip", image], check=True)
    return KernelText(image), KernelSymbols.from_kallsyms(text), at


def test_kernel_frontier_has_direct_jumps_calls_and_the_way_past_a_jump(
    kernel: tuple[KernelText, KernelSymbols, dict[str, int]],
) -> None:
    text, symbols, at = kernel
    first, second, third = at["first"], at["second"], at["third"]
    # test and jz have 3 and 2 bytes, a call 5, ret 1, a jmp to the end of this file 2.
    one, two, three, four = (
        Block(first, 5),
        Block(first + 5, 5),
        Block(first + 10, 1),
        Block(first + 11, second - first - 11),
    )

    def edges(*blocks: Block) -> list[Edge]:
        return kernel_frontier(blocks, text, symbols)

    branch, call = EdgeKind.BRANCH, EdgeKind.CALL
    assert edges(one) == [
        Edge(first, first + 5, branch, "first", "first"),
        Edge(first, first + 11, branch, "first", "first"),
    ]
    assert edges(one, two) == [
        Edge(first, first + 11, branch, "first", "first"),
        Edge(first + 5, second, call, "first", "second"),
    ]
    assert edges(one, two, three, Block(second, 1)) == [
        Edge(first, first + 11, branch, "first", "first")
    ]
    assert edges(one, two, three, four, Block(second, 1)) == [
        Edge(first + 11, third, branch, "first", "third")
    ]
    # A block that begins in the middle of another one: its code is covered.
    assert edges(Block(first, third - first)) == [Edge(first, third, branch, "first", "third")]
    assert edges(Block(third, 2)) == []


def test_kernel_frontier_counts_other_sides_and_leaves_out_what_is_not_recorded(
    kernel: tuple[KernelText, KernelSymbols, dict[str, int]],
) -> None:
    text, symbols, at = kernel
    sides = [Block(at["first"] + 5, 5), Block(at["fourth"], 5)]
    assert [(e.to, e.others) for e in kernel_frontier(sides, text, symbols)] == [
        (at["first"], 0),
        (at["second"], 0),
    ]
    twice = [Block(at["first"], 5), Block(at["first"] + 3, 2)]
    assert {e.others for e in kernel_frontier(twice, text, symbols)} == {1}
    assert kernel_frontier(sides, text, symbols, lambda pc: pc != at["first"]) == [
        Edge(at["first"] + 5, at["second"], EdgeKind.CALL, "first", "second")
    ]


def test_kernel_text_of_other_places_is_empty_and_of_other_files_an_error(
    kernel: tuple[KernelText, KernelSymbols, dict[str, int]], tmp_path: Path
) -> None:
    text, symbols, at = kernel
    assert text.read(at["second"], 1) == b"\xc3"
    assert text.read(at["second"], 1 << 20) == b""
    assert text.read(0xFFFF_FFFF_C000_0000, 4) == b""
    assert kernel_frontier([Block(0xFFFF_FFFF_C000_0000, 4)], text, symbols) == []
    with pytest.raises(SourceError, match="cannot read"):
        KernelText(tmp_path / "no")
    (tmp_path / "other").write_bytes(b"MZ" * 100)
    with pytest.raises(SourceError, match="no image of a kernel"):
        KernelText(tmp_path / "other")
