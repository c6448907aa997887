# SPDX-License-Identifier: Apache-2.0
"""The linters and the house rules for sources, as tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bridge.bench.executions import LANE_LOOP
from bridge.bench.floor import LAYOUT_FLAGS
from bridge.vm.wires import WIRES
from tests.support import ROOT, sources

PYTHON = ("bridge", "tests", "examples", "docs", "setup.py")
"""Where there is Python."""

LICENCES = {
    "bridge": "Apache-2.0",
    "bridge/sources/guest_kernel/tcg": "GPL-2.0-or-later",
    "bridge/vm/tcg": "GPL-2.0-or-later",
    "guest/module": "GPL-2.0",
    "tests/fuzz/kernel_faults": "GPL-2.0",
}
"""Who is under which licence; the longest prefix counts, and Apache-2.0 is the rest's."""

NO_SPDX = {".json", ".md", ".txt.gz", ".svg", ".png"}
NO_SPDX_NAMES = {
    "LICENSE",
    "COPYING",
    "LICENSING",
    "py.typed",
    ".gitignore",
    "go.sum",
}

NO_SPDX_IN = ("tests/data/", "tests/fuzz/data/", "images/root/")
"""Sources under measurement, recorded texts, and files that lie in the guest as they are."""


def texts() -> dict[str, str]:
    """The text files among the sources, by their path from the top."""
    found = {}
    for path in sources():
        data = path.read_bytes()
        if b"\0" not in data:
            found[path.relative_to(ROOT).as_posix()] = data.decode("utf-8")
    return found


def tool(name: str) -> str:
    """A tool of the development extras, from this very Python's environment."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.exists() else shutil.which(name)
    assert path is not None, f"{name} is not installed: make venv"
    return path


def check(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def is_shell(name: str, text: str) -> bool:
    return name.endswith(".sh") or re.match(r"#!.*\b(sh|dash|bash)\b", text) is not None


def test_ruff_finds_nothing() -> None:
    check(tool("ruff"), "check", *PYTHON)


def test_the_format_is_ruffs() -> None:
    check(tool("ruff"), "format", "--check", *PYTHON)


def test_types_are_strict() -> None:
    check(tool("mypy"), "--strict", "bridge", "tests")
    # Programs of their own, which import each other as a user's would.
    check(
        tool("mypy"), "--strict", *(str(path) for path in sorted((ROOT / "examples").glob("*.py")))
    )


def test_every_source_file_begins_with_its_licence() -> None:
    wrong = []
    for name, text in texts().items():
        path = Path(name)
        if path.name in NO_SPDX_NAMES or path.suffix in NO_SPDX or name.startswith(NO_SPDX_IN):
            continue
        lines = text.splitlines()
        if lines and lines[0].startswith("#!"):
            lines = lines[1:]
        match = re.search(r"SPDX-License-Identifier: (\S+)", lines[0] if lines else "")
        prefix = max((key for key in LICENCES if name.startswith(f"{key}/")), default="", key=len)
        expected = LICENCES.get(prefix, "Apache-2.0")
        if match is None or not match.group(1).startswith(expected):
            wrong.append(f"{name}: {expected} expected")
    assert wrong == []


def test_the_licences_are_there() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "GNU GENERAL PUBLIC LICENSE" in (ROOT / "guest/module/COPYING").read_text()


def test_no_host_names_of_registries_and_no_paths_of_a_machine() -> None:
    # Where packages come from is the user's to say; written apart, so that this file passes.
    registries = ["py" + "pi.org", "python" + "hosted.org", "deb.debian" + ".org", "crates" + ".io"]
    patterns = {
        "a registry's host name": re.compile("|".join(map(re.escape, registries))),
        "a path of somebody's machine": re.compile(r"(?<![\w/.$}])/(root/\.|home/\w|Users/\w)"),
        "a URL with a password": re.compile(r"://[^/\s:@\"']+:[^/\s@\"']+@"),
    }
    wrong = [
        f"{name}:{number}: {what}: {line.strip()}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in patterns.items()
        if pattern.search(line)
    ]
    assert wrong == []


def test_no_work_is_left_to_do_in_comments() -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    wrong = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts().items()
        if Path(name).name not in NO_SPDX_NAMES and not name.startswith("tests/data/")
        for number, line in enumerate(text.splitlines(), 1)
        if marks.search(line)
    ]
    assert wrong == []


def test_files_end_with_one_newline_and_lines_with_no_blank() -> None:
    wrong = [
        name
        for name, text in texts().items()
        if Path(name).name not in NO_SPDX_NAMES
        and not name.startswith(("tests/data/", "tests/fuzz/data/"))
        if text
        and (not text.endswith("\n") or text.endswith("\n\n") or re.search(r"[ \t]\n", text))
    ]
    assert wrong == []


def test_python_modules_say_what_they_export() -> None:
    wrong = []
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
        if name.startswith("bridge/") and re.search(r"^(def|class) [^_]", text, re.MULTILINE):
            # Run by path, or loaded into a bare interpreter, whose start counts.
            if "__main__" in text or "bare interpreter" in text:
                continue
            if "__all__" not in text:
                wrong.append(f"{name}: no __all__")
            if "from __future__ import annotations" not in text:
                wrong.append(f"{name}: no future annotations")
    assert wrong == []


def test_shell_scripts_are_clean() -> None:
    scripts = [name for name, text in texts().items() if is_shell(name, text)]
    assert "guest/workload/files.sh" in scripts
    for name in scripts:
        first = (ROOT / name).read_text().splitlines()[0]
        check("bash" if "bash" in first else "sh", "-n", name)
    check(tool("shellcheck"), *scripts)


def test_scripts_are_executable() -> None:
    wrong = [
        name
        for name, text in texts().items()
        if text.startswith("#!") and not os.access(ROOT / name, os.X_OK)
    ]
    assert wrong == []


LAYOUTS = {
    "bridge/bench/floor.c": LAYOUT_FLAGS,
    "bridge/bench/lane.c": LANE_LOOP.flags,
    "bridge/vm/wires.c": WIRES.flags,
}
"""Sources that get the layout of shared memory from their Python module."""

C_SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in sources()
    if path.suffix == ".c"
    and not any(
        map(path.is_relative_to, (ROOT / "guest/module", ROOT / "tests/fuzz/kernel_faults"))
    )
)


@pytest.mark.parametrize("name", C_SOURCES)
def test_c_sources_compile_without_a_warning(name: str, tmp_path: Path) -> None:
    # gcc is among the packages that `make test` installs; the module is compiled with its image.
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None, "no C compiler: .ci/install-packages test"
    defined = LAYOUTS.get(name, ())
    check(
        *(compiler, "-std=gnu11", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", *defined),
        *("-I", "tests/system/conformance", "-I", "guest/agent", "-I", "bridge/fuzz/shim"),
        *("-I", "bridge/sources/native/runtime", "-c", name, "-o", str(tmp_path / "out.o")),
    )


@pytest.mark.parametrize(
    "name",
    ["bridge/device/fastpath/compiled.pyx", "bridge/sources/python/tracer/compiled.pyx"],
)
def test_the_compiled_part_compiles_without_a_warning(tmp_path: Path, name: str) -> None:
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        pytest.skip("this Python has no headers, so nothing is compiled for it")
    made = tmp_path / "compiled.c"
    check(tool("cython"), "-Wextra", "-Werror", name, "-o", str(made))
    compiler = shutil.which("gcc")
    assert compiler is not None, "gcc is missing: make packages-test"
    check(
        *(compiler, "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{headers}"),
        *("-c", str(made), "-o", str(tmp_path / "out.o")),
    )


def test_there_are_c_sources() -> None:
    assert C_SOURCES
