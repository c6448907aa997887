# SPDX-License-Identifier: Apache-2.0
"""Races between program and bridge, and programs that write over the shared memory."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.sources.native.build import READER, RUNTIME, build_runtime
from bridge.sources.native.source import NativeSource
from tests.support.native import build, functions, needs_clang, run

pytestmark = needs_clang

RUNS = 100_000 * int(os.environ.get("KCOV_BRIDGE_EXAMPLES", "1"))

HOSTILE = """\
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
__attribute__((noinline)) int covered(int x) { return x + 1; }
int main(int argc, char **argv) {
    volatile int sum = covered(argc);
    int fd = open(getenv("KCOV_BRIDGE_NATIVE"), O_RDWR);
    struct stat status;
    fstat(fd, &status);
    unsigned int *words = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    srand(atoi(argv[1]));
    if (ftruncate(fd, 0) == 0) return 3;
    for (int i = 0; i < 20000; i++) {
        /* Header, threads, modules, ranges; then the levels of blocks. */
        size_t at = i % 2 ? rand() % (650000 / 4) : rand() % (status.st_size / 4);
        words[at] = i % 3 ? rand() : rand() % 2048;
    }
    return sum == 1;
}
"""

TAKES_ALL = """\
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "layout.h"
int main(void)
{
    int fd = open(getenv("KCOV_BRIDGE_NATIVE"), O_RDWR);
    char *memory = mmap(NULL, KBN_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    ((struct kbn_header *)memory)->taking = 1;
    memset(memory + KBN_TAKEN_AT, 1, 1 << 16);
    return 0;
}
/* The last block. */
int __attribute__((section(".text.z"))) never(int x) { return x + 1; }
"""


@pytest.fixture(name="source")
def _source() -> Iterator[NativeSource]:
    source = NativeSource()
    source.start()
    yield source
    source.stop()


def test_race_no_run_of_a_block_is_lost(tmp_path: Path) -> None:
    reader = READER.build()
    linked = (*build_runtime().link_flags, str(reader), f"-Wl,-rpath,{reader.parent}")
    made = build(tmp_path / "race", Path(__file__).with_name("race.c"), linked=linked)
    done = subprocess.run(
        [str(made), str(RUNS)], capture_output=True, text=True, timeout=600, check=False
    )
    match = re.fullmatch(r"(\d+) runs, (\d+) lost, (\d+) looks, \d+ without news\n", done.stdout)
    assert match is not None, (done.returncode, done.stdout, done.stderr)
    assert int(match[1]) == 3 * RUNS
    assert int(match[2]) == 0
    # Otherwise nothing was raced.
    assert int(match[3]) > RUNS / 100


@pytest.mark.parametrize("seed", range(4))
def test_hostile_program_the_source_goes_on(
    source: NativeSource, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "hostile.c"
    path.write_text(HOSTILE)
    hostile = build(tmp_path / "hostile", path)
    assert run(source, hostile, str(seed)).returncode == 0
    for _ in range(5):
        pcs = source.consume()
        places = source.places()
        assert all(places.table.lookup(pc) is not None for pc in pcs)
        assert len(pcs) <= source.blocks_total
        run(source, hostile, str(seed + 100))
    source.record_threads(True)
    source.consume()


def test_hostile_program_says_that_it_took_code_without_a_block(
    source: NativeSource, tmp_path: Path
) -> None:
    path = tmp_path / "program.c"
    path.write_text(TAKES_ALL)
    trace_pc = ("-fsanitize-coverage=trace-pc",)
    layout = RUNTIME.source.parent
    made = build(tmp_path / "program", path, f"-I{layout}", compiler="gcc", coverage=trace_pc)
    assert run(source, made).returncode == 0
    assert functions(source, source.consume()) == {"main"}
    source.refresh()
    (module,) = source.table
    assert 0 < sum(module.covered) < module.count
    assert source.blocks_covered == sum(module.covered)


def test_other_layout_is_said(
    source: NativeSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "program.c"
    path.write_text("int main(void) { return 0; }\n")
    made = build(tmp_path / "program", path)
    memory = source._memory
    assert memory is not None
    # As a bridge of another version has it.
    memory.buffer[8:12] = (99).to_bytes(4, "little")
    assert run(source, made).returncode == 0
    assert source.consume() == []
    source.stop()
    assert "another version" in caplog.text


def test_program_without_the_run_time_is_said(
    source: NativeSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(source, "/bin/true").returncode == 0
    source.stop()
    assert "no program of the target has told of its blocks" in caplog.text


def test_threads_are_told_apart(source: NativeSource, tmp_path: Path) -> None:
    path = tmp_path / "threads.c"
    path.write_text(
        "#define _GNU_SOURCE\n#include <pthread.h>\n"
        "__attribute__((noinline)) void *one(void *x) "
        '{ pthread_setname_np(pthread_self(), "late"); return x; }\n'
        "int main(void) { pthread_t t; pthread_create(&t, 0, one, 0);\n"
        "pthread_join(t, 0); return 0; }\n"
    )
    made = build(tmp_path / "threads", path)
    source.record_threads(True)
    run(source, made)
    pcs = source.consume()
    of_one = {pc for pc in pcs if functions(source, [pc]) == {"one"}}
    threads = source.thread_of
    assert of_one
    assert {threads[pc].name for pc in pcs} == {"threads"}
    assert {threads[pc].id for pc in of_one}.isdisjoint(threads[pc].id for pc in set(pcs) - of_one)
