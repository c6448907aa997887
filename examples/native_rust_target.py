# SPDX-License-Identifier: Apache-2.0
"""A server in Rust as a target: its blocks are in the guest's kcov.

    cd examples
    (cd native_rust && RUSTFLAGS="$(kcov-bridge native --rust)" cargo build --release)
    kcov-bridge run --target native_rust_target:LinesTarget -- bash -c \
        'exec 3<>/dev/tcp/10.0.2.100/7; echo add 20 22 >&3; head -n 1 <&3'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bridge.targets import Endpoint
from bridge.targets.program import ProgramTarget

PROGRAM = Path(__file__).with_name("native_rust") / "target" / "release" / "lines"


class LinesTarget(ProgramTarget):
    """The guest reaches the server at 10.0.2.100, port 7."""

    name = "lines"

    def command(self) -> Sequence[str | Path]:
        return [PROGRAM, str(self.port)]

    def serves(self) -> None:
        self.endpoints = (Endpoint("lines", self.port, 7),)
