# SPDX-License-Identifier: Apache-2.0
"""PCs stay where they are when a comment, a blank line or a docstring's text changes."""

from __future__ import annotations

import io
import sysconfig
import tokenize
from pathlib import Path

import pytest

from bridge.sources.pcs import BlockTable

STDLIB = Path(sysconfig.get_paths()["stdlib"])
FILES = ("ast.py", "asyncio/tasks.py", "dataclasses.py", "http/client.py", "socketserver.py")


def with_comments(source: str) -> tuple[str, dict[int, int]]:
    """A source with a comment and a blank line after each statement; old lines to new ones."""
    ends = {
        token.end[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.NEWLINE
    }
    text: list[str] = []
    moved = {}
    for number, line in enumerate(source.splitlines(keepends=True), 1):
        text.append(line)
        moved[number] = len(text)
        if number in ends:
            text += ["# a comment: else, case and finally\n", "\n"]
    return "".join(text), moved


@pytest.mark.parametrize("name", FILES)
def test_pcs_of_a_file_with_comments_added_are_the_same(name: str) -> None:
    source = (STDLIB / name).read_text(encoding="utf-8")
    changed, moved = with_comments(source)
    before, after = (
        BlockTable.from_sources({"f.py": source}),
        BlockTable.from_sources({"f.py": changed}),
    )
    assert len(changed) > 1.3 * len(source)
    assert len(before) == len(after) > 50
    for pc, location in before:
        other = after.lookup(pc)
        assert other is not None
        assert other.block.start_line == moved[location.block.start_line]


def test_pcs_do_not_move_with_the_text_of_docstrings() -> None:
    source = 'def f(n):\n    """{}"""\n    if n:\n        return 1\n    return 2\n'
    tables = [
        BlockTable.from_sources({"f.py": source.format(text)})
        for text in ("short", "long\n\n    and longer\n    # not a comment\n    ")
    ]
    assert [pc for pc, _ in tables[0]] == [pc for pc, _ in tables[1]]
    # Nor where a function gets its first one.
    bare = source.replace('    """{}"""\n', "")
    assert [pc for pc, _ in BlockTable.from_sources({"f.py": bare})] == [pc for pc, _ in tables[0]]
