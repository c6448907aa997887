# SPDX-License-Identifier: Apache-2.0
"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError, UsageError
from bridge.util.files import (
    atomic_output,
    check_output,
    remove,
    remove_partial,
    remove_partials,
    unusable,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[2]


def test_write_atomically_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")
    write_atomically(path, "zwei \u2713")
    assert path.read_text(encoding="utf-8") == "zwei \u2713"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomically_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_write_atomically_no_directory_raises_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="No such file or directory") as caught:
        write_atomically(tmp_path / "gone" / "file", b"")
    assert str(tmp_path / "gone" / "file") in caught.value.message


def test_write_atomically_over_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("")
    with pytest.raises(InfrastructureError, match="Is a directory"):
        write_atomically(tmp_path / "kept", b"")
    assert (tmp_path / "kept" / "file").is_file()
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


@pytest.mark.parametrize("before", ["nothing", "file", "directory", "link"])
@pytest.mark.parametrize("durable", [False, True])
def test_atomic_output_directory_replaces_what_was_there(
    tmp_path: Path, before: str, durable: bool
) -> None:
    path = tmp_path / "it"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if before == "file":
        path.write_text("old")
    elif before == "directory":
        (path / "below").mkdir(parents=True)
        (path / "below" / "old").write_text("old")
    elif before == "link":
        path.symlink_to(elsewhere)
    with atomic_output(path, durable=durable) as part:
        (part / "deep").mkdir(parents=True)
        (part / "deep" / "new").write_text("new")
        (part / "link").symlink_to("/nowhere")
        assert not (path / "deep").exists()
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*")) == [
        "deep",
        "deep/new",
        "link",
    ]
    assert sorted(tmp_path.iterdir()) == [elsewhere, path]
    assert not list(elsewhere.iterdir())


def test_atomic_output_exception_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.mkdir()

    def fail_half_way() -> None:
        with atomic_output(path) as part:
            part.mkdir()
            (part / "half").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == [path]
    assert not list(path.iterdir())


def test_atomic_output_nothing_made_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_output(tmp_path / "it"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole", [False, True], ids=["of a file", "of a directory"])
def test_remove_partial_after_a_kill_removes_the_rest_alone(tmp_path: Path, whole: bool) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from bridge.util.files import atomic_output\n"
        "with atomic_output(Path(sys.argv[1])) as part:\n"
        "    part.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "it"
    path.write_text("whole")
    other = tmp_path / ".it"
    other.write_text("another's")
    words = [sys.executable, "-c", script, str(path)]
    assert subprocess.run(words, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    if whole:
        remove_partials(tmp_path)
    else:
        remove_partial(path)
    assert sorted(tmp_path.iterdir()) == [other, path]
    assert path.read_text() == "whole"
    remove_partial(tmp_path / "gone" / "it")
    remove_partials(tmp_path / "gone")


def test_remove_takes_files_links_trees_and_nothing(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tree)
    (tmp_path / "file").write_text("")
    remove(tmp_path / "link")
    assert tree.is_dir()
    for name in ("file", "tree", "nothing"):
        remove(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_check_output_says_it_and_leaves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    check_output(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("kept")
    check_output(path)
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]
    for wrong in (tmp_path, path / "below", tmp_path / "missing" / "file"):
        with pytest.raises(UsageError, match="directory"):
            check_output(wrong)
    for wrong in (Path("/proc/file"), tmp_path / ("n" * 300)):
        with pytest.raises(InfrastructureError, match=r"cannot write .*: (No such|File name too)"):
            check_output(wrong)


def test_write_atomically_to_a_pipe_does_not_replace_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for path in (pipe, Path(f"/proc/self/fd/{reader}")):
            check_output(path)
            write_atomically(path, "text")
            assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["a" * 300, f"{'a' * 300}/b"])
def test_unusable_directory_that_cannot_be_looked_at_says_why(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    with pytest.raises(OSError, match="too long") as caught:
        directory.mkdir(parents=True)
    error = unusable(directory, caught.value, hint="another one")
    assert isinstance(error, InfrastructureError)
    assert error.message == f"{directory} cannot be used: File name too long"
