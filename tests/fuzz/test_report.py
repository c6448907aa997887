# SPDX-License-Identifier: Apache-2.0
"""The figures of a campaign's report are those of its files."""

from __future__ import annotations

import json
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest

from bridge.cli.main import main
from bridge.errors import InfrastructureError, UsageError
from bridge.fuzz.progress import PROGRESS_FILE, ProgressWriter, Sample
from bridge.fuzz.records import read_record
from bridge.fuzz.report import CURVES_FILE, CampaignReport, read_pcs, write_campaign_report
from bridge.fuzz.store import Offer, Store
from bridge.results import REPORT_FILE
from bridge.sources.pcs import BlockTable
from tests.support.campaign_data import FACTS, LINES, SOURCE, write_campaign, write_source
from tests.support.report_data import HOSTILE


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The target's module, where the report looks for it; returns its text."""
    path, text = write_source(tmp_path / "src")
    monkeypatch.syspath_prepend(path.parent)
    return text


def block_of(table: BlockTable, name: str) -> int:
    file = table.file("parser_target.py")
    assert file is not None
    pc = file.line_pc(LINES[name])
    assert pc is not None
    return file.index_of(pc)


def numbers(*names: str) -> list[int]:
    table = BlockTable()
    table.add("parser_target.py", SOURCE)
    return [block_of(table, name) for name in names]


def report(directory: Path, **options: Any) -> CampaignReport:
    return CampaignReport(read_record(directory), **options)


def test_report_totals_and_blocks_are_those_of_the_files(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    table = write_campaign(
        out, source=source, blocks=numbers("module", "kind", "a", "loop", "if", "above")
    )
    data = report(out).data()
    assert data["problems"] == []
    lines = [json.loads(line) for line in (out / "cases.jsonl").read_text().splitlines()[1:]]
    samples = [json.loads(line) for line in (out / PROGRESS_FILE).read_text().splitlines()[1:]]
    last = samples[-1]
    totals = data["totals"]
    assert (totals["seconds"], totals["executions"], totals["rate"]) == (100.0, 50_000, 500.0)
    assert totals["blocks"] == last["blocks"] == 6
    assert totals["seedBlocks"] == totals["newBlocks"] == 3
    assert (totals["findings"], totals["seen"]) == (2, 7)
    assert totals["stability"] == last["stability"] == 0.97
    assert (totals["vms"], totals["mostVms"]) == (2, 2)
    # PCs that stand for system calls are no blocks.
    code = {pc for line in lines for pc in line["pcs"] if table.lookup(int(pc, 16)) is not None}
    assert {row[0] for row in data["blocks"]} < code
    rows = {row[1]: row for row in data["blocks"]}
    above = rows["parser_target.py:10"]
    assert above[3] == "first = each"
    assert above[5] == next(line["name"] for line in lines if above[0] in line["pcs"])
    assert (above[6], rows["parser_target.py:1-4"][6]) == (False, True)
    series = {each["title"]: each for each in data["series"]}
    assert series["Blocks over time"]["points"] == [
        [round(each["seconds"], 3), each["blocks"]] for each in samples
    ]
    assert series["Blocks over executions"]["points"][-1] == [50_000, 6]
    assert series["Executions per second"]["points"][0][1] == pytest.approx(500, rel=0.01)
    assert len(series["Stability"]["points"]) == len(samples) - 1
    json.dumps(data, allow_nan=False)


def test_report_frontier_names_both_ends(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    write_campaign(out, source=source, blocks=numbers("module", "kind", "a", "loop", "if"))
    rows = report(out).data()["frontier"]
    assert [(row[1], row[5], row[8]) for row in rows] == [
        ("parser_target.py:5-6", "parser_target.py:12", "branch"),
        ("parser_target.py:1-4", "parser_target.py:18", "branch"),
        ("parser_target.py:8", "parser_target.py:11", "branch"),
        ("parser_target.py:9", "parser_target.py:10", "branch"),
    ]
    assert [row[9] for row in rows] == [4, 2, 1, 1]
    above = rows[3]
    assert (above[2], above[3]) == ("parse", "if each > 200:")
    assert (above[6], above[7]) == ("parse", "first = each")


def test_report_against_another_campaign_says_what_only_one_has(
    tmp_path: Path, source: str
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_campaign(one, source=source, blocks=numbers("module", "kind", "a"))
    table = write_campaign(other, source=source, blocks=numbers("module", "kind", "try"))
    pcs = read_pcs(other)
    data = report(one, against=("other", pcs)).data()
    assert (data["totals"]["onlyHere"], data["totals"]["onlyThere"]) == (1, 1)
    assert [(row[1], row[7]) for row in data["blocks"]] == [
        ("parser_target.py:1-4", True),
        ("parser_target.py:5-6", True),
        ("parser_target.py:7", False),
    ]
    assert [row[1] for row in data["missed"]] == ["parser_target.py:13"]
    # The same from the PCs of a run.
    run = tmp_path / "run"
    run.mkdir()
    (run / "pcs.txt").write_text("".join(f"{pc:#x}\n" for pc in pcs) * 2)
    assert read_pcs(run) == read_pcs(run / "pcs.txt") == pcs
    assert len(table) > 3


def test_report_pcs_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no PCs to compare with"):
        read_pcs(tmp_path)
    (tmp_path / "pcs.txt").write_text("0x12\nzz\n")
    with pytest.raises(InfrastructureError, match="no list of PCs"):
        read_pcs(tmp_path)


def test_report_files_that_are_missing_or_damaged_are_said(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    write_campaign(out, source=source, findings=1)
    (out / "blocks.tsv").unlink()
    (out / "findings" / "finding-0" / "finding.json").write_text("[1")
    with (out / "cases.jsonl").open("a") as file:
        file.write('{"name": 1}\n')
    (out / PROGRESS_FILE).unlink()
    made = report(out)
    data = made.data()
    text = "\n".join(data["problems"])
    assert "no figures yet" in text
    assert "1 lines of" in text
    assert "a finding was left out" in text
    assert "there is no blocks.tsv" in text
    assert data["findings"] == []
    assert data["series"] == []
    assert data["totals"]["blocks"] == len(data["blocks"]) > 0
    assert made.page().startswith("<!--")
    assert "<polyline" not in made.svg()


def test_report_stability_is_the_last_that_was_known(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_campaign(out)
    with ProgressWriter(out / PROGRESS_FILE) as progress:
        progress.write(Sample(101.0, 50_000, 6))
    assert report(out).data()["totals"]["stability"] == 0.97


def test_report_campaign_that_has_just_begun_is_shown(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Store.create(out, FACTS), ProgressWriter(out / PROGRESS_FILE) as progress:
        progress.write(Sample(0.0, 0, 0))
        # While it runs, and holds the directory.
        made = write_campaign_report(out)
        assert made == out / REPORT_FILE
    data = report(out).data()
    assert data["totals"]["rate"] is None
    assert data["blocks"] == data["frontier"] == data["findings"] == []


def test_report_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no campaign"):
        read_record(tmp_path)
    with pytest.raises(UsageError, match="there is no directory"):
        read_record(tmp_path / "no")


def test_report_drawing_is_xml_and_ends_at_the_last_sample(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    write_campaign(out, source=source, samples=5000)
    write_campaign_report(out)
    text = (out / CURVES_FILE).read_text()
    drawing = xml.dom.minidom.parseString(text)
    lines = drawing.getElementsByTagName("polyline")
    assert len(lines) == 2
    for line in lines:
        points = line.getAttribute("points").split()
        # A few hundred of 5,000 samples, and the last one at the right edge.
        assert 400 < len(points) < 1300
        assert points[-1].startswith("538.0,")
    assert HOSTILE not in text
    # A finding at its time in one, at its executions in the other.
    assert [line.getAttribute("class") for line in drawing.getElementsByTagName("line")].count(
        "mark"
    ) == 4


def test_report_guest_kernel_has_functions_and_says_what_is_not_known(tmp_path: Path) -> None:
    out = tmp_path / "out"
    start = 0xFFFF_FFFF_8100_0000
    with Store.create(out, {**FACTS, "sources": ["kernel"], "kernel": "0.0.0-none"}) as store:
        store.add([Offer(b"x", 1.0, 1, (start + 0x10, start + 0x50))])
    (out / "kernel-symbols.tsv").write_text(
        f"kcov-bridge-kernel-symbols\t1\n{start:x}\t256\t\t\n"
        f"{start:x}\t64\t\tvfs_read\n{start + 64:x}\t192\t\tvfs_write\n"
    )
    (out / "kernel-blocks.tsv").write_text(f"{start + 0x10:x}\t5\n{start + 0x50:x}\t5\n")
    data = report(out).data()
    assert [row[1:3] for row in data["blocks"]] == [
        ["vfs_read+0x10", "vfs_read"],
        ["vfs_write+0x10", "vfs_write"],
    ]
    assert "the image of the guest's kernel is not here" in "\n".join(data["problems"])


def test_fuzz_report_writes_page_and_drawing_and_prints_figures(
    tmp_path: Path, source: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_campaign(out, source=source)
    assert main(["fuzz", "report", str(out)]) == 0
    assert capfd.readouterr().out == f"{out / REPORT_FILE}\n"
    assert (out / CURVES_FILE).stat().st_size > 1000
    assert main(["fuzz", "report", str(out), "--json", "--against", str(out)]) == 0
    data = json.loads(capfd.readouterr().out)
    assert (data["totals"]["onlyHere"], data["against"]) == (0, "out")
    assert main(["fuzz", "report", str(out), "-o", "-"]) == 0
    assert "</html>" in capfd.readouterr().out
    page = tmp_path / "page.html"
    assert main(["fuzz", "report", str(out), "-o", str(page)]) == 0
    # Links are from the page to the campaign.
    assert 'href":"out/corpus' in page.read_text()
    assert (tmp_path / CURVES_FILE).is_file()


def test_fuzz_report_errors_end_with_their_status(
    tmp_path: Path, source: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fuzz", "report", str(tmp_path)]) == 2
    assert "holds no campaign" in capfd.readouterr().err
    out = tmp_path / "out"
    write_campaign(out, source=source)
    assert main(["fuzz", "report", str(out), "-o", str(tmp_path / "no" / "x.html")]) == 125
    assert "cannot write" in capfd.readouterr().err
