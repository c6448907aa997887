# SPDX-License-Identifier: Apache-2.0
"""Native blocks in the object for synthetic PCs, as addr2line shows them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from bridge.cli.main import main
from bridge.results.elf_export import write_elf
from bridge.results.kernel_object import write_kernel_object
from bridge.results.run_directory import load_native
from bridge.sources.native.source import NativeSource
from tests.support.native import build, needs_clang, run

pytestmark = needs_clang

HEADER = """\
#include <stdio.h>
static inline __attribute__((always_inline)) int twice(int x) {
    if (x > 1)
        puts("more");
    return x;
}
"""
PROGRAM = """\
#include "twice.h"
namespace shop {
__attribute__((noinline)) int price(int x) { return x < 5 ? twice(x) : 7; }
}
int main(int argc, char **argv) {
    return shop::price(argc) == 3;
}
"""


@pytest.fixture(name="directory", scope="module")
def _directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of a C++ program, which is still there."""
    directory = tmp_path_factory.mktemp("native")
    (directory / "twice.h").write_text(HEADER)
    (directory / "program.cc").write_text(PROGRAM)
    source = NativeSource()
    source.start()
    run(source, build(directory / "program", directory / "program.cc"))
    source.consume()
    source.stop()
    source.save(directory / "native.tsv")
    return directory


def inlined(vmlinux: Path, pc: int) -> list[tuple[str, str]]:
    """Functions and places of an address, the innermost first."""
    command = ["addr2line", "-i", "-f", "-e", str(vmlinux), hex(pc)]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    return list(zip(words[::2], words[1::2], strict=False))


def test_native_blocks_have_functions_and_lines_as_symbolize_has(directory: Path) -> None:
    out = directory / "vmlinux"
    arguments = ["export", "--run", str(directory), "--format", "elf", "-o", str(out)]
    assert main(arguments) == 0
    places = load_native(directory)
    assert places is not None
    (module,) = places.table
    seen = set()
    for index in range(module.count):
        frames = places.frames(module, index)
        assert frames
        for moved in (0, 1, 8):
            assert inlined(out, module.pc(index) - moved) == [
                (frame.function, f"{frame.file}:{frame.line}") for frame in frames
            ]
        seen.add(tuple(frame.function for frame in frames))
    assert seen == {("main",), ("shop::price(int)",), ("twice(int)", "shop::price(int)")}


def test_manager_object_of_a_native_target_has_its_lines(directory: Path, tmp_path: Path) -> None:
    assert write_kernel_object(directory, tmp_path / "obj") == "lines of the target"
    symbols = subprocess.run(
        ["nm", str(tmp_path / "obj" / "vmlinux")], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r" t shop::price\(int\)$", symbols, re.M)


def test_native_blocks_without_a_file_have_their_module(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (directory / "native.tsv").read_text().replace(f"{directory}/program", "/gone/program")
    (tmp_path / "native.tsv").write_text(text)
    write_elf(tmp_path, tmp_path / "vmlinux")
    places = load_native(tmp_path)
    assert places is not None
    (module,) = places.table
    assert inlined(tmp_path / "vmlinux", module.pc(0))[0][0] == "program"
    assert "native blocks have no line" in caplog.text
