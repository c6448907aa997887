# SPDX-License-Identifier: Apache-2.0
"""What a campaign shows while it runs: a live screen, plain lines, or lines of JSON."""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol, TextIO

from bridge.errors import MissingDependencyError

if TYPE_CHECKING:
    from bridge.fuzz.hub import CampaignView

__all__ = ["JsonLines", "PlainLines", "Screen", "counted", "live_screen", "plain_text"]

_RATE_SECONDS: Final = 10.0
"""Executions per second are those of the last few seconds."""
_LINE_SECONDS: Final = 10.0
_SAID: Final = 6
"""Lines of what happened at the bottom of the screen."""
_HOW_TO_END: Final = "Ctrl-C ends it and keeps all; --resume goes on"


class Screen(Protocol):
    """Shows the figures of a campaign, and what happens."""

    def show(self, view: CampaignView, /) -> None:
        """Show the figures."""

    def say(self, text: str, /) -> None:
        """Show a sentence about what happens."""


class _Rate:
    """Executions per second, of the last few seconds."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def add(self, view: CampaignView) -> float:
        """Take the present figures; return the rate."""
        points = self._points
        points.append((view.seconds, view.executions))
        while len(points) > 2 and points[-1][0] - points[0][0] > _RATE_SECONDS:
            points.popleft()
        (begin, before), (end, after) = points[0], points[-1]
        return (after - before) / (end - begin) if end > begin else 0.0


def _rate_text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.1f}"


def plain_text(view: CampaignView, rate: float) -> str:
    """Return the figures as one line."""
    if not view.vms and not view.executions:
        # Zeros would look like a campaign that does nothing.
        seeds = f"{counted(view.corpus, 'seed')} wait{'s' if view.corpus == 1 else ''}"
        return f"{_clock(view.seconds)}, no VM is ready yet, {seeds}"
    return ", ".join(
        (
            _clock(view.seconds),
            f"{view.executions:,} executions ({_rate_text(rate)} per second)",
            f"{view.blocks:,} blocks",
            counted(view.corpus, "case"),
            counted(view.findings, "finding"),
            counted(view.vms, "VM"),
            f"stability {_percent(view.stability)}",
        )
    )


class PlainLines:
    """A line now and then, for logs."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._rate = _Rate()
        self._due = 0.0

    def show(self, view: CampaignView, /) -> None:
        """See :class:`Screen`."""
        rate = self._rate.add(view)
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _LINE_SECONDS
            print(plain_text(view, rate), file=self._out, flush=True)

    def say(self, text: str, /) -> None:
        """See :class:`Screen`."""
        print(text, file=self._out, flush=True)


class JsonLines:
    """A JSON object a line: figures once a second, and what happens.

    An object has either the key ``said`` or the figures.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._rate = _Rate()
        self._due = 0.0

    def show(self, view: CampaignView, /) -> None:
        """See :class:`Screen`."""
        rate = self._rate.add(view)
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + 1
            self._print(
                {
                    "seconds": round(view.seconds, 3),
                    "executions": view.executions,
                    "executions_per_second": round(rate, 1),
                    "blocks": view.blocks,
                    "edges": view.edges,
                    "corpus": view.corpus,
                    "findings": view.findings,
                    "vms": view.vms,
                    "stability": view.stability,
                    "workers": view.workers(),
                }
            )

    def say(self, text: str, /) -> None:
        """See :class:`Screen`."""
        self._print({"said": text})

    def _print(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self._out, flush=True)


class _LiveScreen:
    def __init__(self, live: Any, out: str) -> None:
        self._live = live
        self._out = out
        self._rate = _Rate()
        self._said: deque[str] = deque(maxlen=_SAID)
        self._view: CampaignView | None = None

    def show(self, view: CampaignView, /) -> None:
        """See :class:`Screen`."""
        self._view = view
        self._draw(self._rate.add(view))

    def say(self, text: str, /) -> None:
        """See :class:`Screen`."""
        self._said.append(text)
        if self._view is None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._draw(self._rate.add(self._view))

    def _draw(self, rate: float) -> None:
        from rich.columns import Columns
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        view = self._view
        if view is None:
            return
        figures = Columns(
            [
                Text.assemble((f"{name} ", "dim"), (value, style))
                for name, value, style in (
                    ("executions", f"{view.executions:,}", "bold"),
                    ("per second", _rate_text(rate), "bold"),
                    ("blocks", f"{view.blocks:,}", "bold"),
                    ("edges", f"{view.edges:,}", "bold"),
                    ("corpus", f"{view.corpus:,}", "bold"),
                    ("findings", f"{view.findings:,}", "bold red" if view.findings else "bold"),
                    ("VMs", str(view.vms), "bold"),
                    ("stability", _percent(view.stability), "bold"),
                )
            ],
            padding=(0, 3),
        )
        jobs = Table(expand=True, box=None)
        for name in ("job", "where", "state", "executions", "guest µs", "resets"):
            text = name in ("where", "state")
            jobs.add_column(name, justify="left" if text else "right", overflow="fold")
        for job in view.jobs:
            more = job.figures.more
            state = job.figures.state if job.state == "running" else str(job.state)
            jobs.add_row(
                str(job.number),
                Text(job.worker),
                Text(state),
                f"{job.executions:,}",
                f"{more.get('guest', 0):,.0f}",
                f"{more.get('resets', 0):,.0f}",
            )
        said = Text("\n".join(self._said), style="dim", overflow="fold")
        title = f"kcov-bridge fuzz · {_clock(view.seconds)} · {self._out}"
        parts = Group(figures, Text(), jobs, Text(), said)
        self._live.update(Panel(parts, title=Text(title), subtitle=Text(_HOW_TO_END, style="dim")))


@contextlib.contextmanager
def live_screen(out: str, terminal: TextIO) -> Iterator[Screen]:
    """Use the terminal as a screen that changes in place.

    Args:
        out: the campaign's directory, for the title.
        terminal: where the screen is.

    Raises:
        MissingDependencyError: the package ``rich`` is not installed.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise MissingDependencyError(
            "the live screen needs the package rich", hint="pip install 'kcov-bridge[fuzz]'"
        ) from error
    with Live(console=Console(file=terminal), refresh_per_second=4, transient=False) as live:
        yield _LiveScreen(live, out)


def counted(number: int, what: str) -> str:
    """Return a number with what it counts, in the singular or the plural."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _percent(part: float | None) -> str:
    return "unknown" if part is None else f"{100 * part:.1f} %"
