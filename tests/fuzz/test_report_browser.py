# SPDX-License-Identifier: Apache-2.0
"""The page of a campaign in a real browser: its numbers, search, keyboard, colours and widths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from bridge.fuzz.records import read_record
from bridge.fuzz.report import CampaignReport
from bridge.results import REPORT_FILE
from tests.support.browser import Browser, chromium
from tests.support.campaign_data import write_campaign, write_source
from tests.support.report_data import HOSTILE

PARTS = ("overview", "findings", "blocks", "frontier")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a campaign with its page, compared with another one."""
    top = tmp_path_factory.mktemp("campaign")
    path, text = write_source(top / "src", functions=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        # All but each fifth block; the other has each third one.
        table = write_campaign(
            top / "out", source=text, blocks=[n for n in range(300) if n % 5 != 4], findings=3
        )
        file = table.file("parser_target.py")
        assert file is not None
        there = {file.pc(number) for number in range(0, 300, 3)}
        record = read_record(top / "out")
        CampaignReport(record, against=("other", there)).write(top / "out" / REPORT_FILE)
        data = CampaignReport(record, against=("other", there)).data()
    (top / "out" / "data.json").write_text(json.dumps(data))
    return top / "out"


@pytest.fixture(scope="module")
def data(directory: Path) -> dict[str, Any]:
    """The figures, which tests/fuzz/test_report.py compares with the files."""
    found: dict[str, Any] = json.loads((directory / "data.json").read_text())
    return found


def show(browser: Browser, part: str) -> None:
    browser.find(f"#tab-{part}").click()
    assert browser.find(f"#panel-{part}").is_displayed()


def choose(browser: Browser, part: str, text: str) -> str:
    """Choose which rows are listed; return the line of the count."""
    browser.run(
        """const select = document.getElementById(arguments[0]);
           select.value = [...select.options].find((each) => each.text === arguments[1]).value;
           select.dispatchEvent(new Event("change"))""",
        f"{part}-filter",
        text,
    )
    return browser.text(f"#{part}-count")


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)]
)
def test_campaign_page_each_part_is_readable_and_without_errors(
    browser: Browser, directory: Path, width: int, dark: bool
) -> None:
    browser.open(directory / REPORT_FILE, width=width, dark=dark)
    background = browser.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 384) == dark
    for part in PARTS:
        show(browser, part)
        for found in browser.all(f"#panel-{part} .list"):
            found.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.sticking_out() == []
        texts, low = browser.low_contrast()
        assert texts > 20
        assert low == []
    assert browser.errors() == []
    assert browser.run("return window.hacked") is None


def test_campaign_page_numbers_are_those_of_the_data(
    browser: Browser, directory: Path, data: dict[str, Any]
) -> None:
    browser.open(directory / REPORT_FILE)
    totals = data["totals"]
    card = {
        name: browser.text(f"#card-{name}")
        for name in ("executions", "blocks", "corpus", "findings", "frontier", "stability")
    }
    assert f"{totals['executions']:,}" in card["executions"]
    assert f"{totals['rate']:,.0f} a second" in card["executions"]
    assert f"{totals['blocks']:,}\n{totals['newBlocks']} more" in card["blocks"]
    assert f"{totals['corpus']} cases\n{totals['cases']} cases" in card["corpus"]
    assert f"{totals['findings']}\nseen {totals['seen']} times" in card["findings"]
    assert f"{totals['frontier']}\n" in card["frontier"]
    assert f"{100 * totals['stability']:.1f} %" in card["stability"]
    assert f"+{totals['onlyHere']} \N{MINUS SIGN}{totals['onlyThere']}" in browser.text(
        "#card-against"
    )
    assert browser.text("#title") == "Fuzz campaign: plan9"
    assert browser.text("#banner-bad").startswith("!\n3 findings, seen 12 times.")
    labels = browser.run(
        """return [...document.querySelectorAll("svg.chart")]
             .map((each) => each.getAttribute("aria-label"))"""
    )
    assert f"Blocks over time: {totals['blocks']} blocks after 1 min 40 s" in labels
    assert f"Blocks over executions: {totals['blocks']} blocks after 50,000 executions" in labels
    # A mark for each finding, in both curves of the coverage.
    assert len(browser.all("svg.chart path.mark")) == 6
    assert browser.text("#tab-blocks .count") == str(len(data["blocks"]) + len(data["missed"]))


def test_campaign_page_filters_and_search_find_what_the_data_has(
    browser: Browser, directory: Path, data: dict[str, Any]
) -> None:
    browser.open(directory / REPORT_FILE)
    show(browser, "blocks")
    blocks, total = data["blocks"], len(data["blocks"]) + len(data["missed"])
    fresh = sum(not row[6] for row in blocks)
    here = sum(not row[7] for row in blocks)
    assert choose(browser, "blocks", "only the campaign, no seed") == f"{fresh} of {total} blocks"
    assert choose(browser, "blocks", "only here, not in other") == f"{here} of {total} blocks"
    missed = len(data["missed"])
    assert choose(browser, "blocks", "only in other") == f"{missed} of {total} blocks"
    browser.find("#blocks-list").send_keys(Keys.HOME)
    assert "Only reached in other." in browser.text("#blocks-detail")
    assert data["missed"][0][1] in browser.text("#blocks-detail")
    choose(browser, "blocks", "all")
    browser.find("#blocks-search").send_keys("handle_71(")
    found = sum("handle_71(" in row[3] for row in [*blocks, *data["missed"]])
    assert found > 0
    assert browser.text("#blocks-count") == f"{found} of {total} blocks"
    show(browser, "frontier")
    for kind, name in (("branch", "branches"), ("call", "calls and functions")):
        count = sum(row[8] == kind for row in data["frontier"])
        assert 0 < count < len(data["frontier"])
        line = f"{count} of {len(data['frontier'])} edges"
        assert choose(browser, "frontier", name) == line


def test_campaign_page_findings_show_case_and_evidence(
    browser: Browser, directory: Path, data: dict[str, Any]
) -> None:
    browser.open(directory / REPORT_FILE)
    browser.find("#panel-overview table .link").click()
    assert browser.find("#panel-findings").is_displayed()
    text = browser.text("#findings-detail")
    first = data["findings"][0]
    assert first["title"].strip() in text
    assert HOSTILE in text
    assert "seen 3 times, first after 25.00 s and 12,500 executions" in text
    assert f'open "a0" {HOSTILE}' in text
    assert "Traceback (most recent call last)" in text
    link = browser.find("#findings-detail a")
    assert link.get_attribute("href") == (directory / "findings" / "finding-0").as_uri()


def test_campaign_page_is_operated_with_the_keyboard(
    browser: Browser, directory: Path, data: dict[str, Any]
) -> None:
    browser.open(directory / REPORT_FILE)
    browser.find("#tab-overview").send_keys(Keys.END)
    assert browser.run("return document.activeElement.id") == "tab-frontier"
    browser.find("#frontier-list").send_keys(Keys.END)
    last = data["frontier"][-1]
    text = browser.text("#frontier-detail")
    assert last[1] in text
    assert last[5] in text
    browser.keys(Keys.HOME, Keys.ARROW_DOWN)
    assert data["frontier"][1][5] in browser.text("#frontier-detail")
    show(browser, "overview")
    chart = browser.find("svg.chart")
    browser.run("arguments[0].focus()", chart)
    points = data["series"][0]["points"]
    readout = "return arguments[0].closest('figure').querySelector('figcaption span').textContent"
    browser.keys(Keys.HOME)
    assert browser.run(readout, chart) == f"{points[0][1]} blocks at 0 s"
    browser.keys(Keys.END)
    assert browser.run(readout, chart) == f"{points[-1][1]} blocks at 1 min 40 s"
    assert browser.errors() == []
