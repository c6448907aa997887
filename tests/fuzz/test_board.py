# SPDX-License-Identifier: Apache-2.0
"""The board's layout as Python and as the shim have it must be one."""

from __future__ import annotations

import os
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest

from bridge.errors import UsageError
from bridge.fuzz import board, messages
from bridge.fuzz.board import Board, BoardLayout, BoardState, BoardWord, Fold, TraceArea

HEADER = Path(board.__file__).with_name("shim") / "board.h"

LAYOUT = BoardLayout(4096, 8192, 8192, 1 << 20, 1 << 21, 4096, [TraceArea(1 << 22, 512)])


def _expected() -> dict[str, int]:
    expected = {
        "KB_BOARD_MAGIC": board.MAGIC,
        "KB_BOARD_VERSION": board.VERSION,
        "KB_BOARD_BYTES": board.BOARD_BYTES,
        "KB_BOARD_AREAS": board.AREAS,
        "KB_MESSAGE_BYTES": messages.MESSAGE_BYTES,
        "sizeof(KB_SLOT_VARIABLE)": len(board.SLOT_VARIABLE) + 1,
        "sizeof(struct kb_board_area)": 16,
        "offsetof(struct kb_board_area, words)": 8,
    }
    for word in BoardWord:
        expected[f"offsetof(struct kb_board, {word.name.lower()})"] = word * 8
    prefixes: dict[str, type[IntEnum]] = {"KB_BOARD_": BoardState, "KB_FOLD_": Fold}
    for prefix, values in prefixes.items():
        expected.update({prefix + value.name: int(value) for value in values})
    return expected


def test_layout_shim_header_is_the_same(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler, "a C compiler is needed (Debian: gcc libc6-dev)"
    names = list(_expected())
    prints = "\n".join(f'\tprintf("%llu\\n", (unsigned long long)({name}));' for name in names)
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\n\n'
        '_Static_assert(sizeof(struct kb_board) <= KB_BOARD_BYTES, "one page");\n'
        f"int main(void)\n{{\n{prints}\n\tputs(KB_SLOT_VARIABLE);\n\treturn 0;\n}}\n"
    )
    program = tmp_path / "layout"
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    assert output.pop() == board.SLOT_VARIABLE
    assert dict(zip(names, map(int, output), strict=True)) == _expected()


def test_board_two_writers_never_share_a_cache_line() -> None:
    shim = {word for word in BoardWord if BoardWord.EXECUTIONS <= word < BoardWord.AREA}
    slot = set(BoardWord) - shim
    assert not {word // 8 for word in shim} & {word // 8 for word in slot}


def test_board_layout_is_in_its_memory() -> None:
    with Board(LAYOUT) as made:
        words = memoryview(os.pread(made.fd, board.BOARD_BYTES, 0)).cast("Q")
        assert words[BoardWord.MAGIC] == board.MAGIC
        assert words[BoardWord.INPUT_BYTES] == 1 << 20
        assert list(words[BoardWord.AREA : BoardWord.AREA + 2]) == [1 << 22, 512]
        assert made[BoardWord.AREAS] == 1


def test_board_changes_are_in_its_memory() -> None:
    with Board(LAYOUT) as made:
        assert made.state is BoardState.STARTING
        made.state = BoardState.READY
        made.add_epoch()
        made.add_fault()
        made.add_fault()
        made.last_case = 7
        words = memoryview(os.pread(made.fd, board.BOARD_BYTES, 0)).cast("Q")
        assert list(words[BoardWord.STATE : BoardWord.LAST_CASE + 1]) == [1, 1, 2, 7]
        assert (made.state, made.epoch, made.faults) == (BoardState.READY, 1, 2)


def test_board_memory_cannot_be_resized() -> None:
    with Board(LAYOUT) as made, pytest.raises(PermissionError):
        os.ftruncate(made.fd, 0)


def test_layout_too_many_areas_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 64"):
        BoardLayout(0, 0, 0, 0, 0, 0, [TraceArea(0, 2)] * 65)


@pytest.mark.parametrize("size", [0, 63, (1 << 24) + 1])
def test_layout_impossible_map_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="cells"):
        BoardLayout(0, 0, 0, 0, 0, 0, [], map_size=size)
