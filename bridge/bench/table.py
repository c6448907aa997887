# SPDX-License-Identifier: Apache-2.0
"""The results as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bridge.bench.measurement import Result
from bridge.bench.stats import Aim, Comparison, Of, Summary

__all__ = ["amount", "render", "say_aim"]

_HEAD = ("", "median", "spread", "runs", "baseline", "median", "spread", "comes to", "aim", "")
_LEFT = frozenset({0, 4, 7, 8, 9})
"""The columns of text; the others have numbers."""


def amount(value: float, unit: str = "") -> str:
    """Format three significant digits, with separated thousands, and the unit."""
    size = abs(value)
    if size >= 100 or size == 0:
        text = f"{value:,.0f}"
    else:
        digits = 2 if size < 10 else 1
        text = f"{value:.{digits}f}" if size >= 0.1 else f"{value:.2g}"
    return f"{text} {unit}".rstrip()


def say_aim(aim: Aim, unit: str) -> str:
    """Format an aim, such as ``<= 2x``."""
    sign = "<=" if aim.at_most else ">="
    return f"{sign} {_figure(aim.of, aim.limit, unit)}"


def render(results: Iterable[Result]) -> str:
    """Format all results, with the reasons of what was refused or not measured."""
    return "\n\n".join(_one(result) for result in results)


def _one(result: Result) -> str:
    lines = [f"{result.name}: {result.about}"]
    if result.comparisons:
        lines += _columns([_HEAD, *(row for each in result.comparisons for row in _rows(each))])
    lines += [f"  note: {note}" for note in result.notes]
    if result.failure:
        first, *rest = result.failure.splitlines()
        lines += [f"  not measured: {first}", *(f"    {line}" for line in rest)]
    return "\n".join(lines)


def _rows(comparison: Comparison) -> list[Sequence[str]]:
    ours, baseline = comparison.ours.summary, comparison.baseline
    outcome = comparison.outcome()
    comes_to = (
        f"refused: {outcome.refused}"
        if outcome.figure is None
        else _figure(comparison.of, outcome.figure.median, comparison.unit)
    )
    row = [comparison.case, *_series(ours, comparison.unit), str(ours.runs)]
    if baseline is None:
        row += ["none", "", "", comes_to if outcome.figure is None else ""]
    else:
        row += [baseline.name, *_series(baseline.summary, comparison.unit), comes_to]
    aims = [(say_aim(aim, comparison.unit), _verdict(comparison, aim)) for aim in comparison.aims]
    first, *rest = aims or [("", "")]
    return [[*row, *first], *(["", *[""] * 7, *each] for each in rest)]


def _series(summary: Summary, unit: str) -> tuple[str, str]:
    return amount(summary.median, unit), f"{summary.spread:.0%}"


def _figure(of: Of, value: float, unit: str) -> str:
    if of is Of.VALUE:
        return amount(value, unit)
    if of is Of.MORE:
        return f"{amount(value, unit)} more"
    return f"{amount(value)}{of.value}"


def _verdict(comparison: Comparison, aim: Aim) -> str:
    verdict = comparison.verdict(aim)
    return verdict.value if verdict is not None else "refused"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if column in _LEFT else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
