# SPDX-License-Identifier: Apache-2.0
"""Basic blocks: the rules, and agreement with coverage.py and with a real tracer.

``tests/data/blocks/nasty.blocks`` holds the blocks of ``nasty.py``. To make it again after
a change of the rules or of the program:
``python -m bridge.sources.python.blocks <tests/data/blocks/nasty.py >nasty.blocks``
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from textwrap import dedent
from types import FrameType
from typing import Any

import pyroute2
import pytest
from coverage.parser import PythonParser

from bridge.errors import SourceError
from bridge.sources.python.blocks import Block, decode_source, find_blocks

DATA = Path(__file__).resolve().parents[3] / "tests" / "data" / "blocks"
NASTY = DATA / "nasty.py"
ROOT = Path(__file__).resolve().parents[3]


def ranges(source: str) -> list[str]:
    """The blocks as ranges of lines, as ``1`` or ``1-3``."""
    return [
        f"{b.start_line}" if b.start_line == b.end_line else f"{b.start_line}-{b.end_line}"
        for b in find_blocks(dedent(source).lstrip("\n"))
    ]


def owners(blocks: list[Block]) -> dict[int, int]:
    """Each line's block; asserts that no line has two."""
    found: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for line in block.lines:
            assert line not in found
            found[line] = index
    return found


RULES = {
    "straight line": ("a = 1\nb = 2\n\nc = 3\n", ["1-4"]),
    "if ends the block it stands in": ("a = 1\nif a:\n    b = 1\nc = 1\n", ["1-2", "3", "4"]),
    "else begins a block": ("if a:\n    b\nelse:\n    c\n", ["1", "2", "3-4"]),
    "elif is a test of its own": ("if a:\n    b\nelif c:\n    d\n", ["1", "2", "3", "4"]),
    "a loop header is a join point": ("a\nfor b in c:\n    d\ne\n", ["1", "2", "3", "4"]),
    "while too": ("a\nwhile b:\n    c\n", ["1", "2", "3"]),
    "statements on a line share a block": ("if a: b = 1\nc = 2\n", ["1", "2"]),
    "a chain of shared lines": ("if a: b\nelse: c; d\n", ["1", "2"]),
    "return ends a block": ("def f():\n    return 1\n    a = 1\n", ["1", "2", "3"]),
    "with ends a block": ("a\nwith b:\n    c\nd\n", ["1-2", "3", "4"]),
    "a header of several lines": ("if (\n    a\n):\n    b\n", ["1-3", "4"]),
    "comments belong to nothing": ("# a\nif a:  # b\n    # c\n\n    b\n# d\n", ["2", "5"]),
    "def is executed with its block": ("a\ndef f(x=1):\n    b\nc\n", ["1-2", "3", "4"]),
    "class body is a block": ("a\nclass A:\n    b\n    c\nd\n", ["1-2", "3-4", "5"]),
    "decorators belong to the definition": ("a\n@b\ndef f():\n    c\n", ["1-3", "4"]),
    "try": (
        "try:\n    a\nexcept B:\n    c\nelse:\n    d\nfinally:\n    e\nf\n",
        ["1", "2", "3", "4", "5-6", "7-8", "9"],
    ),
    "match": (
        "a\nmatch b:\n    case 1:\n        c\n    case _: d\ne\n",
        ["1-2", "3", "4", "5", "6"],
    ),
    "a docstring joins a loop": (
        'def f():\n    "doc"\n    while a:\n        b\n',
        ["1", "2-3", "4"],
    ),
    "global joins what follows": (
        "def f():\n    global a\n    for a in b:\n        c\n",
        ["1", "2-3", "4"],
    ),
    "a local annotation is nothing": (
        "def f():\n    a: int\n    while b:\n        c\n",
        ["1", "2-3", "4"],
    ),
    "lambda and comprehension": (
        "a = lambda: (\n    1\n)\nb = [\n    c\n    for c in d\n]\n",
        ["1-7"],
    ),
    "only a docstring": ('def f():\n    """doc"""\n', ["1", "2"]),
    "empty": ("", []),
    "only comments": ("# nothing\n", []),
    "form feed and tabs": ("\x0cif a:\n\tb\n\tif c:\n\t\td\n", ["1", "2-3", "4"]),
    "line continuation": ("if a and \\\n        b:\n    c\n", ["1-2", "3"]),
    "else of a statement inside, above elif": (
        "if a:\n    if b: c\n    else: d\nelif e:\n    f\n",
        ["1", "2", "3", "4", "5"],
    ),
}


@pytest.mark.parametrize(("source", "expected"), RULES.values(), ids=RULES.keys())
def test_rules(source: str, expected: list[str]) -> None:
    assert ranges(source) == expected


def test_columns_count_from_one_in_bytes_and_end_after_the_last() -> None:
    assert [str(b) for b in find_blocks("ä = 1\nif ä:\n  b = 'ö'\n")] == ["1.1,2.7", "3.3,3.11"]
    assert [str(b) for b in find_blocks("if a:  # note\n  b  # note\n")] == ["1.1,1.14", "2.3,2.4"]


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_do_not_matter(end: str) -> None:
    text = NASTY.read_text(encoding="utf-8")
    assert find_blocks(text.replace("\n", end).encode()) == find_blocks(text)


def test_coding_cookie_and_byte_order_mark() -> None:
    latin = "# -*- coding: latin-1 -*-\nnaïve = 'é'\n".encode("latin-1")
    assert [str(b) for b in find_blocks(latin)] == ["2.1,2.14"]
    assert find_blocks(b"\xef\xbb\xbfa = 1\n") == find_blocks("a = 1\n")
    assert decode_source(b"\xef\xbb\xbfa\n") == "a\n"


@pytest.mark.parametrize(
    "source",
    [
        b"def f(:\n",
        b"a = '\xff'\n",
        b"# coding: no-such-coding\n",
        b"a = 1\x00\n",
        "a" + "(" * 5000,
    ],
    ids=["syntax", "no utf-8", "unknown coding", "nul", "too deep"],
)
def test_what_cannot_be_parsed_is_a_source_error(source: str | bytes) -> None:
    with pytest.raises(SourceError) as caught:
        find_blocks(source)
    assert caught.value.evidence


def test_long_elif_chains_do_not_recurse() -> None:
    chain = "if a == 0:\n    b\n" + "".join(f"elif a == {n}:\n    b\n" for n in range(1, 400))
    assert len(find_blocks(chain)) == 800


def real_files() -> list[Path]:
    """Files of the standard library and of a real target."""
    files = [NASTY]
    for module in (argparse, dataclasses, typing, functools):
        assert module.__file__ is not None
        files.append(Path(module.__file__))
    for package in (asyncio, pyroute2):
        assert package.__file__ is not None
        files += sorted(Path(package.__file__).parent.rglob("*.py"))
    return files


def test_every_executable_line_of_coverage_has_exactly_one_block() -> None:
    missing = []
    lines = 0
    for path in real_files():
        parser = PythonParser(text=decode_source(path.read_bytes()), filename=str(path))
        parser.parse_source()
        owner = owners(find_blocks(path.read_bytes()))
        # The raw statements are those of the bytecode, docstrings and excluded lines too.
        wanted = set(parser.statements) | set(parser.raw_statements)
        lines += len(wanted)
        missing += [f"{path.name}:{line}" for line in sorted(wanted - set(owner))]
    assert missing == []
    assert lines > 20_000


def test_blocks_are_in_order_and_disjoint() -> None:
    for path in real_files():
        end = 0
        for block in find_blocks(path.read_bytes()):
            assert block.start_line > end
            assert (block.start_line, block.start_col) < (block.end_line, block.end_col)
            end = block.end_line


def trace_nasty() -> set[int]:
    """The lines of nasty.py that a tracer of this Python reports when it runs."""
    seen: set[int] = set()

    def tracer(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename != str(NASTY):
            return None
        if event == "line":
            seen.add(frame.f_lineno)
        return tracer

    program = compile(NASTY.read_text(encoding="utf-8"), str(NASTY), "exec", dont_inherit=True)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        exec(program, {"__name__": "nasty"})
    finally:
        sys.settrace(before)
    return seen


def test_every_traced_line_has_a_block_and_a_block_runs_whole() -> None:
    blocks = find_blocks(NASTY.read_bytes())
    owner = owners(blocks)
    seen = trace_nasty()
    assert seen - {0} <= set(owner)
    parser = PythonParser(text=NASTY.read_text(encoding="utf-8"))
    parser.parse_source()
    # A tracer may report any line of a statement, coverage.py counts its first.
    seen = parser.translate_lines(seen)
    statements: list[set[int]] = [set() for _ in blocks]
    for line in parser.statements:
        statements[owner[line]].add(parser.first_line(line))
    never = []
    for block, lines in zip(blocks, statements, strict=True):
        assert lines <= seen or not lines & seen, f"block {block} ran in part"
        if not lines & seen:
            never.append(block.start_line)
    text = NASTY.read_text(encoding="utf-8").splitlines()
    # What the program does not reach: dead code, and branches for other values.
    assert len(never) < len(blocks) / 8, [text[line - 1] for line in never]


def other_pythons() -> list[str]:
    """Other supported interpreters of this machine: on the PATH, or installed by pyenv."""
    found = [shutil.which(f"python3.{minor}") for minor in (11, 12, 13, 14)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [path for path in found if path] + [
        str(path) for path in sorted(pyenv.glob("3.1[1-9]*/bin/python"))
    ]
    usable = {}
    for candidate in candidates:
        answer = subprocess.run(
            [candidate, "-c", "import sys; print(sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode == 0:
            usable[answer.stdout] = candidate
    return list(usable.values())


def test_blocks_are_the_recorded_ones_on_every_python() -> None:
    recorded = (DATA / "nasty.blocks").read_text(encoding="utf-8")
    assert "".join(f"{block}\n" for block in find_blocks(NASTY.read_bytes())) == recorded
    for python in other_pythons():
        answer = subprocess.run(
            [python, "-m", "bridge.sources.python.blocks"],
            input=NASTY.read_bytes(),
            stdout=subprocess.PIPE,
            check=True,
            cwd=ROOT,
        )
        assert answer.stdout.decode() == recorded, python
