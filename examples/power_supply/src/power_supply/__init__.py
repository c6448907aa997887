# SPDX-License-Identifier: Apache-2.0
"""A simulated laboratory power supply that is controlled over a serial line, in SCPI."""

from power_supply.model import PowerSupply
from power_supply.port import serve

__all__ = ["PowerSupply", "serve"]
