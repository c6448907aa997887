# SPDX-License-Identifier: Apache-2.0
"""The page as a file: whole, closed to any text of the data, without a network."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import InfrastructureError, UsageError
from bridge.results import REPORT_FILE
from bridge.results.report import gather, page, write_report
from bridge.results.report.page import page_data, render_page
from bridge.results.test_record import Outcome, RecordedTest, RecordWriter, evidence_name
from bridge.trace import Call, HostCode, HostThread, TraceHeader, TraceWriter
from tests.support.report_data import HOSTILE, write_report_data


class Page(html.parser.HTMLParser):
    """Elements of a page, and the texts of those that are taken as they are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self._open = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag in ("script", "style")
        if self._open:
            self.raw.append((*self.elements[-1], ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            # A long text may come in several parts.
            self.raw[-1] = (*self.raw[-1][:2], self.raw[-1][2] + data)

    def data(self) -> Any:
        (text,) = [data for tag, attributes, data in self.raw if attributes.get("id") == "data"]
        return json.loads(text)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_report_data(tmp_path / "report")
    return tmp_path / "report"


def test_page_hostile_texts_add_no_element(directory: Path) -> None:
    write_report(directory, directory / REPORT_FILE)
    found = Page((directory / REPORT_FILE).read_text())
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert "img" not in [tag for tag, _ in found.elements]
    text = json.dumps(found.data())
    # It is there: in a node id, a message, a source, the arguments of a call.
    assert text.count(HOSTILE) >= 4
    raw = (directory / REPORT_FILE).read_text()
    assert "<img" not in raw


def test_page_title_with_markup_and_without_utf8_is_escaped(tmp_path: Path) -> None:
    directory = tmp_path / "<b>\udcff"
    directory.mkdir()
    (directory / "pcs.txt").write_text("")
    with gather([directory]) as (report, _):
        text = render_page(report)
    (title,) = re.findall("<title>(.*?)</title>", text)
    assert "&lt;b&gt;" in title
    text.encode("utf-8")


def test_page_marks_of_the_template_in_data_stay_text(tmp_path: Path) -> None:
    directory = tmp_path / "%%DATA%%"
    with RecordWriter(directory) as writer:
        writer.write(
            RecordedTest("\udcff%%STYLE_HASH%%", Outcome.PASSED, lines={"/\udcff.py": (1,)})
        )
    write_report(directory, tmp_path / "page.html")
    data = Page((tmp_path / "page.html").read_text()).data()
    assert data["tests"][0]["id"] == "\udcff%%STYLE_HASH%%"
    assert ["Directory", str(directory)] in data["facts"]
    assert data["title"] == "1 test passed"


def test_page_policy_allows_its_own_program_and_style_alone(directory: Path) -> None:
    with gather([directory]) as (report, _):
        found = Page(render_page(report))
    (policy,) = [
        attributes["content"] or ""
        for tag, attributes in found.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = [data for name, attributes, data in found.raw if name == tag and not attributes]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_page_names_nothing_outside_of_itself(directory: Path) -> None:
    with gather([directory]) as (report, _):
        found = Page(render_page(report))
    for _, attributes in found.elements:
        assert not {"src", "srcset", "action"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    program = "".join(data for tag, attributes, data in found.raw if not attributes)
    # The name of a namespace is no address that is fetched.
    assert set(re.findall(r"https?://[^\"]*", program)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", program
    )


def test_page_links_coverage_pages_beside_it(directory: Path, tmp_path: Path) -> None:
    (directory / "html").mkdir()
    (directory / "html" / "index.html").write_text("")
    with gather([directory]) as (report, _):
        assert page_data(report, directory)["links"][0]["href"] == "html/index.html"
        assert page_data(report, tmp_path)["links"][0]["href"] == "report/html/index.html"
        assert page_data(report, None)["links"] == []


def test_page_links_the_evidence_of_failed_tests(directory: Path, tmp_path: Path) -> None:
    (directory / "evidence").mkdir()
    with gather([directory]) as (report, _):
        failed, passed = report.tests[5], report.tests[0]
        assert (failed.outcome, passed.outcome) == (Outcome.FAILED, Outcome.PASSED)
        for test in (failed, passed):
            (directory / "evidence" / f"{evidence_name(test.test)}.txt").write_text("")
        links = [test["evidence"] for test in page_data(report, tmp_path)["tests"]]
    assert links[5] == "report/evidence/tests-test_5.py-test_5-5.txt"
    assert set(links[:5] + links[6:]) == {""}


def test_page_data_trace_columns_are_the_calls(directory: Path) -> None:
    with gather([directory]) as (report, _):
        data = page_data(report, None)
        calls = [call for _, call in report.calls]
    trace = data["trace"]
    assert len(trace["start"]) == len(calls) == 400
    for at, call in enumerate(calls):
        assert trace["names"][trace["name"][at]] == call.name
        assert trace["threads"][trace["thread"][at]][0] == str(call.thread)
        assert trace["texts"][trace["arguments"][at]] == ", ".join(call.arguments or ())
        assert trace["result"][at] == call.result
        assert (trace["error"][at] >= 0) == (call.error is not None)
        host = trace["hostSets"][trace["host"][at]] if trace["host"][at] >= 0 else []
        assert [trace["codes"][code][1] for code in host] == [code.function for code in call.host]
        kernel = [trace["functions"][each] for each in trace["kernelSets"][trace["kernel"][at]]]
        assert kernel == list(call.kernel)
    tests = {test["id"] for test in data["tests"]}
    assert {data["tests"][at]["id"] for at in trace["test"] if at >= 0} <= tests


def test_page_data_calls_of_two_machines_have_tracks_of_their_own(tmp_path: Path) -> None:
    write_report_data(tmp_path, workers=("gw0", "gw1"), threads=2)
    with gather([tmp_path]) as (report, _):
        threads = page_data(report, None)["trace"]["threads"]
    assert sorted(thread for thread, _ in threads) == ["1:100", "1:101", "2:100", "2:101"]


def test_page_data_host_code_names_its_thread(tmp_path: Path) -> None:
    threads = [
        None,
        HostThread(7, 8, "reader"),
        HostThread(7, 9, "worker"),
        HostThread(7, 10, "worker"),
        HostThread(7, 11, ""),
    ]
    host = tuple(HostCode("s.py", "f", (1,), thread) for thread in threads)
    with TraceWriter(tmp_path / "trace.jsonl", TraceHeader()) as trace:
        trace.write(Call(0, 1, 1, "a", 0, "read", None, 1, host=host))
    with gather([tmp_path]) as (report, _):
        data = page_data(report, None)["trace"]
    (host_set,) = data["hostSets"]
    named = [data["codes"][code][3] for code in host_set]
    assert [data["hostThreads"][at] if at >= 0 else None for at in named] == [
        *(None, "reader", "worker 9", "worker 10", "thread 11")
    ]


def test_page_data_results_beyond_exact_numbers_are_text(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "trace.jsonl", TraceHeader()) as trace:
        trace.write(Call(0, 1, 1, "a", 9, "mmap", None, 0x7F00_1234_5000))
        trace.write(Call(1, None, 1, "a", 231, "exit_group", None, None))
    with gather([tmp_path]) as (report, _):
        assert page_data(report, None)["trace"]["result"] == ["0x7f0012345000", None]


def test_page_more_calls_than_it_lists_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_CALLS", 3)
    with TraceWriter(tmp_path / "trace.jsonl", TraceHeader()) as trace:
        for at in range(5):
            trace.write(Call(at, 0.1, 1, "a", 0, "read", None, 1))
    with gather([tmp_path]) as (report, _):
        data = page_data(report, None)
    assert len(data["trace"]["start"]) == 3
    assert data["totals"]["calls"] == data["syscalls"][0]["calls"] == 5
    assert "5 calls; the first 3" in data["problems"][0]


def test_page_arguments_beyond_all_measure_are_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_TEXTS", 1000)
    with TraceWriter(tmp_path / "trace.jsonl", TraceHeader()) as trace:
        for at in range(9):
            trace.write(Call(at, 0.1, 1, "a", 0, "read", (f"{at}" * 5000,), 1))
    with gather([tmp_path]) as (report, _):
        texts = page_data(report, None)["trace"]["texts"]
    assert [len(text) for text in texts] == [400, 400, 400, *[40] * 6]


def test_write_report_directory_without_anything_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_write_report_output_that_cannot_be_written_is_an_error(directory: Path) -> None:
    with pytest.raises(InfrastructureError, match="cannot write"):
        write_report(directory, directory / "no" / "page.html")
