# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: its numbers, its search, its keyboard, its colours and widths."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.keys import Keys

from bridge.results import REPORT_FILE, summary
from bridge.results.report import write_report
from bridge.results.summary import Summary
from bridge.results.test_record import Outcome, RecordedTest, RecordWriter
from bridge.session.stats import Stats
from tests.support.browser import Browser, chromium
from tests.support.report_data import HOSTILE, write_report_data

PARTS = ("overview", "tests", "source", "kernel", "trace")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    write_report_data(directory, tests=40, files=3, functions=8, calls=1500, threads=20)
    write_report(directory, directory / REPORT_FILE)
    return directory


@pytest.fixture(scope="module")
def calls(directory: Path) -> list[dict[str, Any]]:
    """The calls of the trace, as its file has them."""
    lines = (directory / "trace.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def starts(calls: list[dict[str, Any]]) -> list[float]:
    """When the calls began if the traces of the tests follow one another."""
    found: list[float] = []
    begin = 0.0
    for _, group in itertools.groupby(calls, key=lambda call: call["test"]):
        of_test = list(group)
        found += [begin + call["start"] for call in of_test]
        begin += max(call["start"] + (call["seconds"] or 0) for call in of_test)
    return found


@pytest.fixture(scope="module")
def tests(directory: Path) -> list[dict[str, Any]]:
    """The tests of the record, as its file has them."""
    lines = (directory / "tests.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def show(browser: Browser, part: str) -> None:
    browser.find(f"#tab-{part}").click()
    assert browser.find(f"#panel-{part}").is_displayed()


def search(browser: Browser, part: str, text: str, count: str) -> None:
    """Type a search, and wait until the line of the count says this."""
    field = browser.find(f"#{part}-search")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text or Keys.BACKSPACE)
    line = f"{part}-count"
    with contextlib.suppress(TimeoutException):
        browser.wait(
            "return document.getElementById(arguments[0]).textContent === arguments[1]", line, count
        )
    assert browser.text(f"#{line}") == count


def rows(browser: Browser, panel: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    return list(
        browser.run(
            """
            const box = [...document.querySelectorAll(`#panel-${arguments[0]} .box`)]
              .find((each) => each.querySelector("h2").textContent === arguments[1]);
            return [...box.querySelectorAll("tbody tr")]
              .map((row) => [...row.cells].map((cell) => cell.innerText));
            """,
            panel,
            heading,
        )
    )


def covered(directory: Path) -> dict[str, tuple[set[int], set[int]]]:
    """Reached lines and all lines of each file, as coverage.py counts them."""
    measured = coverage.Coverage(data_file=str(directory / ".coverage"), config_file=False)
    measured.load()
    found = {}
    for path in measured.get_data().measured_files():
        _, statements, _, missing, _ = measured.analysis2(path)
        found[path] = set(statements) - set(missing), set(statements)
    return found


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)]
)
def test_page_each_part_is_readable_and_without_errors(
    browser: Browser, directory: Path, width: int, dark: bool
) -> None:
    browser.open(directory / REPORT_FILE, width=width, dark=dark)
    background = browser.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 384) == dark
    for part in PARTS:
        show(browser, part)
        for found in browser.all(f"#panel-{part} .list"):
            # With a row selected, and what is shown of it.
            found.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.sticking_out() == []
        texts, low = browser.low_contrast()
        assert texts > 20
        assert low == []
    assert browser.errors() == []
    assert browser.run("return window.hacked") is None


def test_page_numbers_of_the_overview_are_those_of_the_files(
    browser: Browser,
    directory: Path,
    tests: list[dict[str, Any]],
    calls: list[dict[str, Any]],
) -> None:
    browser.open(directory / REPORT_FILE)
    outcomes = Counter(test["outcome"] for test in tests)
    machine = sum(test["kind_of_failure"] == "machine" for test in tests)
    files = covered(directory)
    reached = sum(len(hit) for hit, _ in files.values())
    statements = sum(len(known) for _, known in files.values())
    card = {name: browser.text(f"#card-{name}") for name in ("tests", "lines", "calls", "pcs")}
    assert f"{outcomes['passed']} of {len(tests)}" in card["tests"]
    assert f"{outcomes['failed']} failed, {machine} of the machine" in card["tests"]
    assert f"{reached} of {statements}" in card["lines"]
    assert f"{100 * reached / statements:.1f} % in 3 files" in card["lines"]
    assert f"{len(calls):,}" in card["calls"]
    assert f"{sum(bool(call['host']) for call in calls):,} reached the host" in card["calls"]
    assert f"{sum(test['pcs'] for test in tests):,}" in card["pcs"]
    kernel = {name for call in calls for name in call["kernel"]}
    assert browser.text("#card-kernel .value") == str(len(kernel))

    shown = {row[0]: row[2] for row in rows(browser, "overview", "Files")}
    assert shown == {
        f"src/{Path(path).name}": f"{len(hit)} / {len(known)}"
        for path, (hit, known) in files.items()
    }
    found = rows(browser, "overview", "System calls")
    by_name = Counter(call["name"] for call in calls)
    failed = Counter(call["name"] for call in calls if call["error"])
    assert {row[0]: (int(row[1]), int(row[2])) for row in found} == {
        name: (count, failed[name]) for name, count in by_name.items()
    }
    bad = [test["test"] for test in tests if test["outcome"] == "failed"]
    assert [row[0] for row in rows(browser, "overview", "Failed tests")] == bad


def test_page_curve_ends_at_the_number_of_lines(browser: Browser, directory: Path) -> None:
    browser.open(directory / REPORT_FILE)
    data = coverage.CoverageData(str(directory / ".coverage"))
    data.read()
    data.set_query_contexts([r"\|run$"])
    lines = sum(len(data.lines(path) or ()) for path in data.measured_files())
    label = browser.run(
        """return [...document.querySelectorAll("svg.chart")]
             .map((each) => each.getAttribute("aria-label"))
             .find((text) => text.startsWith("Host lines over tests"))"""
    )
    assert label == f"Host lines over tests: {lines} lines after 40 tests"


def test_page_matrix_has_the_lines_of_each_test_and_file(
    browser: Browser, directory: Path, tests: list[dict[str, Any]]
) -> None:
    browser.open(directory / REPORT_FILE, height=2000)
    show(browser, "tests")
    shown = browser.run(
        """return [...document.querySelectorAll("#tests-list .lrow")].map((row) =>
             [row.querySelector(".tname").title,
              ...[...row.querySelectorAll(".cell")].map((cell) => Number(cell.textContent))])"""
    )
    files = [str(directory / "src" / f"service_{number}.py") for number in range(3)]
    by_id = {test["test"]: test for test in tests}
    assert len(shown) == len(tests)
    for name, *counts in shown:
        assert counts == [len(by_id[name]["lines"].get(path, ())) for path in files]


def test_page_choosing_a_test_marks_its_lines_in_the_source(
    browser: Browser, directory: Path, tests: list[dict[str, Any]]
) -> None:
    browser.open(directory / REPORT_FILE, height=2600)
    show(browser, "tests")
    browser.run("document.querySelector('#tests-list [data-at=\"4\"]').click()")
    browser.find("#tests-detail ul .link").click()
    file = str(directory / "src" / "service_0.py")
    wanted = set(tests[4]["lines"][file])
    marks = browser.run(
        """return [...document.querySelectorAll("#source-list .lrow")].map((row) =>
             [Number(row.querySelector(".no").textContent),
              row.querySelector(".mark").textContent,
              row.querySelector(".by").textContent, row.querySelector(".code").textContent])"""
    )
    marks = sorted(marks)
    hit, known = covered(directory)[file]
    source = Path(file).read_text().split("\n")
    assert [text for *_, text in marks] == [line or " " for line in source]
    assert {line for line, mark, *_ in marks if mark == "✓"} == wanted
    assert {line for line, mark, *_ in marks if mark == "·"} == hit - wanted
    assert {line for line, mark, *_ in marks if mark == "✗"} == known - hit
    reached_by = Counter(line for test in tests for line in test["lines"].get(file, ()))
    for line, _, by, _ in marks:
        if reached_by[line]:
            count = reached_by[line]
            assert by == ("1 test" if count == 1 else f"{count} tests")


def test_page_line_names_its_tests_and_its_calls(
    browser: Browser,
    directory: Path,
    tests: list[dict[str, Any]],
    calls: list[dict[str, Any]],
) -> None:
    browser.open(directory / REPORT_FILE)
    file = str(directory / "src" / "service_1.py")
    browser.run(
        """const file = document.getElementById("tab-source"); file.click();
           const select = document.getElementById("source-file"); select.value = "1";
           select.dispatchEvent(new Event("change"));"""
    )
    list_ = browser.find("#source-list")
    list_.send_keys(*([Keys.ARROW_DOWN] * 5))
    text = browser.text("#source-detail")
    assert "src/service_1.py:5" in text
    ids = [test["test"] for test in tests if 5 in test["lines"].get(file, ())]
    assert f"Reached by {len(ids)} test" in text
    assert all(name in text for name in ids)
    reached = [
        call["name"]
        for call in calls
        if any(code["file"] == file and 5 in code["lines"] for code in call["host"])
    ]
    assert f"Reached by {len(reached)} system calls" in text
    for name, count in Counter(reached).items():
        assert f"{name}\n{count}" in text


def test_page_search_of_the_trace_finds_what_the_file_has(
    browser: Browser, directory: Path, calls: list[dict[str, Any]]
) -> None:
    browser.open(directory / REPORT_FILE)
    show(browser, "trace")
    total = f"{len(calls):,} calls"
    assert browser.text("#trace-count") == total

    def matching(*terms: str) -> str:
        def text(call: dict[str, Any]) -> str:
            host = [
                f"src/{Path(each['file']).name} {each['function']} "
                f"{each['thread']['name'] if each['thread'] else ''}"
                for each in call["host"]
            ]
            parts = [call["name"], ", ".join(call["arguments"]), call["error"] or "", *host]
            parts += [call["test"] or "", f"{call['command']} {call['thread']}"]
            return "\n".join(parts).lower()

        def has(call: dict[str, Any], term: str) -> bool:
            key, _, rest = term.rpartition(":")
            if key == "kernel":
                return any(rest in name for name in call["kernel"])
            if key == "name":
                return bool(call["name"] == rest)
            return term in text(call) or term == str(call["result"])

        found = sum(all(has(call, term) for term in terms) for call in calls)
        assert 0 < found < len(calls)
        return f"{found:,} of {total}"

    for terms in (
        ("enoent",),
        ("openat",),
        ("file-17",),
        ("handle_3",),
        ("serve-clients",),
        ("service_2.py",),
        ("kernel:kernel_function_5",),
        ("name:read",),
        ("name:write", "kernel:function_1"),
        ("</script>",),
        ("test_2",),
        ("read", "enoent"),
        ("ls", "107"),
    ):
        search(browser, "trace", " ".join(terms), matching(*terms))
    search(browser, "trace", "no such text", f"0 of {total}")
    assert "Nothing matches" in browser.text("#trace-list")
    search(browser, "trace", "", total)
    browser.find("#trace-errors").click()
    failed = sum(call["error"] is not None for call in calls)
    assert browser.text("#trace-count") == f"{failed:,} of {total}"
    browser.find("#trace-hosts").click()
    both = sum(call["error"] is not None and bool(call["host"]) for call in calls)
    assert browser.text("#trace-count") == f"{both:,} of {total}"
    browser.find("#trace-list").send_keys(Keys.HOME)
    first = next(call for call in calls if call["error"] and call["host"])
    names = [code["thread"] and code["thread"]["name"] for code in first["host"]]
    assert (
        browser.text("#trace-detail").count("in serve-clients") == names.count("serve-clients") > 0
    )
    assert browser.errors() == []


def test_page_search_of_tests_and_kernel_functions(
    browser: Browser, directory: Path, tests: list[dict[str, Any]]
) -> None:
    browser.open(directory / REPORT_FILE)
    show(browser, "tests")
    found = sum("test_3.py" in test["test"] for test in tests)
    search(browser, "tests", "test_3.py", f"{found} of {len(tests)} tests")
    search(browser, "tests", HOSTILE.split()[0] + " test_3[", f"1 of {len(tests)} tests")
    search(browser, "tests", "", f"{len(tests)} tests")
    browser.find('[data-kind="failed"]').click()
    failed = sum(test["outcome"] == "failed" for test in tests)
    assert browser.text("#tests-count") == f"{failed} of {len(tests)} tests"
    show(browser, "kernel")
    search(browser, "kernel", "function_1", "4 of 14 functions")


def test_page_kernel_function_shows_the_host_code_beside_it(
    browser: Browser, directory: Path, calls: list[dict[str, Any]]
) -> None:
    browser.open(directory / REPORT_FILE)
    show(browser, "kernel")
    search(browser, "kernel", "kernel_function_12", "1 of 14 functions")
    browser.find("#kernel-list").send_keys(Keys.ENTER)
    text = browser.text("#kernel-detail")
    found = [call for call in calls if "kernel_function_12" in call["kernel"]]
    for name, count in Counter(call["name"] for call in found).items():
        assert f"{name}\n{count}" in text
    host = Counter(
        (Path(code["file"]).name, code["function"]) for call in found for code in call["host"]
    )
    for (file, function), count in host.items():
        assert f"{file}: {function} " in text
        assert f"{count} call" in text


def test_page_everything_is_reached_with_the_tab_key_and_seen(
    browser: Browser, directory: Path
) -> None:
    browser.open(directory / REPORT_FILE)
    for part in PARTS:
        show(browser, part)
        wanted = browser.run(
            """return [...document.querySelectorAll("a[href], button, select, input, [tabindex]")]
                 .filter((each) => each.tabIndex >= 0 && each.getClientRects().length)
                 .map((each, at) => each.dataset.stop = at)"""
        )
        browser.run("document.activeElement.blur(); scrollTo(0, 0)")
        stops: list[str] = []
        for _ in range(len(wanted) + 30):
            browser.keys(Keys.TAB)
            stop, width, named = browser.run(
                """const on = document.activeElement, style = getComputedStyle(on);
                   return [on.dataset.stop,
                           style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
                           Boolean(on.getAttribute("aria-label") || on.textContent.trim() ||
                                   on.labels && on.labels.length)]"""
            )
            if stop is None:
                continue
            if stops and stop == stops[0]:
                break
            assert width >= 2, (part, stop)
            assert named, (part, stop)
            stops.append(stop)
        # In the order of the page, from the start again or from the list of parts.
        at = stops.index(str(wanted[0]))
        assert stops[at:] + stops[:at] == [str(stop) for stop in wanted]


def test_page_parts_and_lists_are_operated_with_keys(
    browser: Browser, directory: Path, calls: list[dict[str, Any]]
) -> None:
    browser.open(directory / REPORT_FILE)
    browser.find("#tab-overview").send_keys(Keys.ARROW_RIGHT)
    assert browser.run("return document.activeElement.id") == "tab-tests"
    assert browser.find("#panel-tests").is_displayed()
    browser.keys(Keys.END)
    assert browser.run("return document.activeElement.id") == "tab-trace"
    browser.keys(Keys.ARROW_RIGHT)
    assert browser.find("#panel-overview").is_displayed()
    assert not browser.find("#panel-trace").is_displayed()

    show(browser, "trace")
    grid = browser.find("#trace-list")
    grid.send_keys(Keys.END)
    assert browser.run(
        """const grid = document.getElementById("trace-list");
           const row = document.getElementById(grid.getAttribute("aria-activedescendant"));
           const box = row.getBoundingClientRect(), around = grid.getBoundingClientRect();
           return [row.getAttribute("aria-selected"), row.getAttribute("aria-rowindex"),
                   box.top >= around.top && box.bottom <= around.bottom + 1]"""
    ) == ["true", "1501", True]
    when = starts(calls)
    assert f"at {when[-1]:.6f} s" in browser.text("#trace-detail")
    grid.send_keys(Keys.HOME, Keys.ARROW_DOWN, Keys.PAGE_DOWN, Keys.PAGE_UP)
    assert f"at {when[1]:.6f} s" in browser.text("#trace-detail")


def test_page_time_line_is_zoomed_with_keys_and_a_click_selects(
    browser: Browser, directory: Path
) -> None:
    browser.open(directory / REPORT_FILE)
    show(browser, "trace")
    line = browser.find("#trace-timeline")
    # 14 threads have a track, the other 6 share one.
    assert line.size["height"] == 15 * 17 + 22
    line.send_keys("+", "+")
    assert "of 1,500 calls" in browser.text("#trace-count")
    middle = browser.text("#trace-range")
    line.send_keys(Keys.ARROW_RIGHT)
    assert browser.text("#trace-range") != middle
    line.send_keys("0")
    assert browser.text("#trace-count") == "1,500 calls"
    line.click()
    assert "took" in browser.text("#trace-detail")
    painted = browser.run(
        """const canvas = arguments[0], c = canvas.getContext("2d");
           const data = c.getImageData(0, 0, canvas.width, canvas.height).data;
           const colors = new Set();
           for (let i = 0; i < data.length; i += 4)
             colors.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
           return colors.size""",
        line,
    )
    assert painted > 5


def test_page_assistive_programs_get_a_name_for_all_that_can_be_operated(
    browser: Browser, directory: Path
) -> None:
    browser.open(directory / REPORT_FILE)
    roles: Counter[str] = Counter()
    for part in PARTS:
        show(browser, part)
        tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})
        for node in tree["nodes"]:
            focusable = any(
                each["name"] == "focusable" and each["value"]["value"]
                for each in node.get("properties", ())
            )
            role = node.get("role", {}).get("value", "")
            if node.get("ignored") or not focusable or role == "RootWebArea":
                continue
            roles[role] += 1
            if role != "main":
                assert node.get("name", {}).get("value"), node
    assert {"tab", "grid", "button", "searchbox", "combobox", "link"} <= set(roles)


def test_page_print_shows_all_parts_and_a_part_of_long_lists(
    browser: Browser, directory: Path
) -> None:
    browser.open(directory / REPORT_FILE)
    browser.run(
        """addEventListener("beforeprint", () => {
             window.printed = [...document.querySelectorAll("[role=tabpanel]")]
               .map((panel) => getComputedStyle(panel).display);
             window.rows = document.querySelectorAll("#trace-list .lrow").length; })"""
    )
    pdf = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(pdf["data"]).startswith(b"%PDF-")
    assert browser.run("return window.printed") == ["block"] * 5
    assert browser.run("return window.rows") == 120
    # And after it all is as before.
    assert not browser.find("#panel-trace").is_displayed()
    assert browser.errors() == []


def test_page_of_a_run_says_that_nothing_was_lost_or_what(browser: Browser, tmp_path: Path) -> None:
    summary.write(
        Summary(Stats(pcs=5000, returns=300), 0, ("cat", HOSTILE)), tmp_path / "summary.json"
    )
    write_report(tmp_path, tmp_path / REPORT_FILE)
    browser.open(tmp_path / REPORT_FILE)
    assert browser.text("#banner-good") == "✓\nNothing was lost: all 5,000 PCs were kept."
    assert browser.all("#banner-bad") == []
    assert browser.text("#title") == f"cat {HOSTILE}"
    lost = Stats(pcs=5000, returns=300, lost_pcs=7)
    summary.write(Summary(lost, 125, error=HOSTILE), tmp_path / "summary.json")
    write_report(tmp_path, tmp_path / REPORT_FILE)
    browser.open(tmp_path / REPORT_FILE)
    text = browser.text("#banner-bad")
    assert "7 PCs were dropped" in text
    assert HOSTILE in text
    assert browser.find("#banner-bad").get_attribute("role") == "alert"
    assert browser.all("#banner-good") == []
    assert browser.errors() == []


def test_page_of_tests_that_reached_no_line_has_a_list_without_columns(
    browser: Browser, tmp_path: Path
) -> None:
    with RecordWriter(tmp_path) as writer:
        for number in range(3):
            writer.write(RecordedTest(f"t{number}", Outcome.PASSED, pcs=0, lost=0))
    write_report(tmp_path, tmp_path / REPORT_FILE)
    browser.open(tmp_path / REPORT_FILE)
    assert browser.text("#banner-good") == "✓\nNothing was lost."
    show(browser, "tests")
    inside = browser.run(
        """return [...document.querySelectorAll("#tests-list .lrow, #tests-list .lhead")]
             .map((row) => { const around = row.getBoundingClientRect();
               return [...row.children].every((cell) => {
                 const box = cell.getBoundingClientRect();
                 return box.top >= around.top - 1 && box.bottom <= around.bottom + 1; }); })"""
    )
    assert inside == [True] * 4
    assert browser.run("return document.querySelector('#tests-list .lhead').clientHeight") < 40
    assert browser.errors() == []


def test_page_opens_at_the_part_that_its_address_names(browser: Browser, directory: Path) -> None:
    browser.open(directory / REPORT_FILE)
    browser.run("location.hash = '#kernel'")
    browser.wait("return !document.getElementById('panel-kernel').hidden")
    show(browser, "tests")
    assert browser.run("return location.hash") == "#tests"
    browser.driver.refresh()
    assert browser.find("#panel-tests").is_displayed()


def test_page_of_a_big_run_stays_usable(browser: Browser, tmp_path: Path) -> None:
    write_report_data(tmp_path, tests=200, files=20, functions=34, calls=50_000, threads=40)
    write_report(tmp_path, tmp_path / REPORT_FILE)
    assert (tmp_path / REPORT_FILE).stat().st_size < 20 << 20
    began = time.monotonic()
    browser.open(tmp_path / REPORT_FILE)
    show(browser, "trace")
    assert browser.text("#trace-count") == "50,000 calls"
    # Seconds on a quiet machine; a busy one may take several times as long.
    assert time.monotonic() - began < 30
    files = covered(tmp_path)
    assert sum(len(known) for _, known in files.values()) > 2000
    show(browser, "overview")
    assert f"of {sum(len(known) for _, known in files.values()):,}" in browser.text("#card-lines")
    for part in PARTS[1:]:
        show(browser, part)
        browser.find(f"#{part}-list").send_keys(Keys.END)
        # Rows that are not seen do not exist.
        assert 5 < len(browser.all(f"#{part}-list .lrow")) < 120
    last = json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[-1])
    assert last["arguments"][1] in browser.text("#trace-detail")
    assert last["test"] in browser.text("#trace-detail")
    search(browser, "trace", "enoent", "5,000 of 50,000 calls")
    took = browser.run(
        """const from = performance.now(), box = document.getElementById("trace-hosts");
           box.click(); return performance.now() - from"""
    )
    assert took < 3000
    assert browser.errors() == []
