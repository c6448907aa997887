# SPDX-License-Identifier: Apache-2.0
"""A target for measurements, whose code does nothing by itself."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from bridge.errors import InfrastructureError
from bridge.sources.native.build import build_runtime
from bridge.sources.native.source import NativeSource
from bridge.sources.python.source import PythonSource
from bridge.targets import Endpoint
from bridge.targets.none import NoTarget
from bridge.util.compile import CProgram

__all__ = [
    "COVERED_TARGET",
    "NATIVE_TARGET",
    "CoveredTarget",
    "NativeTarget",
    "cover_before_each_look",
    "cover_native_before_each_look",
]

COVERED_TARGET = "bridge.bench.targets:CoveredTarget"
"""The target's name for the setting ``target``."""

NATIVE_TARGET = "bridge.bench.targets:NativeTarget"
"""The same of the target with native blocks."""

_COVERED = Path(__file__).with_name("covered.py")


_BLOCKS = CProgram(
    name="native blocks",
    source=Path(__file__).with_name("blocks.c"),
    flags=(
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-Wl,-Bsymbolic",
    ),
    folder="bench",
)


class CoveredTarget(NoTarget):
    """A target with one small module, of which nothing runs.

    It has an endpoint, like services that a guest reaches over its network, but no server.
    """

    name = "covered"
    packages = ("bridge.bench.covered",)
    endpoints = (Endpoint("covered", host_port=9, guest_port=9),)


class NativeTarget(NoTarget):
    """A target with some native blocks, of which none runs."""

    name = "native blocks"
    native = True
    endpoints = CoveredTarget.endpoints


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


def cover_native_before_each_look(source: NativeSource, scratch: Path) -> None:
    """Run a native block before each ``consume()``, in this process, as its compiler's code does.

    Args:
        scratch: a directory for the library with the block. The run time takes the source once for
            a process, so each call loads a copy of its own.

    Raises:
        BridgeError: the library cannot be built.
        InfrastructureError: its blocks are not covered.
    """
    made = scratch / "blocks.so"
    _BLOCKS.compile(made, *build_runtime().link_flags)
    library = ctypes.CDLL(str(made))
    os.environ.update(source.environment)
    try:
        if not library.kb_blocks_start():
            raise InfrastructureError("the native blocks of the measurement are not covered")
    finally:
        for name in source.environment:
            del os.environ[name]
    run = library.kb_blocks_run
    consume = source.consume

    def run_and_consume() -> list[int]:
        run()
        return consume()

    source.consume = run_and_consume  # type: ignore[method-assign]
