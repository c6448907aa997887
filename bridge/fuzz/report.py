# SPDX-License-Identifier: Apache-2.0
"""The report of a campaign: one HTML page, its figures as JSON, its curves as SVG.

The campaign may still run. The page is made as that of runs is
(:mod:`bridge.results.report.document`); ``report.js`` shows the data.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from bridge.errors import BridgeError, InfrastructureError, UsageError
from bridge.fuzz.curves import Curve, Panel, draw, thin_out
from bridge.fuzz.frontier import Edge, kernel_frontier, python_frontier
from bridge.fuzz.places import Places, is_syscall_pc
from bridge.fuzz.progress import PROGRESS_FILE, Progress, TCurve
from bridge.fuzz.records import CampaignRecord, read_record
from bridge.fuzz.store import CAMPAIGN_FILE, CASES_FILE, CORPUS_DIRECTORY
from bridge.results import REPORT_FILE
from bridge.results.kernel_export import is_kernel_pc
from bridge.results.report.document import link, render_document
from bridge.results.report.pcs import PCS_FILE
from bridge.sources import PC
from bridge.sources.guest_kernel import BLOCKS_FILE as KERNEL_BLOCKS_FILE
from bridge.sources.guest_kernel.symbols import KernelSymbols
from bridge.util.files import write_atomically

__all__ = ["CURVES_FILE", "CampaignReport", "read_pcs", "write_campaign_report"]

CURVES_FILE: Final = "coverage.svg"
"""Name of the drawing of the coverage, beside the page."""

_RATE_SECONDS: Final = 10.0
"""Executions per second are those of so many seconds, as on the screen."""
_ROWS: Final = 50_000
"""Rows of blocks, and of the frontier, that the page lists at most; figures are of all."""
_UNRECORDED: Final = ("__SCT__", "__x86_", "__fentry__", "__cfi_", "__pfx_")
"""Names of kernel code that is patched or not recorded: it cannot become covered."""


def read_pcs(path: Path) -> set[PC]:
    """Read the PCs of a campaign or of a run: its directory, or a file of PCs in hex.

    Raises:
        UsageError: there is nothing to read.
        InfrastructureError: a file cannot be read or is damaged.
    """
    if (path / CAMPAIGN_FILE).is_file():
        return read_record(path).covered()
    file = path / PCS_FILE if path.is_dir() else path
    try:
        with file.open(encoding="ascii") as lines:
            return {int(line, 16) for line in set(lines) if line.strip()}
    except FileNotFoundError as error:
        raise UsageError(
            f"there are no PCs to compare with: no {file}",
            hint=f"name a campaign, a run that has a {PCS_FILE}, or a file of PCs",
        ) from error
    except OSError as error:
        raise InfrastructureError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise InfrastructureError(
            f"{file} is no list of PCs in hex", evidence=str(error)
        ) from error


def write_campaign_report(directory: Path, output: Path | None = None) -> Path:
    """Write the page of a campaign and the drawing beside it; return the path of the page.

    Raises:
        BridgeError: the directory is not that of a campaign, or a file cannot be read or written.
    """
    return CampaignReport(read_record(directory)).write(output or directory / REPORT_FILE)


class CampaignReport:
    """A campaign and what its PCs mean.

    Args:
        against: name and PCs of what the blocks are compared with.
        vmlinux: the guest kernel's debug information, if it is not where Debian's packages put it.

    Raises:
        BridgeError: a file of the campaign is damaged.
    """

    def __init__(
        self,
        campaign: CampaignRecord,
        *,
        against: tuple[str, Collection[PC]] | None = None,
        vmlinux: Path | None = None,
    ) -> None:
        self.campaign = campaign
        self.problems = list(campaign.problems)
        self._against = against
        self.places = Places(campaign, vmlinux, self.problems)
        self.frontier = self._find_frontier()

    def write(self, output: Path) -> Path:
        """Write the page and, beside it, the drawing; return the path of the page."""
        base = output.absolute().parent
        write_atomically(base / CURVES_FILE, self.svg())
        write_atomically(output, self.page(base))
        return output

    def page(self, base: Path | None = None) -> str:
        """Return the page; links to files beside it are relative to ``base``."""
        program = importlib.resources.files("bridge.fuzz").joinpath("report.js")
        data = self.data()
        data["links"] = self._links(base)
        for finding, known in zip(data["findings"], self.campaign.findings, strict=True):
            finding["href"] = link(known.directory, base) if base is not None else ""
        title = self.campaign.fact("target") or self.campaign.name
        return render_document(f"Fuzz campaign: {title}", data, program.read_text(encoding="utf-8"))

    def svg(self) -> str:
        """Draw the coverage over time and over executions."""
        progress = self.campaign.progress
        findings = [each.finding for each in self.campaign.findings]
        marks = [(float(each.seconds), each.title) for each in findings]
        runs = [(float(each.executions), each.title) for each in findings]
        panels = [
            Panel(f"Blocks over {over}", unit, "blocks", [Curve("", points)], where)
            for over, unit, where in (
                ("time", "seconds", marks),
                ("executions", "executions", runs),
            )
            if (points := thin_out(progress.curve("blocks", unit)))
        ]
        return draw(panels, "dashed: a finding" if marks else "")

    def data(self) -> dict[str, Any]:
        """Return all figures; JSON can hold them.

        PCs are hexadecimal text. ``blocks`` has, for each block in the order in which it was first
        reached: PC, place, function, source line, seconds, case, whether a seed reached it first,
        and whether what the campaign is compared with has it. ``missed`` are the blocks that only
        the other has: PC, place, function, source line. ``frontier`` has: PC, place, function and
        source line of the covered block, the same of its neighbour, the way between, blocks behind
        it, further covered blocks with the same neighbour.
        """
        campaign, there = self.campaign, self._against
        blocks = [
            [
                *self._place(pc),
                round(case.seconds, 3),
                case.name,
                case.seed,
                pc in there[1] if there is not None else None,
            ]
            for case in campaign.cases
            for pc in case.pcs
            if not is_syscall_pc(pc)
        ]
        covered = {pc for pc in campaign.covered() if not is_syscall_pc(pc)}
        missed = []
        if there is not None:
            missed = sorted(pc for pc in there[1] if pc not in covered and not is_syscall_pc(pc))
        problems = list(self.problems)
        for name, rows in (("blocks", blocks), ("edges of the frontier", self.frontier)):
            if len(rows) > _ROWS:
                problems.append(f"there are {len(rows):,} {name}; the first {_ROWS:,} are listed")
        return {
            "format": "kcov-bridge fuzz report",
            "version": 1,
            "directory": str(campaign.directory),
            "facts": _facts(campaign),
            "problems": problems,
            "totals": self._totals(covered, len(missed)),
            "series": _series(campaign),
            "findings": [
                {
                    "title": each.finding.title,
                    "kind": each.finding.kind.value,
                    "times": each.finding.times,
                    "seconds": each.finding.seconds,
                    "executions": each.finding.executions,
                    "stack": each.finding.stack,
                    "others": each.finding.others,
                    "case": each.case,
                    "evidence": each.evidence,
                    "directory": each.directory.name,
                }
                for each in campaign.findings
            ],
            "against": there[0] if there is not None else None,
            "blocks": blocks[:_ROWS],
            "missed": [self._place(pc) for pc in missed[:_ROWS]],
            "frontier": [
                [
                    *self._place(edge.at, edge.symbol),
                    *self._place(edge.to, edge.to_symbol),
                    edge.kind.value,
                    edge.behind,
                    edge.others,
                ]
                for edge in self.frontier[:_ROWS]
            ],
        }

    def _totals(self, covered: set[PC], missed: int) -> dict[str, Any]:
        campaign = self.campaign
        last = campaign.progress.last
        seeds = {pc for pc in campaign.seeds_covered() if not is_syscall_pc(pc)}
        there = self._against
        # When the machines have ended, it is not known any more.
        stability = campaign.progress.curve("stability")
        return {
            "seconds": last.seconds if last else 0.0,
            "executions": last.executions if last else 0,
            "rate": last.executions / last.seconds if last and last.seconds else None,
            "blocks": last.blocks if last else len(covered),
            "corpus": last.corpus if last else len({case.name for case in campaign.cases}),
            "findings": len(campaign.findings),
            "seen": sum(each.finding.times for each in campaign.findings),
            "vms": last.vms if last else 0,
            "mostVms": max((each.vms for each in campaign.progress.samples), default=0),
            "stability": stability[-1][1] if stability else None,
            "seedBlocks": len(seeds),
            "newBlocks": len(covered - seeds),
            "onlyHere": len(covered.difference(there[1])) if there is not None else None,
            "onlyThere": missed if there is not None else None,
            "frontier": len(self.frontier),
            "cases": len({case.name for case in campaign.cases if case.pcs}),
        }

    def _place(self, pc: PC, symbol: str = "") -> list[str]:
        place, name, text = self.places.of(pc)
        return [f"{pc:x}", place, symbol or name, text]

    def _links(self, base: Path | None) -> list[dict[str, str]]:
        if base is None:
            return []
        directory = self.campaign.directory
        names = {"corpus": CORPUS_DIRECTORY, "figures": PROGRESS_FILE, "cases": CASES_FILE}
        found = [{"text": "curves as SVG", "href": link(base / CURVES_FILE, base)}]
        return found + [
            {"text": text, "href": link(directory / name, base)}
            for text, name in names.items()
            if (directory / name).exists()
        ]

    def _find_frontier(self) -> list[Edge]:
        covered, problems = self.campaign.covered(), self.problems
        found: list[Edge] = []
        places = self.places
        if places.table is not None:
            found += python_frontier(places.table, covered, places.sources, problems)
        if places.symbols is not None:
            found += self._kernel_frontier(places.symbols, covered)
        return sorted(found, key=lambda edge: (-edge.behind, edge.at, edge.to))

    def _kernel_frontier(self, symbols: KernelSymbols, covered: set[PC]) -> list[Edge]:
        blocks = [block for block in self.places.kernel_blocks() if block.start in covered]
        if not blocks:
            if any(map(is_kernel_pc, covered)):
                self.problems.append(
                    f"there is no {KERNEL_BLOCKS_FILE}: the frontier of the guest's kernel is not "
                    "known"
                )
            return []

        def recorded(pc: PC) -> bool:
            symbol = symbols.lookup(pc)
            return symbol is not None and not symbol.name.startswith(_UNRECORDED)

        try:
            text = self.places.kernel_text()
            if text is None:
                self.problems.append(
                    "the image of the guest's kernel is not here: its frontier is not known"
                )
                return []
            found = kernel_frontier(blocks, text, symbols, recorded)
        except BridgeError as error:
            hint = f" ({error.hint})" if error.hint else ""
            self.problems.append(f"{error.message}{hint}")
            return []
        lost = sum(not text.read(block.start, block.size) for block in blocks)
        if lost:
            self.problems.append(
                f"{lost:,} covered blocks are of modules that are not here: their frontier is not "
                "known"
            )
        return found


_NAMES: Final = {
    "target": "Target",
    "harness": "Harness",
    "sources": "Sources",
    "kernel": "Kernel",
    "accel": "Accelerator",
    "engine": "Engine",
    "jobs": "Jobs",
    "fold": "Fold",
    "feedback": "Feedback",
}


def _facts(campaign: CampaignRecord) -> list[list[str]]:
    """Return the settings as rows of name and text, the important ones first."""
    rows = [["Directory", str(campaign.directory)]]
    for name in dict.fromkeys((*_NAMES, *campaign.facts)):
        if isinstance(campaign.facts.get(name), dict) or not (text := campaign.fact(name)):
            continue
        rows.append([_NAMES.get(name, name.replace("_", " ").capitalize()), text[:400]])
    return rows


def _series(campaign: CampaignRecord) -> list[dict[str, Any]]:
    progress = Progress(tuple(_thinned(campaign.progress)))
    findings = [each.finding for each in campaign.findings]
    times: list[list[Any]] = [[each.seconds, each.title] for each in findings]
    runs: list[list[Any]] = [[each.executions, each.title] for each in findings]
    stability: TCurve = [(at, 100 * value) for at, value in progress.curve("stability")]
    found = [
        ("Blocks over time", "seconds", "blocks", progress.curve("blocks"), times, False),
        (
            "Blocks over executions",
            "executions",
            "blocks",
            progress.curve("blocks", "executions"),
            runs,
            False,
        ),
        ("Executions per second", "seconds", "a second", progress.rates(_RATE_SECONDS), [], True),
        ("Corpus", "seconds", "cases", progress.curve("corpus"), [], False),
        ("Stability", "seconds", "percent", stability, [], True),
        ("VMs", "seconds", "VMs", progress.curve("vms"), [], False),
    ]
    return [
        {
            "title": title,
            "x": x,
            "y": y,
            "points": [[round(at, 3), round(value, 2)] for at, value in points],
            "marks": marks,
            "line": line,
        }
        for title, x, y, points, marks, line in found
        if points and (title != "VMs" or len({value for _, value in points}) > 1)
    ]


def _thinned(progress: Progress) -> list[Any]:
    """Return a few hundred samples; rates between them are means."""
    kept = {at for at, _ in thin_out([(n, 0.0) for n in range(len(progress.samples))])}
    return [sample for number, sample in enumerate(progress.samples) if number in kept]
