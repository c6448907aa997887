# SPDX-License-Identifier: Apache-2.0
"""Tests of the sensor through Linux' driver for it: ``pytest test_lm75.py``."""

from __future__ import annotations

import pytest

from bridge.pytest_plugin import Guest, Kcov

pytestmark = pytest.mark.guest(target="lm75_target:Lm75Target", source="python")

TEMPERATURE = "/sys/class/hwmon/hwmon0/temp1_input"
LIMIT = "/sys/class/hwmon/hwmon0/temp1_max"


def test_driver_reads_the_temperature(guest: Guest, kcov: Kcov) -> None:
    trace = kcov.run(["cat", TEMPERATURE])
    assert trace.results[0].stdout == "21500\n"
    trace.assert_covered("lm75.py:Lm75.read", "lm75.py:register")
    trace.assert_not_covered("lm75.py:degrees")


def test_driver_sets_the_limit(guest: Guest, kcov: Kcov) -> None:
    trace = kcov.run(f"echo 30500 >{LIMIT} && cat {LIMIT}")
    assert trace.results[0].stdout == "30500\n"
    trace.assert_covered("lm75.py:degrees")


def test_missing_chip_does_not_answer(guest: Guest) -> None:
    assert "No such device or address" in guest.fail(
        "exec 3<>/dev/target/i2c; perl -e 'open F, q(+<&=), 3; ioctl F, 0x703, 0x50; "
        "defined(sysread F, $_, 1) or die $!' 2>&1"
    )
