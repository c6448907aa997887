# SPDX-License-Identifier: Apache-2.0
"""The report's coverage for programs: LCOV, Cobertura and JSON, by coverage.py's own reporters.

Lines and functions of native programs follow, and those of the guest's kernel where a run has them
and the kernel's debug information is installed. Without that information its functions have no
files: the JSON export lists them, the others leave them out.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import bridge
from bridge.errors import InfrastructureError, UsageError
from bridge.results import kernel_export
from bridge.results.code_file import CodeFile
from bridge.results.coverage_files import with_absolute_path
from bridge.results.native_export import lcov_of
from bridge.results.report.gather import Report
from bridge.results.report.host import HostData
from bridge.sources.guest_kernel import BLOCKS_FILE, SYMBOLS_FILE

__all__ = ["EXPORTS", "kernel_lcov", "parse_lcov"]

_log = logging.getLogger(__name__)


def kernel_lcov(report: Report, vmlinux: Path | None = None) -> str:
    """Return the kernel's coverage of all runs as LCOV; "" if there is none with lines."""
    parts = []
    for run in report.runs:
        if not (run.path / SYMBOLS_FILE).is_file() or not (run.path / BLOCKS_FILE).is_file():
            continue
        try:
            parts.append(kernel_export.FORMATS["lcov"](run.path, vmlinux).decode())
        except UsageError as error:
            if vmlinux is not None:
                raise
            _log.warning("no lines of the guest's kernel: %s", error.report())
    return "".join(parts)


def parse_lcov(text: str) -> dict[str, CodeFile]:
    """Return what an LCOV text of :mod:`bridge.results.kernel_export` has, by file."""
    files: dict[str, CodeFile] = {}
    file = CodeFile()
    starts: dict[str, int] = {}
    for record in text.splitlines():
        kind, _, rest = record.partition(":")
        if kind == "SF":
            file = files.setdefault(rest, CodeFile())
            starts = {}
        elif kind == "FN":
            line, _, name = rest.partition(",")
            starts[name] = int(line)
        elif kind == "FNDA":
            count, _, name = rest.partition(",")
            before = file.functions.get(name, (0, False))[1]
            file.functions[name] = starts[name], before or count != "0"
        elif kind == "DA":
            line, _, count = rest.partition(",")
            file.lines[int(line)] = file.lines.get(int(line), False) or count != "0"
    return files


def _lcov(report: Report, host: HostData, vmlinux: Path | None) -> str:
    text = _by_coverage(host, "lcov")
    text = "".join(map(with_absolute_path, text.splitlines(keepends=True)))
    return text + lcov_of(report.native) + kernel_lcov(report, vmlinux)


def _cobertura(report: Report, host: HostData, vmlinux: Path | None) -> str:
    text = _by_coverage(host, "xml")
    kernel = parse_lcov(kernel_lcov(report, vmlinux))
    if not kernel and not report.native:
        return text
    root = ET.fromstring(text) if text else _empty_cobertura()
    for name, files in (("native", report.native), ("kernel", kernel)):
        if files:
            _add_package(root, name, files)
    ET.indent(root, "\t")
    return "<?xml version='1.0' encoding='utf-8'?>\n" + ET.tostring(root, encoding="unicode") + "\n"


def _add_package(root: ET.Element, name: str, files: Mapping[str, CodeFile]) -> None:
    packages = root.find("packages")
    assert isinstance(packages, ET.Element)
    package = ET.SubElement(packages, "package", name=name, complexity="0")
    classes = ET.SubElement(package, "classes")
    valid = covered = 0
    for name, file in sorted(files.items()):
        hit = sum(file.lines.values())
        valid, covered = valid + len(file.lines), covered + hit
        each = ET.SubElement(
            classes,
            "class",
            {"name": Path(name).name, "filename": name, "complexity": "0"},
        )
        each.set("line-rate", _rate(hit, len(file.lines)))
        each.set("branch-rate", "0")
        methods = ET.SubElement(each, "methods")
        for function, (line, was_hit) in sorted(file.functions.items()):
            method = ET.SubElement(methods, "method", name=function, signature="")
            method.set("line-rate", str(int(was_hit)))
            method.set("branch-rate", "0")
            inner = ET.SubElement(method, "lines")
            ET.SubElement(inner, "line", number=str(line), hits=str(int(was_hit)))
        lines = ET.SubElement(each, "lines")
        for line, was_hit in sorted(file.lines.items()):
            ET.SubElement(lines, "line", number=str(line), hits=str(int(was_hit)))
    package.set("line-rate", _rate(covered, valid))
    package.set("branch-rate", "0")
    valid += int(root.get("lines-valid", "0"))
    covered += int(root.get("lines-covered", "0"))
    root.set("lines-valid", str(valid))
    root.set("lines-covered", str(covered))
    root.set("line-rate", _rate(covered, valid))


def _empty_cobertura() -> ET.Element:
    root = ET.Element(
        "coverage", version=bridge.__version__, timestamp=str(int(time.time() * 1000))
    )
    for name in ("lines-valid", "lines-covered", "branches-valid", "branches-covered"):
        root.set(name, "0")
    root.set("branch-rate", "0")
    root.set("complexity", "0")
    ET.SubElement(root, "sources")
    ET.SubElement(root, "packages")
    return root


def _rate(hit: int, total: int) -> str:
    return f"{hit / total if total else 1:.4g}"


def _json(report: Report, host: HostData, vmlinux: Path | None) -> str:
    text = _by_coverage(host, "json")
    values: dict[str, Any] = json.loads(text) if text else {"files": {}, "totals": {}}
    files = parse_lcov(kernel_lcov(report, vmlinux))
    functions: dict[tuple[str, str], list[int]] = {}
    for run in report.runs:
        for each in run.pcs.functions:
            figures = functions.setdefault((each.name, each.module), [0, 0])
            figures[0] = max(figures[0], each.blocks)
            figures[1] += each.pcs
    if functions:
        values["kernel"] = {
            "functions": [
                {"name": name, "module": module, "blocks": blocks, "pcs": pcs}
                for (name, module), (blocks, pcs) in sorted(functions.items())
            ],
            "files": _json_files(files),
        }
    if report.native:
        values["native"] = {
            "blocks_covered": sum(each.count(1) for each in report.native_covered.values()),
            "blocks_total": sum(map(len, report.native_covered.values())),
            "files": _json_files(report.native),
        }
    return json.dumps(values, indent=1) + "\n"


def _json_files(files: Mapping[str, CodeFile]) -> dict[str, dict[str, list[int]]]:
    return {
        name: {
            "executed_lines": sorted(line for line, hit in file.lines.items() if hit),
            "missing_lines": sorted(line for line, hit in file.lines.items() if not hit),
        }
        for name, file in sorted(files.items())
    }


def _by_coverage(host: HostData, kind: str) -> str:
    """Have coverage.py write one of its reports; "" where nothing was measured."""
    from coverage.exceptions import CoverageException, CoverageWarning, NoDataError

    if not host.lines:
        return ""
    measured = host.coverage()
    contexts = any(context for by_context in host.lines.values() for context in by_context)
    with TemporaryDirectory(prefix="kcov-bridge-report-") as scratch:
        file = Path(scratch, "report")
        try:
            with warnings.catch_warnings(record=True) as left_out:
                warnings.simplefilter("always", CoverageWarning)
                if kind == "lcov":
                    measured.lcov_report(outfile=str(file), ignore_errors=True)
                elif kind == "xml":
                    measured.xml_report(outfile=str(file), ignore_errors=True)
                else:
                    measured.json_report(
                        outfile=str(file), ignore_errors=True, show_contexts=contexts
                    )
            for warning in left_out:
                _log.warning("%s", warning.message)
            return file.read_text(encoding="utf-8")
        except NoDataError:
            return ""
        except (CoverageException, OSError) as error:
            raise InfrastructureError(
                "coverage.py cannot write its report", evidence=str(error)
            ) from error


EXPORTS: Final[dict[str, Callable[[Report, HostData, Path | None], str]]] = {
    "lcov": _lcov,
    "cobertura": _cobertura,
    "json": _json,
}
"""What makes each format, with a ``vmlinux`` where one is named; the text is empty where nothing
was measured."""
