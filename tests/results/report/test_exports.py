# SPDX-License-Identifier: Apache-2.0
"""LCOV, Cobertura and JSON of a report: coverage.py's, and the kernel beside it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import coverage
import pytest

from bridge.results.report import EXPORTS, gather
from bridge.sources.guest_kernel.symbols import KernelSymbols
from tests.support.linked_kernel import addresses, link
from tests.support.report_data import write_report_data


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_report_data(tmp_path / "report", calls=10)
    return tmp_path / "report"


@pytest.fixture
def vmlinux(directory: Path, tmp_path: Path) -> Path:
    """A kernel with debug information, of which the run has covered one function."""
    linked = link(tmp_path)
    where = addresses(linked)
    names = {"_stext": "T", "turn": "T", "grain": "T"}
    where |= {"_stext": min(where["turn"], where["grain"])}
    text = "".join(f"{where[name]:x} {kind} {name}\n" for name, kind in names.items())
    text += f"{max(where['turn'], where['grain']) + 0x40:x} T _etext\n"
    KernelSymbols.from_kallsyms(text).save(directory / "kernel-symbols.tsv")
    (directory / "kernel-blocks.tsv").write_text(f"{where['grain']:#x}\t4\n")
    return linked


def read_lcov(text: str) -> tuple[dict[str, set[int]], set[str]]:
    """The covered lines of each file, and the names of the covered functions."""
    lines: dict[str, set[int]] = {}
    functions = set()
    file = ""
    for record in text.splitlines():
        kind, _, rest = record.partition(":")
        words = rest.split(",")
        if kind == "SF":
            file = rest
            lines[file] = set()
        elif kind == "DA" and words[1] != "0":
            lines[file].add(int(words[0]))
        elif kind == "FNDA" and words[0] != "0":
            functions.add(words[1])
    return lines, functions


def made(directory: Path, kind: str, vmlinux: Path | None = None) -> str:
    with gather([directory]) as (report, host):
        return EXPORTS[kind](report, host, vmlinux)


def covered(directory: Path) -> dict[str, set[int]]:
    """The lines of each file, as coverage.py counts them."""
    measured = coverage.Coverage(data_file=str(directory / ".coverage"), config_file=False)
    measured.load()
    lines = {}
    for path in measured.get_data().measured_files():
        _, statements, _, missing, _ = measured.analysis2(path)
        lines[path] = set(statements) - set(missing)
    return lines


def test_lcov_has_the_lines_of_coverage_py_with_absolute_paths(directory: Path) -> None:
    lines, _ = read_lcov(made(directory, "lcov"))
    assert lines == covered(directory)


def test_lcov_has_the_kernel_beside_the_host(directory: Path, vmlinux: Path) -> None:
    lines, functions = read_lcov(made(directory, "lcov", vmlinux))
    (grain,) = [found for name, found in lines.items() if name.endswith("grain.c")]
    assert grain
    assert "grain" in functions
    assert covered(directory).items() <= lines.items()


def test_cobertura_has_the_lines_of_coverage_py(directory: Path) -> None:
    root = ET.fromstring(made(directory, "cobertura"))
    assert int(root.get("lines-covered", "")) == sum(map(len, covered(directory).values()))


def test_cobertura_totals_include_the_kernel(directory: Path, vmlinux: Path) -> None:
    root = ET.fromstring(made(directory, "cobertura", vmlinux))
    (kernel,) = [each for each in root.iter("package") if each.get("name") == "kernel"]
    (grain,) = [each for each in kernel.iter("class") if each.get("name") == "grain.c"]
    hits = [line.get("hits") for line in grain.findall("lines/line")]
    assert "1" in hits
    lines = root.findall(".//class/lines/line")
    assert int(root.get("lines-valid", "")) == len(lines)
    assert int(root.get("lines-covered", "")) == sum(line.get("hits") != "0" for line in lines)
    assert [method.get("name") for method in grain.iter("method")].count("grain") == 1


def test_json_names_the_tests_of_each_line(directory: Path) -> None:
    values = json.loads(made(directory, "json"))
    assert values["totals"]["covered_lines"] == sum(map(len, covered(directory).values()))
    contexts = {
        context
        for file in values["files"].values()
        for names in file["contexts"].values()
        for context in names
    }
    assert "tests/test_0.py::test_0[0]|run" in contexts


def test_json_has_kernel_functions_and_lines(directory: Path, vmlinux: Path) -> None:
    kernel = json.loads(made(directory, "json", vmlinux))["kernel"]
    assert [(each["name"], each["blocks"]) for each in kernel["functions"]] == [("grain", 1)]
    (grain,) = [file for name, file in kernel["files"].items() if name.endswith("grain.c")]
    assert grain["executed_lines"]


def test_json_without_debug_information_still_has_kernel_functions(
    directory: Path, vmlinux: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = json.loads(made(directory, "json"))["kernel"]
    assert [each["name"] for each in kernel["functions"]] == ["grain"]
    assert kernel["files"] == {}
    assert "no lines of the guest's kernel" in caplog.text


def test_exports_of_a_run_without_lines_are_empty_or_have_none(tmp_path: Path) -> None:
    (tmp_path / "pcs.txt").write_text("")
    assert made(tmp_path, "lcov") == made(tmp_path, "cobertura") == ""
    assert json.loads(made(tmp_path, "json"))["files"] == {}
