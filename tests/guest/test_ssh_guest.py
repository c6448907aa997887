# SPDX-License-Identifier: Apache-2.0
"""Output of commands in a real guest, whose sshd reports a command's end before its last bytes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bridge.guest.guest import Output
from bridge.session.session import Session

pytestmark = [pytest.mark.vm, pytest.mark.guest(target="none", source="python", syscall_pcs=True)]

_SIZES = (2_140_000, 2_150_000, 2_155_000)
"""More than the window of a channel, by less than sshd and a pipe hold."""


def standing_still(sizes: list[int], seconds: float) -> Output:
    """A reader that stands still once, as a pager or a disk does."""

    def take(chunk: bytes) -> None:
        sizes.append(len(chunk))
        if len(sizes) == 1:
            time.sleep(seconds)

    return take


def test_run_reader_of_output_stands_still_all_arrives(session: Session) -> None:
    came: list[int] = []
    for size in _SIZES:
        sizes: list[int] = []
        take = standing_still(sizes, 4.0)
        assert session.run(f"head -c {size} /dev/zero", stdout=take).exit_status == 0
        came.append(sum(sizes))
    assert came == list(_SIZES)


def test_shell_reader_of_output_stands_still_all_arrives(session: Session) -> None:
    came: list[int] = []
    for size in _SIZES:
        sizes: list[int] = []
        take = standing_still(sizes, 4.0)
        with Path("/dev/null").open("rb") as stdin:
            command = f"head -c {size} /dev/zero"
            assert session.guest.shell(command, stdin=stdin.fileno(), stdout=take) == 0
        came.append(sum(sizes))
    assert came == list(_SIZES)


def test_get_disk_stands_still_the_copy_is_whole(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.guest.run("head -c 2150000 /dev/urandom >/tmp/file", check=True)
    expected = session.run("sha256sum </tmp/file").text.split()[0]
    opens = Path.open

    class SlowFile:
        def __init__(self, file: Any) -> None:
            self._file = file
            self._late = False

        def __enter__(self) -> SlowFile:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: bytes) -> None:
            if not self._late:
                self._late = True
                time.sleep(4.0)
            self._file.write(data)

    def open_slow(path: Path, *arguments: Any, **named: Any) -> Any:
        file = opens(path, *arguments, **named)
        return SlowFile(file) if path.name == "copied" else file

    monkeypatch.setattr(Path, "open", open_slow)
    session.get("/tmp/file", tmp_path / "copied")
    monkeypatch.undo()
    session.put(tmp_path / "copied", "/tmp/back")
    assert session.run("sha256sum </tmp/back").text.split()[0] == expected


def test_run_start_up_file_that_prints_is_no_output(session: Session) -> None:
    session.put(b"echo welcome; echo warning >&2\n", session.run("printf %s ~/.bashrc").text)
    assert session.guest.shell("true", stdin=0, stdout=(seen := bytearray()).extend) == 0
    assert b"welcome" in seen, "the user's shell reads it"
    result = session.run("printf out; printf err >&2")
    assert (result.stdout, result.stderr) == (b"out", b"warning\nerr")
    pcs = session.kcov(["true"])
    assert (pcs.exit_status, pcs.stdout) == (0, b"")
