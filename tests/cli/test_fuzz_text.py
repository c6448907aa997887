# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge fuzz text``: both directions, wrong files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bridge.cli.main import main
from bridge.fuzz.files_text import to_bytes

TEXT = "open f0 a rw|creat 0644\nwrite f0 100 7\nclose f0\n"


def test_fuzz_text_case_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = tmp_path / "case"
    case.write_bytes(to_bytes(TEXT))
    assert main(["fuzz", "text", str(case)]) == 0
    assert capsys.readouterr().out == TEXT


def test_fuzz_text_bytes_from_stdin_make_the_case(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bridge", "fuzz", "text", "--bytes", "-"]
    done = subprocess.run(command, input=TEXT.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == to_bytes(TEXT)


def test_fuzz_text_output_is_written(tmp_path: Path) -> None:
    text, case = tmp_path / "text", tmp_path / "case"
    text.write_text(TEXT)
    assert main(["fuzz", "text", "--bytes", str(text), "-o", str(case)]) == 0
    assert case.read_bytes() == to_bytes(TEXT)


def test_fuzz_text_wrong_line_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT + "opne f0\n")
    assert main(["fuzz", "text", "--bytes", str(text)]) == 2
    captured = capsys.readouterr()
    assert f"{text}: line 4: there is no call 'opne'" in captured.err
    assert "hint: the calls are open read" in captured.err
    assert captured.out == ""


def test_fuzz_text_bytes_of_no_text_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = tmp_path / "case"
    case.write_bytes(b"\xff\xfe")
    assert main(["fuzz", "text", "--bytes", str(case)]) == 2
    assert "is not text" in capsys.readouterr().err


def test_fuzz_text_missing_file_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "text", "no-such-file"]) == 2
    assert "no-such-file cannot be read: No such file" in capsys.readouterr().err
