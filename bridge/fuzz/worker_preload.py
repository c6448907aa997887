# SPDX-License-Identifier: Apache-2.0
"""What a worker of a local cluster does first."""

from __future__ import annotations

import os

__all__ = ["dask_setup"]


def dask_setup(worker: object) -> None:
    """Leave the terminal's session: Ctrl-C is for the campaign, which then ends its jobs."""
    os.setsid()
