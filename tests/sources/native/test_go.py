# SPDX-License-Identifier: Apache-2.0
"""Go programs: their counters are read and cleared while they run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bridge.sources.native.modules import ModuleTable
from bridge.sources.native.source import NativeSource
from tests.support.line_program import LineProgram, line_program
from tests.support.native import DATA

GO = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")

pytestmark = pytest.mark.skipif(GO is None, reason="go is missing: apt-get install golang-go")

REQUESTS = ("add 1 2", "add 200 1", "upper a", "upper ", "many", "other")


@pytest.fixture(name="program", scope="module")
def _program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("go"), "-cover", "-covermode=atomic")


def build(directory: Path, *flags: str) -> Path:
    environment = {
        **os.environ,
        "GOFLAGS": "-mod=mod",
        "GOCACHE": str(directory.parent / "go-cache"),
    }
    done = subprocess.run(
        [str(GO), "build", *flags, "-o", str(directory / "lines"), "."],
        cwd=DATA / "go",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory / "lines"


def started(program: Path, **environment: str) -> AbstractContextManager[LineProgram]:
    return line_program([program], environment)


@pytest.fixture(name="running")
def _running(program: Path) -> Iterator[LineProgram]:
    with started(program) as running:
        running.read()
        yield running


@pytest.fixture(name="source")
def _source(running: LineProgram) -> Iterator[NativeSource]:
    source = NativeSource()
    source.start()
    source.add_process(running.process.pid)
    yield source
    source.stop()


def blocks(source: NativeSource) -> set[str]:
    """What was covered, as ``function line``."""
    places = source.places()
    texts = [str(places.text(pc)) for pc in source.consume()]
    return {re.sub(r".*/main.go:(\d+)\..* .*\.(\w+)", r"\2 \1", text) for text in texts}


def test_go_each_request_has_its_blocks(source: NativeSource, running: LineProgram) -> None:
    blocks(source)
    assert running.ask("add 1 2") == "3"
    first = blocks(source)
    assert {each for each in first if each.startswith("add")} == {"add 14", "add 18"}
    assert {each.split()[0] for each in first} == {"main", "add"}
    assert running.ask("upper a") == "A"
    assert {each.split()[0] for each in blocks(source)} == {"main", "upper"}
    assert running.ask("add 1 2") == "3"
    assert blocks(source) == first
    assert blocks(source) == set()
    assert 0 < source.blocks_covered < source.blocks_total


def profile(directory: Path) -> dict[str, int]:
    """Blocks by place, with their counts, of what Go has left in a directory."""
    out = directory / "profile"
    command = [str(GO), "tool", "covdata", "textfmt", "-i", str(directory), "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    words = (line.split() for line in out.read_text().splitlines()[1:])
    return {place: int(count) for place, _, count in words}


def test_go_counters_agree_with_covdata(program: Path, tmp_path: Path) -> None:
    ours_at, theirs_at = tmp_path / "ours", tmp_path / "theirs"
    ours_at.mkdir()
    theirs_at.mkdir()
    source = NativeSource()
    source.start()
    with (
        started(program, GOCOVERDIR=str(theirs_at)) as plain,
        started(program, GOCOVERDIR=str(ours_at)) as read,
    ):
        assert plain.read() == read.read()
        source.add_process(read.process.pid)
        for request in REQUESTS:
            assert plain.ask(request) == read.ask(request)
            source.consume()
        source.stop()
    source.save(tmp_path / "native.tsv")
    theirs = profile(theirs_at)
    (module,) = ModuleTable.load(tmp_path / "native.tsv")
    assert {str(block) for block in module.blocks} == set(theirs)
    ours = {str(block) for block, ran in zip(module.blocks, module.covered, strict=True) if ran}
    ran = {place for place, count in theirs.items() if count}
    # What runs after the last request, at the end of the input, only theirs can have.
    assert ours <= ran
    assert len(ran - ours) <= 1
    assert len(ours) > 12
    # The bridge has only read: the program's own data is what it is without the bridge.
    assert profile(ours_at) == theirs


@pytest.mark.parametrize("mode", ["set", "count"])
def test_go_other_modes_have_the_blocks_of_each_request(
    tmp_path_factory: pytest.TempPathFactory, mode: str
) -> None:
    made = build(tmp_path_factory.mktemp(mode), "-cover", f"-covermode={mode}")
    source = NativeSource()
    source.start()
    with started(made) as running:
        running.read()
        source.add_process(running.process.pid)
        blocks(source)
        for _ in range(3):
            assert running.ask("add 1 2") == "3"
            assert {each.split()[0] for each in blocks(source)} == {"main", "add"}
            assert blocks(source) == set()
            assert running.ask("upper a") == "A"
            assert {each.split()[0] for each in blocks(source)} == {"main", "upper"}
    source.stop()


def test_go_program_without_coverage_is_left_alone(tmp_path: Path) -> None:
    source = NativeSource()
    source.start()
    with started(build(tmp_path)) as running:
        running.read()
        source.add_process(running.process.pid)
        assert running.ask("add 1 2") == "3"
        assert source.consume() == []
        assert source.blocks_total == 0
    source.stop()


def test_go_program_that_has_ended_gives_no_blocks(program: Path) -> None:
    source = NativeSource()
    source.start()
    with started(program) as running:
        running.read()
        source.add_process(running.process.pid)
        assert blocks(source)
        running.ask("add 1 2")
    # Nothing is read of whatever has its number now.
    assert source.consume() == []
    source.stop()


def test_go_program_that_is_started_again_takes_no_more_room(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There is room for the blocks of one.
    monkeypatch.setattr("bridge.sources.native.memory._MOST_BLOCKS", 30)
    source = NativeSource()
    source.start()
    found = []
    for _ in range(4):
        with started(program) as running:
            running.read()
            source.add_process(running.process.pid)
            blocks(source)
            assert running.ask("add 1 2") == "3"
            ran = blocks(source)
            descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
            found.append((ran, source.blocks_total, descriptors))
    assert {"add 14", "add 18"} <= found[0][0]
    assert found == [found[0]] * 4
    source.stop()


def test_go_block_that_always_runs_is_never_lost(
    source: NativeSource, running: LineProgram
) -> None:
    blocks(source)
    for _ in range(300):
        running.ask("add 1 2")
        found = blocks(source)
        assert {"add 14", "add 18"} <= found, found
