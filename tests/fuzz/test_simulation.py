# SPDX-License-Identifier: Apache-2.0
"""The simulation: its model, and what it says of the coordinator."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest

from bridge.cli import fuzz_simulate
from bridge.errors import UsageError
from bridge.fuzz.simulation import RECORDED, Growth, _Features, simulate
from bridge.fuzz.store import Offer, Store


def test_model_finds_what_the_power_law_says() -> None:
    features = _Features(RECORDED, 1e6)
    for executions in (1e3, 1e5, 1e6):
        found = [len(features.found(random.Random(seed), int(executions), 0)) for seed in range(20)]
        expected = RECORDED.factor * executions**RECORDED.exponent
        assert sum(found) / len(found) == pytest.approx(expected, rel=0.1)


def test_fit_recovers_the_model_that_made_the_cases(tmp_path: Path) -> None:
    numbers = random.Random(1)
    features = _Features(RECORDED, 1e5)
    known: set[int] = set()
    with Store.create(tmp_path, {}) as store:
        for executions in range(500, 100_000, 500):
            new = features.found(numbers, 500, 0) - known
            known |= new
            store.add(
                Offer(numbers.randbytes(50), 0.0, executions, [each * 100 + n for n in range(6)])
                for each in new
            )
    fitted = Growth.fitted(tmp_path)
    assert fitted.exponent == pytest.approx(RECORDED.exponent, abs=0.08)
    assert fitted.factor * 1e5**fitted.exponent == pytest.approx(len(known), rel=0.2)
    assert (fitted.case_bytes, fitted.pcs) == (50, 6)


def test_model_last_feature_of_many_workers_is_a_pc() -> None:
    # The default: 1,000 workers for 600 s.
    features = _Features(RECORDED, 6e8)
    case = features.case(len(features._chances), random.Random(1))
    assert max(case.coverage.pcs) < 2**64
    assert len(case.coverage.pcs) == RECORDED.pcs


def test_fit_to_too_few_cases_is_refused(tmp_path: Path) -> None:
    with Store.create(tmp_path, {}) as store:
        store.add([Offer(b"one", 0, 5, [1])])
    with pytest.raises(UsageError, match="too few cases"):
        Growth.fitted(tmp_path)


def test_more_workers_find_more_and_the_hub_hears_each(tmp_path: Path) -> None:
    few = simulate(2, seconds=20, vanish=8)
    many = simulate(20, seconds=20, vanish=8)
    assert few.restarts == many.restarts == 2
    assert few.reports >= 2 * 15
    assert many.reports >= 20 * 15
    for load in (few, many):
        executions = load.workers * 1000 * 20
        assert load.cases == pytest.approx(RECORDED.factor * executions**RECORDED.exponent, rel=0.2)
        assert 0 < load.cpu_seconds <= load.wall_seconds
        # Deltas travel: far less than the whole corpus with each answer.
        assert load.bytes_out < load.reports * load.cases * RECORDED.case_bytes / 4
    # What all find at the same time, before they hear of each other.
    assert many.repeated > few.repeated


def test_simulate_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    fuzz_simulate.add_arguments(parser)
    words = ["--workers", "1", "--workers", "3", "--seconds", "5"]
    assert fuzz_simulate.run(parser.parse_args([*words, "--json"])) == 0
    loads = json.loads(capsys.readouterr().out)
    assert [load["workers"] for load in loads] == [1, 3]
    assert all(load["cases"] > 20 for load in loads)
    assert fuzz_simulate.run(parser.parse_args(words[:2] + words[4:])) == 0
    table = capsys.readouterr().out
    assert table.split()[0] == "workers"
    assert "fitted to 138 cases" in table


@pytest.mark.parametrize("words", [["--workers", "0"], ["--seconds", "0"], ["--rate", "nan"]])
def test_simulate_nonsense_is_refused(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    fuzz_simulate.add_arguments(parser)
    with pytest.raises(UsageError):
        fuzz_simulate.run(parser.parse_args(words))
