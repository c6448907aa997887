# SPDX-License-Identifier: Apache-2.0
"""From records and PCs to calls with names and code."""

from __future__ import annotations

import json.decoder
import pickle
import tempfile
from array import array
from pathlib import Path

import pytest

from bridge.device.abi import CALL_WORDS_BITS, CallFlag, CallLogWord, CallWord
from bridge.device.calls import CallBook, CallLog
from bridge.device.region import Region
from bridge.sources.native.debug import Frame
from bridge.sources.pcs import BlockTable, Location, syscall_pc
from bridge.sources.python.functions import FunctionIndex, functions_of
from bridge.trace import HostCode
from bridge.trace.explained import CodeFinder, ExplainedCalls, kernel_function
from bridge.trace.text import host_text

SOURCE = """\
def outer(x):
    def inner():
        return 1
    if x:
        return inner()
    return 2

class C:
    def method(self):
        return 3
"""


def record(number: int, result: int, entered: int, returned: int, count: int, flags: int) -> bytes:
    head = CallWord.STRINGS | flags << CALL_WORDS_BITS
    words = (head, number, result, entered, returned, count, *[7] * 6, 0x746163, 0)
    return array("Q", [word & 2**64 - 1 for word in words]).tobytes()


def explained(records: list[bytes], pcs: list[int], table: BlockTable) -> ExplainedCalls:
    region = Region(1 << 20)
    area, ring = region.allocate(1024), region.allocate(CallLogWord.RING + 4096)
    assert area is not None
    assert ring is not None
    log = CallLog(ring, area, clear_bitmap=False)
    words = array("Q", b"".join(records))
    ring.words[CallLogWord.RING : CallLogWord.RING + len(words)] = memoryview(words)
    ring.words[CallLogWord.HEAD] = len(words)
    book = CallBook()
    book.begin("thread", 312)
    book.add("thread", log)
    book.recorded("thread", len(pcs))
    book.end("thread", 0)
    book.finish()
    region.close()

    def symbolize(pc: int) -> Location | str | None:
        return table.lookup(pc) or ("vfs_read+0x10 [ext4]" if pc == 1 else None)

    functions = {"pkg/m.py": functions_from(SOURCE)}

    def function_at(file: str, line: int) -> str:
        spans = [(len(span), name) for name, span in functions[file].items() if line in span]
        return min(spans)[1] if spans else ""

    return ExplainedCalls(book.calls, pcs, CodeFinder(symbolize, function_at))


def functions_from(source: str) -> dict[str, range]:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(source)
        file.flush()
        return functions_of(Path(file.name))


def test_explained_calls_have_names_times_and_code() -> None:
    table = BlockTable.from_sources({"pkg/m.py": SOURCE})
    line = {number: table.line_pc("pkg/m.py", number) or 0 for number in range(1, 11)}
    number_pc = syscall_pc(257)
    assert number_pc is not None
    pcs = [number_pc, line[10], line[3], 1, 99, line[10]]
    done = int(CallFlag.RETURNED)
    calls = explained(
        [
            record(257, -2, 1_000_000_000, 1_002_000_000, 0, done),
            record(39, 312, 3_000_000_000, 2_000_000_000, 5, done),
            record(231, 0, 4_000_000_000, 0, 6, 0),
            record(20, 1, 5_000_000_000, 5_000_000_000, 6, done | CallFlag.IA32),
        ],
        pcs,
        table,
    )
    opened, getpid, exits, odd = calls
    assert (opened.name, opened.result, opened.error) == ("openat", -2, "ENOENT")
    assert (opened.start, opened.thread, opened.command) == (0.0, 312, "cat")
    assert opened.seconds == pytest.approx(0.002)
    assert opened.host == (
        HostCode("pkg/m.py", "C.method", (10,), pcs=(line[10],)),
        HostCode("pkg/m.py", "outer.inner", (3,), pcs=(line[3],)),
    )
    assert opened.kernel == ("vfs_read",)
    assert opened.modules == (("ext4", ("vfs_read",)),)
    # A clock that runs backwards is the guest's affair.
    assert (getpid.name, getpid.seconds, getpid.start) == ("getpid", 0.0, 2.0)
    assert getpid.host == (HostCode("pkg/m.py", "C.method", (10,), pcs=(line[10],)),)
    assert (exits.result, exits.seconds, exits.error, exits.host) == (None, None, None, ())
    assert (odd.name, odd.arguments) == ("ia32_syscall_20", None)
    assert calls[1:3] == [getpid, exits]
    assert calls[-1] == odd
    assert pickle.loads(pickle.dumps(calls)) == [opened, getpid, exits, odd]


@pytest.mark.parametrize(
    ("text", "name", "module"),
    [
        ("vfs_read+0x1f", "vfs_read", ""),
        ("v9fs_open+0x0 [9p]", "v9fs_open", "9p"),
        ("fs/read_write.c:12 vfs_read+0x1f", "vfs_read", ""),
        ("nothing", "nothing", ""),
    ],
)
def test_kernel_function_of_each_form(text: str, name: str, module: str) -> None:
    assert kernel_function(text) == (name, module)


def test_function_index_has_the_innermost_function() -> None:
    index = FunctionIndex(["json"])
    (line,) = (
        number
        for number, text in enumerate(Path(json_decoder()).read_text().splitlines(), 1)
        if "obj, end = self.scan_once(s, idx)" in text
    )
    assert index.at("json/decoder.py", line) == "JSONDecoder.raw_decode"
    assert index.at("json/decoder.py", 1) == ""
    assert index.at("json/nowhere.py", 1) == ""


def json_decoder() -> str:
    return json.decoder.__file__


def test_code_finder_names_functions_of_native_programs() -> None:
    frames = {8: Frame("serve", "/src/a.c", 7, 3), 24: Frame("serve", "/src/a.c", 9, 1)}
    frames[40] = Frame("start", "/src/b.s", 0, 0)
    finder = CodeFinder(lambda pc: "vfs_read+0x10" if pc == 1 else None, lambda *_: "", frames.get)
    host, kernel, modules = finder.find([24, 1, 8, 40, 24])
    assert (kernel, modules) == (("vfs_read",), ())
    assert host == (
        HostCode("/src/a.c", "serve", (7, 9), pcs=(8, 24)),
        HostCode("/src/b.s", "start", (), pcs=(40,)),
    )
    assert host_text(host) == "a.c: serve 7, 9; b.s: start"
