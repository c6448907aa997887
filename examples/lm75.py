# SPDX-License-Identifier: Apache-2.0
"""A model of the temperature sensor LM75: the code that the example measures."""

from __future__ import annotations

TEMPERATURE, CONFIGURATION, HYSTERESIS, LIMIT = range(4)


class Lm75:
    """The chip, as an I²C bus sees it: a pointer to one of four registers."""

    def __init__(self, celsius: float) -> None:
        self.celsius = celsius
        self.pointer = TEMPERATURE
        self.configuration = 0
        self.limits = {HYSTERESIS: 75.0, LIMIT: 80.0}

    def write(self, data: bytes) -> None:
        if not data:
            return
        self.pointer = data[0] & 3
        value = data[1:]
        if not value:
            return
        if self.pointer == CONFIGURATION:
            self.configuration = value[0]
        elif self.pointer in self.limits:
            self.limits[self.pointer] = degrees(value)

    def read(self, length: int) -> bytes:
        if self.pointer == CONFIGURATION:
            return bytes([self.configuration])
        if self.pointer == TEMPERATURE:
            return register(self.celsius)
        return register(self.limits[self.pointer])


def register(celsius: float) -> bytes:
    """Nine bits, half a degree each, at the top of two bytes."""
    return (round(celsius * 2) << 7 & 0xFFFF).to_bytes(2, "big")


def degrees(value: bytes) -> float:
    return int.from_bytes(value[:2].ljust(2, b"\0"), "big", signed=True) / 256
