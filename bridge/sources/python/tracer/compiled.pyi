# SPDX-License-Identifier: Apache-2.0
"""See plain.py."""

from .plain import (
    Apart,
    Feed,
    Group,
    View,
    chain,
    chained,
    current,
    forked,
    install,
    thread_ended,
    uninstall,
)

__all__ = [
    "Apart",
    "Feed",
    "Group",
    "View",
    "chain",
    "chained",
    "current",
    "forked",
    "install",
    "thread_ended",
    "uninstall",
]
