# SPDX-License-Identifier: Apache-2.0
"""What the command line says about a harness, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest

from bridge.errors import MissingDependencyError, UsageError
from bridge.fuzz.files_text import to_text
from bridge.fuzz.harness import GUEST_DIRECTORY, RUNNER, Harness
from bridge.guest.images import Image

CODE = "int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { return !d || !n; }\n"


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def image() -> Image:
    packages = MappingProxyType({"libc6": "2.36-9+deb12u10"})
    return Image(
        directory=Path("images/bookworm-1"),
        recipe="bookworm",
        suite="bookworm",
        fingerprint="1",
        base_fingerprint="1",
        agent_fingerprint="1",
        kernel_release="6.1",
        kernel_version="6.1",
        include=(),
        modules=(),
        packages=packages,
        files=MappingProxyType({}),
    )


def compile_object(name: str, code: str, *flags: str) -> Path:
    compiler = shutil.which("gcc")
    assert compiler is not None, "gcc is missing: make packages-test"
    language = ["-x", "c"]
    command = [compiler, "-o", name, *language, "-", "-x", "none", *flags]
    subprocess.run(command, input=code.encode(), check=True)
    return Path(name).absolute()


def shared(name: str = "harness.so", code: str = CODE, *flags: str) -> Path:
    return compile_object(name, code, "-shared", "-fPIC", *flags)


def archive(name: str = "harness.a", code: str = CODE, *flags: str) -> Path:
    member = compile_object("member.o", code, "-c", *flags)
    subprocess.run(["ar", "rcs", name, member], check=True)
    return Path(name).absolute()


def refused(spec: str | None, command: tuple[str, ...] = (), **arguments: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        Harness.parse(spec, command, **arguments)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value


def test_parse_files_has_seeds_that_are_readable() -> None:
    harness = Harness.parse("files", differential=True, ignore=("link", "chmod=EPERM"))
    assert (harness.runner, harness.files) == (RUNNER, ())
    assert harness.arguments == (
        *("files", "/mnt/target", "--differential"),
        *("--ignore", "link", "--ignore", "chmod=EPERM"),
    )
    assert harness.readable is to_text
    assert len(harness.seeds) > 3
    assert all(to_text(seed) for seed in harness.seeds)
    assert to_text(harness.tokens[0] * 2).count("open ") == 2


def test_parse_command_is_the_runners() -> None:
    assert Harness.parse("", ["cat", "@@"]).arguments == ("command", "cat", "@@")
    harness = Harness.parse(None, ["cat"], exit_status=True)
    assert harness.arguments == ("command", "-e", "cat")


@pytest.mark.parametrize(
    ("spec", "command", "message"),
    [
        (None, (), "there is no harness"),
        ("files", ("cat",), "--harness files and a command after -- are two harnesses"),
        (None, ("",), "the command after -- is empty"),
        ("flies", (), "flies is not a harness"),
        ("missing.so", (), "missing.so is not a file"),
        ("missing.a", (), "missing.a is not a file"),
        ("python:json", (), "python:json does not name a function"),
        ("python::parse", (), "python::parse does not name a function"),
        ("python:no-such:parse", (), "no-such:parse does not name a function"),
        ("python:no_such_module:parse", (), "there is no Python module no_such_module here"),
        ("python:json.nothing:parse", (), "there is no Python module json.nothing here"),
        ("python:json:no_such", (), "json has no function no_such"),
        ("python:mmap:mmap", (), "mmap is not a source file"),
    ],
)
def test_parse_what_makes_no_sense_is_refused(
    spec: str | None, command: tuple[str, ...], message: str
) -> None:
    # Built-in modules have no file at all on some Pythons.
    expected = (message, "there is no Python module mmap here")
    assert refused(spec, command).message.startswith(expected)


def test_parse_options_of_another_form_are_refused() -> None:
    shared()
    assert "only for the harness files" in refused("harness.so", differential=True).message
    assert refused("files", ignore=("link",)).message == "--ignore is for --differential"


def test_parse_shared_object_is_put_into_the_guest(image: Image) -> None:
    harness = Harness.parse(str(shared()), image=image)
    assert [file.guest_path for file in harness.files] == [f"{GUEST_DIRECTORY}/harness.so"]
    assert (harness.runner, harness.arguments) == (
        RUNNER,
        ("llvm", f"{GUEST_DIRECTORY}/harness.so"),
    )


def test_parse_shared_object_brings_its_libraries(image: Image) -> None:
    Path("lib").mkdir()
    shared("lib/libdeep.so.2", "int deep(void) { return 1; }\n", "-Wl,-soname,libdeep.so.2")
    code = "int deep(void);\nint part(void) { return deep(); }\n"
    shared("lib/libpart.so.1", code, "-Wl,-soname,libpart.so.1", "lib/libdeep.so.2")
    code = f"int part(void);\nint use(void) {{ return part(); }}\n{CODE}"
    path = shared("harness.so", code, "lib/libpart.so.1")
    error = refused(str(path), image=image)
    assert f"{path} needs libpart.so.1, which is not on this machine" in error.message
    assert "--library" in error.hint
    harness = Harness.parse(str(path), image=image, libraries=(Path("lib"),))
    assert [Path(file.guest_path).name for file in harness.files] == [
        *("harness.so", "libpart.so.1", "libdeep.so.2", "runner")
    ]
    runner = harness.files[-1]
    assert runner.guest_path == harness.runner
    assert f"LD_LIBRARY_PATH={GUEST_DIRECTORY}\n" in runner.source.read_text()


def test_parse_shared_object_with_a_sanitizer_loads_it_first(image: Image) -> None:
    harness = Harness.parse(str(shared("harness.so", CODE, "-fsanitize=address")), image=image)
    script = harness.files[-1].source.read_text()
    assert "export ASAN_OPTIONS=abort_on_error=1" in script
    (first,) = [line for line in script.splitlines() if line.startswith("export LD_PRELOAD=")]
    library = first.partition("=")[2]
    assert library.startswith(f"{GUEST_DIRECTORY}/libasan.so.")
    assert library in {file.guest_path for file in harness.files}


def test_parse_shared_object_that_needs_a_newer_c_library_is_refused(image: Image) -> None:
    # getrandom is of 2.25.
    code = f"#include <sys/random.h>\nlong use(void) {{ return getrandom(0, 0, 0); }}\n{CODE}"
    path = str(shared("harness.so", code))
    old = dataclasses.replace(image, packages={"libc6": "2.24-11"})
    error = refused(path, image=old)
    assert "needs the C library 2.25" in error.message
    assert "has 2.24" in error.message
    assert Harness.parse(path, image=image).files


@pytest.mark.parametrize("form", ["so", "a"])
def test_parse_object_without_the_function_is_refused(form: str) -> None:
    make = shared if form == "so" else archive
    path = make(f"other.{form}", "int other(void) { return 0; }\n")
    error = refused(str(path))
    assert error.message == f"{path} does not define LLVMFuzzerTestOneInput"
    assert "a harness is int LLVMFuzzerTestOneInput(const uint8_t" in error.hint
    hidden = make(f"static.{form}", CODE.replace("int", "__attribute__((used)) static int", 1))
    assert "does not define" in refused(str(hidden)).message
    mangled = CODE.replace("LLVMFuzzerTestOneInput", "_Z22LLVMFuzzerTestOneInputPKhm")
    assert 'extern "C"' in refused(str(make(f"mangled.{form}", mangled))).hint


@pytest.mark.parametrize("form", ["so", "a"])
def test_parse_object_for_another_machine_is_refused(form: str) -> None:
    path = archive() if form == "a" else shared()
    data = bytearray(path.read_bytes())
    at = data.index(b"\x7fELF")
    data[at + 18 : at + 20] = (183).to_bytes(2, "little")  # e_machine: EM_AARCH64
    path.write_bytes(data)
    error = refused(str(path))
    assert error.message.endswith("is for AArch64, and guests are x86-64")


@pytest.mark.parametrize("name", ["text.so", "text.a"])
def test_parse_file_that_is_no_object_is_refused(name: str) -> None:
    Path(name).write_text("text\n" * 100)
    kind = "a shared object" if name.endswith("so") else "an archive"
    assert refused(name).message.startswith(f"{name} is not {kind}")


def test_parse_program_in_place_of_a_shared_object_is_refused() -> None:
    path = compile_object("program.so", f"{CODE}int main(void) {{ return 0; }}\n", "-no-pie")
    assert "is not a shared object" in refused(str(path)).message


def test_parse_without_pyelftools_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared()
    monkeypatch.setitem(sys.modules, "elftools.elf.elffile", None)
    with pytest.raises(MissingDependencyError) as caught:
        Harness.parse(str(path))
    assert caught.value.hint == "pip install 'kcov-bridge[fuzz]'"


def test_parse_archive_becomes_a_runner_of_its_own() -> None:
    path = archive()
    harness = Harness.parse(str(path))
    (runner,) = harness.files
    assert (runner.guest_path, harness.arguments) == (harness.runner, ("llvm",))
    assert harness.runner != RUNNER
    # It is static, and has the harness.
    told = subprocess.run(["ldd", runner.source], capture_output=True, text=True, check=False)
    assert "not a dynamic executable" in told.stdout + told.stderr
    # The same again comes from the cache.
    before = runner.source.stat().st_mtime_ns
    assert Harness.parse(str(path)).files == harness.files
    assert runner.source.stat().st_mtime_ns == before


def test_parse_archive_that_lacks_a_function_says_which() -> None:
    code = "int missing_function(void);\n" + CODE.replace("!d ||", "missing_function() ||")
    error = refused(str(archive("harness.a", code)))
    assert "cannot be linked with the runner" in error.message
    assert "missing_function" in error.evidence


def test_parse_python_function_brings_its_module(image: Image) -> None:
    Path("mine.py").write_text("def parse(data): pass\n")
    error = refused("python:mine:parse", image=image)
    assert "has no python3" in error.message
    assert "image build --include python3" in error.hint
    packages = {**image.packages, "python3": "3.11"}
    harness = Harness.parse(
        "python:mine:parse", image=dataclasses.replace(image, packages=packages)
    )
    assert [file.guest_path for file in harness.files] == [
        f"{GUEST_DIRECTORY}/harness_python.py",
        f"{GUEST_DIRECTORY}/modules/mine.py",
    ]
    assert harness.arguments[-2:] == ("mine", "parse")


def test_parse_python_package_is_brought_whole() -> None:
    Path("mine/deep").mkdir(parents=True)
    for name in ("mine/__init__.py", "mine/deep/__init__.py", "mine/other.py"):
        Path(name).touch()
    Path("mine/deep/parser.py").write_text("if True:\n    from json import loads as parse\n")
    harness = Harness.parse("python:mine.deep.parser:parse")
    assert [file.guest_path.removeprefix(f"{GUEST_DIRECTORY}/") for file in harness.files] == [
        "harness_python.py",
        *(f"modules/mine/{name}" for name in ("__init__.py", "deep/__init__.py")),
        *(f"modules/mine/{name}" for name in ("deep/parser.py", "other.py")),
    ]


def test_parse_python_module_that_does_not_compile_is_refused() -> None:
    Path("broken.py").write_text("def parse(data):\n    return (\n")
    assert "is not Python: line 2" in refused("python:broken:parse").message
