# SPDX-License-Identifier: Apache-2.0
"""The instrument alone, without a guest."""

import pytest

from power_supply import PowerSupply


def test_output_is_what_was_set():
    supply = PowerSupply()
    supply.execute("VOLT 12.5")
    supply.execute("OUTP ON")
    assert supply.execute("MEAS:VOLT?") == "12.500"
    assert supply.execute("MEAS:CURR?") == "1.250"


def test_current_limit_lowers_the_voltage():
    supply = PowerSupply()
    for line in ("VOLT 12.5", "CURR 1", "OUTP ON"):
        supply.execute(line)
    assert supply.execute("MEAS:VOLT?") == "10.000"


@pytest.mark.parametrize(
    ("line", "error"),
    [("VOLT 31", "-222"), ("VOLT high", "-104"), ("VOLTAGE 3", "-113"), ("FREQ?", "-113")],
)
def test_wrong_line_is_an_error(line, error):
    supply = PowerSupply()
    assert supply.execute(line) is None
    assert supply.execute("SYST:ERR?").startswith(error)
    assert supply.execute("SYST:ERR?") == '0,"No error"'
