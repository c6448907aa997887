# SPDX-License-Identifier: Apache-2.0
"""Programs that record blocks of their threads themselves, as QEMU does with the plugin."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from bridge.sources.native.build import build_runtime
from bridge.sources.native.source import NativeSource
from tests.support.native import build, functions, needs_clang

PROGRAM = """\
#include <kcov_bridge.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
#define APART __attribute__((noinline))
static volatile int sum;
#define QUIET __attribute__((noinline, no_sanitize("coverage")))
APART int before(int x) { return sum += x + 1; }
APART int mine(int x) { return sum += x + 2; }
APART int refused(int x) { return sum += x + 3; }
APART int after(int x) { return sum += x + 4; }
APART int in_thread(int x) { return sum += x + 5; }
APART int in_child(int x) { return sum += x + 6; }
static int taking = 1;
QUIET static int take(uint64_t pc)
{
    if (taking)
        printf("%lx\\n", pc);
    return taking;
}
QUIET static void *thread(void *data) { in_thread(1); return data; }
QUIET static void wait_for_bridge(void)
{
    char line;

    puts("next");
    fflush(stdout);
    read(0, &line, 1);
}
QUIET int main(void)
{
    pthread_t other;

    before(1);
    wait_for_bridge();
    if (kcov_bridge_take_blocks(take))
        return 1;
    mine(1);
    before(2);
    mine(2);
    taking = 0;
    refused(1);
    pthread_create(&other, NULL, thread, NULL);
    pthread_join(other, NULL);
    if (!fork()) {
        in_child(1);
        _exit(0);
    }
    wait(NULL);
    if (kcov_bridge_take_blocks(NULL) != take)
        return 2;
    after(1);
    wait_for_bridge();
    return 0;
}
"""


@needs_clang
def test_a_thread_takes_its_blocks_itself(tmp_path: Path) -> None:
    path = tmp_path / "program.c"
    path.write_text(PROGRAM)
    made = build(tmp_path / "program", path, f"-I{build_runtime().directory}", "-Wl,--build-id")
    source = NativeSource()
    source.start()
    with subprocess.Popen(
        [made],
        env={**os.environ, **source.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "next\n"
        assert functions(source, source.consume()) == {"before"}
        assert not source.taken
        program.stdin.write("\n")
        taken = [int(line, 16) for line in iter(program.stdout.readline, "next\n")]
        given = source.consume()
        program.stdin.write("\n")
    assert program.wait() == 0
    # In their order, and each time.
    assert [functions(source, [pc]) for pc in taken] == [{"mine"}, {"before"}, {"mine"}]
    assert functions(source, given) == {"in_thread", "in_child", "after"}
    assert source.taken == set(taken)
    # What the program refused is nobody's.
    assert source.blocks_covered == 5
    source.stop()
    assert source.taken == set(taken)
    assert source.blocks_covered == 5
    (module,) = source.table
    assert sum(module.covered) == 5
