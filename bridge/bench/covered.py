# SPDX-License-Identifier: Apache-2.0
"""A module to be covered: what a target of the benchmark has for a package."""

from __future__ import annotations

__all__ = ["answer"]


def answer() -> int:
    return 42
