# SPDX-License-Identifier: Apache-2.0
"""Draw curves of campaigns as an SVG, which follows the reader's light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final
from xml.sax.saxutils import escape

from bridge.fuzz.progress import TCurve

__all__ = ["Band", "Curve", "Panel", "draw", "thin_out"]

_WIDTH: Final = 560
_HEIGHT: Final = 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 22, 62, 50
_POINTS: Final = 400
_LIGHT: Final = ("#1d5cb8", "#b4531f", "#17693f", "#7a4fa3")
_DARK: Final = ("#86b6ff", "#f2a274", "#74d6a0", "#c9a5ee")
_SIDES: Final = len(_LIGHT)

_STYLE: Final = (
    """\
svg { background: #ffffff; }
text { font: 12px system-ui, "DejaVu Sans", Helvetica, Arial, sans-serif; fill: #55616f; }
.title { font-size: 14px; font-weight: bold; fill: #19222d; }
.grid { stroke: #d9dee4; }
.mark { stroke: #ab221a; stroke-dasharray: 2 3; }
.line { fill: none; stroke-width: 2; }
.band { fill-opacity: 0.18; stroke: none; }
"""
    + "".join(
        f".line.s{side} {{ stroke: {colour}; }} .band.s{side} {{ fill: {colour}; }}\n"
        for side, colour in enumerate(_LIGHT)
    )
    + "@media (prefers-color-scheme: dark) {\n"
    "svg { background: #161d25; } text { fill: #9caab9; } .title { fill: #e4eaf0; }\n"
    ".grid { stroke: #2a3540; } .mark { stroke: #ff9d95; }\n"
    + "".join(
        f".line.s{side} {{ stroke: {colour}; }} .band.s{side} {{ fill: {colour}; }}\n"
        for side, colour in enumerate(_DARK)
    )
    + "}\n"
)


@dataclass(frozen=True, slots=True)
class Band:
    """The range around a curve: two curves at the same places."""

    low: TCurve
    high: TCurve


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure that holds until its next point."""

    label: str
    points: TCurve
    band: Band | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """A drawing of some curves.

    Attributes:
        x: the unit of the horizontal axis; ``seconds`` become minutes or hours.
        y: the unit of the vertical axis.
        marks: places on the horizontal axis, and what is there.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    marks: Sequence[tuple[float, str]] = field(default=())


def draw(panels: Sequence[Panel], note: str = "") -> str:
    """Return an SVG of panels side by side, with a line of text below."""
    width, height = max(1, len(panels)) * _WIDTH, _HEIGHT + (24 if note else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">',
        f"<title>{_escape('; '.join(panel.title for panel in panels))}</title>",
        f"<style>{_STYLE}</style>",
    ]
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({number * _WIDTH} 0)">{_panel(panel)}</g>')
    if note:
        parts.append(_text(width / 2, height - 10, note, "middle"))
    return "\n".join([*parts, "</svg>", ""])


def thin_out(points: TCurve) -> TCurve:
    """Return at most a few hundred points of a curve, the first and the last among them."""
    step = -(-len(points) // _POINTS)
    if step <= 1:
        return points
    kept = points[::step]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _panel(panel: Panel) -> str:
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    curves = [curve for curve in panel.curves if curve.points]
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in _all_points(curve)]
    x_most = max([*xs, *(x for x, _ in panel.marks), 0.0]) or 1.0
    y_ticks = _ticks(max([*ys, 0.0]) or 1.0)
    unit, name = _unit(panel.x, x_most)

    def across(x: float) -> float:
        return left + (right - left) * x / x_most

    def up(y: float) -> float:
        return bottom - (bottom - top) * y / y_ticks[-1]

    parts = [_text(left, 20, panel.title, "start", "title")]
    for y in y_ticks:
        at = up(y)
        parts.append(f'<line class="grid" x1="{left}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        parts.append(_text(left - 8, at + 4, f"{y:,g}" if y < 10 else f"{y:,.0f}", "end"))
    for tick in _ticks(x_most / unit):
        if tick * unit <= x_most * 1.0001:
            parts.append(_text(across(tick * unit), bottom + 18, f"{tick:,g}", "middle"))
    parts.append(_text((left + right) / 2, bottom + 38, name, "middle"))
    parts.append(
        f'<text transform="translate(16 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{_escape(panel.y)}</text>"
    )
    for x, text in panel.marks:
        at = across(x)
        parts.append(
            f'<line class="mark" x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{bottom}">'
            f"<title>{_escape(text)}</title></line>"
        )
    for side, curve in enumerate(curves):
        if curve.band is not None:
            forth = _steps(curve.band.high, across, up)
            back = _steps(curve.band.low, across, up)
            parts.append(
                f'<polygon class="band s{side % _SIDES}" points="'
                f'{" ".join([*forth, *reversed(back)])}"/>'
            )
        points = " ".join(_steps(curve.points, across, up))
        parts.append(f'<polyline class="line s{side % _SIDES}" points="{points}"/>')
        if len(curves) > 1 or curve.band is not None:
            x, y = left + side % 2 * 230, 38 + side // 2 * 15
            parts.append(
                f'<line class="line s{side % _SIDES}" x1="{x}" y1="{y - 4}" x2="{x + 22}" '
                f'y2="{y - 4}"/>'
            )
            parts.append(_text(x + 28, y, curve.label, "start"))
    return "".join(parts)


def _all_points(curve: Curve) -> Iterable[tuple[float, float]]:
    return [*curve.points, *(curve.band.high if curve.band is not None else ())]


def _steps(
    points: TCurve, across: Callable[[float], float], up: Callable[[float], float]
) -> list[str]:
    found: list[str] = []
    before: float | None = None
    for x, y in points:
        if before is not None:
            found.append(f"{across(x):.1f},{before:.1f}")
        before = up(y)
        found.append(f"{across(x):.1f},{before:.1f}")
    return found


def _unit(x: str, most: float) -> tuple[float, str]:
    if x != "seconds":
        return 1.0, x
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if most >= 2 * size:
            return size, name
    return 1.0, x


def _ticks(most: float) -> list[float]:
    """Return 0 and up to seven round steps; the last is at least ``most``."""
    step = 10.0 ** math.floor(math.log10(most))
    for part in (0.1, 0.2, 0.5, 1.0, 2.0):
        if most / (step * part) <= 6:
            step *= part
            break
    return [round(number * step, 9) for number in range(math.ceil(most / step - 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    more = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{_escape(text)}</text>'


def _escape(text: str) -> str:
    """Return a text as XML can hold it: what a guest has written may have any character."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))
