# SPDX-License-Identifier: Apache-2.0
"""The names of system calls are those of this machine's headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bridge.trace import make_tables
from bridge.trace.names import call_name, error_name, error_text, flag_values, system_calls

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


def test_system_calls_of_the_headers_have_the_same_numbers() -> None:
    assert HEADER.is_file(), "Debian: linux-libc-dev"
    pairs = re.findall(r"^#define __NR_(\w+) (\d+)$", HEADER.read_text(), re.MULTILINE)
    assert len(pairs) > 300
    ours = {call.name: number for number, call in system_calls().items()}
    newest = max(ours.values())
    theirs = {name: int(number) for name, number in pairs if int(number) <= newest}
    assert {name: number for name, number in ours.items() if name in theirs} == theirs


def test_flags_of_the_headers_have_the_same_values() -> None:
    for group, values in make_tables.flags().items():
        assert set(values.items()) <= set(flag_values(group).items()), group


@pytest.mark.parametrize(
    ("number", "ia32", "name"),
    [
        (257, False, "openat"),
        (61, False, "wait4"),
        (9999, False, "syscall_9999"),
        (-1, False, "syscall_-1"),
        (20, True, "ia32_syscall_20"),
    ],
)
def test_call_name_of_any_number(number: int, ia32: bool, name: str) -> None:
    assert call_name(number, ia32=ia32) == name


@pytest.mark.parametrize(
    ("result", "name", "text"),
    [
        (-2, "ENOENT", "No such file or directory"),
        (-514, "ERESTARTNOHAND", "Unknown error 514"),
        (-524, "ENOTSUPP", "Unknown error 524"),
        (-4000, "errno 4000", "Unknown error 4000"),
        (0, None, ""),
        (17, None, ""),
        (-4096, None, ""),
        (-(2**63), None, ""),
    ],
)
def test_error_name_of_any_result(result: int, name: str | None, text: str) -> None:
    assert error_name(result) == name
    if name is not None:
        assert error_text(result) == text
