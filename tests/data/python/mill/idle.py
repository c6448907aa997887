# SPDX-License-Identifier: Apache-2.0
"""A module that nobody imports."""


def unused():
    """Not called."""
    return 1
