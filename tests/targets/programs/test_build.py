# SPDX-License-Identifier: Apache-2.0
"""Programs of others: built once, whole or not at all, and what is missing is said at once."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridge.cli.main import main
from bridge.errors import InfrastructureError, MissingDependencyError, TargetError, UsageError
from bridge.sources.native.build import Runtime, build_runtime
from bridge.sources.native.source import NativeSource
from bridge.targets.programs import PROGRAMS, target_class
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


SHARED = dataclasses.replace(
    COMPILED, command=tuple(word.replace("{archive}", "{shared}") for word in COMPILED.command)
)


@needs_clang
def test_build_has_the_same_pcs_in_another_cache(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    covered = []
    for cache in (programs.parent, tmp_path / "cache-with-a-longer-name"):
        cache.mkdir(exist_ok=True)
        if cache != programs.parent:
            (cache / "native").symlink_to(cache_folder("native"))
        monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(cache))
        built = dataclasses.replace(ONE, steps=(SHARED,)).build(progress=silent)
        assert built.directory.is_relative_to(cache)
        source = NativeSource()
        source.start()
        try:
            assert run(source, built.source / "one").returncode == 2
            pcs = source.consume()
            assert {frame.file for pc in pcs if (frame := source.places().innermost(pc))} == {
                f"{built.source}/one.c"
            }
        finally:
            source.stop()
        covered.append(pcs)
    assert covered[0] == covered[1]
    assert covered[0]


@needs_clang
def test_build_with_the_shared_object_runs_with_that_of_the_bridge(
    programs: Path, tmp_path: Path
) -> None:
    program = dataclasses.replace(ONE, steps=(SHARED,))
    built = program.build(progress=silent)
    runtime = build_runtime()
    for environment, where in (({}, built.source), (program.environment, runtime.directory)):
        listed = subprocess.run(
            ["ldd", built.source / "one"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (place,) = (line.split()[2] for line in listed.splitlines() if runtime.shared.name in line)
        assert Path(place).resolve() == (where / runtime.shared.name).resolve()
    assert not ONE.environment


@needs_clang
def test_find_of_another_run_time_is_no_build_of_what_has_linked_it(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = dataclasses.replace(ONE, name="other", steps=(SHARED,)).build(progress=silent)
    linked = ONE.build(progress=silent)
    changed = dataclasses.replace(
        build_runtime(), directory=build_runtime().directory.with_name("kcov-bridge-changed")
    )
    monkeypatch.setattr("bridge.targets.programs.build.build_runtime", lambda: changed)
    assert dataclasses.replace(ONE, name="other", steps=(SHARED,)).find() == shared
    assert ONE.find() is None
    assert linked.source.is_dir()


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


@pytest.fixture
def old_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Go as old as that of Debian 12, first in PATH."""
    (tmp_path / "go").write_text("#!/bin/sh\necho go version go1.19.8 linux/amd64\n")
    (tmp_path / "go").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_build_with_a_compiler_that_is_too_old_says_which_will_do(
    programs: Path, old_go: None
) -> None:
    lines: list[str] = []
    go = dataclasses.replace(
        ONE,
        tools={"no-such-tool": "some-package", "go": "golang-go"},
        versions=(("go", "version"), ("sh", "-c", "echo 0.1")),
        oldest={"go": "1.20"},
    )
    with pytest.raises(MissingDependencyError) as caught:
        go.build(progress=lines.append)
    assert caught.value.message.endswith(
        "needs: some-package, go 1.20 or newer (this one is 1.19.8)"
    )
    assert "apt-get install --no-install-recommends some-package;" in caught.value.hint
    assert "bookworm-backports" in caught.value.hint
    assert not lines
    for enough in ("1.19", "1.19.8", "1.9"):
        assert not dataclasses.replace(go, oldest={"go": enough}).too_old()


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


SLEEP = Step("compiling", ("ln", "-s", "/bin/sleep", "one"))


class Sleeper(BuiltTarget):
    name = "sleeper"
    program = dataclasses.replace(ONE, steps=(SLEEP,), tools={}, versions=())

    def command(self) -> Sequence[str | Path]:
        return [self.built.source / "one", "600"]


def test_remove_of_a_program_that_runs_is_refused(programs: Path) -> None:
    target = Sleeper()
    target.build_programs()
    built = target.built
    target.start()
    try:
        with pytest.raises(UsageError, match="in use"):
            built.remove()
        lines: list[str] = []
        with pytest.raises(UsageError, match="in use"):
            target.program.build(force=True, progress=lines.append)
        assert not lines
        assert built.source.is_dir()
    finally:
        target.stop()
    target.program.build(force=True, progress=silent)
    built.remove()
    with pytest.raises(MissingDependencyError, match="removed just now"):
        target.start()
    assert not list(programs.iterdir())


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


@needs_clang
def test_target_build_all_builds_what_it_can(
    programs: Path,
    old_go: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in PROGRAMS:
        kind = target_class(name)
        if "go" not in kind.program.oldest:
            monkeypatch.setattr(kind, "program", dataclasses.replace(ONE, name=name))
    assert main(["target", "build", "--all"]) == 125
    said = capsys.readouterr()
    assert {each.name for each in built_programs()} == {"nbdkit", "virtiofsd"}
    assert said.out.count("\n") == 2
    assert "2 of 4 programs were not built: gonfs, mstpm" in said.err
    assert said.err.count("go 1.20 or newer (this one is 1.19.8)") == 2


@needs_clang
def test_target_rm_all_leaves_what_is_in_use(
    programs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nbdkit", "gonfs"):
        program = dataclasses.replace(ONE, name=name)
        monkeypatch.setattr(type(create(name)), "program", program)
        program.build(progress=silent)
    (nbdkit,) = built_programs("nbdkit")
    with nbdkit.in_use():
        assert main(["target", "rm", "--all"]) == 125
        assert [each.name for each in built_programs()] == ["nbdkit"]
    said = capsys.readouterr()
    assert "1 of 4 programs were not removed: nbdkit" in said.err
    assert "in use by a session" in said.err


@pytest.mark.parametrize("name", ["a:b", "a;b"])
def test_run_time_in_a_directory_that_the_loader_would_split_is_refused(name: str) -> None:
    with pytest.raises(InfrastructureError, match="colon or a semicolon") as raised:
        _ = Runtime(Path("/cache") / name).environment
    assert "KCOV_BRIDGE_CACHE" in raised.value.hint
