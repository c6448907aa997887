# SPDX-License-Identifier: Apache-2.0
"""The command ``kcov-bridge bench``."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from bridge.bench.document import describe, surroundings
from bridge.bench.measurement import Measurement, perform
from bridge.bench.plot import plot
from bridge.bench.table import render
from bridge.config import Settings
from bridge.errors import InfrastructureError, UsageError
from bridge.util.files import write_atomically

__all__ = ["add_bench_arguments", "bench_command", "measurements"]

_log = logging.getLogger("bridge.bench")

_MEASUREMENTS = (
    ("signals", "SIGNAL"),
    ("signals", "IDLE"),
    ("signals", "OTHERS"),
    ("consume", "CONSUME"),
    ("consume", "TARGET"),
    ("append", "MEASUREMENT"),
    ("ready", "READY"),
    ("ready", "RESET"),
    ("vms", "MEASUREMENT"),
)
"""Where each measurement is defined, in the order in which they are taken."""

DEFAULT_OUT = Path("bench.json")

_QUIET_LOAD = 0.5
"""Processes that may be running beside (the load of one minute, proc(5))."""


def measurements() -> dict[str, Measurement]:
    """All measurements by name, in order."""
    found: list[Measurement] = [
        getattr(import_module(f"bridge.bench.{module}"), name) for module, name in _MEASUREMENTS
    ]
    return {each.name: each for each in found}


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments, beside the settings."""
    parser.add_argument("--list", action="store_true", help="say what can be measured, and end")
    parser.add_argument(
        "--only", metavar="NAME,...", help="take these measurements alone (default: all)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="as few rounds as can be compared at all, and the smaller cases alone",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the JSON document, not the table"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=DEFAULT_OUT,
        metavar="FILE",
        help=f"where the JSON document goes; - for stdout, as --json (default: {DEFAULT_OUT})",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.svg", help="draw consume and vms into this file too"
    )


def bench_command(settings: Settings, args: argparse.Namespace) -> int:
    """Measure, print, write. 0 where all was measured, whether or not the aims are met.

    Raises :class:`bridge.errors.UsageError` for a name that is none, and
    :class:`bridge.errors.InfrastructureError` where something could not be measured or written;
    what could be is printed before.
    """
    known = measurements()
    if args.list:
        width = max(map(len, known))
        for each in known.values():
            print(f"{each.name:<{width}}  {each.about}")
        return 0
    chosen = _choose(known, args.only)
    output = None if str(args.output) == "-" else args.output
    as_json = args.json or output is None
    for path in (output, args.plot):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"there is no directory {path.parent} to write {path.name} into")
    head = surroundings(settings, quick=args.quick)
    if head["machine"]["load"][0] > _QUIET_LOAD:
        _log.warning(
            "this machine is not quiet (load %s): figures will be too large, or be refused",
            head["machine"]["load"][0],
        )
    results = []
    with _progress_alone():
        for number, measurement in enumerate(chosen, 1):
            _log.info("[%d/%d] %s: %s", number, len(chosen), measurement.name, measurement.about)
            results.append(perform(measurement, settings, quick=args.quick))
    document = describe(head, results)
    text = json.dumps(document, indent=1) + "\n"
    print(text if as_json else f"{_title(head)}\n\n{render(results)}", end="" if as_json else "\n")
    sys.stdout.flush()
    if output is not None:
        write_atomically(output, text)
    if args.plot is not None:
        write_atomically(args.plot, plot(document))
    failed = [result.name for result in results if result.failure]
    if failed:
        raise InfrastructureError(f"could not be measured: {', '.join(failed)}")
    return 0


def _choose(known: dict[str, Measurement], only: str | None) -> list[Measurement]:
    if only is None:
        return list(known.values())
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(
            f"there is no measurement {', '.join(unknown) or 'in an empty list'}",
            hint=f"there are {', '.join(known)}",
        )
    return [measurement for name, measurement in known.items() if name in names]


def _title(head: dict[str, Any]) -> str:
    machine, versions = head["machine"], head["versions"]
    return (
        f"{machine['processor']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, "
        f"{head['accelerator']['name']}, QEMU {versions['qemu']}\n"
        f"Python {versions['python']}, coverage.py {versions['coverage']}, "
        f"kcov-bridge {versions['kcov_bridge']}"
        + ("" if head["compiled"] else " (not compiled)")
        + f"; {head['date']}, load {machine['load'][0]}"
        + (", --quick" if head["quick"] else "")
    )


@contextlib.contextmanager
def _progress_alone() -> Iterator[None]:
    """Of the rest of the bridge only warnings, unless more was asked for with -v."""
    root = logging.getLogger("bridge")
    level = root.level
    if level == logging.INFO:
        root.setLevel(logging.WARNING)
        _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        _log.setLevel(logging.NOTSET)
