# SPDX-License-Identifier: Apache-2.0
"""The instrument: what each line does, and what it answers.

The commands are those that nearly all supplies have (SCPI-1999): ``*IDN?``, ``*RST``, ``VOLT``,
``CURR``, ``OUTP``, ``MEAS:VOLT?``, ``MEAS:CURR?`` and ``SYST:ERR?``.
"""

from __future__ import annotations

from collections import deque

IDENTITY = "EXAMPLE,PS-30,0001,1.0"
LOAD_OHM = 10.0
MAX_VOLT = 30.0
MAX_AMPERE = 3.0
MAX_ERRORS = 10


class PowerSupply:
    """One output with a voltage and a current limit, and a resistor connected to it."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=MAX_ERRORS)
        self.reset()

    def reset(self) -> None:
        """Set what the supply has when it is switched on; errors stay."""
        self.volt = 0.0
        self.ampere = MAX_AMPERE
        self.on = False

    def execute(self, line: str) -> str | None:
        """Carry out one line; return the answer if it is a question."""
        header, _, argument = line.strip().partition(" ")
        header = header.upper()
        if header.endswith("?"):
            return self._ask(header[:-1])
        if header == "*RST":
            self.reset()
        elif header in ("VOLT", "CURR"):
            self._set(header, argument)
        elif header == "OUTP" and argument.upper() in ("ON", "OFF", "1", "0"):
            self.on = argument.upper() in ("ON", "1")
        elif header:
            self.errors.append('-113,"Undefined header"')
        return None

    def _set(self, header: str, argument: str) -> None:
        try:
            value = float(argument)
        except ValueError:
            self.errors.append('-104,"Data type error"')
            return
        if not 0 <= value <= (MAX_VOLT if header == "VOLT" else MAX_AMPERE):
            self.errors.append('-222,"Data out of range"')
        elif header == "VOLT":
            self.volt = value
        else:
            self.ampere = value

    def _ask(self, header: str) -> str | None:
        if header == "*IDN":
            return IDENTITY
        if header == "VOLT":
            return f"{self.volt:.3f}"
        if header == "CURR":
            return f"{self.ampere:.3f}"
        if header == "OUTP":
            return "1" if self.on else "0"
        if header == "MEAS:VOLT":
            return f"{self._output()[0]:.3f}"
        if header == "MEAS:CURR":
            return f"{self._output()[1]:.3f}"
        if header == "SYST:ERR":
            return self.errors.popleft() if self.errors else '0,"No error"'
        self.errors.append('-113,"Undefined header"')
        return None

    def _output(self) -> tuple[float, float]:
        """Volt and ampere at the resistor: the current limit lowers the voltage."""
        if not self.on:
            return 0.0, 0.0
        ampere = min(self.volt / LOAD_OHM, self.ampere)
        return ampere * LOAD_OHM, ampere
