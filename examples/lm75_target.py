# SPDX-License-Identifier: Apache-2.0
"""The sensor as a target: ``--target lm75_target:Lm75Target``; needs ``pip install usbip``."""

from __future__ import annotations

from collections.abc import Mapping

from bridge.targets.i2c import Chip, I2cTarget


class Lm75Target(I2cTarget):
    """A bus with one sensor, which the guest's driver ``lm75`` shows below ``/sys/class/hwmon``."""

    packages = ("lm75",)
    drivers: Mapping[int, str] = {0x48: "lm75"}

    def chips(self) -> Mapping[int, Chip]:
        from lm75 import Lm75

        return {0x48: Lm75(celsius=21.5)}
