# SPDX-License-Identifier: Apache-2.0
"""The results as JSON: one object, for programs and for later comparison.

::

    format        "kcov-bridge-bench"
    version       2; 1 had one boolean as "compiled", about the fast path
    date          when it began: ISO 8601, UTC
    quick         whether --quick was given
    machine       processor, cpus, memory_mib, kernel, load (the three of uptime(1), at the start)
    versions      kcov_bridge, python, coverage, qemu
    compiled      of the parts fastpath (bridge/device/fastpath) and tracer
                  (bridge/sources/python/tracer): whether their compiled form was used
    accelerator   name and reason
    measurements  in the order in which they were made, each with
      name, about, seconds, notes
      failure     why it was cut short, or ""
      comparisons each with
        case, parameters (the numbers in it), unit, needed (the least number of runs)
        ours, baseline (or null): name, runs, median, q1, q3, min, max, spread, values
        compared  "times" (ours / baseline), "faster" (baseline / ours), "more" (ours - baseline),
                  "value" (ours alone)
        result    null if it is refused, otherwise median, q1, q3 over the turns
        refused   why it is, or ""
        aims      each with compared, limit, at_most, and met: true, false, or null if the
                  quartiles disagree or the figure is refused
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridge.bench.measurement import Result
from bridge.bench.stats import Aim, Comparison, Series, Verdict
from bridge.config import Settings
from bridge.device import fastpath
from bridge.sources.python import tracer
from bridge.vm.accel import choose_accelerator

__all__ = ["FORMAT", "VERSION", "describe", "surroundings"]

FORMAT = "kcov-bridge-bench"
VERSION = 2

_MET = {Verdict.MET: True, Verdict.MISSED: False}


def surroundings(settings: Settings, *, quick: bool) -> dict[str, Any]:
    """Return the document's head: where, when and with what the figures are measured."""
    accelerator = choose_accelerator(settings.accel)
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "machine": {
            "processor": _processor(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
            "kernel": platform.release(),
            "load": [round(each, 2) for each in os.getloadavg()],
        },
        "versions": {
            "kcov_bridge": _version("kcov-bridge"),
            "python": platform.python_version(),
            "coverage": _version("coverage"),
            "qemu": _qemu(settings.qemu),
        },
        "compiled": {"fastpath": fastpath.COMPILED, "tracer": tracer.COMPILED},
        "accelerator": {"name": accelerator.name, "reason": accelerator.reason},
    }


def describe(head: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Return the whole document."""
    return {**head, "measurements": [_result(result) for result in results]}


def _result(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "about": result.about,
        "seconds": round(result.seconds, 1),
        "notes": result.notes,
        "failure": result.failure,
        "comparisons": [_comparison(each) for each in result.comparisons],
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    outcome = comparison.outcome()
    figure = outcome.figure
    return {
        "case": comparison.case,
        "parameters": dict(comparison.parameters),
        "unit": comparison.unit,
        "needed": comparison.needed,
        "ours": _series(comparison.ours),
        "baseline": _series(comparison.baseline) if comparison.baseline is not None else None,
        "compared": comparison.of.name.lower(),
        "result": None
        if figure is None
        else {"median": figure.median, "q1": figure.q1, "q3": figure.q3},
        "refused": outcome.refused,
        "aims": [_aim(comparison, aim) for aim in comparison.aims],
    }


def _aim(comparison: Comparison, aim: Aim) -> dict[str, Any]:
    verdict = comparison.verdict(aim)
    return {
        "compared": aim.of.name.lower(),
        "limit": aim.limit,
        "at_most": aim.at_most,
        "met": _MET.get(verdict) if verdict is not None else None,
    }


def _series(series: Series) -> dict[str, Any]:
    values = {"name": series.name, "runs": len(series.values), "values": list(series.values)}
    if not series.values:
        return values
    summary = series.summary
    return {
        **values,
        "median": summary.median,
        "q1": summary.q1,
        "q3": summary.q3,
        "min": summary.low,
        "max": summary.high,
        "spread": summary.spread if summary.median else None,
    }


def _processor() -> str:
    """Return the processor's name in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _qemu(program: str) -> str | None:
    """Return QEMU's version; None if it does not say."""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"version (.+)", done.stdout)
    return found.group(1).strip() if found else None
