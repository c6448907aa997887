# SPDX-License-Identifier: Apache-2.0
"""Draw the measurements ``consume`` and ``vms`` as an SVG, from the JSON document.

Points are medians, with a bar from quartile to quartile, and hollow where the comparison with the
baseline is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

from bridge.bench.vms import ADAPTIVE, MEMORY, READY
from bridge.errors import UsageError

__all__ = ["plot"]

_PANEL_WIDTH, _PANEL_HEIGHT = 520, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 20, 92, 58
_COLOURS = ("#1b6ca8", "#c8553d", "#4f7d3a", "#7a4fa3")
_STYLE = """\
text { font-family: "DejaVu Sans", Helvetica, Arial, sans-serif; font-size: 12px; fill: #222; }
.title { font-size: 14px; font-weight: bold; }
.grid { stroke: #e3e5e8; stroke-width: 1; }
.axis { stroke: #555; stroke-width: 1; }
"""


@dataclass(frozen=True)
class _Point:
    """A point: ``at`` on the horizontal axis, and the series' median and quartiles.

    ``sure`` is false if its comparison was refused.
    """

    at: float
    median: float
    q1: float
    q3: float
    sure: bool

    @classmethod
    def of(cls, at: float, comparison: dict[str, Any], side: str, scale: float = 1.0) -> _Point:
        middle, first, third = (comparison[side][key] * scale for key in ("median", "q1", "q3"))
        return cls(at, middle, first, third, not comparison["refused"])


@dataclass
class _Line:
    label: str
    colour: str
    points: list[_Point] = field(default_factory=list)
    dashed: bool = False


@dataclass(frozen=True)
class _Panel:
    """A drawing.

    Attributes:
        ticks: (value, text) of the horizontal axis.
        logarithmic: both axes count in powers of ten. Otherwise the values are at equal distances,
            and the vertical axis begins at 0.
    """

    title: str
    across: str
    up: str
    lines: Sequence[_Line]
    ticks: Sequence[tuple[float, str]]
    logarithmic: bool = False


def plot(document: dict[str, Any]) -> str:
    """Return the SVG. Raises :class:`bridge.errors.UsageError` if there is nothing to draw."""
    found = {each["name"]: each["comparisons"] for each in document["measurements"]}
    panels = [*_consume(found.get("consume", [])), *_vms(found.get("vms", []))]
    if not panels:
        raise UsageError(
            "there is nothing to draw", hint="measure consume or vms: --only consume,vms"
        )
    columns = min(2, len(panels))
    width = columns * _PANEL_WIDTH
    height = -(-len(panels) // columns) * _PANEL_HEIGHT + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        x, y = number % columns * _PANEL_WIDTH, number // columns * _PANEL_HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{_draw(panel)}</g>')
    machine = document["machine"]
    where = (
        f"{machine['processor']}, {machine['cpus']} CPUs, {document['accelerator']['name']}; "
        f"{document['date'][:10]}; medians and quartiles; "
        "hollow: too different from run to run to be compared"
    )
    parts.append(_text(width / 2, height - 10, where, "middle", colour="#666"))
    return "\n".join([*parts, "</svg>", ""])


def _consume(comparisons: Sequence[dict[str, Any]]) -> list[_Panel]:
    ours: dict[int, _Line] = {}
    theirs: dict[int, _Line] = {}
    for each in comparisons:
        files, blocks = (each["parameters"][key] for key in ("files", "blocks"))
        if files not in ours:
            colour = _COLOURS[len(ours) % len(_COLOURS)]
            ours[files] = _Line(f"{each['ours']['name']}, {files:,} files", colour)
            theirs[files] = _Line(
                f"{each['baseline']['name']}, {files:,} files", colour, dashed=True
            )
        ours[files].points.append(_Point.of(blocks, each, "ours", 1e-6))
        theirs[files].points.append(_Point.of(blocks, each, "baseline", 1e-6))
    if not ours:
        return []
    blocks = sorted({point.at for line in ours.values() for point in line.points})
    return [
        _Panel(
            "A look at the coverage",
            "blocks covered since the last look",
            "time for a look",
            [*ours.values(), *theirs.values()],
            [(each, f"{each:,.0f}") for each in blocks],
            logarithmic=True,
        )
    ]


def _vms(comparisons: Sequence[dict[str, Any]]) -> list[_Panel]:
    def panel(title: str, up: str, series: Sequence[tuple[str, str, str]]) -> _Panel | None:
        """``series``: name of ours, which of the two, label."""
        lines = []
        for number, (name, side, label) in enumerate(series):
            line = _Line(label, _COLOURS[number], dashed=side == "baseline")
            for each in comparisons:
                if each["ours"]["name"] == name:
                    line.points.append(_Point.of(each["parameters"]["vms"], each, side))
            if line.points:
                lines.append(line)
        if not lines:
            return None
        counts = sorted({point.at for line in lines for point in line.points})
        ticks = [(each, f"{each:.0f}") for each in counts]
        return _Panel(title, "VMs at once", up, lines, ticks)

    panels = (
        panel("Ready", "seconds", [(READY, "ours", "from the start until all answer")]),
        panel("Memory of each VM", "MiB a VM", [(MEMORY, "ours", "QEMU and bridge, PSS")]),
        panel(
            "Signals of all VMs together",
            "signals a second",
            [(ADAPTIVE, "ours", "awake for a moment"), (ADAPTIVE, "baseline", "always asleep")],
        ),
    )
    return [each for each in panels if each is not None]


def _draw(panel: _Panel) -> str:
    left, right = _LEFT, _PANEL_WIDTH - _RIGHT
    top, bottom = _TOP, _PANEL_HEIGHT - _BOTTOM
    values = [each for line in panel.lines for p in line.points for each in (p.q1, p.median, p.q3)]
    ticks_up = _decades(values) if panel.logarithmic else _round_steps(max(values))
    low, high = ticks_up[0], ticks_up[-1]
    first, last = panel.ticks[0][0], panel.ticks[-1][0]
    places = [value for value, _ in panel.ticks]

    def across(value: float) -> float:
        if len(panel.ticks) == 1:
            return (left + right) / 2
        if panel.logarithmic:
            part = math.log(value / first) / math.log(last / first)
        else:
            part = places.index(value) / (len(places) - 1)
        return left + 24 + part * (right - left - 48)

    def up(value: float) -> float:
        if panel.logarithmic:
            part = math.log(max(value, low) / low) / math.log(high / low)
        else:
            part = (value - low) / (high - low)
        return bottom - part * (bottom - top)

    show: Callable[[float], str] = _seconds if panel.logarithmic else _plain
    parts = [_text(left, 22, panel.title, "start", kind="title")]
    for value in ticks_up:
        y = up(value)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, show(value), "end"))
    for value, label in panel.ticks:
        x = across(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}"/>'
        )
        parts.append(_text(x, bottom + 20, label, "middle"))
    parts.append(f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>')
    parts.append(_text((left + right) / 2, bottom + 42, panel.across, "middle"))
    middle = (top + bottom) / 2
    parts.append(
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(panel.up)}</text>"
    )
    parts += [_draw_line(line, across, up) for line in panel.lines]
    parts += _legend(panel.lines, left, 42)
    return "".join(parts)


def _draw_line(line: _Line, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    points = sorted(line.points, key=lambda point: point.at)
    path = " ".join(f"{across(p.at):.1f},{up(p.median):.1f}" for p in points)
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"'
        f"{_dashes(line)}/>"
    ]
    for point in points:
        x = across(point.at)
        parts.append(
            f'<line x1="{x:.1f}" y1="{up(point.q1):.1f}" x2="{x:.1f}" y2="{up(point.q3):.1f}" '
            f'stroke="{line.colour}" stroke-width="5" stroke-opacity="0.35"/>'
            f'<circle cx="{x:.1f}" cy="{up(point.median):.1f}" r="3.5" stroke="{line.colour}" '
            f'stroke-width="1.5" fill="{line.colour if point.sure else "white"}"/>'
        )
    return "".join(parts)


def _legend(lines: Sequence[_Line], left: float, top: float) -> list[str]:
    """Draw the legend above the drawing, in two columns if necessary."""
    rows = len(lines) if len(lines) <= 3 else -(-len(lines) // 2)
    parts = []
    for number, line in enumerate(lines):
        x, y = left + number // rows * 180, top + number % rows * 16
        parts.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x + 26}" y2="{y - 4}" stroke="{line.colour}" '
            f'stroke-width="2"{_dashes(line)}/>'
        )
        parts.append(_text(x + 32, y, line.label, "start"))
    return parts


def _dashes(line: _Line) -> str:
    return ' stroke-dasharray="6 4"' if line.dashed else ""


def _text(x: float, y: float, text: str, anchor: str, *, kind: str = "", colour: str = "") -> str:
    more = (f' class="{kind}"' if kind else "") + (f' style="fill:{colour}"' if colour else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _decades(values: Sequence[float]) -> list[float]:
    """Return the powers of ten around all values."""
    first = math.floor(math.log10(min(values)))
    last = max(math.ceil(math.log10(max(values))), first + 1)
    return [10.0**power for power in range(first, last + 1)]


def _round_steps(most: float) -> list[float]:
    """Return 0 and up to seven round steps; the last is at least ``most``."""
    step = 10.0 ** math.floor(math.log10(most))
    for part in (0.2, 0.5, 1.0, 2.0):
        if most / (step * part) <= 6:
            step *= part
            break
    return [number * step for number in range(math.ceil(most / step - 1e-9) + 1)]


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if value >= size * 0.999:
            return f"{value / size:.0f} {unit}"
    return f"{value:g} s"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"
