# SPDX-License-Identifier: Apache-2.0
"""A target for measurements: code to cover that does nothing until it is asked."""

from __future__ import annotations

from pathlib import Path

from bridge.sources.python.source import PythonSource
from bridge.targets import Endpoint
from bridge.targets.none import NoTarget

__all__ = ["COVERED_TARGET", "CoveredTarget", "cover_before_each_look"]

COVERED_TARGET = "bridge.bench.targets:CoveredTarget"
"""Its name for the setting ``target``."""

_COVERED = Path(__file__).with_name("covered.py")


class CoveredTarget(NoTarget):
    """One small module is measured, and nothing in it runs.

    It has an endpoint, as the services do that a guest reaches over its network; nothing is there.
    """

    name = "covered"
    packages = ("bridge.bench.covered",)
    endpoints = (Endpoint("covered", host_port=9, guest_port=9),)


def cover_before_each_look(source: PythonSource) -> None:
    """From now on a line of the target is new at each ``consume()``.

    The line is noted where the tracer notes it, at its cost or less: with code of the target that
    really runs, each call would also wait for that.
    """
    text = _COVERED.read_text(encoding="utf-8").splitlines()
    cover = source.line_recorder(_COVERED, 1 + text.index("    return 42"))
    consume = source.consume

    def cover_and_consume() -> list[int]:
        cover()
        return consume()

    source.consume = cover_and_consume  # type: ignore[method-assign]
