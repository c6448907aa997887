# SPDX-License-Identifier: Apache-2.0
"""Targets that are native programs, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bridge.sources.native.build import build_runtime
from bridge.targets import Endpoint
from bridge.targets.program import ProgramTarget
from tests.support.native import DATA, GUARDS, build


class LineServer(ProgramTarget):
    """``tests/data/native/service.c``, which the guest reaches on port 7."""

    name = "lines"

    def command(self) -> Sequence[str | Path]:
        program = build(self.scratch / "service", DATA / "service.c")
        return [program, str(self.port)]

    def serves(self) -> None:
        self.endpoints = (Endpoint("lines", self.port, 7),)


class RequestServer(ProgramTarget):
    """``tests/data/native/requests.c``, which the guest reaches on port 80."""

    name = "requests"

    def command(self) -> Sequence[str | Path]:
        program = build(
            *(self.scratch / "requests", DATA / "requests.c"),
            f"-I{build_runtime().directory}",
            coverage=[*GUARDS, "-fsanitize-coverage=trace-cmp"],
        )
        return [program, str(self.port)]

    def serves(self) -> None:
        self.endpoints = (Endpoint("requests", self.port, 80),)
