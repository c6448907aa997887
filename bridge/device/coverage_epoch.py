# SPDX-License-Identifier: Apache-2.0
"""The values of the region's coverage epoch, a word of the header.

The word changes whenever something may have been covered, so that an owner that finds it unchanged
need not ask the host. The doorbell and each relay write it. A relay (``bridge/vm/relay.py``) loads
this file by its path into a bare interpreter, so it imports nothing but the standard library.
"""

import os
import time

__all__ = ["coverage_epoch_value"]


def coverage_epoch_value() -> int:
    """Return a value for the coverage epoch: never 0, and never one that it had before.

    A value is a clock above the process id, so the values of two writers differ. The clock wraps
    after half an hour, while the doorbell sets the word several times a second.
    """
    return (time.monotonic_ns() << 23 | os.getpid() << 1 | 1) & (1 << 64) - 1
