# SPDX-License-Identifier: Apache-2.0
"""The records of KCOV_TRACE_CMP, as Linux lays them out."""

from __future__ import annotations

from bridge.device.abi import KCOV_CMP_SIZE, Comparison

__all__ = ["comparison_record"]


def comparison_record(left: int, right: int, constant: int, pc: int) -> Comparison | None:
    """Return the record of a comparison.

    The size is the smallest that holds both operands, signed if one is negative. Operands are cut
    to it and zero-extended, like the arguments of ``__sanitizer_cov_trace_cmp1`` to ``cmp8`` in
    Linux' ``kernel/kcov.c``.

    Args:
        constant: KCOV_CMP_CONST if ``left`` is a literal, otherwise 0.

    Returns:
        The record; None if 64 bits cannot hold both operands with their signs.
    """
    low, high = (left, right) if left < right else (right, left)
    # -1 - low has the bits of a negative low, except for the sign.
    bits = high.bit_length() if low >= 0 else max((-1 - low).bit_length(), high.bit_length()) + 1
    for log, size in enumerate((8, 16, 32, 64)):
        if bits <= size:
            mask = (1 << size) - 1
            return KCOV_CMP_SIZE(log) | constant, left & mask, right & mask, pc
    return None
