# SPDX-License-Identifier: Apache-2.0
"""What needs neither a kernel nor a guest: configurations, and the comparison of reports."""

from __future__ import annotations

import pytest

from bridge.errors import ImageError
from tests.system import reference
from tests.system.conformance import (
    KNOWN_DIFFERENCES,
    PROGRAMS,
    SOURCES,
    Line,
    Result,
    differences,
    side_by_side,
)

WANTED = "CONFIG_A=y\n# CONFIG_B is not set\n"


@pytest.mark.parametrize("got", ["CONFIG_A=y\n", "CONFIG_A=y\n# CONFIG_B is not set\n"])
def test_a_configuration_that_was_taken(got: str) -> None:
    reference._check_configuration(WANTED, got)


@pytest.mark.parametrize(
    ("got", "lost"),
    [
        ("", "CONFIG_A=y"),
        ("CONFIG_A=m\n", "CONFIG_A=y"),
        ("CONFIG_A=y\nCONFIG_B=y\n", "# CONFIG_B is not set"),
    ],
)
def test_a_configuration_that_was_not(got: str, lost: str) -> None:
    with pytest.raises(ImageError) as caught:
        reference._check_configuration(WANTED, got)
    assert caught.value.evidence == lost


def test_what_an_old_compiler_may_lack() -> None:
    reference._check_configuration("CONFIG_KCOV_ENABLE_COMPARISONS=y\n", "")


def test_variants_differ_in_kcov_and_in_name() -> None:
    texts = [reference._configuration(variant) for variant in reference.VARIANTS]
    assert len(set(texts)) == len(texts)
    for variant, text in zip(reference.VARIANTS, texts, strict=True):
        assert f'CONFIG_LOCALVERSION="-{variant}"\n' in text
        assert ("CONFIG_KCOV=y\n" in text) == (variant == "kcov")


def test_an_unknown_variant() -> None:
    with pytest.raises(ImageError, match="no reference kernel 'huge'"):
        reference.build("huge")


GOOD = Line("kept", True)
BAD = Line("broken", False, None, "got 3, wanted 4")


class TestDifferences:
    def test_none(self) -> None:
        assert differences([Result("p", (GOOD,))], {}) == ([], [])

    def test_one_that_is_known(self) -> None:
        explained, unexplained = differences([Result("p", (GOOD, BAD))], {("p", "broken"): "why"})
        assert explained == ["p: broken [got 3, wanted 4]: why"]
        assert unexplained == []

    def test_one_that_is_not(self) -> None:
        _, unexplained = differences([Result("p", (GOOD, BAD))], {("q", "broken"): "why"})
        assert unexplained == ["p: broken [got 3, wanted 4]"]

    def test_one_that_is_known_but_is_none(self) -> None:
        explained, unexplained = differences([Result("p", (GOOD,))], {("p", "kept"): "why"})
        assert explained == []
        assert unexplained == ["p: kept: said to differ, but does not any more"]

    def test_of_a_program_that_did_not_run(self) -> None:
        assert differences([Result("p", (GOOD,))], {("q", "broken"): "why"}) == ([], [])

    def test_a_program_that_failed_explains_nothing(self) -> None:
        result = Result("p", (), "no plan")
        assert differences([result], {("p", "broken"): "why"}) == ([], ["p: no plan"])


def test_known_differences_name_rules_that_there_are() -> None:
    for program, rule in KNOWN_DIFFERENCES:
        assert program in PROGRAMS
        assert f'"{rule}"' in (SOURCES / f"{program}.c").read_text()


def test_two_columns() -> None:
    again = Line("kept", True, "no such")
    shown = side_by_side(Result("p", (GOOD, again, BAD)), Result("p", (GOOD, GOOD), "no plan"))
    assert shown.splitlines() == [
        "p (0.0 s, 0.0 s)",
        "  ok      ok      kept",
        "  skip    ok      kept  [no such]",
        "  not ok  -       broken  [got 3, wanted 4]",
        "  failed on the bridge: no plan",
    ]
