# SPDX-License-Identifier: Apache-2.0
"""What tests of the Python source share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from bridge.sources.python.source import PythonSource

MakePackage = Callable[..., str]
MakeSource = Callable[..., PythonSource]
Measure = Callable[..., tuple[Any, PythonSource]]
T = TypeVar("T")


def places(source: PythonSource, pcs: list[int] | None = None) -> list[str]:
    """What consume() gives, as ``module:first line`` of each block."""
    found = []
    for pc in source.consume() if pcs is None else pcs:
        location = source.table.lookup(pc)
        assert location is not None
        found.append(f"{Path(location.file).stem}:{location.block.start_line}")
    return found


class TargetThread:
    """A thread on which a source is started, as a session does it; the test's own is another."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._executor.submit(threading.current_thread).result()

    def __call__(self, function: Callable[..., T], *args: object) -> T:
        return self._executor.submit(function, *args).result(60)

    def end(self) -> None:
        """End the thread."""
        self._executor.shutdown()
