# SPDX-License-Identifier: Apache-2.0
"""The supply behind a real serial driver and terminal, in a real Linux."""

import pytest

pytestmark = pytest.mark.guest(target="supply_target:SupplyTarget", source="python")

RAW = "stty -F /dev/target/supply raw -echo"
"""How a program that talks to an instrument sets its terminal."""


def ask(*lines):
    """Return the shell script that sends lines; one answer comes for each question."""
    answers = sum(line.endswith("?") for line in lines)
    text = "\\n".join(lines) + "\\n"
    return f"exec 3<>/dev/target/supply; printf '{text}' >&3; head -n {answers} <&3"


@pytest.fixture
def supply(guest):
    guest.succeed(RAW)
    return guest


def test_identity(supply):
    assert supply.succeed(ask("*IDN?")).strip() == "EXAMPLE,PS-30,0001,1.0"


def test_output_is_limited(supply, kcov):
    with kcov.trace() as trace:
        answer = supply.succeed(ask("VOLT 12.5", "CURR 1", "OUTP ON", "MEAS:VOLT?"))
    assert float(answer) == 10
    trace.assert_covered("model.py:PowerSupply._output")
    trace.assert_not_covered("model.py:PowerSupply.reset")


def test_supply_was_just_switched_on(supply):
    """The tests before left it on; the guest and the supply are as new in each."""
    assert supply.succeed(ask("OUTP?", "VOLT?")).split() == ["0", "0.000"]


def test_terminal_that_was_not_set_up_sends_the_answers_back(guest):
    """A terminal echoes: the supply finds its own answers in its input. No mock of the driver
    does this, and each user of a serial instrument has met it."""
    guest.succeed(ask("*IDN?"))
    guest.succeed(RAW)
    assert guest.succeed(ask("SYST:ERR?")).startswith("-113")
