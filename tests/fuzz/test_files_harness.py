# SPDX-License-Identifier: Apache-2.0
"""The harness ``files`` on file systems of this machine, in mount namespaces, without kcov."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridge.fuzz.files_text import to_bytes
from tests.fuzz.test_files_text import SEED, random_case
from tests.support import ROOT

AGENT = ROOT / "guest" / "agent"
SOURCES = (
    *(AGENT / f"files-{name}.c" for name in ("compare", "decode", "fixed", "world")),
    AGENT / "harness-files.c",
    AGENT / "sweep.c",
)
SIGABRT = 6


@dataclass(frozen=True)
class Done:
    """What became of a case."""

    status: int
    output: str


@dataclass(frozen=True)
class Runner:
    """Runs cases of ``files`` in a directory."""

    program: Path

    def start(
        self, cases: Sequence[bytes], directory: Path, *options: str, setup: str = ""
    ) -> subprocess.CompletedProcess[bytes]:
        """Run cases; ``setup`` is a shell's line that may mount something on $D first."""
        data = b"".join(len(case).to_bytes(4, "little") + case for case in cases)
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        command = ["unshare", "--mount", *user, "sh", "-ec", f'{setup or ":"}; exec "$@"', "sh"]
        return subprocess.run(
            [*command, self.program, "files", directory, *options],
            input=data,
            capture_output=True,
            env={**os.environ, "D": str(directory)},
            timeout=120,
            check=False,
        )

    def run(
        self, cases: Sequence[bytes], directory: Path, *options: str, setup: str = ""
    ) -> list[Done]:
        done = self.start(cases, directory, *options, setup=setup)
        assert (done.returncode, done.stderr) == (0, b"")
        results = []
        rest = done.stdout
        while rest:
            line, rest = rest.split(b"\n", 1)
            status, _, length = map(int, line.split())
            results.append(Done(status, rest[:length].decode()))
            rest = rest[length:]
        assert len(results) == len(cases)
        return results


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    compiler = shutil.which("gcc")
    assert compiler is not None, "gcc is missing: make packages-test"
    program = tmp_path_factory.mktemp("runner") / "runner"
    sources = (Path(__file__).with_name("runner.c"), *SOURCES)
    flags = ("-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-pthread")
    subprocess.run([compiler, *flags, "-o", program, *sources], check=True)
    return Runner(program)


def tmpfs(size: str = "4m") -> str:
    return f'mount -t tmpfs -o size={size} tmpfs "$D"'


def test_files_random_cases_find_an_empty_directory_each(runner: Runner, tmp_path: Path) -> None:
    # What a case left on the target would be a difference to the local side of the next one, whose
    # directory is a new one each time.
    source = random.Random(SEED)
    cases = [random_case(source) for _ in range(300)]
    # Which of two links shares a timestamp or block with what is the same on both: tmpfs.
    results = runner.run(cases, tmp_path, "--differential", setup=tmpfs())
    assert [done for done in results if done.status] == []


def test_files_every_case_is_cleaned_up(runner: Runner, tmp_path: Path) -> None:
    source = random.Random(SEED + 1)
    cases = [random_case(source) for _ in range(300)]
    made = to_bytes("mkdir d 0755\nopen f0 d/a rw|creat 0644\nchmod . 0000\nrename d e replace\n")
    runner.run([*cases, made], tmp_path)
    (work,) = tmp_path.iterdir()
    assert list(work.iterdir()) == []
    assert work.stat().st_mode & 0o7777 == 0o777


def test_files_of_a_target_that_makes_none_are_found_once(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, kept = tmp_path / "tree", tmp_path / "kept"
    for number in range(7):
        place = tree / f"dir{number % 3}" / f"file{number}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes(range(number)) * 50)
    monkeypatch.setenv("KEPT", str(kept))
    read_only = 'mount --bind "$D" "$D"; mount -o remount,bind,ro "$D"'
    names = ("a", "b", "c", "d/a", "d/b", "d/e/a", "e/a")
    reads = "".join(f"open f0 {name} r 0000\nread f0 65535\nclose f0\n" for name in names)
    case = to_bytes(reads)
    (first,) = runner.run([case], tree, "--differential", setup=read_only)
    assert first == Done(0, "")
    found = kept.read_bytes()
    assert found.count(b"file") == 7
    # The tree of the local side, contents included, comes from what was kept.
    (second,) = runner.run([case], tree, "--differential", setup=read_only)
    assert (second, kept.read_bytes()) == (first, found)
    for each in tree.glob("*/*"):
        each.write_bytes(b"others")
    (third,) = runner.run([case], tree, "--differential", setup=read_only)
    assert third.status == SIGABRT
    assert third.output.startswith("difference in read.")
    # Nonsense is no more than bytes.
    for length in (1, 7, len(found) // 2, len(found) - 1):
        kept.write_bytes(found[:length])
        runner.start([case], tree, setup=read_only)


def test_files_difference_is_reported_with_both_results(runner: Runner, tmp_path: Path) -> None:
    case = to_bytes("open f0 a rw|creat 0644\nwrite f0 100 7\nwrite f0 65535 7\nclose f0\n")
    (done,) = runner.run([case], tmp_path, "--differential", setup=tmpfs("8k"))
    assert done.status == SIGABRT
    lines = done.output.splitlines()
    assert lines[0] == "difference in write.result: call 3: write f0 65535 7"
    assert lines[1].startswith("  target: 8092,")
    assert lines[2].startswith("  local : 65535,")


@pytest.mark.parametrize(
    "ignored", [("write", "tree"), ("write.result", "tree.size", "tree.data"), ("*",)]
)
def test_files_ignored_difference_is_none(
    runner: Runner, tmp_path: Path, ignored: tuple[str, ...]
) -> None:
    case = to_bytes("open f0 a rw|creat 0644\nwrite f0 65535 7\nclose f0\n")
    options = [word for what in ignored for word in ("--ignore", what)]
    (done,) = runner.run([case], tmp_path, "--differential", *options, setup=tmpfs("8k"))
    assert done == Done(0, "")


def test_files_ignored_refusal_is_left_out_on_the_local_side(
    runner: Runner, tmp_path: Path
) -> None:
    # The second mkdir finds no room for an inode; what follows is as if it was not in the case.
    case = to_bytes("mkdir d 0755\nmkdir e 0755\nstat e\nlist .\n")
    setup = tmpfs("1m,nr_inodes=3")
    (done,) = runner.run([case], tmp_path, "--differential", setup=setup)
    assert done.output.startswith("difference in mkdir.result: call 2: mkdir e 0755\n")
    assert "target: -1 ENOSPC" in done.output
    options = ("--differential", "--ignore", "mkdir=ENOSPC")
    assert runner.run([case], tmp_path, *options, setup=setup) == [Done(0, "")]


def test_files_difference_in_the_tree_is_reported(runner: Runner, tmp_path: Path) -> None:
    # No call shows it: the mapping's pages are lost when the file system is full.
    case = to_bytes("open f0 a rw|creat 0644\nwrite f0 20000 1\nclose f0\n")
    options = ("--differential", "--ignore", "write")
    (done,) = runner.run([case], tmp_path, *options, setup=tmpfs("8k"))
    assert done.status == SIGABRT
    assert done.output.startswith("difference in tree.data: a\n  target: data ")
    assert ", size 8192, links 1\n" in done.output


def test_files_links_of_the_target_lead_nowhere_else(runner: Runner, tmp_path: Path) -> None:
    outside, mount = tmp_path / "outside", tmp_path / "mount"
    outside.mkdir()
    mount.mkdir()
    (outside / "a").write_text("precious")
    # A server may present its own directory of the harness's name.
    (mount / "kcov-bridge-fuzz").symlink_to(outside)
    case = to_bytes('unlink a\nopen f0 a rw|creat|trunc 0644\nput f0 "x"\nchmod . 0000\nlist .\n')
    runner.run([case] * 40, mount)
    assert (outside / "a").read_text() == "precious"
    assert [path.name for path in outside.iterdir()] == ["a"]


def test_files_target_that_cannot_be_written_is_used_as_it_is(
    runner: Runner, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "first").write_text("one")
    (tmp_path / "sub" / "second").write_text("two")
    setup = 'mount --bind "$D" "$D"; mount -o remount,bind,ro "$D"'
    reads = to_bytes("open f0 a r 0644\nread f0 100\nstat d\nlist .\nstat a\n")
    writes = to_bytes("open f1 a w 0644\n")
    done = runner.run([reads, writes], tmp_path, "--differential", setup=setup)
    assert done[0] == Done(0, "")
    assert done[1].output.splitlines()[:2] == [
        "difference in open.result: call 1: open f1 a w 0644",
        "  target: -1 EROFS",
    ]


def test_files_mapping_beyond_the_end_of_its_file_is_an_error(
    runner: Runner, tmp_path: Path
) -> None:
    case = to_bytes("open f0 a rw|creat 0644\nmread f0 0 4096\nmwrite f0 8192 10 1\n")
    assert runner.run([case, b""], tmp_path) == [Done(0, ""), Done(0, "")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nonsense",), "unknown argument --nonsense"),
        (("--seconds", "soon"), "no number of seconds: soon"),
        (("--ignore", "opne"), "nothing to ignore: opne"),
        (("--ignore", "open.colour"), "nothing to ignore: open.colour"),
        (("--ignore", "open=EWHAT"), "nothing to ignore: open=EWHAT"),
    ],
)
def test_files_wrong_argument_is_refused(
    runner: Runner, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = runner.start([b""], tmp_path, *options)
    assert done.returncode == 125
    assert done.stderr.decode().startswith(f"files: {message}\nusage: files DIRECTORY")
