# SPDX-License-Identifier: Apache-2.0
"""Make the pictures of docs/report.md and docs/fuzzing.md from real runs: ``make screenshots``.

usage: python -m docs.screenshots TESTS RUN [CAMPAIGN]

TESTS is the directory of a pytest run (--guest-report), RUN that of a run with a trace (--out),
CAMPAIGN that of a fuzz campaign; without it the pictures of docs/fuzzing.md stay as they are.
"""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from selenium.webdriver.common.keys import Keys

from bridge.fuzz.report import write_campaign_report
from bridge.fuzz.store import CAMPAIGN_FILE
from bridge.results import REPORT_FILE
from bridge.results.report import write_report
from tests.support.browser import Browser, chromium

DOCS = Path(__file__).parent
LARGEST = 150_000
"""Bytes of a picture: they are part of the sources."""


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Attributes:
        name: of the file.
        run: 0 for the run of tests, 1 for the other, 2 for the campaign.
        part: the part of the report that is open.
        row: the row that is selected in the list of that part.
        query: what is searched for.
        choose: the selects that get another option: their ids and a text in that option.
    """

    name: str
    run: int
    part: str
    row: int = 0
    query: str = ""
    choose: tuple[tuple[str, str], ...] = ()
    width: int = 1280
    height: int = 760
    dark: bool = False


PICTURES = (
    Picture("report-overview.png", 1, "overview"),
    Picture("report-tests.png", 0, "tests", row=2, choose=(("tests-columns", "model.py"),)),
    Picture("report-source.png", 1, "source", row=94, choose=(("source-file", "server.py"),)),
    Picture("report-kernel.png", 1, "kernel", row=1, query="p9_", height=700),
    Picture(
        "report-trace.png",
        1,
        "trace",
        row=7,
        query="name:openat /mnt/target",
        height=650,
        dark=True,
    ),
    Picture("report-phone.png", 0, "overview", width=400, height=800),
    Picture("fuzzing-overview.png", 2, "overview", height=900),
    Picture("fuzzing-frontier.png", 2, "frontier", row=3, height=560, dark=True),
)


_CHOOSE = """
const select = document.getElementById(arguments[0]);
select.value = [...select.options].find((each) => each.text.includes(arguments[1])).value;
select.dispatchEvent(new Event("change"));
"""


def take(browser: Browser, page: Path, picture: Picture) -> bytes:
    """Return a picture of a page."""
    browser.driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    browser.open(page, width=picture.width, height=picture.height, dark=picture.dark)
    browser.find(f"#tab-{picture.part}").click()
    for select, text in picture.choose:
        browser.run(_CHOOSE, select, text)
    if picture.query:
        browser.find(f"#{picture.part}-search").send_keys(picture.query)
        browser.wait(
            "return document.getElementById(arguments[0]).textContent.includes(' of ')",
            f"{picture.part}-count",
        )
    for grid in browser.all(f"#panel-{picture.part} .list"):
        grid.send_keys(*[Keys.ARROW_DOWN] * picture.row)
        # A ring around the list would be all that one sees.
        browser.run("document.activeElement.blur()")
    browser.run("scrollTo(0, 0)")
    taken = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return base64.b64decode(taken["data"])


def main(directories: list[Path]) -> int:
    """Make all pictures; return 1 if one is too large."""
    status = 0
    with TemporaryDirectory() as scratch, chromium() as browser:
        pages = []
        for number, directory in enumerate(directories):
            pages.append(Path(scratch, f"{number}-{REPORT_FILE}"))
            write = write_campaign_report if (directory / CAMPAIGN_FILE).is_file() else write_report
            write(directory, pages[-1])
        for picture in PICTURES:
            if picture.run >= len(pages):
                continue
            data = take(browser, pages[picture.run], picture)
            if len(data) > LARGEST:
                print(f"{picture.name} has {len(data):,} bytes, more than {LARGEST:,}")
                status = 1
            (DOCS / picture.name).write_bytes(data)
    return status


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
