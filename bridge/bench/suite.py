# SPDX-License-Identifier: Apache-2.0
"""All measurements, and how they are made one after the other."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from bridge.bench.document import surroundings
from bridge.bench.measurement import Measurement, Result, perform
from bridge.config import Settings
from bridge.errors import UsageError

__all__ = ["choose", "measurements", "take", "title"]

_log = logging.getLogger("bridge.bench")

_MEASUREMENTS = (
    ("signals", "SIGNAL"),
    ("signals", "NATIVE_SIGNAL"),
    ("signals", "IDLE"),
    ("signals", "TRACE"),
    ("signals", "OTHERS"),
    ("consume", "CONSUME"),
    ("consume", "TARGET"),
    ("append", "MEASUREMENT"),
    ("ready", "READY"),
    ("ready", "RESET"),
    ("guest_tests", "MEASUREMENT"),
    ("executions", "MEASUREMENT"),
    ("vms", "MEASUREMENT"),
)
"""The module and name of each measurement, in the order in which they are made."""

_QUIET_LOAD = 0.5
"""The load (of one minute, proc(5)) up to which a machine counts as quiet."""


def measurements() -> dict[str, Measurement]:
    """Return all measurements by name, in order."""
    found: list[Measurement] = [
        getattr(import_module(f"bridge.bench.{module}"), name) for module, name in _MEASUREMENTS
    ]
    return {each.name: each for each in found}


def take(
    chosen: Sequence[Measurement], settings: Settings, *, quick: bool
) -> tuple[dict[str, Any], list[Result]]:
    """Make measurements one after the other.

    Returns:
        The head of the document, and a result for each measurement, including failed ones.
    """
    head = surroundings(settings, quick=quick)
    if head["machine"]["load"][0] > _QUIET_LOAD:
        _log.warning(
            "this machine is busy (load %s): figures will be too large, or refused",
            head["machine"]["load"][0],
        )
    results = []
    with _progress_alone():
        for number, measurement in enumerate(chosen, 1):
            _log.info("[%d/%d] %s: %s", number, len(chosen), measurement.name, measurement.about)
            results.append(perform(measurement, settings, quick=quick))
    return head, results


def choose(known: dict[str, Measurement], only: str | None) -> list[Measurement]:
    """Return the measurements that a list of names, separated by commas, asks for; None is all.

    Raises:
        UsageError: a name is unknown, or there is none.
    """
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


def title(head: dict[str, Any]) -> str:
    """Describe the machine of a measurement in two lines."""
    machine, versions = head["machine"], head["versions"]
    plain = [part for part, compiled in head["compiled"].items() if not compiled]
    return (
        f"{machine['processor']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, "
        f"{head['accelerator']['name']}, QEMU {versions['qemu']}\n"
        f"Python {versions['python']}, coverage.py {versions['coverage']}, "
        f"kcov-bridge {versions['kcov_bridge']}"
        + (f" (plain {', '.join(plain)})" if plain else "")
        + f"; {head['date']}, load {machine['load'][0]}"
        + (", --quick" if head["quick"] else "")
    )


@contextlib.contextmanager
def _progress_alone() -> Iterator[None]:
    """Reduce the log of the rest of the bridge to warnings, unless -v was given."""
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
