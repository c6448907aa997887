# SPDX-License-Identifier: Apache-2.0
"""What each system call of a trace reached, as a table."""

from __future__ import annotations

import re

from bridge.trace import Call, HostCode
from bridge.trace.table import rows, table


def call(
    name: str, *host: HostCode, error: str | None = None, kernel: tuple[str, ...] = ()
) -> Call:
    return Call(0.0, 0.001, 1, "x", 0, name, (), 0, error, host, kernel)


READ = HostCode("a.c", "serve", (1, 2), pcs=(16, 32))
WRITE = HostCode("a.c", "write", (7,), pcs=(48,))


def test_rows_count_blocks_once_and_those_of_one_call_alone() -> None:
    found = rows(
        [
            call("close", error="EIO"),
            call("read", READ, kernel=("f", "g")),
            call("read", READ),
            call("write", READ, WRITE, kernel=("g",)),
        ]
    )
    assert [row.name for row in found] == ["write", "read", "close"]
    write, read, close = found
    assert (write.blocks, write.own, write.functions) == (3, 1, ("write", "serve"))
    assert (read.calls, read.blocks, read.own, read.kernel) == (2, 2, 0, 2)
    assert read.seconds == 0.002
    assert (close.failed, close.blocks, close.functions) == (1, 0, ())


def test_rows_of_a_trace_without_pcs_count_lines() -> None:
    (row,) = rows([call("read", HostCode("a.c", "serve", (1, 2)), HostCode("b.c", "", (1,)))])
    assert (row.blocks, row.functions) == (3, ("serve", "b.c"))


def test_table_has_a_line_for_each_call_and_some_functions() -> None:
    lines = list(table(rows([call("write", READ, WRITE), call("close")]), functions=1))
    assert [re.split("  +", line) for line in lines] == [
        [
            *("system call", "calls", "failed", "time", "blocks", "its own", "kernel"),
            "functions of the target",
        ],
        ["write", "1", "0", "1 ms", "3", "3", "0", "serve and 1 more"],
        ["close", "1", "0", "1 ms", "0", "0", "0"],
    ]
    assert lines[0].index("functions") == lines[1].index("serve")
