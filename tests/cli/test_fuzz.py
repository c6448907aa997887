# SPDX-License-Identifier: Apache-2.0
"""What `kcov-bridge fuzz` refuses before it starts anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bridge.cli import fuzz
from bridge.cli.main import _parse, main
from bridge.fuzz.campaign_job import Plan
from bridge.targets.registry import find_factory

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
    (["--target", "nothing"], "there is no target nothing"),
    (["--target", "no.such.module:Class"], "there is no module no"),
    (["--scheduler", "tcp://127.0.0.1:9", "--target", "nothing"], "there is no target nothing"),
    (["--scheduler", "nowhere"], "'nowhere' is no address of a scheduler"),
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


def test_fuzz_scheduler_that_is_not_there_leaves_no_campaign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bridge.fuzz.cluster._CONNECT", 1.0)
    out = tmp_path / "out"
    assert main(["fuzz", "--out", str(out), "--scheduler", "tcp://127.0.0.1:9"]) == 125
    said = capsys.readouterr().err
    assert "the scheduler tcp://127.0.0.1:9 cannot be reached" in said
    assert "Traceback" not in said
    assert not out.exists()


def test_fuzz_plan_means_the_same_in_each_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the command finds beside it is found by a worker elsewhere, and by --resume."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for place in (home, elsewhere):
        place.mkdir()
    (home / "harness.so").write_bytes(b"")
    (home / "beside_the_command.py").write_text("class Mine:\n    pass\n")
    monkeypatch.chdir(home)
    args = _parse(["fuzz", "--harness", "harness.so"])
    assert args is not None
    plan = fuzz._plan(args)
    assert plan.harness == str(home / "harness.so")
    assert str(home) in plan.path
    assert not [each for each in plan.path if each.startswith(sys.prefix)]

    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(home)])
    there = Plan.of(json.loads(json.dumps(plan.as_values())))
    there.find_modules()
    assert find_factory("beside_the_command:Mine").__name__ == "Mine"
