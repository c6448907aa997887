# SPDX-License-Identifier: Apache-2.0
"""Compares two groups of campaigns, as evaluations of fuzzers do: text, JSON, curves as SVG.

Trials may be of different length. The curves, and what is compared at their end, go as far as the
shortest trial; findings and the blocks that only one side reached are of whole trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bridge.errors import UsageError
from bridge.fuzz.curves import Panel, draw
from bridge.fuzz.progress import TCurve
from bridge.fuzz.records import CampaignRecord, read_record
from bridge.fuzz.store import CAMPAIGN_FILE
from bridge.fuzz.trials import Figure, Spread, band, magnitude, value_at

__all__ = ["Comparison", "Side", "compare", "read_side"]

_SAME: Final = ("target", "harness", "sources")
"""Facts that must be the same on both sides."""
_TOLD: Final = ("kernel", "accel", "engine", "jobs", "fold", "feedback", "image")
"""Facts whose differences are said."""


@dataclass(frozen=True, slots=True)
class Side:
    """The trials of one side."""

    name: str
    trials: tuple[CampaignRecord, ...]

    def curves(self, over: str) -> list[TCurve]:
        """Return the covered blocks of each trial over seconds or executions."""
        return [trial.progress.curve("blocks", over) for trial in self.trials]

    def covered(self) -> set[int]:
        """Return the PCs that any trial reached."""
        return set().union(*(trial.covered() for trial in self.trials))


@dataclass(frozen=True, slots=True)
class FindingCount:
    """A finding, and in how many trials of each side it was seen."""

    title: str
    ours: int
    theirs: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two groups of trials, compared.

    Attributes:
        seconds, executions: how far the curves go.
        reach: the number of blocks for the time to a coverage.
        only_ours, only_theirs: blocks that no trial of the other side reached.
        notes: what a reader must know; one sentence each.
    """

    ours: Side
    theirs: Side
    seconds: float
    executions: float
    reach: int
    figures: tuple[Figure, ...]
    findings: tuple[FindingCount, ...]
    only_ours: int
    only_theirs: int
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return all figures; JSON can hold them. What never happened is null."""
        return {
            "format": "kcov-bridge fuzz comparison",
            "version": 1,
            "sides": [
                {"name": side.name, "trials": [str(each.directory) for each in side.trials]}
                for side in (self.ours, self.theirs)
            ],
            "seconds": self.seconds,
            "executions": self.executions,
            "reach": self.reach,
            "figures": [
                {
                    "name": each.name,
                    "unit": each.unit,
                    "values": [list(map(_finite, side)) for side in (each.ours, each.theirs)],
                    "medians": [
                        _finite(Spread.of(side).median) for side in (each.ours, each.theirs)
                    ],
                    "u": each.u,
                    "p": each.p,
                    "a12": each.a12,
                    "effect": magnitude(each.a12),
                    "verdict": each.verdict,
                }
                for each in self.figures
            ],
            "findings": [
                {"title": each.title, "trials": [each.ours, each.theirs]} for each in self.findings
            ],
            "only": [self.only_ours, self.only_theirs],
            "notes": list(self.notes),
        }

    def render(self) -> str:
        """Render the comparison for a terminal; no trailing newline."""
        ours, theirs = self.ours, self.theirs
        rows = [
            ("", f"A: {ours.name}", f"B: {theirs.name}", "U", "p", "A12", ""),
            ("trials", f"{len(ours.trials)}", f"{len(theirs.trials)}", "", "", "", ""),
        ]
        for each in self.figures:
            rows.append(
                (
                    each.name,
                    _spread(each.ours, each.unit),
                    _spread(each.theirs, each.unit),
                    f"{each.u:g}",
                    "-" if each.p is None else _probability(each.p),
                    f"{each.a12:.2f}",
                    each.verdict,
                )
            )
        rows.append(
            ("only this side", f"{self.only_ours:,} blocks", f"{self.only_theirs:,} blocks")
            + ("",) * 4
        )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += ["", "Medians, in brackets the quartiles. A12 above 0.5: A has the larger values."]
        if self.findings:
            lines += ["", "findings, trials that saw them in A and B:"]
            lines += [
                f"  {each.ours:>3} {each.theirs:>3}  {_one_line(each.title)}"
                for each in self.findings
            ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def svg(self) -> str:
        """Draw the medians over time and over executions, with bands from quartile to quartile."""
        panels = [
            Panel(
                f"Blocks over {title}",
                over,
                "blocks",
                [
                    band(f"{side.name} ({len(side.trials)})", side.curves(over), end)
                    for side in (self.ours, self.theirs)
                ],
            )
            for title, over, end in (
                ("time", "seconds", self.seconds),
                ("executions", "executions", self.executions),
            )
        ]
        return draw(panels, "medians of the trials; bands: quartiles")


def read_side(paths: Iterable[Path], name: str = "") -> Side:
    """Read the trials of a side.

    Args:
        paths: directories of campaigns, or directories that have only campaigns in them.
        name: for people; by default the name of the first directory.

    Raises:
        UsageError: there is no campaign.
        BridgeError: a file of a campaign cannot be read.
    """
    found: dict[Path, CampaignRecord] = {}
    paths = list(paths)
    for path in paths:
        inner = sorted(each.parent for each in path.glob(f"*/{CAMPAIGN_FILE}"))
        several = inner if not (path / CAMPAIGN_FILE).is_file() and inner else [path]
        for directory in several:
            found[directory.resolve()] = read_record(directory)
    for record in found.values():
        if record.progress.last is None:
            raise UsageError(
                f"{record.directory} has no figures yet: it cannot be compared",
                hint="wait until it has run for some seconds",
            )
    return Side(name or paths[0].resolve().name, tuple(found.values()))


def compare(ours: Side, theirs: Side, *, reach: int | None = None) -> Comparison:
    """Compare two sides.

    Args:
        reach: number of blocks for the time to a coverage; by default the smaller of the medians
            that the sides have at the end.

    Raises:
        UsageError: the sides fuzzed different things, or share a trial.
        MissingDependencyError: scipy is not installed.
    """
    notes = _check(ours, theirs)
    trials = [*ours.trials, *theirs.trials]
    lasts = [trial.progress.last for trial in trials]
    ends = [(last.seconds, last.executions) for last in lasts if last is not None]
    seconds = min(at for at, _ in ends)
    executions = min(done for _, done in ends)
    longest = max(at for at, _ in ends)
    if longest > 1.05 * seconds:
        notes.append(
            "the trials are of different length: what is compared over time ends with the "
            f"shortest one, after {_time(seconds)} of up to {_time(longest)}"
        )

    def final(over: str, end: float) -> tuple[list[float], list[float]]:
        first, second = (
            [value_at(points, end) for points in side.curves(over)] for side in (ours, theirs)
        )
        return first, second

    by_time = final("seconds", seconds)
    wanted = reach
    if wanted is None:
        wanted = math.ceil(min(Spread.of(values).median for values in by_time))
    figures = [
        Figure.of(f"blocks after {_time(seconds)}", "", *by_time),
        Figure.of(f"blocks after {executions:,} runs", "", *final("executions", executions)),
        Figure.of(
            "executions per second",
            "",
            *(
                [value_at(t.progress.curve("executions"), seconds) / seconds for t in side.trials]
                if seconds
                else [0.0] * len(side.trials)
                for side in (ours, theirs)
            ),
        ),
        Figure.of(
            "findings",
            "",
            *([float(len(trial.findings)) for trial in side.trials] for side in (ours, theirs)),
        ),
    ]
    # At no block there is nothing to wait for.
    if wanted > 0:
        figures[2:2] = [
            Figure.of(
                f"{name} to {wanted:,} blocks",
                unit,
                *(
                    [_first(points, wanted, end) for points in side.curves(over)]
                    for side in (ours, theirs)
                ),
            )
            for name, unit, over, end in (
                ("time", "s", "seconds", seconds),
                ("runs", "", "executions", float(executions)),
            )
        ]
    titles = sorted({title for trial in trials for title in _titles(trial)})
    first, second = ours.covered(), theirs.covered()
    return Comparison(
        ours,
        theirs,
        seconds,
        executions,
        wanted,
        tuple(figures),
        tuple(
            FindingCount(
                title, *(sum(title in _titles(t) for t in side.trials) for side in (ours, theirs))
            )
            for title in titles
        ),
        len(first - second),
        len(second - first),
        tuple(notes),
    )


def _check(ours: Side, theirs: Side) -> list[str]:
    """Refuse what cannot be compared; return what the reader must know."""
    trials = [*ours.trials, *theirs.trials]
    for name in _SAME:
        found = {trial.fact(name) for trial in trials}
        if len(found) > 1:
            both = " and ".join(sorted(text or "(unknown)" for text in found))
            raise UsageError(
                f"the campaigns cannot be compared: they have different {name}: {both}",
                hint="compare campaigns of the same target, harness and sources",
            )
    shared = {t.directory.resolve() for t in ours.trials} & {
        t.directory.resolve() for t in theirs.trials
    }
    if shared:
        raise UsageError(f"{min(shared)} is on both sides", hint="name each trial once")
    notes = []
    for name in _TOLD:
        sides = [sorted({trial.fact(name) for trial in side.trials}) for side in (ours, theirs)]
        if sides[0] != sides[1]:
            texts = [", ".join(text or "unknown" for text in side) for side in sides]
            notes.append(f"{name} differs: {texts[0]} in A, {texts[1]} in B")
    for trial in trials:
        notes += [f"{trial.name}: {problem}" for problem in trial.problems]
    return notes


def _titles(trial: CampaignRecord) -> set[str]:
    return {each.finding.title for each in trial.findings}


def _first(points: TCurve, wanted: float, end: float) -> float:
    """Return where a curve first has a value; infinity if it has not by the end."""
    return next((x for x, y in points if y >= wanted and x <= end), math.inf)


def _one_line(text: str) -> str:
    """Return a text of the guest as a terminal may show it."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spread(values: Sequence[float], unit: str) -> str:
    spread = Spread.of(values)
    text = _number(spread.median, unit)
    if len(values) > 1:
        text += f" [{_number(spread.q1, unit)} - {_number(spread.q3, unit)}]"
    never = sum(not math.isfinite(value) for value in values)
    return f"{text}, {never} never" if never else text


def _number(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "never"
    if unit == "s":
        return _time(value)
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def _time(seconds: float) -> str:
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"


def _probability(p: float) -> str:
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"
