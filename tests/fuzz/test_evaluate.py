# SPDX-License-Identifier: Apache-2.0
"""Feedback against blind mutation, with a small fuzzer of its own in the campaign's place."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bridge.errors import UsageError
from bridge.fuzz.evaluate import evaluate
from bridge.fuzz.progress import PROGRESS_FILE, ProgressWriter, Sample
from bridge.fuzz.store import Offer, Store
from tests.support.campaign_data import FACTS

WORD = b"magic"


def blocks(case: bytes) -> set[int]:
    """What a case covers: a parser that compares one byte after the other."""
    found = {0x1000}
    for number, byte in enumerate(WORD):
        if case[number : number + 1] != bytes((byte,)):
            break
        found.add(0x1010 + 16 * number)
    return found


def fuzz(out: Path, *, feedback: bool, executions: int, seed: int) -> None:
    """Mutate one byte of a kept case at a time; blind: only the seed is kept."""
    chance = random.Random(f"{seed} {feedback}")
    kept = [b"....."]
    with (
        Store.create(out, {**FACTS, "feedback": feedback}) as store,
        ProgressWriter(out / PROGRESS_FILE) as progress,
    ):
        store.add([Offer(kept[0], 0.0, 0, blocks(kept[0]), True)])
        for number in range(1, executions + 1):
            case = bytearray(chance.choice(kept))
            case[chance.randrange(len(case))] = chance.choice(b"abcdefghijklm")
            if new := blocks(bytes(case)) - store.covered:
                store.add([Offer(bytes(case), number / 1000, number, new)])
                if feedback:
                    kept.append(bytes(case))
            if number % 100 == 0:
                progress.write(Sample(number / 1000, number, len(store.covered), len(kept)))


def test_evaluate_feedback_reaches_more_than_blind_mutation(tmp_path: Path) -> None:
    said: list[str] = []
    found = evaluate(tmp_path, fuzz, executions=1500, trials=5, said=said.append)
    (final,) = [each for each in found.figures if each.name.startswith("blocks after 1.5 s")]
    # Blind mutation changes one byte of the seed: it gets past the first comparison, no further.
    assert set(final.theirs) == {2}
    assert min(final.ours) > 2
    assert final.a12 == 1
    assert final.verdict == "larger, large effect"
    assert found.notes == ("feedback differs: yes in A, no in B",)
    # In turns.
    assert said[:4] == [
        "trial 1 of 5, feedback",
        "trial 1 of 5, blind",
        "trial 2 of 5, blind",
        "trial 2 of 5, feedback",
    ]
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written == found.as_dict()
    assert (tmp_path / "comparison.svg").read_text().startswith("<svg")


def test_evaluate_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    ran: list[str] = []

    def interrupted(out: Path, *, feedback: bool, executions: int, seed: int) -> None:
        fuzz(out, feedback=feedback, executions=executions, seed=seed)
        ran.append(f"{feedback} {seed}")
        if len(ran) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, interrupted, executions=200, trials=2)
    assert sorted(each.name for each in (tmp_path / "blind").iterdir()) == [".01.part", "00"]
    evaluate(tmp_path, interrupted, executions=200, trials=2)
    # Only what was not whole has run again.
    assert ran == ["True 0", "False 0", "False 1", "False 1", "True 1"]
    assert sorted(each.name for each in (tmp_path / "blind").iterdir()) == ["00", "01"]
    # With all trials there nothing runs.
    evaluate(tmp_path, interrupted, executions=200, trials=2)
    assert len(ran) == 5


def test_evaluate_trial_that_ended_early_is_refused(tmp_path: Path) -> None:
    evaluate(tmp_path, fuzz, executions=200, trials=1)
    with pytest.raises(UsageError, match="ended after 200 of 400 executions"):
        evaluate(tmp_path, fuzz, executions=400, trials=1)
    with pytest.raises(UsageError, match="at least one trial"):
        evaluate(tmp_path, fuzz, executions=400, trials=0)
