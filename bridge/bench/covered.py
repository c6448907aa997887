# SPDX-License-Identifier: Apache-2.0
"""The package of the benchmark's target: a module to be covered."""

from __future__ import annotations

__all__ = ["answer"]


def answer() -> int:
    return 42
