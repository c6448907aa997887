# SPDX-License-Identifier: Apache-2.0
"""Go programs: their counters are read and cleared while they run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.sources.native.modules import ModuleTable
from bridge.sources.native.source import NativeSource
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


class Running:
    """A program that answers lines."""

    def __init__(self, program: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
        )
        self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture(name="running")
def _running(program: Path) -> Iterator[Running]:
    running = Running(program)
    yield running
    running.end()


@pytest.fixture(name="source")
def _source(running: Running) -> Iterator[NativeSource]:
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


def test_go_each_request_has_its_blocks(source: NativeSource, running: Running) -> None:
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


def test_go_counters_agree_with_covdata(program: Path, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    plain = Running(program, GOCOVERDIR=str(directory))
    source = NativeSource()
    source.start()
    read = Running(program)
    source.add_process(read.process.pid)
    for request in REQUESTS:
        assert plain.ask(request) == read.ask(request)
        source.consume()
    plain.end()
    read.process.kill()
    read.end()
    source.stop()
    profile = tmp_path / "profile"
    command = [str(GO), "tool", "covdata", "textfmt", "-i", str(directory), "-o", str(profile)]
    subprocess.run(command, check=True, capture_output=True)
    theirs = set()
    everything = set()
    for line in profile.read_text().splitlines()[1:]:
        place, _, count = line.split()
        everything.add(place)
        if count != "0":
            theirs.add(place)
    source.save(tmp_path / "native.tsv")
    (module,) = ModuleTable.load(tmp_path / "native.tsv")
    assert {str(block) for block in module.blocks} == everything
    ours = {str(block) for block, ran in zip(module.blocks, module.covered, strict=True) if ran}
    # What runs after the last request, at the end of the input, only theirs can have.
    assert ours <= theirs
    assert len(theirs - ours) <= 1
    assert len(ours) > 12


def test_go_program_without_coverage_is_left_alone(tmp_path: Path) -> None:
    running = Running(build(tmp_path))
    source = NativeSource()
    source.start()
    source.add_process(running.process.pid)
    assert running.ask("add 1 2") == "3"
    assert source.consume() == []
    assert source.blocks_total == 0
    running.end()
    source.stop()


def test_go_block_that_always_runs_is_never_lost(source: NativeSource, running: Running) -> None:
    blocks(source)
    for _ in range(300):
        running.ask("add 1 2")
        found = blocks(source)
        assert {"add 14", "add 18"} <= found, found
