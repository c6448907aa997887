# SPDX-License-Identifier: Apache-2.0
"""Groups of campaigns compared: the statistics against published values, and what is refused."""

from __future__ import annotations

import json
import math
import random
import xml.dom.minidom
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from bridge.cli.main import main
from bridge.errors import UsageError
from bridge.fuzz.compare import Comparison, compare, read_side
from bridge.fuzz.progress import PROGRESS_FILE, ProgressWriter, Sample
from bridge.fuzz.store import Offer, Store
from bridge.fuzz.trials import Figure, Spread, a12, band, magnitude, value_at
from tests.support.campaign_data import FACTS, write_campaign

# Treatment and control of the examples of R's package effsize. Counted by hand, the treatment has
# the larger value in 22.5 of the 60 pairs, equal ones as halves.
TREATMENT = (10, 10, 20, 20, 20, 30, 30, 30, 40, 50)
CONTROL = (10, 20, 30, 40, 40, 50)


def test_figure_agrees_with_the_example_in_scipys_documentation() -> None:
    figure = Figure.of("age", "", (19, 22, 16, 29, 24), (20, 11, 17, 12))
    assert figure.u == 17
    assert figure.p == pytest.approx(0.1111111111111111)
    assert figure.a12 == 17 / 20
    assert figure.verdict == "no difference that the trials could show"


def test_figure_agrees_with_mann_and_whitneys_tortoises_and_hares() -> None:
    """Six of each, in the order T H H H H H T T T T T H, have U of 11 and 25."""
    order = "THHHHHTTTTTH"
    tortoises = [12 - at for at, who in enumerate(order) if who == "T"]
    hares = [12 - at for at, who in enumerate(order) if who == "H"]
    assert (Figure.of("", "", tortoises, hares).u, Figure.of("", "", hares, tortoises).u) == (
        11,
        25,
    )


def test_a12_is_the_part_of_the_pairs_with_the_larger_value() -> None:
    assert a12(TREATMENT, CONTROL) == 22.5 / 60
    assert a12((1, 2, 3), (1, 2, 3)) == 0.5
    assert a12((4, 5), (1, 2, 3)) == 1
    assert a12((math.inf, 1), (math.inf,)) == 0.25
    assert [magnitude(each) for each in (0.5, 0.56, 0.64, 0.71, 0.29, 0.55)] == [
        *("negligible", "small", "medium", "large", "large", "negligible")
    ]
    with pytest.raises(ValueError, match="no values"):
        a12((), (1,))


def test_figure_u_is_scipys_also_with_ties() -> None:
    chance = random.Random(7)
    for _ in range(50):
        ours = [chance.randint(0, 6) for _ in range(chance.randint(5, 12))]
        theirs = [chance.randint(1, 8) for _ in range(chance.randint(5, 12))]
        found = stats.mannwhitneyu(ours, theirs)
        figure = Figure.of("", "", ours, theirs)
        assert figure.u == found.statistic
        assert figure.p == pytest.approx(found.pvalue)


def test_figure_that_cannot_be_tested_says_why() -> None:
    equal = Figure.of("", "", (3, 3, 3, 3), (3, 3, 3, 3))
    assert (equal.p, equal.a12, equal.verdict) == (None, 0.5, "all trials are equal")
    never = Figure.of("", "", (math.inf,) * 5, (math.inf,) * 5)
    assert never.verdict == "all trials are equal"
    single = Figure.of("", "", (3,), (4,))
    assert (single.p, single.a12) == (None, 0)
    assert single.verdict == "too few trials: with 1 and 1 no result could have p below 1"
    # With three on each side the least p is 0.1, with four it is 0.029.
    assert "below 0.1" in Figure.of("", "", (1, 2, 3), (4, 5, 6)).verdict
    four = Figure.of("", "", (1, 2, 3, 4), (5, 6, 7, 8))
    assert four.p == pytest.approx(2 / 70)
    assert four.verdict == "smaller, large effect"


def test_spread_of_trials_that_never_reached_it_is_a_rank() -> None:
    assert Spread.of((1, 2, 3, 4)) == Spread(4, 2.5, 1.75, 3.25, 1, 4)
    assert Spread.of((5,)) == Spread(1, 5, 5, 5, 5, 5)
    never = Spread.of((1, math.inf, 2, math.inf, math.inf))
    assert (never.q1, never.median) == (2, math.inf)
    assert not math.isnan(never.q3)


def test_band_is_median_and_quartiles_where_any_curve_changes() -> None:
    curves = [[(0.0, 1.0), (2.0, 5.0)], [(0.0, 1.0), (1.0, 3.0)], [(0.5, 2.0), (3.0, 9.0)]]
    found = band("x", curves, 2.5)
    assert found.points == [(0.0, 1.0), (0.5, 1.0), (1.0, 2.0), (2.0, 3.0), (2.5, 3.0)]
    assert found.band is not None
    assert found.band.low[-1] == (2.5, 2.5)
    assert found.band.high[-1] == (2.5, 4.0)
    assert band("x", curves[:1], 2.5).band is None
    assert value_at(curves[2], 0.4) == 0


# -- Campaigns


def write_trial(
    directory: Path,
    curve: Sequence[tuple[float, int, int]],
    *,
    pcs: Sequence[int] = (),
    **facts: Any,
) -> Path:
    """Write a campaign with samples of seconds, executions and blocks."""
    with (
        Store.create(directory, {**FACTS, **facts}) as store,
        ProgressWriter(directory / PROGRESS_FILE) as progress,
    ):
        if pcs:
            store.add([Offer(b"x", 1.0, 1, pcs)])
        for seconds, executions, blocks in curve:
            progress.write(Sample(seconds, executions, blocks))
    return directory


def write_trials(top: Path, ends: Sequence[int], **facts: Any) -> list[Path]:
    """Write trials of 100 s and 1,000 executions that reach these numbers of blocks half-way."""
    return [
        write_trial(
            top / str(number), [(0, 0, 5), (50, 500, end), (100, 1000, end)], pcs=(end,), **facts
        )
        for number, end in enumerate(ends)
    ]


def figure(comparison: Comparison, name: str) -> Figure:
    (found,) = [each for each in comparison.figures if each.name.startswith(name)]
    return found


def test_compare_coverage_at_the_end_and_time_to_it(tmp_path: Path) -> None:
    ours = read_side(write_trials(tmp_path / "ours", [30, 31, 32, 33, 34]))
    theirs = read_side(write_trials(tmp_path / "theirs", [20, 21, 22, 23, 40]))
    found = compare(ours, theirs)
    final = figure(found, "blocks after 100")
    assert final.ours == (30, 31, 32, 33, 34)
    assert final.theirs == (20, 21, 22, 23, 40)
    assert final.u == 20
    assert final.a12 == 0.8
    assert final.p == pytest.approx(stats.mannwhitneyu(final.ours, final.theirs).pvalue)
    assert found.reach == 22
    to = figure(found, "time to 22 blocks")
    assert to.ours == (50,) * 5
    assert to.theirs == (math.inf, math.inf, 50, 50, 50)
    assert (found.only_ours, found.only_theirs) == (5, 5)
    assert found.notes == ()
    later = compare(ours, theirs, reach=40)
    assert figure(later, "time to 40 blocks").theirs == (math.inf,) * 4 + (50,)
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    shown = {each["name"]: each for each in data["figures"]}
    assert shown["time to 22 blocks"]["values"][1] == [None, None, 50, 50, 50]
    assert shown["blocks after 100 s"]["medians"] == [32, 22]


def test_compare_trials_of_different_length_ends_with_the_shortest(tmp_path: Path) -> None:
    short = write_trial(tmp_path / "short", [(0, 0, 1), (10, 900, 20)])
    long = write_trial(tmp_path / "long", [(0, 0, 1), (9, 100, 15), (40, 1000, 90)])
    found = compare(read_side([short]), read_side([long]))
    assert (found.seconds, found.executions) == (10, 900)
    assert figure(found, "blocks after 10 s").theirs == (15,)
    assert figure(found, "blocks after 900").theirs == (15,)
    assert "different length" in found.notes[0]
    assert "after 10 s of up to 40 s" in found.render()


def test_compare_equal_trials_divide_by_nothing(tmp_path: Path) -> None:
    ours = read_side(write_trials(tmp_path / "a", [7] * 4))
    theirs = read_side(write_trials(tmp_path / "b", [7] * 4))
    found = compare(ours, theirs)
    assert {each.p for each in found.figures} == {None}
    assert {each.a12 for each in found.figures} == {0.5}
    assert found.render().count("all trials are equal") == len(found.figures)
    # Campaigns that have not executed anything.
    none = [write_trial(tmp_path / name, [(0, 0, 0)]) for name in ("c", "d")]
    text = compare(read_side(none[:1]), read_side(none[1:])).render()
    assert "nan" not in text
    assert "to 0 blocks" not in text


@pytest.mark.parametrize(
    ("name", "value"), [("target", "usbip"), ("harness", "x.so"), ("sources", ["kernel"])]
)
def test_compare_campaigns_of_different_things_is_refused(
    tmp_path: Path, name: str, value: object
) -> None:
    ours = read_side(write_trials(tmp_path / "a", [7, 8]))
    theirs = read_side(write_trials(tmp_path / "b", [7], **{name: value}))
    with pytest.raises(UsageError, match=f"different {name}"):
        compare(ours, theirs)
    # Also among the trials of one side.
    mixed = read_side(
        [*(t.directory for t in ours.trials[:1]), *(t.directory for t in theirs.trials)]
    )
    with pytest.raises(UsageError, match=f"different {name}"):
        compare(mixed, read_side([ours.trials[1].directory]))


def test_compare_other_differences_are_said(tmp_path: Path) -> None:
    ours = read_side(write_trials(tmp_path / "a", [7, 8]))
    theirs = read_side(write_trials(tmp_path / "b", [7, 8], feedback=False))
    assert compare(ours, theirs).notes == ("feedback differs: yes in A, no in B",)


def test_compare_trial_on_both_sides_or_without_figures_is_refused(tmp_path: Path) -> None:
    paths = write_trials(tmp_path / "a", [7, 8])
    with pytest.raises(UsageError, match="on both sides"):
        compare(read_side(paths), read_side(paths[:1]))
    empty = write_trial(tmp_path / "empty", [])
    with pytest.raises(UsageError, match="no figures yet"):
        read_side([empty])
    with pytest.raises(UsageError, match="holds no campaign"):
        read_side([tmp_path / "a" / "0" / "corpus"])


def test_compare_drawing_has_two_medians_and_two_bands_in_each_panel(tmp_path: Path) -> None:
    ours = read_side(write_trials(tmp_path / "a", [7, 8, 9]), "A & <B>")
    theirs = read_side(write_trials(tmp_path / "b", [5, 6]))
    drawing = xml.dom.minidom.parseString(compare(ours, theirs).svg())
    assert len(drawing.getElementsByTagName("polygon")) == 4
    assert len(drawing.getElementsByTagName("polyline")) == 4


def test_fuzz_compare_prints_text_and_json_and_draws(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_trials(tmp_path / "a", [30, 31, 32, 33])
    write_trials(tmp_path / "b", [20, 21, 22, 23])
    arguments = ["fuzz", "compare", str(tmp_path / "a"), "--against", str(tmp_path / "b")]
    assert main([*arguments, "--svg", str(tmp_path / "x.svg")]) == 0
    text = capfd.readouterr().out
    assert "A: a" in text
    assert "0.0286  1.00  larger, large effect" in text
    assert (tmp_path / "x.svg").read_text().endswith("</svg>\n")
    assert main([*arguments, "--json", "--names", "new", "old"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert [(side["name"], len(side["trials"])) for side in data["sides"]] == [
        ("new", 4),
        ("old", 4),
    ]
    assert main(["fuzz", "compare", str(tmp_path / "a/0"), str(tmp_path / "b/0")]) == 0
    assert "too few trials" in capfd.readouterr().out
    assert main(["fuzz", "compare", str(tmp_path / "a/0")]) == 2
    assert "nothing to compare with" in capfd.readouterr().err


def test_compare_findings_are_counted_by_trial(tmp_path: Path) -> None:
    for number in range(3):
        write_campaign(tmp_path / "a" / str(number), findings=2)
        write_campaign(tmp_path / "b" / str(number), findings=number)
    found = compare(read_side([tmp_path / "a"]), read_side([tmp_path / "b"]))
    assert [(each.ours, each.theirs) for each in found.findings] == [(3, 2), (3, 1)]
    assert figure(found, "findings").theirs == (0, 1, 2)
    assert (found.only_ours, found.only_theirs) == (0, 0)
