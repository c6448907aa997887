# SPDX-License-Identifier: Apache-2.0
"""Programs of others: built once, whole or not at all, and what is missing is said at once."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridge.cli.main import main
from bridge.errors import MissingDependencyError, TargetError
from bridge.sources.native.build import build_runtime
from bridge.sources.native.source import NativeSource
from bridge.targets.programs import PROGRAMS
from bridge.targets.programs.build import BuiltTarget, Program, Step, built_programs
from bridge.targets.registry import create
from bridge.util.cache import cache_folder
from bridge.util.commands import Commands
from tests.support import ROOT
from tests.support.native import functions, needs_clang, run


@dataclass(frozen=True)
class OneFile:
    """A source that is one C file."""

    text: str = "int shout(int n) { return n + 1; }\nint main(int n, char **_) { return shout(n); }"

    @property
    def tools(self) -> Mapping[str, str]:
        return {"sh": "dash"}

    def fetch(self, directory: Path, commands: Commands) -> tuple[Path, str]:
        top = directory / "one-1.0"
        top.mkdir()
        (top / "one.c").write_text(self.text + "\n")
        return top, "1.0"


COMPILED = Step(
    "compiling",
    (
        *("sh", "-c"),
        "clang -g -fsanitize-coverage=trace-pc-guard,pc-table -ffile-prefix-map={source}={place} "
        "-fno-sanitize-link-runtime one.c {archive} -o one",
    ),
)
ONE = Program("one", OneFile(), (COMPILED,), ("one",))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of programs of a cache that has the run time alone."""
    build_runtime()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "native").symlink_to(cache_folder("native"))
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "programs"


def silent(line: str) -> None:
    pass


@needs_clang
def test_build_makes_a_covered_program_once(programs: Path) -> None:
    assert ONE.find() is None
    lines: list[str] = []
    built = ONE.build(progress=lines.append)
    assert any("compiling" in line for line in lines)
    assert "version 1.0" in lines[-1]
    assert built.directory.parent == programs
    assert (built.version, built.name) == ("1.0", "one")
    source = NativeSource()
    source.start()
    try:
        assert run(source, built.source / "one").returncode == 2
        assert {"main", "shout"} <= functions(source, source.consume())
    finally:
        source.stop()
    again: list[str] = []
    assert ONE.build(progress=again.append) == built
    assert not again
    assert ONE.find() == built
    assert list(built_programs("one")) == [built]
    assert {each.name for each in programs.iterdir()} == {built.directory.name}


@needs_clang
def test_build_another_recipe_has_a_place_of_its_own(programs: Path) -> None:
    first = ONE.build(progress=silent)
    other = dataclasses.replace(ONE, source=OneFile("int main(void) { return 0; }"))
    assert other.find() is None
    second = other.build(progress=silent)
    assert second.directory != first.directory
    assert len(built_programs("one")) == 2
    assert ONE.find() == first


@needs_clang
def test_build_forced_replaces_the_program(programs: Path) -> None:
    built = ONE.build(progress=silent)
    (built.source / "mark").touch()
    assert ONE.build(force=True, progress=silent) == built
    assert not (built.source / "mark").exists()


@needs_clang
def test_build_failed_shows_the_compiler_and_leaves_its_log_alone(programs: Path) -> None:
    bad = dataclasses.replace(ONE, source=OneFile("int main(void) { return missing(); }"))
    with pytest.raises(TargetError, match="compiling") as caught:
        bad.build(progress=silent)
    assert "missing" in caught.value.evidence
    log = programs / "one.log"
    assert str(log) in caught.value.hint
    assert "missing" in log.read_text()
    assert list(programs.iterdir()) == [log]
    ONE.build(progress=silent)
    assert not log.exists(), "a build that succeeds has its log in its own directory"


@needs_clang
def test_build_without_its_product_is_an_error(programs: Path) -> None:
    with pytest.raises(TargetError, match="has not made other"):
        dataclasses.replace(ONE, products=("one", "other")).build(progress=silent)
    assert not built_programs("one")


@needs_clang
def test_build_names_all_that_is_missing_before_it_begins(programs: Path) -> None:
    tools = {"no-such-tool": "some-package", "/no/such/file": "other-package", "sh": "dash"}
    lines: list[str] = []
    with pytest.raises(MissingDependencyError, match="other-package, some-package") as caught:
        dataclasses.replace(ONE, tools=tools).build(progress=lines.append)
    assert "dash" not in caught.value.message
    assert "apt-get install" in caught.value.hint
    assert not lines


@needs_clang
def test_build_without_room_says_how_much_is_needed(programs: Path) -> None:
    with pytest.raises(TargetError, match=r"no room to build one: .* MiB are needed"):
        dataclasses.replace(ONE, room=1 << 60).build(progress=silent)


@needs_clang
def test_build_interrupted_leaves_nothing(programs: Path, tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    step = Step("waiting", ("sh", "-c", f"echo $$ >{marker}; exec sleep 60"))
    script = (
        "from tests.targets.programs.test_build import *\n"
        f"dataclasses.replace(ONE, steps=({step!r},)).build()\n"
    )
    builder = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE)
    while not marker.exists() or not marker.read_text().strip():
        assert builder.poll() is None
        time.sleep(0.01)
    builder.send_signal(signal.SIGINT)
    _, said = builder.communicate(timeout=30)
    assert b"KeyboardInterrupt" in said
    assert not list(programs.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_missing_has_a_compiler_that_does_not_run() -> None:
    program = dataclasses.replace(
        ONE,
        tools={"false": "some-compiler", "sh": "dash"},
        versions=(("false",), ("sh", "-c", ":")),
    )
    assert program.missing() == ["some-compiler"]


@needs_clang
def test_build_removes_what_killed_builds_of_its_program_left(programs: Path) -> None:
    ours, others = programs / ".one-0123456789ab.abcdefgh", programs / ".one-more-0123456789ab.abcd"
    for left in (ours, others):
        (left / "one").mkdir(parents=True)
    ONE.build(progress=silent)
    assert not ours.exists()
    assert others.exists()


@needs_clang
def test_remove_of_what_another_process_has_removed(programs: Path) -> None:
    built = ONE.build(progress=silent)
    built.remove()
    built.remove()
    assert not list(programs.iterdir())


class One(BuiltTarget):
    name = "one"
    program = ONE


@needs_clang
def test_target_that_is_not_built_says_how(programs: Path) -> None:
    with pytest.raises(MissingDependencyError, match="not built yet") as caught:
        assert One().built
    assert "kcov-bridge target build one" in caught.value.hint


@needs_clang
def test_target_builds_its_program_when_asked(
    programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = One()
    target.build_programs()
    assert (target.built.source / "one").is_file()
    assert "one: [" in capsys.readouterr().err


# The command


@needs_clang
def test_target_list_has_all_targets(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["target", "list"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("plan9")
    assert "(not built yet)" in next(line for line in out.splitlines() if "nbdkit" in line)


def test_target_list_without_a_compiler_or_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for cache in (tmp_path / "cache", Path(os.devnull, "cache")):
        monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(cache))
        assert main(["target", "list"]) == 0
        assert capsys.readouterr().out.count("(not built yet)") == len(PROGRAMS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build"], "--all"),
        (["build", "--all", "nbdkit"], "--all"),
        (["build", "plan9"], "no program"),
        (["path", "nbdkti"], "did you mean nbdkit"),
        (["path", "nbdkit"], "kcov-bridge target build nbdkit"),
        (["rm"], "target list"),
    ],
)
def test_target_wrong_words_say_what_is_right(
    programs: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["target", *words]) == 2
    assert said in capsys.readouterr().err


@needs_clang
def test_target_rm_removes_all_builds(
    programs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = create("nbdkit")
    monkeypatch.setattr(type(target), "program", dataclasses.replace(ONE, name="nbdkit"))
    assert main(["target", "build", "nbdkit"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert main(["target", "path", "nbdkit"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert main(["target", "rm", "nbdkit"]) == 0
    assert not path.exists()
    assert not list(programs.iterdir())
