# SPDX-License-Identifier: Apache-2.0
"""The forms of coverage that compilers have, and what a program may do meanwhile."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.sources.native.build import build_runtime
from bridge.sources.native.source import NativeSource
from tests.support.line_program import line_program
from tests.support.native import build, functions, needs_clang, run

PROGRAM = """\
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#define N __attribute__((noinline))
N int small(int x) { return x + 1; }
N int large(int x) { return x * 3; }
N int in_child(int x) { return x * 5; }
N int executed(int x) { return x * 7; }
N void *in_thread(void *x) { return (char *)x + large(3); }
int main(int argc, char **argv) {
    volatile int sum = 0;
    for (int i = 1; i < argc; i++) {
        char *word = argv[i];
        if (!strcmp(word, "small")) sum += small(i);
        if (!strcmp(word, "fork") && !fork()) { sum += in_child(i); exit(0); }
        if (!strcmp(word, "fork-abrupt") && !fork()) { sum += in_child(i); _exit(0); }
        if (!strcmp(word, "exec") && !fork())
            execl("/proc/self/exe", "again", "executed", NULL);
        if (!strcmp(word, "executed")) sum += executed(i);
        if (!strcmp(word, "thread")) {
            pthread_t thread;
            pthread_create(&thread, NULL, in_thread, word);
            pthread_join(thread, NULL);
        }
        if (!strcmp(word, "load")) {
            void *library = dlopen(argv[++i], RTLD_NOW);
            if (!library) { puts(dlerror()); return 1; }
            ((int (*)(int))dlsym(library, "loaded"))(i);
            dlclose(library);
        }
        if (!strcmp(word, "die")) kill(getpid(), SIGKILL);
        if (!strcmp(word, "wait")) { char c; puts("waits"); fflush(stdout); read(0, &c, 1); }
        while (wait(NULL) > 0) {}
    }
    return 0;
}
"""
LIBRARY = "int loaded(int x) { if (x > 100) return 1; return x * 11; }\n"

GUARDS = ("clang", "-fsanitize-coverage=trace-pc-guard,pc-table")
FORMS = [
    pytest.param(*GUARDS, id="guards", marks=needs_clang),
    pytest.param(
        "clang", "-fsanitize-coverage=trace-pc-guard", id="guards-alone", marks=needs_clang
    ),
    pytest.param(
        "clang",
        "-fsanitize-coverage=inline-8bit-counters,pc-table",
        id="counters",
        marks=needs_clang,
    ),
    pytest.param(
        "clang", "-fsanitize-coverage=inline-bool-flag,pc-table", id="flags", marks=needs_clang
    ),
    pytest.param("gcc", "-fsanitize-coverage=trace-pc", id="gcc"),
]


@pytest.fixture(name="source")
def _source() -> Iterator[NativeSource]:
    source = NativeSource()
    source.start()
    yield source
    source.stop()


def program(directory: Path, compiler: str, form: str, *flags: str, linked: bool = True) -> Path:
    path = directory / "program.c"
    path.write_text(PROGRAM)
    linker = None if linked else ["-ldl"]
    return build(
        directory / "program", path, *flags, compiler=compiler, coverage=[form], linked=linker
    )


@pytest.mark.parametrize(("compiler", "form"), FORMS)
def test_form_each_run_has_its_functions(
    source: NativeSource, tmp_path: Path, compiler: str, form: str
) -> None:
    made = program(tmp_path, compiler, form)
    for words, expected in (
        (["small"], {"small"}),
        (["thread"], {"in_thread", "large"}),
        (["fork"], {"in_child"}),
        (["exec"], {"executed"}),
    ):
        assert run(source, made, *words).returncode == 0
        assert functions(source, source.consume()) == {"main", *expected}
    assert source.blocks_covered < source.blocks_total


@pytest.mark.parametrize(("compiler", "form"), FORMS)
def test_form_a_running_program_is_read(
    source: NativeSource, tmp_path: Path, compiler: str, form: str
) -> None:
    made = program(tmp_path, compiler, form)
    words: list[str | Path] = [made, "small", "wait", "thread", "wait"]
    with line_program(words, source.environment) as running:
        running.read()
        assert functions(source, source.consume()) == {"main", "small"}
        assert source.consume() == []
        running.ask("")
        assert functions(source, source.consume()) == {"main", "in_thread", "large"}
        running.send("")
    assert running.process.returncode == 0


@pytest.mark.parametrize(("compiler", "form"), FORMS)
def test_form_a_library_that_is_loaded_and_unloaded_has_blocks(
    source: NativeSource, tmp_path: Path, compiler: str, form: str
) -> None:
    path = tmp_path / "library.c"
    path.write_text(LIBRARY)
    shared = build_runtime().shared_flags
    library = build(
        *(tmp_path / "library.so", path, "-shared", "-fPIC"),
        compiler=compiler,
        coverage=[form],
        # Its own copy of the run time keeps what its counters have when it is unloaded.
        linked=shared if "inline" not in form else (*build_runtime().link_flags, "-Wl,-Bsymbolic"),
    )
    main = tmp_path / "program.c"
    main.write_text(PROGRAM)
    made = build(tmp_path / "program", main, compiler=compiler, coverage=[form], linked=shared)
    assert run(source, made, "load", str(library), "load", str(library)).returncode == 0
    assert functions(source, source.consume()) == {"main", "loaded"}


def test_gcc_a_library_at_the_place_of_another_has_blocks_of_its_own(
    source: NativeSource, tmp_path: Path
) -> None:
    compiler, form = FORMS[-1].values
    shared = build_runtime().shared_flags
    libraries = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.c"
        inner = f"{name}_inner"
        path.write_text(
            f"__attribute__((noinline)) int {inner}(int x) {{ return x * 3; }}\n"
            f"int loaded(int x) {{ return {inner}(x) + 1; }}\n"
        )
        libraries.append(
            build(
                *(tmp_path / f"{name}.so", path, "-shared", "-fPIC"),
                compiler=str(compiler),
                coverage=[str(form)],
                linked=shared,
            )
        )
    main = tmp_path / "program.c"
    main.write_text(PROGRAM)
    # As a user links it, and with the run time as an archive.
    for number, linked in enumerate((shared, ("-rdynamic", *build_runtime().link_flags))):
        made = build(
            tmp_path / f"program{number}",
            main,
            compiler=str(compiler),
            coverage=[str(form)],
            linked=linked,
        )
        words = [word for library in libraries for word in ("load", str(library))] * 3
        assert run(source, made, *words).returncode == 0
        assert functions(source, source.consume()) == {
            *("main", "loaded", "first_inner", "second_inner")
        }


def test_gcc_a_program_that_is_linked_statically_may_unload_a_library(
    source: NativeSource, tmp_path: Path
) -> None:
    path = tmp_path / "library.c"
    path.write_text(LIBRARY)
    plain = build(
        *(tmp_path / "library.so", path, "-shared", "-fPIC"), compiler="gcc", coverage=(), linked=()
    )
    made = program(tmp_path, "gcc", "-fsanitize-coverage=trace-pc", "-static")
    assert run(source, made, "load", plain, "small").returncode == 0
    assert functions(source, source.consume()) == {"main", "small"}


@pytest.mark.parametrize(
    ("compiler", "form"), [each for each in FORMS if "inline" not in str(each.values[1])]
)
def test_form_blocks_of_a_program_that_is_killed_are_kept(
    source: NativeSource, tmp_path: Path, compiler: str, form: str
) -> None:
    made = program(tmp_path, compiler, form)
    assert run(source, made, "small", "fork-abrupt", "die").returncode == -9
    assert functions(source, source.consume()) == {"main", "small", "in_child"}


@needs_clang
def test_clang_weak_callbacks_of_its_own_are_overridden(
    source: NativeSource, tmp_path: Path
) -> None:
    path = tmp_path / "program.c"
    path.write_text(PROGRAM)
    made = tmp_path / "program"
    command = ["clang", "-g", GUARDS[1], str(path), *build_runtime().link_flags, "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "libclang_rt" in done.stderr:
        pytest.skip("clang's own run time is missing: apt-get install libclang-rt-14-dev")
    assert done.returncode == 0, done.stderr
    run(source, made, "small")
    assert functions(source, source.consume()) == {"main", "small"}


@pytest.mark.parametrize(("compiler", "form"), FORMS[:1])
def test_stripped_program_has_pcs_without_functions(
    source: NativeSource, tmp_path: Path, compiler: str, form: str
) -> None:
    made = program(tmp_path, compiler, form)
    subprocess.run(["strip", str(made)], check=True)
    run(source, made, "small")
    pcs = source.consume()
    assert pcs
    assert all((source.places().text(pc) or "").startswith("program+0x") for pc in pcs)


@pytest.mark.parametrize(("compiler", "form"), FORMS[:1])
def test_program_without_build_id_has_the_pcs_of_its_contents(
    source: NativeSource, tmp_path: Path, compiler: str, form: str
) -> None:
    made = program(tmp_path, compiler, form, "-Wl,--build-id=none")
    run(source, made, "small")
    first = source.consume()
    copy = shutil.copy(made, tmp_path / "copy")
    other = NativeSource()
    other.start()
    run(other, copy, "small")
    assert other.consume() == first != []
    other.stop()
