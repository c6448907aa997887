# SPDX-License-Identifier: Apache-2.0
"""Programs and scripts that reproduce a finding: built and run here, on a local file system."""

from __future__ import annotations

import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.fuzz.files_text import load_encoding, to_bytes
from bridge.fuzz.reproducers import files_program, make_reproducer

HOSTILE = 'BUG: */ "x" \n#include <y> \x00'

CALLS = r"""
mkdir d 0755
open f0 d/a rw|creat 0644
pwrite f0 10 65 5
lseek f0 0 set
read f0 100
dup f0 f1
put f1 "a\"b\\\x00?? \xff"
fstat f1
ftruncate f0 8
mread f0 0 4096
chmod d/a 0600
rename d/a b replace
symlink b c
readlink c
link b e
utimens b now 1
parallel
0: stat b
1: stat c
join
list .
unlink longer
close f0
close f0
"""


def built(tmp_path: Path, text: str, *more: str | Path) -> Path:
    source, program = tmp_path / "reproducer.c", tmp_path / "reproducer"
    source.write_text(text)
    flags = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-result", "-Wno-unused-value")
    subprocess.run(["gcc", *flags, "-pthread", "-o", program, source, *more], check=True)
    return program


def test_files_program_makes_the_calls_of_the_case(tmp_path: Path) -> None:
    program = built(tmp_path, files_program(HOSTILE, to_bytes(CALLS)))
    place = tmp_path / "place"
    place.mkdir()
    done = subprocess.run([program, place], capture_output=True, text=True, check=True)
    results = [line.rpartition(": ")[2] for line in done.stdout.splitlines()]
    # `list` and what comes after the threads, whose order is their own.
    made = place / "kcov-bridge-fuzz"
    assert (made / "b").read_bytes() == b"\0\0\0\0\0ABC"
    assert stat.S_IMODE((made / "b").stat().st_mode) == 0o600
    assert (made / "c").readlink() == Path("b")
    assert (made / "e").stat().st_ino == (made / "b").stat().st_ino
    assert (made / "b").stat().st_mtime == 1
    assert results[:8] == ["0", "0", "10", "0", "15", "0", "9", "0"]
    assert results[-3:] == ["-1, File name too long", "0", "-1, Bad file descriptor"]


def test_files_program_where_nothing_can_be_made_works_on_what_is_there(tmp_path: Path) -> None:
    program = built(tmp_path, files_program("x", to_bytes("open f0 a r 0644\nread f0 9\nstat d")))
    place = tmp_path / "place"
    (place / "folder").mkdir(parents=True)
    (place / "first").write_text("first")
    (place / "second").write_text("second one")
    # A file of this name is no directory.
    (place / "kcov-bridge-fuzz").touch()
    done = subprocess.run([program, place], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["open f0 a r 0644: 0", "read f0 9: 5", "stat d: 0"]


def test_files_program_of_any_case_compiles(tmp_path: Path) -> None:
    rng = random.Random(5)
    encoding = load_encoding()
    special = {encoding.numbers[name] for name in ("SEPARATOR", "ESCAPE")}
    escape, other = encoding.numbers["ESCAPE"], encoding.numbers["ESCAPE_XOR"]
    records = []
    for number in range(3 * len(encoding.calls)):
        plain = bytes([number % len(encoding.calls)]) + rng.randbytes(12)
        records.append(
            b"".join(
                bytes([escape, each ^ other]) if each in special else bytes([each])
                for each in plain
            )
        )
    rng.shuffle(records)
    text = files_program("x", b"\n".join(records))
    warnings = ("-Wno-nonnull", "-Wno-stringop-overread", "-Wno-stringop-overflow")
    built(tmp_path, text, *warnings)
    missing = [name for name in encoding.calls if f'"{name}' not in text]
    assert missing == ["parallel", "join"]


@pytest.mark.parametrize("case", [b"", b"one\ntwo\n", bytes(range(256)) * 3, b"'\"$x\\"])
def test_scripts_and_programs_have_the_case_in_them(tmp_path: Path, case: bytes) -> None:
    out = tmp_path / "out"
    copies = tmp_path / "copies.py"
    copies.write_text(
        f"def take(case):\n    open({str(out)!r}, 'wb').write(case)\n    raise KeyError\n"
    )
    given = {
        "stdin": make_reproducer(HOSTILE, "", ("tee", str(out)), case),
        "file": make_reproducer(HOSTILE, "", ("cp", "@@", str(out)), case),
        "python": make_reproducer(HOSTILE, "python:copies:take", (), case),
    }
    for form, reproducer in given.items():
        assert reproducer is not None
        script = tmp_path / reproducer.name
        script.write_text(reproducer.text)
        words = [sys.executable if form == "python" else "sh", str(script)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True)
        assert done.returncode == (1 if form == "python" else 0), done.stderr
        assert out.read_bytes() == case, form
        out.unlink()


def test_program_of_a_shared_object_calls_its_function(tmp_path: Path) -> None:
    harness = tmp_path / "harness.c"
    harness.write_text(
        "#include <stdint.h>\n#include <stdio.h>\n#include <stddef.h>\n"
        "int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length)\n"
        '{ printf("%zu %d\\n", length, data[length - 1]); return 0; }\n'
    )
    library = tmp_path / "harness.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, harness], check=True)
    reproducer = make_reproducer(HOSTILE, str(library), (), b"\x01\xfe")
    assert reproducer is not None
    program = built(tmp_path, reproducer.text, library)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert done.stdout == "2 254\n"


def test_harness_without_a_form_has_no_reproducer() -> None:
    assert make_reproducer("x", "calls", (), b"") is None
