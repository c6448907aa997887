# SPDX-License-Identifier: Apache-2.0
"""Does feedback help? The same campaign with feedback and with blind mutation, several times each.

A blind trial sees the same coverage and records it, but the engine gets the same map for each case,
so it keeps nothing: it mutates the seeds, and only those. Trials of both sides take turns, so that
other work of the machine affects both. Each has its own directory, ``feedback/NN`` or ``blind/NN``,
which gets its name when the trial is whole; an evaluation that was interrupted goes on with what is
missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from bridge.errors import InfrastructureError, UsageError
from bridge.fuzz.compare import Comparison, compare, read_side
from bridge.fuzz.progress import PROGRESS_FILE, read_progress
from bridge.util.files import remove, write_atomically

__all__ = ["BLIND", "COMPARISON_FILE", "DRAWING_FILE", "FEEDBACK", "RunTrial", "evaluate"]

FEEDBACK: Final = "feedback"
BLIND: Final = "blind"
"""Names of the sides, and of the directories of their trials."""

COMPARISON_FILE: Final = "comparison.json"
DRAWING_FILE: Final = "comparison.svg"

_LEAST: Final = 0.95
"""Part of the executions that a trial must have: the last sample may be a little older."""

_log = logging.getLogger(__name__)


class RunTrial(Protocol):
    """Runs one campaign."""

    def __call__(self, out: Path, *, feedback: bool, executions: int, seed: int) -> None:
        """Run a campaign into a new directory; it ends after this many executions.

        Args:
            seed: of the engine's random numbers.
        """


def evaluate(
    directory: Path,
    run: RunTrial,
    *,
    executions: int,
    trials: int = 10,
    said: Callable[[str], object] = _log.info,
) -> Comparison:
    """Run what is missing of the trials; compare the sides and write what came out.

    Args:
        directory: of all trials; it also gets the figures and the curves.
        run: runs one campaign.
        executions: of each trial.
        trials: of each side.
        said: is told what happens.

    Raises:
        UsageError: the numbers make no sense, or the directory has other trials.
        BridgeError: a campaign failed, or did not execute as much as it should.
    """
    if trials < 1 or executions < 1:
        raise UsageError("an evaluation needs at least one trial, and each one execution")
    for number in range(trials):
        sides = (FEEDBACK, BLIND) if number % 2 == 0 else (BLIND, FEEDBACK)
        for side in sides:
            out = directory / side / f"{number:02}"
            if not out.exists():
                said(f"trial {number + 1} of {trials}, {side}")
                _run(out, run, feedback=side == FEEDBACK, executions=executions, seed=number)
            _check(out, executions)
    comparison = compare(
        *(
            read_side([directory / side / f"{number:02}" for number in range(trials)], side)
            for side in (FEEDBACK, BLIND)
        )
    )
    write_atomically(
        directory / COMPARISON_FILE, json.dumps(comparison.as_dict(), indent=1, allow_nan=False)
    )
    write_atomically(directory / DRAWING_FILE, comparison.svg())
    return comparison


def _run(out: Path, run: RunTrial, *, feedback: bool, executions: int, seed: int) -> None:
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
        run(part, feedback=feedback, executions=executions, seed=seed)
        part.rename(out)
    except OSError as error:
        raise InfrastructureError(f"cannot write {out}: {error.strerror}") from error


def _check(out: Path, executions: int) -> None:
    last = read_progress(out / PROGRESS_FILE).last
    done = last.executions if last is not None else 0
    if done < _LEAST * executions:
        raise UsageError(
            f"the trial {out} ended after {done:,} of {executions:,} executions",
            hint="remove it to run it again, or give fewer --executions",
        )
