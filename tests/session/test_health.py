# SPDX-License-Identifier: Apache-2.0
"""What counts as a sick machine, line by line."""

from __future__ import annotations

import re

import pytest

from bridge.session.health import KernelLog, new_taint, symptoms


@pytest.mark.parametrize(
    "line",
    [
        "[    1.0] WARNING: CPU: 0 PID: 1 at lib/x.c:1 f+0x1/0x2",
        "[    1.0] BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "[    1.0] Oops: 0002 [#1] PREEMPT SMP",
        "[    1.0] INFO: task cat:99 blocked for more than 120 seconds.",
        "[    1.0] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [sh:1]",
        "[    1.0] UBSAN: shift-out-of-bounds in fs/x.c:1:2",
        "[    1.0] a.out[99]: segfault at 0 ip 0000 sp 0000 error 4 in a.out",
        "[    1.0] traps: a.out[99] trap divide error ip:1 sp:2 error:0 in a.out",
        "[    1.0] Out of memory: Killed process 99 (a.out)",
    ],
)
def test_symptoms_line_of_a_complaint_is_one(line: str) -> None:
    (symptom,) = symptoms([line, "[    1.0] eth0: link up"], [])
    assert symptom.text == line
    assert symptoms([line], [re.compile(re.escape(line[12:20]))]) == []


@pytest.mark.parametrize(
    "line",
    [
        "[    1.0] EXT4-fs (vda): mounted filesystem",
        "[    1.0] systemd[1]: Started a warning service.",
        "[    1.0] kcov_bridge: loading out-of-tree module taints kernel.",
    ],
)
def test_symptoms_other_line_is_none(line: str) -> None:
    assert symptoms([line], []) == []


def test_new_taint_each_new_bit_is_a_symptom() -> None:
    before = 1 << 12 | 1 << 13
    texts = [each.text for each in new_taint(before, before | 1 << 9 | 1 << 7, [])]
    assert texts == [
        "new taint: the kernel died: oops or BUG",
        "new taint: the kernel warned",
    ]
    assert new_taint(before, before, []) == []
    assert new_taint(0, 1 << 9, [re.compile("warned")]) == []


def test_kernel_log_since_also_where_the_oldest_lines_are_gone() -> None:
    before = KernelLog(("a", "b", "c"), 0)
    assert KernelLog(("a", "b", "c", "d"), 0).since(before) == ("d",)
    assert KernelLog(("b", "c", "d", "e"), 0).since(before) == ("d", "e")
    assert KernelLog(("x", "y"), 0).since(before) == ("x", "y")
    assert KernelLog(("a", "b", "c"), 0).since(before) == ()
