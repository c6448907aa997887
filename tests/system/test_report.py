# SPDX-License-Identifier: Apache-2.0
"""The report of a run in a guest: what the page says is what the run's files say."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest
from selenium.webdriver.common.keys import Keys

from bridge.results import REPORT_FILE
from tests.support import COMMAND
from tests.support.browser import Browser, chromium

pytestmark = pytest.mark.vm


def call(*arguments: str | Path) -> str:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both sources and a trace, and its page."""
    out = tmp_path_factory.mktemp("report") / "run"
    trace = f"--trace={out.parent / 'trace.txt'}"
    sources = ("--source", "python,kernel", trace)
    workload = ("sh", "-c", "cat /mnt/target/README /root/none; true")
    call("run", *sources, "--out", out, "--", *workload)
    call("report", out)
    return out


@pytest.fixture(scope="module")
def calls(run: Path) -> list[dict[str, Any]]:
    lines = (run / "trace.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[1:-1]]


@pytest.fixture(scope="module")
def browser(run: Path) -> Iterator[Browser]:
    with chromium() as started:
        started.open(run / REPORT_FILE)
        yield started


def test_report_figures_are_those_of_the_summary_and_of_coverage_py(
    browser: Browser, run: Path, calls: list[dict[str, Any]]
) -> None:
    figures = json.loads((run / "summary.json").read_text())
    assert figures["lost_pcs"] == figures["untraced"] == 0
    assert f"all {figures['pcs']:,} PCs were kept" in browser.text("#banner-good")
    assert f"{figures['pcs_unique']:,} different" in browser.text("#card-pcs")
    assert f"{figures['kernel_blocks_covered']:,} basic blocks" in browser.text("#card-kernel")
    assert browser.text("#card-calls .value") == f"{len(calls):,}"
    measured = coverage.Coverage(data_file=str(run / ".coverage"), config_file=False)
    measured.load()
    reached = statements = 0
    for path in measured.get_data().measured_files():
        _, known, _, missing, _ = measured.analysis2(path)
        reached, statements = reached + len(known) - len(missing), statements + len(known)
    assert 0 < reached < statements
    assert browser.text("#card-lines .value") == f"{reached:,} of {statements:,}"
    totals = json.loads(call("report", run, "--format", "json"))["totals"]
    assert (totals["covered_lines"], totals["num_statements"]) == (reached, statements)
    assert figures["kernel"] in browser.text("#where")
    (link,) = [each for each in browser.all("#links a") if "coverage.py" in each.text]
    assert (run / "html" / "index.html").as_uri() == link.get_attribute("href")
    assert browser.errors() == []


def test_report_open_of_the_file_leads_to_the_line_that_served_it(
    browser: Browser, run: Path, calls: list[dict[str, Any]]
) -> None:
    (opened,) = [
        each
        for each in calls
        if each["name"] == "openat" and "/mnt/target/README" in str(each["arguments"])
    ]
    assert opened["host"]
    assert opened["kernel"]
    browser.find("#tab-trace").click()
    browser.find("#trace-search").send_keys("name:openat target/README")
    browser.wait("return document.getElementById('trace-count').textContent.startsWith('1 of')")
    browser.find("#trace-list").send_keys(Keys.ENTER)
    text = browser.text("#trace-detail")
    for code in opened["host"]:
        assert code["function"] in text
    assert f"Kernel functions: {len(opened['kernel'])}" in text
    assert all(name in text for name in opened["kernel"][:100])
    (place,) = [code for code in opened["host"] if code["function"].endswith("t_open")]
    next(
        each for each in browser.all("#trace-detail .link") if place["function"] in each.text
    ).click()
    assert f":{place['lines'][0]}" in browser.text("#source-detail h2")
    assert "openat" in browser.text("#source-detail")
    assert browser.errors() == []


def test_report_failed_call_is_found_by_its_error(
    browser: Browser, calls: list[dict[str, Any]]
) -> None:
    failed = [
        each
        for each in calls
        if each["error"] == "ENOENT" and "/root/none" in str(each["arguments"])
    ]
    assert failed
    browser.find("#tab-trace").click()
    field = browser.find("#trace-search")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("enoent root/none")
    count = f"{len(failed)} of {len(calls):,} calls"
    browser.wait(
        "return document.getElementById('trace-count').textContent === arguments[0]", count
    )


def test_report_lines_of_lcov_are_those_of_the_coverage_data(run: Path) -> None:
    measured = coverage.Coverage(data_file=str(run / ".coverage"), config_file=False)
    measured.load()
    text = call("report", run, "--format", "lcov")
    for path in measured.get_data().measured_files():
        _, statements, _, missing, _ = measured.analysis2(path)
        record = text.partition(f"SF:{path}\n")[2].partition("end_of_record")[0]
        hit = {line for line in record.splitlines() if line.startswith("DA:")}
        assert sum(not line.endswith(",0") for line in hit) == len(statements) - len(missing)
