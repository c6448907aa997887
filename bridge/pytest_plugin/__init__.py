# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: tests that run in a guest, reset before each.

    def test_hostname(guest: Guest) -> None:
        assert guest.succeed("cat /proc/sys/kernel/ostype").strip() == "Linux"

pytest loads :mod:`.plugin` by its entry point. That module imports only pytest and the standard
library; the rest is imported by the first test that asks for a guest, so that a coverage
measurement of the user's own code sees all of its imports. The names of ``__all__`` are the types
of the fixtures, for annotations.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.pytest_plugin.guest import Guest, Result
    from bridge.pytest_plugin.kcov import Kcov, Trace

__all__ = ["Guest", "Kcov", "Result", "Trace"]

_MODULES = {"Guest": "guest", "Kcov": "kcov", "Result": "guest", "Trace": "kcov"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
