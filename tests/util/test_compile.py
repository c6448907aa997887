# SPDX-License-Identifier: Apache-2.0
"""C programs that are compiled once and kept."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bridge.errors import CacheError, InfrastructureError, MissingDependencyError
from bridge.util.compile import CProgram

PROGRAM = '#include <stdio.h>\n#include "said.h"\nint main(void) { puts(SAID); }\n'


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CProgram:
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "it.c").write_text(PROGRAM)
    (tmp_path / "said.h").write_text('#define SAID "one"\n')
    return CProgram("the test", tmp_path / "it.c", ("-O0",), "kept", (tmp_path / "said.h",))


def said(path: Path) -> str:
    return subprocess.run([path], check=True, capture_output=True, text=True).stdout


def test_build_twice_compiles_once(program: CProgram) -> None:
    first = program.build()
    made = first.stat()
    assert said(first) == "one\n"
    assert program.build() == first
    assert first.stat().st_ino == made.st_ino
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_build_something_changed_compiles_anew(program: CProgram, tmp_path: Path) -> None:
    paths = {program.build(), replace(program, flags=("-O1",)).build()}
    (tmp_path / "said.h").write_text('#define SAID "two"\n')
    newest = program.build()
    assert said(newest) == "two\n"
    assert len(paths | {newest}) == 3


def test_build_spare_leaves_the_cache_alone(program: CProgram, tmp_path: Path) -> None:
    assert program.build(spare=tmp_path).parent == tmp_path
    assert not (tmp_path / "cache").exists()
    kept = program.build()
    assert program.build(spare=tmp_path) == kept


def test_build_broken_source_raises_with_the_compilers_words(
    program: CProgram, tmp_path: Path
) -> None:
    (tmp_path / "it.c").write_text("int main(void) { return nothing; }\n")
    with pytest.raises(InfrastructureError, match="the test does not compile") as caught:
        program.build()
    assert "nothing" in caught.value.evidence
    assert not list((tmp_path / "cache" / "kept").iterdir())


def test_build_no_compiler_raises_with_a_remedy(
    program: CProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="no C compiler") as caught:
        program.build()
    assert "gcc" in caught.value.hint


def test_build_cache_cannot_be_written_raises_cache_error(
    program: CProgram, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kept").write_text("in the way")
    with pytest.raises(CacheError, match="the cache"):
        program.build()
