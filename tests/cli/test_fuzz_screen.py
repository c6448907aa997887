# SPDX-License-Identifier: Apache-2.0
"""What a campaign shows: a screen, lines, JSON."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from bridge.cli.fuzz_screen import JsonLines, PlainLines, live_screen, plain_text
from bridge.fuzz.hub import CampaignView, JobState, JobView
from bridge.fuzz.job import Figures


def view(seconds: float = 3725.0, executions: int = 12_345) -> CampaignView:
    figures = Figures(
        executions, 1, 0.987, "fuzzing", {"guest": 812.4, "engine": 90.0, "resets": 7}
    )
    jobs = (
        JobView(0, JobState.RUNNING, "host[0]/1", 1, 0.4, executions, figures),
        JobView(1, JobState.WAITING, "", 0, 0.0, 0, Figures(), ""),
    )
    return CampaignView(
        seconds=seconds,
        executions=executions,
        blocks=4567,
        edges=8901,
        corpus=234,
        findings=2,
        vms=1,
        stability=0.987,
        jobs=jobs,
        problems=(),
    )


def test_plain_text_has_the_figures() -> None:
    assert plain_text(view(), 99.6) == (
        "1:02:05, 12,345 executions (100 per second), 4,567 blocks, 234 cases, 2 findings, 1 VM, "
        "stability 98.7 %"
    )
    assert "(0.4 per second)" in plain_text(view(), 0.42)


def test_plain_text_before_a_vm_is_ready_says_so() -> None:
    early = dataclasses.replace(view(12, 0), vms=0, corpus=1)
    assert plain_text(early, 0.0) == "0:00:12, no VM is ready yet, 1 seed waits"


def test_plain_lines_come_now_and_then() -> None:
    out = io.StringIO()
    screen = PlainLines(out)
    screen.say("it begins")
    for second in range(5):
        screen.show(view(second, 100 * second))
    lines = out.getvalue().splitlines()
    assert lines[0] == "it begins"
    assert len(lines) == 2


def test_json_lines_are_objects() -> None:
    out = io.StringIO()
    screen = JsonLines(out)
    screen.say("it begins")
    screen.show(view())
    said, figures = map(json.loads, out.getvalue().splitlines())
    assert said == {"said": "it begins"}
    assert figures["executions"] == 12_345
    assert figures["workers"] == {"host[0]/1": 1}


@pytest.mark.parametrize("width", [60, 120])
def test_live_screen_shows_figures_jobs_and_what_happened(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, height=40, force_terminal=True, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda file: console)
    with live_screen("build/fuzz", out) as screen:
        screen.say("it [begins]")
        screen.show(view(0.0, 0))
        screen.show(view(10.0, 1000))
        screen.say("finding: [bold]BUG")
    text = out.getvalue()
    for part in ("it [begins]", "1,000", "4,567", "host[0]/1", "waiting", "finding: [bold]BUG"):
        assert part in text, part
    assert "Ctrl-C ends it" in text
    assert " 100 " in text, "executions per second"
