# SPDX-License-Identifier: Apache-2.0
"""How many examples hypothesis makes of a test.

``KCOV_BRIDGE_EXAMPLES`` multiplies the numbers: 10 for a long look, 0.2 for a short one.
"""

from __future__ import annotations

import os

__all__ = ["VARIABLE", "examples"]

VARIABLE = "KCOV_BRIDGE_EXAMPLES"


def examples(number: int) -> int:
    """Return how many examples a test makes where ``number`` is what a plain run makes."""
    return max(1, round(number * float(os.environ.get(VARIABLE, "1"))))
