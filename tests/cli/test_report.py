# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge report`` as a command: which run, which file, which exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge.cli.last_run import remember
from bridge.cli.main import main
from tests.support.report_data import write_report_data


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_report_data(tmp_path / "done", calls=5)
    return tmp_path / "done"


def test_report_page_is_in_the_directory_and_its_path_is_printed(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "done"]) == 0
    assert capfd.readouterr().out == "done/report.html\n"
    assert (
        (directory / "report.html")
        .read_text()
        .startswith("<!-- SPDX-License-Identifier: Apache-2.0 -->\n<!doctype html>\n")
    )


def test_report_without_directory_is_of_the_last_run(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (directory / "blocks.tsv").write_text("kcov-bridge-blocks\t1\n")
    remember(directory)
    assert main(["report"]) == 0
    found = capfd.readouterr()
    assert found.out == f"{directory}/report.html\n"
    assert f"run directory: {directory} (the last run; DIR names another)" in found.err


@pytest.mark.parametrize("kind", ["lcov", "cobertura", "json"])
def test_report_other_formats_go_to_stdout_or_a_file(
    directory: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "done", "--format", kind]) == 0
    text = capfd.readouterr().out
    assert "service_0.py" in text
    assert main(["report", "done", "--format", kind, "-o", "out"]) == 0
    assert len(Path("out").read_text()) == pytest.approx(len(text), rel=0.01)


def test_report_page_to_stdout_has_no_links(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "done", "-o", "-"]) == 0
    text = capfd.readouterr().out
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["links"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "no directory"),
        (["cache"], "nothing to report"),
        (["done", "--format", "pdf"], "invalid choice"),
        (["done", "--format", "lcov", "--vmlinux", "none"], ""),
    ],
)
def test_report_wrong_usage_says_what_is_wrong(
    directory: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main(["report", *arguments])
    assert message in capfd.readouterr().err
    assert status == (2 if message else 0)


def test_report_of_a_damaged_record_says_what_to_do(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (directory / "tests.jsonl").write_text('{"format":"kcov-bridge tests","version":1}\n{}\n')
    assert main(["report", "done"]) == 125
    error = capfd.readouterr().err
    assert "damaged in line 2" in error
    assert "hint: run the tests again" in error
    assert not (directory / "report.html").exists()


def test_report_into_a_directory_that_does_not_exist_is_an_error(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "done", "-o", "no/page.html"]) == 125
    assert "cannot write no/page.html" in capfd.readouterr().err
