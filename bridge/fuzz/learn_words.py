# SPDX-License-Identifier: Apache-2.0
"""The words that the target compares the seeds with, as a dictionary for the engine.

A target's comparisons are recorded in the process where the target runs, and the target may do
anything there. So this is a program of its own: ``python -m bridge.fuzz.learn_words DIRECTORY``
reads the plan and the seeds there and writes the dictionary beside them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from bridge.config import Settings
from bridge.errors import BridgeError, InfrastructureError
from bridge.fuzz.campaign_job import Plan
from bridge.fuzz.dictionary import Dictionary
from bridge.fuzz.slot import Slot, SlotOptions
from bridge.session.target_host import TargetState
from bridge.vm.process import spawn

__all__ = ["learn_words"]

logger = logging.getLogger(__name__)

_PLAN: Final = "plan.json"
_SEEDS: Final = "seeds"
_WORDS: Final = "dictionary"
_SESSION: Final = "slot"
_CASE_SECONDS: Final = 10.0
_SEED_LIMIT: Final = 50
"""Seeds that are executed: later ones hardly show new constants."""
_LIMIT_SECONDS: Final = 300.0


def learn_words(
    plan: Plan, seeds: Sequence[bytes], directory: Path, said: Callable[[str], object]
) -> str:
    """Return the text of a dictionary; empty if the target compares nothing, or cannot be asked.

    Args:
        directory: for the files of the program; is made.
        said: is told how it went.

    Raises:
        InfrastructureError: the directory cannot be written, or the program cannot be started.
    """
    said("learning what the target compares the seeds with (a dictionary for the engine)")
    try:
        (directory / _SEEDS).mkdir(parents=True)
        (directory / _PLAN).write_text(json.dumps(plan.as_values()))
        for number, seed in enumerate(seeds[:_SEED_LIMIT]):
            (directory / _SEEDS / f"{number:06}").write_bytes(seed)
    except OSError as error:
        raise InfrastructureError(
            f"{directory} cannot be written: {error.strerror}",
            hint="make room on its disk, or give another directory with --out",
        ) from error
    command = [sys.executable, "-m", __name__, str(directory)]
    process = spawn(command, name="the learning of words", env=dict(os.environ))
    try:
        ended = process.wait(_LIMIT_SECONDS)
    finally:
        process.kill()
    words = directory / _WORDS
    if not ended or process.returncode != 0:
        last = process.stderr_text.strip().splitlines()[-1:]
        why = last[0] if ended and last else f"it took more than {_LIMIT_SECONDS:g} s"
        said(f"there is no dictionary: {why}")
        return ""
    text = words.read_text() if words.is_file() else ""
    said(f"the dictionary has {len(text.splitlines())} words")
    return text


def main(argv: Sequence[str]) -> int:
    """Execute the seeds, and write the dictionary; return 0 if that went well."""
    directory = Path(argv[1])
    plan = Plan.of(json.loads((directory / _PLAN).read_text()))
    seeds = [path.read_bytes() for path in sorted((directory / _SEEDS).iterdir())]
    settings = Settings.of(plan.settings).replace(comparisons=True, source="python")
    words = Dictionary()
    try:
        with Slot(
            settings,
            plan.make_harness(),
            directory / _SESSION,
            target_state=TargetState.KEEP,
            options=SlotOptions(areas=1),
        ) as slot:
            words.learn(slot, seeds, _CASE_SECONDS)
            words.write(directory / _WORDS)
    except BridgeError as error:
        print(error.message, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
