# SPDX-License-Identifier: Apache-2.0
"""What `kcov-bridge fuzz` refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.cli.main import main

WRONG = [
    (["--time", "5 minutes"], "is no time such as 90s"),
    (["--time", "0"], "is no time such as 90s"),
    (["--jobs", "0"], "0 is not above 0"),
    (["--ignore", "statfs"], "--ignore is given without --differential"),
    (["--harness", "files", "--", "cat"], "both --harness and a command"),
    (["--harness", "nothing.so"], "nothing.so"),
    (["--harness", "magic"], "magic"),
    (["--dictionary", "no-such-file"], "the dictionary no-such-file cannot be read"),
    (["--corpus", "no-such-directory"], "the corpus"),
    (["--resume"], "no campaign"),
    (["--"], "no command after --"),
    (["report"], "the following arguments are required"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(each) for each, _ in WRONG])
def test_fuzz_wrong_arguments_are_told(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    out = [] if arguments[0] in ("report", "--") else ["--out", "out"]
    assert main(["fuzz", *out, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert not (tmp_path / "out").exists()


def test_fuzz_without_the_engine_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["fuzz", "--out", str(tmp_path / "out")]) == 125
    said = capsys.readouterr().err
    assert "afl-fuzz is not installed" in said
    assert "apt-get install" in said
