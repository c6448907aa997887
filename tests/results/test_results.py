# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for people and programs: the summary, and coverage.py's own reports."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError
from bridge.results import coverage_files, summary
from bridge.results.summary import Summary
from bridge.session.stats import InstanceStats, Stats

FIGURES = Summary(
    Stats(
        accel="tcg",
        kernel="6.1.0-1-amd64",
        target="plan9",
        boot_seconds=4.25,
        returns=1200,
        pcs=54000,
        pcs_unique=310,
        blocks_total=620,
        blocks_covered=310,
        instances=[InstanceStats(0, 1, "trace-pc", 8, 7, 0)],
    ),
    exit_status=0,
)

PROGRAM = """\
def covered(x):
    if x:
        return 1
    return 2


def never():
    return 3


covered(True)
"""


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Real data of a real run of coverage.py, of a module in a directory of its own."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "measured.py").write_text(PROGRAM)
    data = tmp_path / "data"
    command = [sys.executable, "-m", "coverage", "run", f"--data-file={data}", "--source=."]
    environment = {key: text for key, text in os.environ.items() if not key.startswith("COV")}
    subprocess.run([*command, "measured.py"], cwd=source, env=environment, check=True, timeout=60)
    return data


def test_summary_file_has_the_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    summary.write(FIGURES, path)
    values = json.loads(path.read_text())
    assert values["format"] == "kcov-bridge-summary"
    assert values["version"] == 2
    expected = {
        "accel": "tcg",
        "kernel": "6.1.0-1-amd64",
        "target": "plan9",
        "boot_seconds": 4.25,
        "returns": 1200,
        "pcs": 54000,
        "pcs_unique": 310,
        "blocks_total": 620,
        "blocks_covered": 310,
        "lost_pcs": 0,
        "exit_status": 0,
    }
    assert expected.items() <= values.items()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert summary.read(path) == values


def test_writing_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    summary.write(FIGURES, path)
    assert summary.read(path)["pcs"] == 54000
    assert names_in(tmp_path) == ["summary.json"]


def test_summary_unwritable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="cannot write"):
        summary.write(FIGURES, tmp_path / "none" / "summary.json")
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(InfrastructureError, match="cannot write"):
        summary.write(FIGURES, tmp_path / "summary.json")
    assert names_in(tmp_path) == ["summary.json"]


def test_summary_file_is_flat(tmp_path: Path) -> None:
    run = dataclasses.replace(FIGURES, command=("ls", "-l"), run_seconds=1.5)
    summary.write(run, tmp_path / "s.json")
    values = summary.read(tmp_path / "s.json")
    assert values["command"] == ["ls", "-l"]
    assert values["run_seconds"] == 1.5
    assert "stats" not in values
    assert "instances" not in values, "those are of a moment, not of a run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no summary"),
        ('{"format": "other"}', "is no summary"),
        ('{"format": "kcov-bridge-summary", "version": 99}', "has version 99"),
    ],
)
def test_reading_what_is_no_summary(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(InfrastructureError, match=message):
        summary.read(path)
    with pytest.raises(InfrastructureError, match="cannot read"):
        summary.read(tmp_path / "none")


def test_summary_text_has_the_figures() -> None:
    text = summary.render(FIGURES)
    assert "310 of 620 of the target (50.0 %)" in text
    assert "54,000 appended, 310 different, 45.0 a call" in text
    assert "6.1.0-1-amd64, tcg" in text
    assert "ended by" not in text
    assert not text.endswith("\n")


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ((), None),
        (("files.sh /mnt",), "command  files.sh /mnt"),
        (("sh", "-c", "a; b"), "command  sh -c 'a; b'"),
    ],
)
def test_summary_text_command_can_be_pasted(command: tuple[str, ...], text: str | None) -> None:
    rendered = summary.render(dataclasses.replace(FIGURES, command=command))
    assert text in rendered if text else "command" not in rendered


def test_summary_text_run_never_booted_says_so() -> None:
    early = Summary(
        Stats(accel="tcg", target="plan9", lost_pcs=7),
        exit_status=123,
        error="the guest did not boot",
    )
    text = summary.render(early)
    assert "unknown kernel" in text
    assert "booted in" not in text
    assert "7, the area was full" in text
    assert "ended by  the guest did not boot" in text


def test_html_and_lcov_from_real_data(data_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    html, lcov = out / "html", out / "lcov.info"
    coverage_files.make_html(data_file, html)
    coverage_files.make_lcov(data_file, lcov)
    assert "measured.py" in (html / "index.html").read_text()
    lines = lcov.read_text().splitlines()
    assert f"SF:{tmp_path / 'source' / 'measured.py'}" in lines
    assert "DA:3,1" in lines
    assert "DA:4,0" in lines
    assert "DA:8,0" in lines
    assert names_in(out) == ["html", "lcov.info"]


def test_lcov_paths_are_absolute_from_anywhere(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "source")
    coverage_files.make_lcov(data_file, tmp_path / "lcov.info")
    assert f"SF:{tmp_path / 'source' / 'measured.py'}\n" in (tmp_path / "lcov.info").read_text()


def test_settings_of_a_project_around_do_not_matter(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".coveragerc").write_text("[run]\ndata_file = nowhere\n[report]\nomit = *\n")
    monkeypatch.chdir(tmp_path)
    html = tmp_path / "out"
    coverage_files.make_html(data_file, html)
    assert (html / "index.html").is_file()


def test_report_is_replaced_as_a_whole(data_file: Path, tmp_path: Path) -> None:
    html = tmp_path / "html"
    html.mkdir()
    (html / "stale.html").write_text("old")
    coverage_files.make_html(data_file, html)
    assert not (html / "stale.html").exists()
    assert (html / "index.html").is_file()


def test_report_vanished_source_is_left_out_with_a_warning(
    data_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "source" / "measured.py"
    other.unlink()
    with caplog.at_level(logging.WARNING, logger="bridge.results.coverage_files"):
        coverage_files.make_lcov(data_file, tmp_path / "lcov.info")
    assert "measured.py" in caplog.text
    assert (tmp_path / "lcov.info").read_text() == ""


def test_report_missing_or_broken_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="there is no coverage data"):
        coverage_files.make_html(tmp_path / "none", tmp_path / "html")
    (tmp_path / "broken").write_bytes(b"no database at all" * 100)
    with pytest.raises(InfrastructureError, match="cannot be read as coverage data"):
        coverage_files.make_lcov(tmp_path / "broken", tmp_path / "lcov.info")
    assert names_in(tmp_path) == ["broken"]


def test_report_fails_half_way_is_deleted(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text("of the last run")

    def full(self: object, directory: str, **rest: object) -> float:
        Path(directory).mkdir()
        Path(directory, "half.html").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coverage.Coverage.html_report", full)
    with pytest.raises(InfrastructureError, match="no HTML report") as caught:
        coverage_files.make_html(data_file, tmp_path / "html")
    assert "No space left" in caught.value.evidence
    assert (tmp_path / "html" / "index.html").read_text() == "of the last run"
    assert names_in(tmp_path) == ["data", "html", "source"]
