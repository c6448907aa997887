# SPDX-License-Identifier: Apache-2.0
"""What the guest writes to its console, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.vm.console import (
    TAIL_LIMIT,
    ConsoleLog,
    find_panic,
    plain_text,
    tail_of_file,
)

PANIC = b"[    1.0] Kernel panic - not syncing: sysrq triggered crash\r\n[    1.1] CPU: 0\r\n"


def test_escapes_and_controls_are_gone() -> None:
    raw = b"\x1b[0;32mok\x1b[0m\x07 \x1b]0;title\x07done\x1b(B\r\nb\x00\x08c\ttab\n"
    assert plain_text(raw) == "ok done\nbc\ttab\n"


@given(st.binary(max_size=2000))
def test_plain_text_random_bytes_has_no_control_characters(raw: bytes) -> None:
    text = plain_text(raw)
    assert not any(ord(char) < 32 and char not in "\n\t" for char in text)
    assert "\x7f" not in text


def test_tail_skips_blank_lines() -> None:
    log = ConsoleLog(None)
    log.feed(b"".join(b"line %d\r\n\r\n" % number for number in range(100)))
    assert log.tail(3) == "line 97\nline 98\nline 99"


def test_console_file_has_all_output_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = ConsoleLog(path)
    log.feed(b"one\r\n")
    log.feed(b"\x1b[1mtwo")
    assert path.read_bytes() == b"one\r\n\x1b[1mtwo"
    log.close()
    log.close()
    assert tail_of_file(path) == "one\ntwo"
    assert log.tail() == "one\ntwo"


def test_console_file_over_the_limit_keeps_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = ConsoleLog(path, limit=1000)
    log.feed(b"the beginning\n")
    for _ in range(300):
        log.feed(b"x" * 999 + b"\n")
    log.feed(b"the end\n")
    assert path.stat().st_size == 1000
    assert log.size == 300_000 + 14 + 8
    log.close()
    content = path.read_bytes()
    assert len(content) < 1000 + TAIL_LIMIT + 100
    assert content.startswith(b"the beginning\n")
    assert content.endswith(b"the end\n")
    assert b"[kcov-bridge: " in content


def test_console_file_slightly_over_the_limit_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = ConsoleLog(path, limit=10)
    log.feed(b"0123456789abc")
    log.close()
    assert path.read_bytes().replace(b"\n[kcov-bridge: 0 bytes of console left out]\n", b"") == (
        b"0123456789abc"
    )


def test_tail_of_file_big_file_reads_only_its_end(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"a\n" * (4 * TAIL_LIMIT) + b"last\n")
    assert tail_of_file(path, 2) == "a\nlast"
    assert tail_of_file(tmp_path / "none") == ""


@pytest.mark.parametrize("cut", range(0, len(PANIC), 7))
def test_panic_cut_anywhere_is_found(cut: int) -> None:
    log = ConsoleLog(None)
    log.feed(b"before\r\n" + PANIC[:cut])
    log.feed(PANIC[cut:])
    log.feed(b"after\r\n")
    assert log.panic == "sysrq triggered crash"


def test_panic_without_one_is_none() -> None:
    log = ConsoleLog(None)
    log.feed(b"panic_on_oops=1 Kernel panicked? no\n")
    assert log.panic is None
    assert find_panic("Kernel panic - not syncing") == "no reason given"
