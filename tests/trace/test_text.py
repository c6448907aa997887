# SPDX-License-Identifier: Apache-2.0
"""A trace as people read it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridge.trace import Call, HostCode, HostThread
from bridge.trace.arguments import arguments_text, quoted
from bridge.trace.names import system_calls
from bridge.trace.text import call_text, host_text, render_trace

CALL = Call(
    start=0.0,
    seconds=0.0012,
    thread=312,
    command="cat",
    number=257,
    name="openat",
    arguments=("AT_FDCWD", '"/mnt/target/README"', "O_RDONLY"),
    result=3,
)
WALK = HostCode("pkg/server.py", "Session.walk", tuple(range(120, 135)))
OPEN = HostCode("pkg/server.py", "Session.open", (201, 202, 203, 240))


def test_call_text_has_call_result_time_and_code() -> None:
    assert call_text(replace(CALL, host=(WALK, OPEN))) == (
        'openat(AT_FDCWD, "/mnt/target/README", O_RDONLY) = 3  1.2 ms → server.py: '
        "Session.walk 120-134, Session.open 201-203, 240"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"result": -2, "error": "ENOENT"}, "= -1 ENOENT (No such file or directory)  1.2 ms"),
        ({"result": -512, "error": "ERESTARTSYS"}, "= ? ERESTARTSYS  1.2 ms"),
        ({"result": -526, "error": "ESERVERFAULT"}, "= -1 ESERVERFAULT (Unknown error 526)"),
        ({"result": None, "seconds": None}, "= ?"),
        ({"name": "mmap", "result": 0x7F0000000000}, "= 0x7f0000000000  1.2 ms"),
        ({"seconds": 0.0000335}, "= 3  33.5 µs"),
        ({"seconds": 2.5}, "= 3  2.5 s"),
        ({"seconds": 0.0}, "= 3  0 µs"),
        ({"seconds": 1e10}, "= 3  10000000000 s"),
    ],
)
def test_call_text_of_each_end(changes: dict[str, object], text: str) -> None:
    line = call_text(replace(CALL, **changes))  # type: ignore[arg-type]
    assert line.partition(") ")[2].startswith(text)


def test_call_text_shows_some_of_the_kernels_functions() -> None:
    names = tuple(f"f{number}" for number in range(8))
    assert call_text(replace(CALL, kernel=names)).endswith(
        " → kernel: f0, f1, f2, f3, f4, f5 and 2 more"
    )


def test_call_text_shows_the_functions_of_modules_on_the_way_to_the_target() -> None:
    queue = tuple(f"queue{number}" for number in range(3))
    call = replace(
        CALL, host=(WALK,), kernel=("f0", *queue, "f1"), modules=(("nbd", queue), ("9p", ()))
    )
    code = "server.py: Session.walk 120-134"
    assert call_text(call, functions=2).endswith(
        f"1.2 ms → kernel: f0, f1 → nbd: queue0, queue1 and 1 more → {code}"
    )
    assert f"→ nbd: {', '.join(queue)} →" in call_text(call)
    assert f"→ nbd: {', '.join(queue)} →" in call_text(call, functions=None)
    assert "→ kernel: functions: 2 → nbd: functions: 3 →" in call_text(call, functions=0)


def test_call_text_of_a_hostile_name_has_no_control_characters() -> None:
    text = call_text(replace(CALL, command="\x1b[2J\n"), thread=True)
    assert text.startswith("[?[2J? 312] openat(")


def test_host_text_files_of_the_same_name_are_told_apart() -> None:
    others = (WALK, HostCode("pkg/other/server.py", "f", (1,)), HostCode("p/__init__.py", "", (2,)))
    assert host_text(others) == (
        "pkg/server.py: Session.walk 120-134; pkg/other/server.py: f 1; p/__init__.py: 2"
    )


def test_host_text_several_threads_are_named() -> None:
    one, two = HostThread(1, 5, "one"), HostThread(1, 6, "\x1b")
    code = (replace(WALK, thread=one), replace(OPEN, thread=two), replace(WALK, thread=two))
    assert host_text(code) == (
        "[one 5] server.py: Session.walk 120-134; "
        "[? 6] server.py: Session.open 201-203, 240, Session.walk 120-134"
    )
    assert host_text(code[:1]) == "server.py: Session.walk 120-134"
    assert host_text(code[:1], threads=True) == "[one 5] server.py: Session.walk 120-134"


def test_render_trace_names_the_targets_threads_from_the_second_on() -> None:
    calls = [
        replace(CALL, host=(replace(WALK, thread=HostThread(1, number, "")),))
        for number in (5, 5, 6, 5)
    ]
    shown = [line.partition("→ ")[2] for line in render_trace(calls)]
    walk = "server.py: Session.walk 120-134"
    assert shown == [walk, walk, f"[6] {walk}", f"[5] {walk}"]


def test_render_trace_names_the_thread_from_the_second_on() -> None:
    other = replace(CALL, thread=313, command="sh")
    lines = list(render_trace([CALL, other, CALL]))
    assert [line.startswith("[sh 313] ") for line in lines] == [False, True, False]


@pytest.mark.parametrize(
    ("name", "values", "texts"),
    [
        ("open", (1, 0o2102, 0o644), ("0x1", "O_RDWR|O_CREAT|O_APPEND", "0644")),
        ("open", (0, 0, 0o644), ("NULL", "O_RDONLY")),
        ("openat", (2**64 - 100, 1, 0o4010000), ("AT_FDCWD", "0x1", "O_RDONLY|O_SYNC")),
        ("openat", (2**32 - 100, 1, 0x80000000), ("AT_FDCWD", "0x1", "O_RDONLY|0x80000000")),
        ("close", (2**32 - 1,), ("-1",)),
        ("lseek", (3, 2**64 - 5, 1), ("3", "-5", "SEEK_CUR")),
        ("mmap", (0, 4096, 0, 0x22, 2**64 - 1, 0), None),
        ("kill", (2**32 - 1, 9), ("-1", "SIGKILL")),
        ("kill", (1, 77), ("1", "77")),
        ("access", (1, 6), ("0x1", "R_OK|W_OK")),
        ("unlinkat", (3, 1, 0x200), ("3", "0x1", "AT_REMOVEDIR")),
        ("getpid", (), ()),
        ("clone", (0x11, 0, 0, 0, 0), ("SIGCHLD", "NULL", "NULL", "NULL", "NULL")),
    ],
)
def test_arguments_text_as_strace_prints_them(
    name: str, values: tuple[int, ...], texts: tuple[str, ...] | None
) -> None:
    (number,) = (number for number, call in system_calls().items() if call.name == name)
    if texts is None:
        texts = ("NULL", "4096", "PROT_NONE", "MAP_PRIVATE|MAP_ANONYMOUS", "-1", "0")
    padded = (*values, *[7] * (6 - len(values)))
    assert arguments_text(number, padded, {}) == texts


def test_arguments_text_any_numbers_of_any_call_are_text() -> None:
    for number in system_calls():
        for value in (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1):
            texts = arguments_text(number, (value,) * 6, {0: (b"\xff\0", True)})
            assert texts is not None
            assert all(text.isprintable() for text in texts)
    assert arguments_text(9999, (0,) * 6, {}) is None


def test_quoted_has_the_escapes_of_c() -> None:
    assert quoted(b'a"\\\n\x00\xff') == r'"a\"\\\n\000\377"'
    assert quoted(b"a", cut=True) == '"a"...'
