# SPDX-License-Identifier: Apache-2.0
"""A target for measurements, whose code does nothing by itself."""

from __future__ import annotations

from pathlib import Path

from bridge.sources.python.source import PythonSource
from bridge.targets import Endpoint
from bridge.targets.none import NoTarget

__all__ = ["COVERED_TARGET", "CoveredTarget", "cover_before_each_look"]

COVERED_TARGET = "bridge.bench.targets:CoveredTarget"
"""The target's name for the setting ``target``."""

_COVERED = Path(__file__).with_name("covered.py")


class CoveredTarget(NoTarget):
    """A target with one small module, of which nothing runs.

    It has an endpoint, like services that a guest reaches over its network, but no server.
    """

    name = "covered"
    packages = ("bridge.bench.covered",)
    endpoints = (Endpoint("covered", host_port=9, guest_port=9),)


def cover_before_each_look(source: PythonSource) -> None:
    """Record a line of the target before each ``consume()``.

    The line is recorded as the tracer does it, at the same cost or less. If code of the target
    really ran, each call would also wait for that.
    """
    text = _COVERED.read_text(encoding="utf-8").splitlines()
    cover = source.line_recorder(_COVERED, 1 + text.index("    return 42"))
    consume = source.consume

    def cover_and_consume() -> list[int]:
        cover()
        return consume()

    source.consume = cover_and_consume  # type: ignore[method-assign]
